# SPDX-License-Identifier: GPL-2.0-or-later
"""Device lists and volume groups as engines know them; real ones on loop devices."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.luns import Luns as LoopLuns
from tests.domains.conftest import GOLDEN, World, build
from tests.san_tree import GIB, SanTree, golden_tree
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.domains import devices as module
from vdsm_storage.domains.candidates import Candidates
from vdsm_storage.domains.devices import DeviceBase, Devices
from vdsm_storage.domains.luns import Luns
from vdsm_storage.domains.rescan import Rescan
from vdsm_storage.domains.storage_network import StorageNetwork
from vdsm_storage.errors import (
    InaccessiblePhysDev,
    VolumeGroupAlreadyExists,
    VolumeGroupDoesNotExist,
    VolumeGroupHasDomainTag,
)
from vdsm_storage.host.iscsi import Iscsi
from vdsm_storage.host.iscsi_records import Records
from vdsm_storage.host.iscsi_sessions import Sessions
from vdsm_storage.host.multipath import Multipath
from vdsm_storage.host.scsi import Scsi
from vdsm_storage.lvm.labels import Label
from vdsm_storage.lvm.model import LogicalVolume, PhysicalVolume, Segment, VolumeGroup
from vdsm_storage.lvm.scan import Seen
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.normalise import Checker

FIRST, SECOND = "360014052d05b1f3670a40e0ae4637e4f", "36001405692aa9c0a9d1407ab8d7bd06c"
EXTENT = 128 * 1024**2


def golden(name: str) -> Any:
    return json.loads((GOLDEN / "device-list" / f"{name}.json").read_text())


def network(tree: SanTree, patterns: str = "") -> StorageNetwork:
    multipath, sessions = Multipath(tree.files, tree.dm), Sessions(tree.files)
    iscsi = Iscsi(tree.files, sessions, Records((str(tree.root),)), SystemClock(), 1.0)
    return StorageNetwork(
        Scsi(tree.files), multipath, sessions, iscsi, Candidates(multipath, patterns)
    )


class GoldenGroups:
    """The group of the golden lists; device-mapper is not there to read it from."""

    def __init__(self) -> None:
        info = golden("getVGInfo-domain")
        pv = info["pvlist"][0]
        size, free = (int(info[key]) // EXTENT for key in ("vgsize", "vgfree"))
        self.name = info["name"]
        self.model = VolumeGroup(
            name=info["name"],
            uuid=info["vgUUID"],
            seqno=9,
            extent_size=EXTENT,
            tags=("RHAT_storage_domain",),
            pvs={
                "pv0": PhysicalVolume(
                    "pv0", pv["pvUUID"], f"/dev/mapper/{FIRST}", 20 * GIB, 129 * 1024**2, size
                )
            },
            lvs={"a": LogicalVolume("a", "x", (), (Segment(0, size - free, "pv0", 0),))},
        )
        self.there: dict[str, str] = {pv["pvUUID"]: f"/dev/mapper/{FIRST}"}

    def find_uuid(self, uuid: str) -> GoldenGroups:
        assert uuid == self.model.uuid
        return self

    def read(self) -> VolumeGroup:
        return self.model

    def devices(self) -> dict[str, str]:
        return self.there

    def can_create(self, device: str) -> str | None:
        return None

    def seen(self) -> dict[str, Seen]:
        label = Label(f"/dev/mapper/{FIRST}", next(iter(self.there)), 20 * GIB, ())
        return {
            f"/dev/mapper/{FIRST}": Seen(1, label, heads=(self.model,)),
            f"/dev/mapper/{SECOND}": Seen(2, None),
        }


@pytest.fixture
def tree(tmp_path: Path) -> SanTree:
    return golden_tree(tmp_path)


@pytest.fixture
def groups() -> GoldenGroups:
    return GoldenGroups()


@pytest.fixture
def devices(
    tree: SanTree, groups: GoldenGroups, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Devices]:
    clock = SystemClock()
    lanes, lower = Lanes(clock), network(tree)
    rescan = Rescan(lower, lanes, clock)
    base = DeviceBase(Luns(lower), rescan, groups, lanes, 1.0)  # type: ignore[arg-type]
    monkeypatch.setattr(module.block, "partition_table", lambda path, timeout: False)
    yield Devices(base)
    lanes.close()


def see(monkeypatch: pytest.MonkeyPatch, devices: Devices, seen: dict[str, Seen]) -> None:
    monkeypatch.setattr(devices._scanner, "look", lambda paths: seen)


# -- against the golden lists --------------------------------------------------------------------


def test_list_without_a_check(devices: Devices) -> None:
    found = devices.listing(check=False, refresh=False)
    assert found == golden("getDeviceList-nocheck")
    Checker(Schema()).check_reply("Host.getDeviceList", found)


def test_list_of_free_devices(
    devices: Devices, groups: GoldenGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, devices, {path: Seen(n, None) for n, path in enumerate(groups.seen())})
    assert devices.listing(refresh=False) == golden("getDeviceList-free")


def test_list_with_a_used_device(
    devices: Devices, groups: GoldenGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, devices, groups.seen())
    assert devices.listing(refresh=False) == golden("getDeviceList-used")


def test_group(devices: Devices, groups: GoldenGroups) -> None:
    found = devices.group_info(groups.model.uuid)
    Checker(Schema()).check_reply("LVMVolumeGroup.getInfo", found)
    wanted = golden("getVGInfo-domain")
    assert found["pvlist"][0]["pe_alloc_count"] == "36"
    # The golden one says "0" for both, which is not so.
    wanted["pvlist"][0].update(pe_alloc_count="36", fwrev="4.0")
    assert found == wanted


def test_group_with_a_device_that_is_not_there(devices: Devices, groups: GoldenGroups) -> None:
    groups.there = {}
    found = devices.group_info(groups.model.uuid)
    Checker(Schema()).check_reply("LVMVolumeGroup.getInfo", found)
    assert (found["state"], found["attr"]["partial"]) == ("PARTIAL", "p")
    (pv,) = found["pvlist"]
    assert (pv["GUID"], pv["pathlist"], pv["devcapacity"]) == (FIRST, [], str(20 * GIB))


# -- paths ---------------------------------------------------------------------------------------


def test_paths_that_do_not_work(tree: SanTree, devices: Devices) -> None:
    tree.states(FIRST, {"8:48": False, "8:32": True})
    tree.write("/sys/block/sda/device/state", "offline")
    tree.states(SECOND, {"8:16": False, "8:0": True})
    found = {one["GUID"]: one for one in devices.listing(refresh=False)}
    states = {
        guid: {path["physdev"]: path["state"] for path in one["pathstatus"]}
        for guid, one in found.items()
    }
    assert states[FIRST] == {"sdd": "failed", "sdc": "active"}
    assert states[SECOND] == {"sdb": "failed", "sda": "failed"}
    assert found[SECOND]["status"] == "unknown"


def test_password_of_a_session_is_told_and_not_shown(tree: SanTree, devices: Devices) -> None:
    for number in (1, 2):
        tree.write(f"/sys/class/iscsi_session/session{number}/username", "bob")
        tree.write(f"/sys/class/iscsi_session/session{number}/password", "secret words")
    found = devices.listing(check=False, refresh=False)
    path = found[0]["pathlist"][0]
    assert (path["user"], path["password"].reveal()) == ("bob", "secret words")
    assert "secret words" not in str(found)
    Checker(Schema()).check_reply("Host.getDeviceList", found)


def test_kinds(tree: SanTree, devices: Devices) -> None:
    tree.write("/sys/class/fc_host/host7/port_name", "0x1")
    tree.disk("sde", "8:64", "pci0/host7/rport-7:0-0/target7:0:0/7:0:0:3")
    tree.map("3600a", "dm-5", {"sde": "8:64"})
    assert {one["GUID"] for one in devices.listing("iSCSI", refresh=False)} == {FIRST, SECOND}
    (fc,) = devices.listing("FCP", refresh=False)
    assert (fc["devtype"], fc["pathlist"], fc["pathstatus"][0]["lun"]) == ("FCP", [], "3")
    # A LUN that is reached both ways belongs to both.
    tree.map("3600b", "dm-6", {"sde": "8:64", "sda": "8:0"})
    for kind in ("FCP", "iSCSI"):
        listed = {one["GUID"]: one["devtype"] for one in devices.listing(kind, refresh=False)}
        assert listed["3600b"] == "MIXED"


def test_only_some(devices: Devices) -> None:
    assert [one["GUID"] for one in devices.listing(guids=[SECOND], refresh=False)] == [SECOND]
    assert devices.listing(guids=["nothing"], refresh=False) == []
    assert devices.find(FIRST) == f"/dev/mapper/{FIRST}"
    with pytest.raises(InaccessiblePhysDev):
        devices.find("nothing")


def test_device_that_hangs_is_unknown(
    devices: Devices, groups: GoldenGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, devices, {path: Seen(n, None) for n, path in enumerate(groups.seen())})
    monkeypatch.setattr(module, "PROBE", 0.3)
    release = SystemClock()

    def hang(path: str, timeout: float) -> bool:
        if FIRST in path:
            release.wait(threading.Event(), 2.0)
        return False

    monkeypatch.setattr(module.block, "partition_table", hang)
    found = {one["GUID"]: one["status"] for one in devices.listing(refresh=False)}
    assert found == {FIRST: "unknown", SECOND: "free"}


# -- on real devices -----------------------------------------------------------------------------


@pytest.fixture
def luns(tmp_path: Path) -> Iterator[LoopLuns]:
    made = LoopLuns(tmp_path)
    yield made
    made.close()


@pytest.fixture
def world(tmp_path: Path, luns: LoopLuns) -> Iterator[World]:
    made = build(tmp_path / "agent", None, devices=luns.pattern)
    yield made
    made.close()


def status(world: World) -> dict[str, str]:
    found = world.services.devices.listing(refresh=False)
    Checker(Schema()).check_reply("Host.getDeviceList", found)
    return {one["GUID"]: one["status"] for one in found}


def test_free_used_partitioned_unusable(world: World, luns: LoopLuns) -> None:
    for name in ("free", "ext4", "parts"):
        luns.make(name, GIB)
    subprocess.run(["mkfs.ext4", "-q", luns.paths[1]], check=True, timeout=60)
    # An MBR with one entry: type 0x83, 2048 sectors from sector 2048 on.
    entry = bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") * 2
    with open(luns.paths[2], "r+b") as file:
        file.write(bytes(446) + entry + bytes(48) + b"\x55\xaa")
    sectors(luns, "large")
    assert status(world) == {
        "free": "free", "ext4": "used", "parts": "used", "large": "unusable",
    }  # fmt: skip
    found = {one["GUID"]: one for one in world.services.devices.listing(refresh=False)}
    assert {guid for guid, one in found.items() if one.get("partitioned")} == {"parts"}
    assert found["large"]["logicalblocksize"] == "4096"
    assert (found["free"]["devtype"], found["free"]["capacity"]) == ("FCP", str(GIB))
    assert found["free"]["pathstatus"][0]["state"] == "active"
    assert world.services.devices.visibility(["free", "no"]) == {"free": True, "no": False}


def sectors(luns: LoopLuns, name: str) -> None:
    file = luns.directory / name
    with file.open("wb") as new:
        new.truncate(GIB)
    argv = ["losetup", "--sector-size", "4096", "--find", "--show", str(file)]
    loop = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout
    path = luns.pattern.replace("*", name)
    os.symlink(loop.strip(), path)
    luns.paths.append(path)


def test_groups(world: World, luns: LoopLuns) -> None:
    devices = world.services.devices
    for guid in ("first", "second", "third"):
        luns.make(guid, 2 * GIB)
    name = new_uuid()
    with pytest.raises(InaccessiblePhysDev, match="nothing"):
        devices.create_group(name, ["first", "nothing"], force=False)
    assert set(status(world).values()) == {"free"}
    uuid = devices.create_group(name, ["first", "second"], force=False)
    assert status(world) == {"first": "used", "second": "used", "third": "free"}
    listed = {one["GUID"]: one for one in devices.listing(check=False, refresh=False)}
    assert {listed[guid]["vgUUID"] for guid in ("first", "second")} == {uuid}
    info = devices.group_info(uuid)
    Checker(Schema()).check_reply("LVMVolumeGroup.getInfo", info)
    assert (info["name"], info["type"], info["state"]) == (name, 2, "OK")
    rows = luns.report("pvs", ["pv_name", "pv_uuid", "pv_pe_count", "pv_size", "vg_name"], name)
    told = {(pv["GUID"], pv["pvUUID"], pv["pe_count"], pv["capacity"]) for pv in info["pvlist"]}
    assert told == {
        (os.path.basename(r["pv_name"]), r["pv_uuid"], r["pv_pe_count"], r["pv_size"]) for r in rows
    }
    assert [listed[pv["GUID"]]["pvsize"] for pv in info["pvlist"]] == [
        pv["capacity"] for pv in info["pvlist"]
    ]
    assert [row["vgUUID"] for row in devices.list_groups()] == [uuid]
    assert devices.list_groups("iSCSI") == []
    with pytest.raises(VolumeGroupAlreadyExists):
        devices.create_group(name, ["third"], force=True)
    devices.remove_group(uuid)
    assert set(status(world).values()) == {"free"}
    with pytest.raises(VolumeGroupDoesNotExist):
        devices.group_info(uuid)


def test_a_whole_domain_is_not_removed_as_a_group(world: World, luns: LoopLuns) -> None:
    luns.make("first", 2 * GIB)
    name = new_uuid()
    uuid = world.services.devices.create_group(name, ["first"], force=False)
    luns.bare.run("vgchange", "--addtag", "RHAT_storage_domain", name)
    with pytest.raises(VolumeGroupHasDomainTag):
        world.services.devices.remove_group(uuid)
    assert status(world) == {"first": "used"}
