# SPDX-License-Identifier: GPL-2.0-or-later
"""Storage networks on a real kernel: an agent logs in to targets; the LUNs that it then sees."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.lab.guest import IN_GUEST
from functional.lab.inner import services
from functional.lab.inner.dm import Loops
from functional.lab.inner.lio import CONFIG, Target
from functional.lab.inner.tool import run, wait_for
from functional.processes import AgentProcess
from vdsm_storage.rpc.client import Client, RemoteError

pytestmark = [pytest.mark.dm, pytest.mark.iscsi, pytest.mark.multipath, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
GIB = 1024**3
BLANK = "00000000-0000-0000-0000-000000000000"
ISCSI, FCP = 3, 2
PORTALS = ("127.0.0.2", "127.0.0.3")
LOCKED, OPEN = "127.0.0.4", "::1"  # portals of the target with CHAP
USER, PASSWORD = "initiator", "a good-secret#1"
VG = "3b6e1f0a-8c5d-4f7e-9a2b-1c0d5e4f6a7b"
LOGIN = 8.0  # seconds; two tries of two
DROP_INS = Path("/etc/multipath/conf.d")
# Sorts behind ours, as an administrator's would: paths are looked at every second.
QUICKER = "defaults {\n    polling_interval 1\n    max_polling_interval 2\n}\n"


class World:
    """An agent, and two targets of this host."""

    def __init__(self, agent: AgentProcess, loops: Loops) -> None:
        self.agent = agent
        self.loops = loops
        self.disks = [loops.make(20 * GIB), loops.make(GIB, sector=4096)]
        self.open = Target(portals=PORTALS)
        self.luns = [self.open.add_lun(disk) for disk in self.disks]
        self.locked = Target(portals=(LOCKED, f"[{OPEN}]"), chap=(USER, PASSWORD))
        self.locked_lun = self.locked.add_lun(loops.make(GIB))

    def call(self, verb: str, **params: Any) -> Any:
        with Client.dev(str(self.agent.dir), timeout=170) as client:
            return client.call(verb, params)

    def code(self, verb: str, **params: Any) -> int:
        with pytest.raises(RemoteError) as error:
            self.call(verb, **params)
        return error.value.code

    def portal(self, address: str, target: Target | None = None, **more: str) -> dict[str, str]:
        """As engines send it."""
        return {
            "id": f"11111111-0000-4000-8000-{abs(hash((address, *more.items()))) % 10**12:012}",
            "connection": address,
            "port": "3260",
            "iqn": (target or self.open).iqn,
            "tpgt": "1",
            "user": "",
            "password": "",
            "ipv6_enabled": "true" if ":" in address else "false",
            **more,
        }

    def servers(self, verb: str, *portals: dict[str, str], kind: int = ISCSI) -> list[int]:
        reply = self.call(
            f"StoragePool.{verb}StorageServer",
            domainType=kind,
            storagepoolID=BLANK,
            connectionParams=list(portals),
        )
        assert [one["id"] for one in reply] == [one["id"] for one in portals]
        return [one["status"] for one in reply]

    def connect(self, *portals: dict[str, str]) -> list[int]:
        return self.servers("connect", *portals)

    def disconnect(self, *portals: dict[str, str]) -> list[int]:
        return self.servers("disconnect", *portals)

    def both(self) -> tuple[dict[str, str], ...]:
        return tuple(self.portal(address) for address in PORTALS)

    def devices(self, **params: Any) -> dict[str, dict[str, Any]]:
        reply = self.call("Host.getDeviceList", **{"storageType": ISCSI, **params})
        return {device["GUID"]: device for device in reply}

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = self.call("Host.getStats")["multipathHealth"]
        return found

    def log(self) -> str:
        return (self.agent.dir / "agent.log").read_text()

    def remove(self) -> None:
        for address in PORTALS:
            self.open.portal_up(address)
        self.disconnect(*self.both())
        for address in (LOCKED, OPEN):
            self.disconnect(self.portal(address, self.locked))
        self.open.remove()
        self.locked.remove()


@pytest.fixture(scope="module")
def drop_in() -> Iterator[None]:
    """Our settings, where no real host's would be changed."""
    if not os.environ.get(IN_GUEST):
        yield
        return
    DROP_INS.mkdir(parents=True, exist_ok=True)
    ours, theirs = DROP_INS / "vdsm-storage.conf", DROP_INS / "zz-lab.conf"
    shutil.copy(ROOT / "packaging/rpm/multipath.conf", ours)
    theirs.write_text(QUICKER)
    yield
    ours.unlink()
    theirs.unlink()


@pytest.fixture(scope="module")
def world(
    drop_in: None, iscsid: None, loops: Loops, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("san") / "agent"
    settings = {"lvm__login_timeout": str(LOGIN), "lvm__scan_timeout": "5"}
    agent = AgentProcess(directory, tls=False, settings=settings)
    with services.multipathd():
        agent.start()
        try:
            made = World(agent, loops)
            try:
                yield made
            finally:
                made.remove()
        finally:
            assert agent.stop() == ""


def sessions() -> dict[str, str]:
    """Number of every session and the address that it goes to."""
    found = {}
    for path in Path("/sys/class/iscsi_connection").glob("connection*"):
        number = path.name.removeprefix("connection").partition(":")[0]
        found[number] = (path / "persistent_address").read_text().strip()
    return found


def records() -> list[Path]:
    roots = [Path("/etc/iscsi"), Path("/var/lib/iscsi")]
    return [
        path
        for root in roots
        for name in ("nodes", "send_targets")
        for path in (root / name).rglob("*")
        if path.is_file()
    ]


# -- discovery and login -------------------------------------------------------------------------


def test_settings_are_taken_by_multipath(world: World) -> None:
    """Each of ours is understood, and a file that sorts behind it has the last word."""
    if not os.environ.get(IN_GUEST):
        pytest.skip("this host has settings of its own")
    done = subprocess.run(
        ("multipathd", "show", "config", "local"), capture_output=True, text=True, timeout=60
    )
    assert "vdsm-storage.conf" not in done.stderr, done.stderr
    defaults = done.stdout.partition("}")[0]
    for line in ('user_friendly_names "no"', "fast_io_fail_tmo 5", "dev_loss_tmo 30",
                 "max_fds 4096", 'flush_on_last_del "yes"', "polling_interval 1"):  # fmt: skip
        assert line in defaults
    assert "no_path_retry 16" in done.stdout.partition("overrides {")[2]


def test_portal_tells_its_targets(world: World) -> None:
    found = world.call("ISCSIConnection.discoverSendTargets", host=PORTALS[0], port="3260")
    parts = {(line.partition(",")[0], line.partition(" ")[2]) for line in found}
    for address in PORTALS:
        assert (f"{address}:3260", world.open.iqn) in parts
    assert (f"[{OPEN}]:3260", world.locked.iqn) in parts
    assert records() == []
    ask = "ISCSIConnection.discoverSendTargets"
    assert world.code(ask, host=PORTALS[0], port="3259") == 475
    assert world.code(ask, host="no host", port="3260") == 453


def test_discovery_with_a_password(world: World) -> None:
    auth = CONFIG / "iscsi/discovery_auth"
    (auth / "userid").write_text(USER)
    (auth / "password").write_text(PASSWORD)
    (auth / "enforce_discovery_auth").write_text("1")
    ask = {"host": PORTALS[0], "port": "3260", "user": USER}
    try:
        verb = "ISCSIConnection.discoverSendTargets"
        assert world.code(verb, **{**ask, "user": ""}) == 476
        assert world.code(verb, password="wrong secret", **ask) == 476
        assert any(world.open.iqn in line for line in world.call(verb, password=PASSWORD, **ask))
    finally:
        (auth / "enforce_discovery_auth").write_text("0")
    assert records() == []
    # The password does no harm where none is asked for.
    assert world.call("ISCSIConnection.discoverSendTargets", password=PASSWORD, **ask)


def test_devices_are_there_when_connect_returns(world: World) -> None:
    """Two portals, and one that is dead and keeps nobody else waiting for long."""
    dead = world.portal("127.0.0.2", port="3259")
    started = time.monotonic()
    assert world.connect(*world.both(), dead) == [0, 0, 465]
    assert time.monotonic() - started < 120
    found = world.devices(refresh=False, checkStatus=False)
    assert found.keys() == {lun.wwid for lun in world.luns}
    for device in found.values():
        assert [path["state"] for path in device["pathstatus"]] == ["active", "active"]
        assert {path["connection"] for path in device["pathlist"]} == set(PORTALS)
        assert os.path.exists(f"/dev/mapper/{device['GUID']}")
    assert len(records()) == 2, "a login that failed leaves nothing"


def test_device_list_is_as_engines_know_it(world: World) -> None:
    found = world.devices()
    golden = json.loads(
        (ROOT / "tests/data/golden/device-list/getDeviceList-free.json").read_text()
    )
    free, sectors = (found[lun.wwid] for lun in world.luns)
    assert set(free) == set(golden[0])
    assert {key: type(value) for key, value in free.items()} == {
        key: type(value) for key, value in golden[0].items()
    }
    assert set(free["pathlist"][0]) == set(golden[0]["pathlist"][0])
    assert (free["capacity"], sectors["capacity"]) == (str(20 * GIB), str(GIB))
    assert free["serial"] == f"SLIO-ORG_IBLOCK_{world.luns[0].serial}"
    assert (free["status"], sectors["status"]) == ("free", "unusable")
    assert sectors["logicalblocksize"] == "4096"
    assert world.devices(storageType=FCP, refresh=False) == {}
    only = world.devices(guids=[world.luns[1].wwid], checkStatus=False, refresh=False)
    assert [device["status"] for device in only.values()] == ["unknown"]
    there = {world.luns[0].wwid: True, "3600140500000000": False}
    assert world.call("Host.getDevicesVisibility", guidList=list(there)) == there


def test_connected_already_is_quick_and_the_same_session(world: World) -> None:
    before = sessions()
    started = time.monotonic()
    assert world.connect(*world.both()) == [0, 0]
    assert time.monotonic() - started < 15
    assert sessions() == before


def test_fibre_channel_has_nothing_to_log_in_to(world: World) -> None:
    fcp = {**world.portal(""), "iqn": "", "port": "", "id": BLANK}
    assert world.servers("connect", fcp, kind=FCP) == [0]
    assert world.servers("disconnect", fcp, kind=FCP) == [0]


# -- volume groups -------------------------------------------------------------------------------


def test_volume_group(world: World) -> None:
    first, sectors = (lun.wwid for lun in world.luns)
    create = "LVMVolumeGroup.create"
    assert world.code(create, name=VG, devlist=["360014050000"], force=False) == 606
    assert world.code(create, name=VG, devlist=[sectors], force=True) in (517, 518)
    uuid = world.call(create, name=VG, devlist=[first], force=False)
    try:
        found = world.devices(refresh=False)
        assert (found[first]["status"], found[first]["vgUUID"]) == ("used", uuid)
        info = world.call("LVMVolumeGroup.getInfo", lvmvolumegroupID=uuid)
        assert (info["name"], info["vgUUID"], info["type"]) == (VG, uuid, 3)
        assert [pv["GUID"] for pv in info["pvlist"]] == [first]
        for pv in info["pvlist"]:
            assert pv["devcapacity"] == found[pv["GUID"]]["capacity"]
            assert pv["capacity"] == found[pv["GUID"]]["pvsize"]
            assert pv["pathlist"] == found[pv["GUID"]]["pathlist"]
        rows = world.call("Host.getLVMVolumeGroups", storageType=ISCSI)
        assert [row["vgUUID"] for row in rows] == [uuid]
        assert world.code(create, name=VG, devlist=[first], force=True) == 505
    finally:
        world.call("LVMVolumeGroup.remove", lvmvolumegroupID=uuid)
    assert world.code("LVMVolumeGroup.getInfo", lvmvolumegroupID=uuid) == 506
    assert world.devices(guids=[first], refresh=False)[first]["status"] == "free"


# -- what happens to LUNs ------------------------------------------------------------------------


def test_lun_grows(world: World) -> None:
    world.loops.grow(world.disks[0], 24 * GIB)
    name = world.luns[0].wwid
    found = world.devices(guids=[name], checkStatus=False)
    assert found[name]["capacity"] == str(24 * GIB)
    assert run("blockdev", "--getsize64", f"/dev/mapper/{name}").strip() == str(24 * GIB)


def test_new_lun_is_found(world: World) -> None:
    lun = world.open.add_lun(world.loops.make(GIB))
    world.luns.append(lun)
    assert world.call("Host.getDevicesVisibility", guidList=[lun.wwid]) == {lun.wwid: True}


def test_failed_path_is_told(world: World) -> None:
    wait_for("all is well", lambda: world.health() == {})
    world.open.portal_down(PORTALS[1])
    wait_for("failed paths", lambda: len(world.health()) == len(world.luns))
    for state in world.health().values():
        assert (state["valid_paths"], len(state["failed_paths"])) == (1, 1)
    # Somebody reads, so that the path is found out at once everywhere.
    found = world.devices(refresh=False, checkStatus=False)
    for device in found.values():
        assert sorted(path["state"] for path in device["pathstatus"]) == ["active", "failed"]
    world.open.portal_up(PORTALS[1])
    wait_for("all is well", lambda: world.health() == {})


def test_dead_luns_are_listed(world: World) -> None:
    """No path to any of them: the list comes all the same, and soon."""
    for address in PORTALS:
        world.open.portal_down(address)
    wait_for("no path", lambda: [s["valid_paths"] for s in world.health().values()] == [0] * 3)
    started = time.monotonic()
    found = world.devices()
    assert time.monotonic() - started < 45
    assert found.keys() == {lun.wwid for lun in world.luns}
    for device in found.values():
        assert device["status"] == "unknown"
        assert {path["state"] for path in device["pathstatus"]} == {"failed"}
    # The agent is as alive as before; nothing of it waits for the LUNs.
    started = time.monotonic()
    world.call("Host.getStats")
    assert time.monotonic() - started < 5
    assert world.connect(*world.both()) == [465, 465]
    for address in PORTALS:
        world.open.portal_up(address)
    wait_for("they are back", lambda: world.health() == {})
    found = world.devices(guids=[world.luns[0].wwid], refresh=False)
    assert [device["status"] for device in found.values()] == ["free"]


# -- CHAP ----------------------------------------------------------------------------------------


def test_password(world: World) -> None:
    """It opens the target, and is on no command line, in no log and no file but open-iscsi's."""
    seen: list[bytes] = []
    stop = threading.Event()
    watcher = threading.Thread(target=watch_commands, args=(seen, stop))
    watcher.start()
    portal = world.portal(LOCKED, world.locked, user=USER)
    assert world.connect({**portal, "user": ""}) == [476]
    assert world.connect({**portal, "password": "wrong secret"}) == [476]
    assert not [path for path in records() if LOCKED in str(path)]
    assert world.connect({**portal, "password": PASSWORD}) == [0]
    stop.set()
    watcher.join()
    assert any(b"iscsiadm" in line for line in seen)
    assert not any(PASSWORD.encode() in line for line in seen)
    for secret in (PASSWORD, "wrong secret"):
        assert secret not in world.log()
        assert secret not in (world.agent.dir / "state/remembered.json").read_text()
    (record,) = [path for path in records() if LOCKED in str(path)]
    assert PASSWORD in record.read_text()
    assert record.stat().st_mode & 0o777 == 0o600
    # Engines keep what a LUN was reached with, to connect other hosts.
    found = world.devices(checkStatus=False, refresh=False)
    (path,) = found[world.locked_lun.wwid]["pathlist"]
    assert (path["user"], path["password"]) == (USER, PASSWORD)


def watch_commands(seen: list[bytes], stop: threading.Event) -> None:
    while not stop.is_set():
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen.append(path.read_bytes())
            except OSError:
                continue


def test_crashed_agent_logs_in_again_without_being_told_the_password(world: World) -> None:
    world.agent.kill()
    (number,) = [n for n, address in sessions().items() if address == LOCKED]
    run("iscsiadm", "-m", "session", "-r", number, "--logout")
    world.agent.start()
    wait_for("the session is back", lambda: LOCKED in sessions().values())
    wait_for("its device is back", lambda: listed(world, world.locked_lun.wwid))
    assert PASSWORD not in world.log()


def listed(world: World, guid: str) -> bool:
    return guid in world.devices(checkStatus=False, refresh=False)


def test_ipv6(world: World) -> None:
    portal = world.portal(OPEN, world.locked, user=USER, password=PASSWORD)
    assert world.connect(portal) == [0]
    found = world.devices(checkStatus=False, refresh=False)
    device = found[world.locked_lun.wwid]
    assert {path["connection"] for path in device["pathlist"]} == {LOCKED, OPEN}
    assert world.disconnect(portal, world.portal(LOCKED, world.locked)) == [0, 0]
    assert not [path for path in records() if world.locked.iqn in str(path)]
    assert world.locked_lun.wwid not in world.devices(checkStatus=False, refresh=False)


# -- logout --------------------------------------------------------------------------------------


def test_last_path_of_a_domain_in_use_stays(world: World) -> None:
    """A domain on a LUN: made, watched, its devices kept while it is."""
    assert world.connect(*world.both()) == [0, 0]
    name = world.luns[0].wwid
    group = world.call("LVMVolumeGroup.create", name=VG, devlist=[name], force=False)
    world.call(
        "StorageDomain.create",
        storagedomainID=VG, domainType=ISCSI, typeArgs=group, name="lab", domainClass=1,
        version="5", blockSize=512, maxHosts=250,
    )  # fmt: skip
    info = world.call("StorageDomain.getInfo", storagedomainID=VG)
    assert (info["type"], info["vguuid"]) == ("ISCSI", group)
    assert info["metadataDevice"] == info["vgMetadataDevice"] == name
    world.call("Host.startMonitoringDomain", sdUUID=VG, hostID=1)
    wait_for("it is watched", lambda: acquired(world))
    assert world.disconnect(*world.both()) == [0, 452]
    assert f"last path to {name}, which domain {VG} uses" in world.log()
    assert list(sessions().values()) == [PORTALS[1]]
    # Nobody watches it any more: it lets go of the LUN, which may leave and come again.
    world.call("Host.stopMonitoringDomain", sdUUID=VG)
    assert world.disconnect(*world.both()) == [0, 0]
    assert world.connect(*world.both()) == [0, 0]
    world.call("StorageDomain.format", storagedomainID=VG, autoDetach=False)
    assert world.code("LVMVolumeGroup.getInfo", lvmvolumegroupID=group) == 506


def acquired(world: World) -> bool:
    domains = world.call("Host.getStats")["storageDomains"]
    return VG in domains and domains[VG]["acquired"] and domains[VG]["actual"]


def test_nothing_stays_behind(world: World) -> None:
    assert world.disconnect(*world.both()) == [0, 0]
    assert sessions() == {}
    assert records() == []
    assert world.devices(checkStatus=False, refresh=False) == {}
    assert not list(Path("/sys/block").glob("sd*"))
