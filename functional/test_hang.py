# SPDX-License-Identifier: GPL-2.0-or-later
"""Storage whose server stops in its tracks: it harms its own domain, for as long as it lasts."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.engine.host import POSIXFS, StorageServer
from functional.pool_lab import COW, MIB, PATIENCE, Lab, Volume, bind_server, make_lab, wait_for
from functional.processes import AgentProcess, leftovers
from vdsm_storage.rpc.client import Pending, RemoteError

HUNG = (3, 851, 1100)  # time-outs of the lane and of locks, a queue that is full
PING = "Host.ping2"


class Server:
    """The process that serves a file system which the agent has mounted."""

    def __init__(self, image: Path) -> None:
        self.image = image
        with image.open("wb") as file:
            file.truncate(256 * MIB)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, timeout=60)

    @property
    def connection(self) -> StorageServer:
        return StorageServer(POSIXFS, str(self.image), vfs_type="fuse.fuse2fs")

    def _signal(self, number: signal.Signals) -> None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b"\0")
                if words[0].endswith(b"fuse2fs") and os.fsencode(self.image) in words:
                    os.kill(int(path.parent.name), number)

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)


class Hanging:
    """A lab with a sound domain, the master, and one whose server can stop."""

    def __init__(self, lab: Lab, server: Server, sound: str, hanging: str) -> None:
        self.lab = lab
        self.server = server
        self.sound = sound
        self.hanging = hanging
        self.volume = lab.create(hanging)

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        self.server.stop()
        try:
            yield
        finally:
            self.server.go_on()

    def age(self, domain: str) -> float:
        return float(self.lab.health(domain).get("lastCheck", -1))

    def wait_rounds(self, seconds: float) -> None:
        """Until the hanging domain's last check is that old; the sound one's stays young."""
        wait_for(lambda: self.age(self.hanging) > seconds, "the age of the last check")

    def wait_well(self) -> None:
        def well() -> bool:
            found = self.lab.health(self.hanging)
            return bool(
                found and found["valid"] and found["acquired"] and float(found["lastCheck"]) < 3
            )

        wait_for(well, "recovery")


@pytest.fixture(scope="module")
def hanging(workdir: Path, start_agent: Callable[..., AgentProcess]) -> Iterator[Hanging]:
    agent = start_agent(
        "agent",
        storage__monitor_interval="0.5",
        storage__lock_timeout="4",
        rpc__verb_timeout="15",
        sanlock__io_timeout="1",  # leases are lost after 8 seconds of silence
    )
    lab = make_lab(agent)
    (workdir / "sound").mkdir()
    sound = lab.add_domain(bind_server(workdir / "sound"))
    server = Server(workdir / "disk.img")
    made = Hanging(lab, server, sound, lab.add_domain(server.connection))
    yield made
    server.go_on()
    lab.client.close()


def seconds(call: Callable[[], Any], times: int = 9) -> float:
    took = []
    for _ in range(times):
        started = time.monotonic()
        call()
        took.append(time.monotonic() - started)
    return statistics.median(took)


def requests(world: Hanging) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whatever has to look at the domain."""
    ids = world.lab.ids(world.volume)
    image = {key: ids[key] for key in ("storagepoolID", "storagedomainID", "imageID")}
    domain = {"storagedomainID": world.hanging}
    for verb in ("Volume.getInfo", "Volume.getSize", "Image.prepare", "Volume.verify_untrusted",
                 "Volume.getQemuImageInfo", "Volume.refresh"):  # fmt: skip
        yield verb, ids
    for verb in ("StorageDomain.getInfo", "StorageDomain.getStats", "StorageDomain.getImages",
                 "StorageDomain.validate"):  # fmt: skip
        yield verb, domain
    yield "StorageDomain.dump", {"sd_id": world.hanging, "full": True}
    yield "StorageDomain.getVolumes", image
    yield "Volume.measure", {**ids, "dstVolFormat": COW}
    yield "Volume.setDescription", {**ids, "description": "x"}
    yield "Lease.status", {"lease": {"sd_id": world.hanging, "lease_id": str(uuid.uuid4())}}


def code_of(pending: Pending) -> int:
    try:
        pending.result(PATIENCE)
    except RemoteError as error:
        return error.code
    return 0


@pytest.mark.mount
def test_only_its_own_domain_waits(hanging: Hanging) -> None:
    lab = hanging.lab
    create = seconds(lambda: lab.create(hanging.sound))
    stats = seconds(lambda: lab.call("Host.getStats"))
    with hanging.hung():
        sent = {verb: lab.client.submit(verb, params) for verb, params in requests(hanging)}
        # The others go on as if nothing were.
        assert seconds(lambda: lab.create(hanging.sound)) < 6 * create
        assert seconds(lambda: lab.call("Host.getStats")) < 20 * stats
        for verb in ("Host.getCapabilities", "Host.getAllTasksStatuses", "Host.getJobs"):
            lab.call(verb)
        for verb in ("getInfo", "getSpmStatus"):
            lab.call(f"StoragePool.{verb}", storagepoolID=lab.pool)
        assert lab.code("StorageDomain.validate", storagedomainID=hanging.sound) == 0
        found = lab.call("Host.getStorageDomains")
        assert hanging.sound in found
        # Every verb on it is answered, and says what is the matter.
        codes = {verb: code_of(pending) for verb, pending in sent.items()}
        assert {verb: code for verb, code in codes.items() if code not in HUNG} == {}
        hanging.wait_rounds(17)
        assert hanging.age(hanging.sound) < hanging.age(hanging.hanging) / 2
        # Twenty rounds of monitoring more cost nothing more.
        threads, descriptors = lab.threads(), lab.descriptors()
        hanging.wait_rounds(24)
        assert lab.threads() <= threads
        assert lab.descriptors() <= descriptors + 2
    hanging.wait_well()
    lab.create(hanging.hanging)
    assert lab.code("Volume.getInfo", **lab.ids(hanging.volume)) == 0


@pytest.mark.mount
def test_requests_for_it_do_not_pile_up(hanging: Hanging) -> None:
    lab = hanging.lab
    before = lab.threads()
    with hanging.hung():
        sent = [
            lab.client.submit("Volume.getInfo", lab.ids(hanging.volume)) for _ in range(1500)
        ]
        ping = seconds(lambda: lab.call(PING))
        assert lab.threads() < before + 20
        assert {code_of(pending) for pending in sent} <= set(HUNG)
        assert seconds(lambda: lab.call(PING)) < 20 * ping
    hanging.wait_well()
    assert lab.code("Volume.getInfo", **lab.ids(hanging.volume)) == 0


@pytest.mark.mount
def test_an_operation_under_its_lease(hanging: Hanging) -> None:
    """sanlock takes the leases away; the agent and the other domain live on."""
    lab = hanging.lab
    where = Volume(hanging.hanging, str(uuid.uuid4()), str(uuid.uuid4()))
    with hanging.hung():
        request = {
            **lab.ids(where), "size": 4 * MIB, "volFormat": COW, "preallocate": 2,
            "diskType": "DATA", "desc": "", "srcImgUUID": str(uuid.UUID(int=0)),
            "srcVolUUID": str(uuid.UUID(int=0)),
        }  # fmt: skip
        pending = lab.client.submit("Volume.create", request)
        hanging.wait_rounds(14)
        assert code_of(pending) != 0
        lab.create(hanging.sound)
    hanging.wait_well()
    lab.create(hanging.hanging)

    def ended() -> bool:
        """The caller gave up before it knew of a task: that one may have begun all the same."""
        tasks = lab.call("Host.getAllTasksStatuses").values()
        return all(task["taskState"] == "finished" for task in tasks)

    wait_for(ended, "no task is left running")


def keep_busy(mount: Path) -> subprocess.Popen[bytes]:
    """Requests to the server all the time, so that it stops in the middle of one."""
    loop = 'while :; do find "$0" -type f -exec head -c 100 {} + ; done >/dev/null 2>&1'
    return subprocess.Popen(["sh", "-c", loop, str(mount)], process_group=0)


@pytest.mark.mount
def test_kill_and_restart_while_it_hangs(hanging: Hanging) -> None:
    """Ready at once, with the sound domain; the other one when its server goes on."""
    lab, agent = hanging.lab, hanging.lab.agent
    mounts = agent.dir / "data-center" / "mnt"
    busy = keep_busy(next(path for path in mounts.iterdir() if path.name.endswith("disk.img")))
    sent = [lab.client.submit(verb, params) for verb, params in requests(hanging)]
    with hanging.hung():
        sent += [lab.client.submit(verb, params) for verb, params in requests(hanging)]
        hanging.wait_rounds(3)
        assert agent.process is not None
        killed = agent.process
        killed.kill()  # a thread of it may stay in the kernel until the server goes on
        lab.client.close()
        agent.start()
        lab.reconnect()
        lab.wait_usable(hanging.sound)
        lab.create(hanging.sound)
        assert not lab.health(hanging.hanging)["acquired"]
        os.killpg(busy.pid, signal.SIGKILL)
    killed.wait(PATIENCE)
    busy.wait(PATIENCE)
    assert killed.stdout is not None
    killed.stdout.close()
    hanging.wait_well()
    lab.create(hanging.hanging)
    assert sent


@pytest.mark.mount
def test_end_while_it_hangs(hanging: Hanging, workdir: Path) -> None:
    """The agent ends, and nothing is left once the server goes on."""
    with hanging.hung():
        hanging.wait_rounds(3)
        for verb, params in requests(hanging):
            hanging.lab.client.submit(verb, params)
        assert hanging.lab.agent.stop() == ""
    assert leftovers(workdir) == []
