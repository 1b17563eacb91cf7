# SPDX-License-Identifier: GPL-2.0-or-later
"""Secrets of a real agent in a real libvirt, proved by guests whose disks open with them only."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from functional import clients_image
from functional.guests.guest import Disk, Plan, definition
from functional.guests.libvirtd import Libvirtd
from functional.processes import BIN, AgentProcess
from vdsm_storage.rpc.client import Client, RemoteError

VALUE = "Zx81-hunter2-Qqp0"  # of the secret that opens disks
SETTLED = 30.0  # seconds
START = {"ovirt/disks": VALUE, "ovirt/ceph/1": "kgqx-rbd-key-55", "ovirt/target": "oiu-chap-9134"}
KINDS = {"ovirt/disks": "volume", "ovirt/ceph/1": "ceph", "ovirt/target": "iscsi"}
IDS = {usage: str(uuid.uuid4()) for usage in START}
FOREIGN = str(uuid.uuid4())


def secret(usage: str, value: str | None = None, uuid_: str = "") -> dict[str, str]:
    raw = (START[usage] if value is None else value).encode()
    return {
        "uuid": uuid_ or IDS[usage], "usageType": KINDS.get(usage, "ceph"), "usageID": usage,
        "password": base64.b64encode(raw).decode(), "description": "of the tests",
    }  # fmt: skip


ALL = [secret(usage) for usage in START]


class World:
    """A libvirtd, an agent on it, and all that either ever said."""

    def __init__(self, libvirtd: Libvirtd, agent: AgentProcess, directory: Path) -> None:
        self.libvirtd = libvirtd
        self.agent = agent
        self.directory = directory
        self.said: list[str] = []
        self._client: Client | None = None

    @property
    def pid(self) -> int:
        assert self.agent.process is not None
        return self.agent.process.pid

    def code(self, verb: str, **params: Any) -> int:
        try:
            if self._client is None:
                self._client = Client.dev(str(self.agent.dir), timeout=120)
            self.said.append(repr(self._client.call(verb, params)))
        except RemoteError as error:
            self.said.append(error.message)
            return error.code
        return 0

    def register(self, *secrets: dict[str, Any], clear: bool = False) -> int:
        return self.code("Host.registerSecrets", secrets=list(secrets), clear=clear)

    def restart(self, crash_point: str = "") -> None:
        """After the agent was killed."""
        self.forget_client()
        self.agent.start(crash_point)

    def forget_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    @contextlib.contextmanager
    def libvirt(self) -> Iterator[Any]:
        connection = libvirt.open(self.libvirtd.uri)
        try:
            yield connection
        finally:
            with contextlib.suppress(libvirt.libvirtError):
                connection.close()

    def usages(self) -> dict[str, str]:
        with self.libvirt() as connection:
            return {one.UUIDString(): one.usageID() for one in connection.listAllSecrets()}

    def wait_usages(self, wanted: dict[str, str]) -> None:
        end = time.monotonic() + SETTLED
        while (found := self.usages()) != wanted and time.monotonic() < end:
            time.sleep(0.1)
        assert found == wanted

    # -- disks ---------------------------------------------------------------------------------

    def disk(self) -> Path:
        """A qcow2 volume that only VALUE opens."""
        path = self.directory / "disk.qcow2"
        if not path.exists():
            password = self.directory / "password"
            password.write_text(VALUE)
            options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
            key = ("--object", f"secret,id=s,file={password}")
            clients_image.create(path, "-f", "qcow2", *key, "-o", options, size="16M")
            password.unlink()
        return path

    @contextlib.contextmanager
    def guest(self) -> Iterator[Any]:
        """A paused one with that disk; libvirtError when the value does not open it."""
        key = f"<secret type='passphrase' uuid='{IDS['ovirt/disks']}'/>"
        more = f"<encryption format='luks'>{key}</encryption>"
        plan = Plan("luks", [Disk(str(self.disk()), more=more)], agent=False)
        xml = definition(plan, self.libvirtd.directory)
        with self.libvirt() as connection:
            domain = connection.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)
            try:
                yield domain
            finally:
                with self.libvirt() as again:  # libvirtd may have been killed meanwhile
                    again.lookupByName("luks").destroy()

    def opens(self) -> bool:
        reason = ""
        try:
            with self.guest():
                return True
        except libvirt.libvirtError as error:
            reason = str(error)
        assert "secret" in reason or "password" in reason, reason
        return False


@pytest.fixture(scope="module")
def libvirtd(workdir: Path) -> Iterator[Libvirtd]:
    daemon = Libvirtd(workdir / "virt")
    daemon.start()
    yield daemon
    daemon.stop()


@pytest.fixture(scope="module")
def made(
    libvirtd: Libvirtd, start_agent: Callable[..., AgentProcess], workdir: Path
) -> Iterator[World]:
    with contextlib.closing(libvirt.open(libvirtd.uri)) as connection:
        connection.secretDefineXML(
            f"<secret private='no'><uuid>{FOREIGN}</uuid>"
            "<usage type='ceph'><name>client.admin</name></usage></secret>"
        ).setValue(b"theirs")
    agent = start_agent(
        "agent", libvirt__uri=libvirtd.uri, libvirt__retry="0.2", secrets__check_interval="1"
    )
    world = World(libvirtd, agent, workdir)
    yield world
    world.forget_client()


@pytest.fixture
def world(made: World) -> World:
    """The secrets of START, in an agent that runs."""
    if not made.agent.alive():
        made.restart()
    assert made.register(*ALL, clear=True) == 0
    return made


FOREIGN_ONLY = {FOREIGN: "client.admin"}
REGISTERED = {**FOREIGN_ONLY, **{IDS[usage]: usage for usage in START}}


# -- the verbs ---------------------------------------------------------------------------------


def test_a_registered_secret_opens_a_disk(world: World) -> None:
    assert world.usages() == REGISTERED
    assert world.opens()
    assert world.register(secret("ovirt/disks", "wrong")) == 0
    assert not world.opens()
    assert world.register(secret("ovirt/disks")) == 0
    assert world.opens()
    ids = [IDS["ovirt/disks"], str(uuid.uuid4()), FOREIGN]
    assert world.code("Host.unregisterSecrets", uuids=ids) == 0
    assert not world.opens()
    assert IDS["ovirt/disks"] not in world.usages()
    assert world.register(clear=True) == 0  # maintenance
    assert world.usages() == FOREIGN_ONLY


def test_from_the_command_line(world: World, tmp_path: Path) -> None:
    """As README says, by standard input."""
    (tmp_path / "ceph.key").write_text("a key")
    id_ = str(uuid.uuid4())
    shell = f"""
        base64 -w0 ceph.key | jq -R --arg id {id_} '{{secrets: [{{uuid: $id, usageType: "ceph",
        usageID: "ovirt/rbd/images", password: .}}], clear: false}}' |
        {BIN}/vdsm-client --dev {world.agent.dir} -f - Host registerSecrets"""
    run = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, b"true\n"), run.stderr
    assert world.usages() == {**REGISTERED, id_: "ovirt/rbd/images"}


def test_codes(world: World) -> None:
    good = secret("ovirt/more", "x", str(uuid.uuid4()))
    for wrong in ({"uuid": "x"}, {"usageType": "tls"}, {"usageID": "mine"}, {"password": "*"}):
        assert world.register(good, {**secret("ovirt/disks"), **wrong}) == 72
    assert world.register({key: good[key] for key in good if key != "usageID"}) == 72
    assert world.code("Host.registerSecrets") == 72
    assert world.code("Host.unregisterSecrets", uuids=[IDS["ovirt/disks"], "x"]) == 72
    assert world.register(good, secret("ovirt/other", "x", FOREIGN)) == 73
    assert world.register(good, secret("ovirt/disks", "x", str(uuid.uuid4()))) == 73
    assert world.usages() == REGISTERED
    assert world.opens()


# -- libvirt comes and goes --------------------------------------------------------------------


def test_libvirtd_is_killed(world: World) -> None:
    with world.guest():
        world.libvirtd.kill_daemon()
        code = world.register(secret("ovirt/disks", "wrong"), clear=True)
        assert code == 73
        assert world.code("Host.unregisterSecrets", uuids=list(IDS.values())) == 74
        world.libvirtd.start_daemon()
        world.wait_usages(REGISTERED)
    assert world.opens()


def test_libvirtd_is_killed_under_load(world: World) -> None:
    ended = threading.Event()
    codes: list[int] = []

    def load() -> None:
        while not ended.is_set():
            codes.append(world.register(*ALL))

    thread = threading.Thread(target=load)
    thread.start()
    for _ in range(4):
        time.sleep(0.5)
        world.libvirtd.kill_daemon()
        time.sleep(0.2)
        world.libvirtd.start_daemon()
    time.sleep(1.0)
    ended.set()
    thread.join()
    assert {0} < set(codes) <= {0, 73}
    world.wait_usages(REGISTERED)
    assert world.opens()


def test_libvirt_hangs(world: World) -> None:
    """An answer comes in bounded time, the agent goes on, and nothing has changed afterwards."""
    world.libvirtd.signal(signal.SIGSTOP)
    try:
        start = time.monotonic()
        assert world.register(secret("ovirt/disks", "wrong"), clear=True) == 73
        assert time.monotonic() - start < 60
        assert world.code("Host.ping2") == 0
    finally:
        world.libvirtd.signal(signal.SIGCONT)
    end = time.monotonic() + SETTLED
    while not (world.usages() == REGISTERED and world.opens()):
        assert time.monotonic() < end
        time.sleep(0.5)


def test_libvirt_loses_one(world: World) -> None:
    """A secret daemon that is restarted by itself goes unnoticed on the connection."""
    with world.libvirt() as connection:
        connection.secretLookupByUUIDString(IDS["ovirt/disks"]).undefine()
    world.wait_usages(REGISTERED)
    assert world.opens()


# -- the agent comes and goes ------------------------------------------------------------------


def test_the_agent_is_killed(world: World) -> None:
    """What was registered is there again; what libvirt has beyond that goes."""
    world.agent.kill()
    with world.libvirt() as connection:
        connection.secretLookupByUUIDString(IDS["ovirt/disks"]).setValue(b"wrong")
        connection.secretLookupByUUIDString(IDS["ovirt/target"]).undefine()
        connection.secretDefineXML(
            "<secret><usage type='ceph'><name>ovirt/left-over</name></usage></secret>"
        )
    world.restart()
    world.wait_usages(REGISTERED)
    assert world.opens()


POINTS = ["secrets:begun", "secrets:begun:3", "secrets:defined", "secrets:kept"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("remove", [False, True], ids=["register", "unregister"])
def test_the_agent_dies_at_each_step(world: World, point: str, remove: bool) -> None:
    world.agent.kill()
    world.restart(point)
    new_id = str(uuid.uuid4())
    with contextlib.suppress(ConnectionError, OSError, TimeoutError):
        if remove:
            world.code("Host.unregisterSecrets", uuids=list(IDS.values()))
        else:
            new = [secret("ovirt/new", "x", new_id), secret("ovirt/disks", "wrong")]
            world.register(*new, clear=True)
    world.agent.wait_dead()
    world.restart()
    kept = point == "secrets:kept"
    if not kept:
        wanted = REGISTERED
    elif remove:
        wanted = FOREIGN_ONLY
    else:
        disks = IDS["ovirt/disks"]
        wanted = {**FOREIGN_ONLY, new_id: "ovirt/new", disks: "ovirt/disks"}
    world.wait_usages(wanted)
    assert world.opens() is not kept


def test_a_clean_stop_clears_and_guests_go_on(world: World) -> None:
    with world.guest() as domain:
        world.forget_client()
        assert world.agent.stop() == ""
        assert world.usages() == FOREIGN_ONLY
        assert not (world.agent.dir / "state" / "secrets").exists()
        write(domain)
    assert not world.opens()
    world.agent.start()
    assert world.usages() == FOREIGN_ONLY


def write(domain: Any) -> None:
    """By QEMU itself, as if the guest did it."""
    device = "/machine/peripheral/virtio-disk0/virtio-backend"
    command = f'qemu-io -d {device} "write 0 1M"'
    flags = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
    said = libvirt_qemu.qemuMonitorCommand(domain, command, flags)
    assert "wrote 1048576/1048576" in said or said == "", said


def test_without_a_file(world: World) -> None:
    """Switched off, nothing is kept, not even of before; an agent that died waits to be told."""
    path = world.agent.dir / "state" / "secrets"
    assert path.exists()
    world.agent.kill()
    world.agent.settings["secrets__keep"] = "false"
    try:
        world.restart()
        world.wait_usages(FOREIGN_ONLY)
        assert not path.exists()
        assert world.register(*ALL) == 0
        assert not path.exists()
        world.libvirtd.kill_daemon()
        world.libvirtd.start_daemon()
        world.wait_usages(REGISTERED)
        world.agent.kill()
        world.restart()
        world.wait_usages(FOREIGN_ONLY)
    finally:
        del world.agent.settings["secrets__keep"]
        world.agent.kill()


@pytest.mark.parametrize("how", ["damaged", "foreign key"])
def test_a_file_of_no_use(world: World, how: str) -> None:
    state, run = world.agent.dir / "state", world.agent.dir / "run"
    world.agent.kill()
    if how == "damaged":
        path = state / "secrets"
        path.write_bytes(path.read_bytes()[:-3] + b"xyz")
        message = "is damaged"
    else:
        (run / "secrets.key").write_bytes(os.urandom(32))
        message = "was encrypted with another key"
    world.restart()
    world.wait_usages(FOREIGN_ONLY)
    assert f"{message}: the secrets in it must be registered again" in log(world)
    assert world.register(*ALL) == 0
    world.agent.kill()
    world.restart()
    world.wait_usages(REGISTERED)


def log(world: World) -> str:
    return (world.agent.dir / "agent.log").read_text()


def test_no_libvirt_at_the_start(world: World) -> None:
    world.agent.kill()
    world.libvirtd.kill_daemon()
    world.restart()
    assert world.register(*ALL) == 73
    assert world.code("Host.ping2") == 0
    world.libvirtd.start_daemon()
    world.wait_usages(REGISTERED)


# -- nothing is shown --------------------------------------------------------------------------


def test_no_core(world: World) -> None:
    """See also tests/base/test_dump.py."""
    limits = Path(f"/proc/{world.pid}/limits").read_text()
    (core,) = (line for line in limits.splitlines() if "core file" in line)
    assert core.split()[4:6] == ["0", "0"]
    process = world.agent.process
    assert process is not None
    os.kill(world.pid, signal.SIGABRT)
    _, status = os.waitpid(world.pid, 0)
    process.returncode = -os.WTERMSIG(status)
    assert not os.WCOREDUMP(status)


def test_values_are_nowhere(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """In nothing that this whole run has written, said, or started.  Comes last in this file."""
    value = "Mv7-nowhere-at-all-3k"
    made = secret("ovirt/disks", value)
    lines: set[bytes] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    lines.add(path.read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    world.agent.kill()
    world.restart()  # so that what it prints is caught
    try:
        world.code("Host.setLogLevel", level="DEBUG")
        assert world.register(made) == 0
        assert world.register({**made, "uuid": "x"}) == 72
        assert world.register({**made, "usageType": made["password"]}) == 72
        assert world.register({**made, "uuid": FOREIGN}) == 73
        assert world.register({**made, "password": "*" + made["password"]}) == 72
        assert world.register({**made, "password": [made["password"]]}) == 72
        assert world.code("Host.registerSecrets", secrets=made) == 72
        world.code("Host.registerSecret", secrets=[made])
        world.libvirtd.kill_daemon()
        assert world.register(made) == 73
        world.libvirtd.start_daemon()
        world.wait_usages(REGISTERED)
        assert not world.opens()
        assert world.register(*ALL) == 0
        assert world.opens()
        world.agent.kill()
        world.restart()
        world.wait_usages(REGISTERED)
    finally:
        ended.set()
        watcher.join()
    looked = 0
    printed = "".join(capfd.readouterr())
    for text in forms(*START.values(), value):
        assert text.decode("latin-1") not in "\n".join((*world.said, printed))
        assert [line for line in lines if text in line] == []
        for path in (*world.agent.dir.rglob("*"), *world.libvirtd.directory.rglob("*")):
            if path.is_file():
                assert text not in path.read_bytes(), path
                looked += 1
        assert text not in world.disk().read_bytes()
    assert looked > 50
    assert (world.agent.dir / "state" / "secrets").exists()


def forms(*values: str) -> Iterator[bytes]:
    """In the clear, base64 at any offset within other data, hexadecimal."""
    for value in values:
        raw = value.encode()
        yield raw
        yield raw.hex().encode()
        for shift in range(3):
            # The digits that depend on neighbours are left out.
            yield base64.b64encode(b"\0" * shift + raw)[4 if shift else 0 :].rstrip(b"=")[:-1]
