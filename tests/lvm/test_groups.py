# SPDX-License-Identifier: GPL-2.0-or-later
"""Volume groups on devices of all kinds: found, made, grown, shrunk, removed."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.lvm.conftest import LoopDevices, LvmTool, program
from tests.lvm.writing import MIB, CountedLvm, at_once, check, told
from vdsm_storage.errors import (
    AgentError,
    CouldNotResizePhysicalVolume,
    DeviceBlockSizeError,
    ForbiddenPhysicalVolumeOperation,
    InaccessiblePhysDev,
    LvmCommandError,
    NoSuchPhysicalVolume,
    PartitionedPhysDev,
    PhysDevInitializationError,
    TooManyPVsInVG,
    UnexpectedVolumeGroupMetadata,
    VolumeGroupAlreadyExists,
    VolumeGroupCreateError,
    VolumeGroupDoesNotExist,
    VolumeGroupExtendError,
    VolumeGroupReduceError,
    VolumeGroupRemoveError,
)
from vdsm_storage.lvm.changes import CreateLv, RemoveLv, RetagVg
from vdsm_storage.lvm.groups import Groups
from vdsm_storage.lvm.labels import read_header, read_label

GIB = 1 << 30
UNREADY = "RHAT_storage_domain_UNREADY"
NAME = "0a9b1ae6-2c0d-4bd4-9c2c-5e1b2a3c4d5e"
EXTENT = 128 * MIB


class World:
    def __init__(self, loops: LoopDevices, lvm: LvmTool, tmp_path: Path) -> None:
        self.loops = loops
        self.tool = lvm
        self.lvm = CountedLvm(str(tmp_path / "ours"))
        self.groups = self.another()

    def another(self) -> Groups:
        """As another process would see it."""
        return Groups(self.lvm, lambda: self.loops.paths, at_once, 5.0)

    def changed(self) -> list[str]:
        """Commands that ran, but for those that only look."""
        looks = ("pvs", "fullreport", "version")
        return [command for command in self.lvm.commands() if command not in looks]


@pytest.fixture
def world(loops: LoopDevices, lvm: LvmTool, tmp_path: Path) -> World:
    return World(loops, lvm, tmp_path)


def used_areas(device: str) -> list[bool]:
    label = read_label(device)
    assert label is not None
    return [not read_header(device, area).ignored for area in label.areas]


def contents(devices: Sequence[str]) -> list[bytes]:
    """The first 4 MiB, where labels, headers and the first texts are."""
    found = []
    for device in devices:
        with open(device, "rb") as file:
            found.append(file.read(4 * MIB))
    return found


# -- making ----------------------------------------------------------------------------------


def test_a_group_has_the_format_of_block_domains(world: World) -> None:
    devices = world.loops(3, 20 * GIB)
    assert [world.groups.can_create(device) for device in devices] == [None, None, None]
    uuid = world.groups.create(NAME, devices, [UNREADY], force=False)
    group = world.groups.find(NAME)
    model = group.read()
    assert (model.uuid, model.tags, model.extent_size) == (uuid, (UNREADY,), EXTENT)
    assert [pv.pe_count for pv in model.pvs.values()] == 3 * [157]
    assert [pv.pe_start for pv in model.pvs.values()] == 3 * [129 * MIB]
    assert [used_areas(device) for device in devices] == [[True, True], 2 * [False], 2 * [False]]
    assert [group.devices()[pv.uuid] for pv in model.pvs.values()] == devices
    fields = "vg_attr,vg_mda_count,vg_mda_used_count,vg_mda_free,vg_autoactivation"
    options = ("--noheadings", "--units", "b", "--nosuffix", "--separator", "|", "-o", fields)
    assert world.tool("vgs", *options, NAME).strip() == "wz--n-|6|2|67106304|"
    assert world.groups.find_uuid(uuid) is group
    for device in devices:
        assert f"storage domain {NAME}" in str(world.groups.can_create(device))
    check(world.tool, model)


def test_the_first_volume_is_at_extent_0_of_the_metadata_device(world: World) -> None:
    devices = world.loops(1, 20 * GIB) + world.loops(1, 40 * GIB)
    world.groups.create(NAME, devices, [UNREADY], force=False)
    group = world.groups.find(NAME)
    model = group.apply(CreateLv("metadata", EXTENT))
    segment = model.lvs["metadata"].segments[0]
    assert (segment.pv, segment.pv_start) == ("pv0", 0)
    assert group.devices()[model.pvs["pv0"].uuid] == devices[0]


def test_a_group_that_is_there(world: World) -> None:
    first = world.loops(1, 2 * GIB)
    world.groups.create(NAME, first, [], force=False)
    with pytest.raises(VolumeGroupAlreadyExists, match=first[0]):
        world.another().create(NAME, world.loops(1, 2 * GIB), [], force=True)


def test_too_many_devices(world: World) -> None:
    names = [f"/dev/nothing{n}" for n in range(11)]
    with pytest.raises(TooManyPVsInVG, match="11 devices, its format holds 10"):
        world.groups.create(NAME, names, [], force=False)
    assert world.lvm.ran == []


class Unusable:
    """Devices that must not be taken, each with the error, and whether force helps."""

    @staticmethod
    def absent(world: World) -> str:
        return "/dev/no-such-device"

    @staticmethod
    def no_device(world: World) -> str:
        return "/dev/null"

    @staticmethod
    def large_sectors(world: World) -> str:
        (device,) = world.loops(1, 2 * GIB)
        program("losetup", "--sector-size", "4096", device)
        return device

    @staticmethod
    def partitions(world: World) -> str:
        """A partition table as parted writes it, which the kernel has not read."""
        (device,) = world.loops(1, 2 * GIB)
        sector = bytearray(512)
        sector[446:462] = bytes([0, 0, 2, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0, 16, 0])
        sector[510:] = b"\x55\xaa"
        with open(device, "r+b") as file:
            file.write(sector)
        return device

    @staticmethod
    def file_system(world: World) -> str:
        (device,) = world.loops(1, 2 * GIB)
        program("mkfs.ext4", "-q", device)
        return device

    @staticmethod
    def foreign_group(world: World) -> str:
        (device,) = world.loops(1, 2 * GIB)
        world.tool.make_group("foreign", [device])
        return device

    @staticmethod
    def torn_group(world: World) -> str:
        """In a group whose metadata is on a device that this host does not see."""
        first, second = world.loops(2, 2 * GIB)
        world.tool.make_group("torn", [first, second])
        program("wipefs", "--all", "--quiet", first)
        return second

    @staticmethod
    def domain(world: World) -> str:
        (device,) = world.loops(1, 2 * GIB)
        world.tool.make_group("domain", [device])
        world.tool("vgchange", "--addtag", UNREADY, "domain")
        return device


@pytest.mark.parametrize(
    ("kind", "error", "force_helps"),
    [
        ("absent", InaccessiblePhysDev, False),
        ("no_device", InaccessiblePhysDev, False),
        ("large_sectors", DeviceBlockSizeError, False),
        ("partitions", PartitionedPhysDev, False),
        ("file_system", PhysDevInitializationError, True),
        ("foreign_group", PhysDevInitializationError, True),
        ("torn_group", PhysDevInitializationError, True),
        ("domain", PhysDevInitializationError, False),
    ],
)
def test_devices_that_are_not_free(
    world: World, kind: str, error: type[AgentError], force_helps: bool
) -> None:
    good, spare = world.loops(2, 2 * GIB)
    world.groups.create("mine", [spare], [], force=False)
    bad = getattr(Unusable, kind)(world)
    there = [device for device in (good, bad) if device.startswith("/dev/loop")]
    before = contents(there)
    world.lvm.ran.clear()
    assert world.groups.can_create(good) is None
    assert world.groups.can_create(bad)
    force = not force_helps
    devices = [good, bad]
    with pytest.raises(error):
        world.groups.create(NAME, devices, [], force)
    with pytest.raises(error):
        world.groups.extend("mine", devices, force)
    with pytest.raises(error):
        world.groups.create(NAME, [bad], [], force=False)
    assert world.changed() == []
    assert contents(there) == before
    if force_helps:
        world.groups.create(NAME, devices, [], force=True)
        assert len(world.groups.find(NAME).read().pvs) == 2
        check(world.tool, world.groups.find(NAME).read())


def test_one_device_twice(world: World, tmp_path: Path) -> None:
    (device,) = world.loops(1, 2 * GIB)
    link = tmp_path / "link"
    link.symlink_to(device)
    with pytest.raises(PhysDevInitializationError, match="twice"):
        world.groups.create(NAME, [device, str(link)], [], force=True)


def test_a_device_in_use(world: World) -> None:
    (device,) = world.loops(1, 2 * GIB)
    fd = os.open(device, os.O_RDWR | os.O_EXCL)
    try:
        assert "in use" in str(world.groups.can_create(device))
        with pytest.raises(PhysDevInitializationError, match="in use"):
            world.groups.create(NAME, [device], [], force=True)
    finally:
        os.close(fd)
    assert world.groups.can_create(device) is None


@pytest.mark.parametrize("failing", ["pvcreate", "pvchange", "vgcreate"])
def test_a_failure_in_the_middle_leaves_free_devices(world: World, failing: str) -> None:
    devices = world.loops(2, 2 * GIB)
    world.lvm.refuse[failing] = LvmCommandError(command=failing, vg=NAME, reason="no luck")
    with pytest.raises(VolumeGroupCreateError, match="no luck"):
        world.groups.create(NAME, devices, [], force=False)
    assert [read_label(device) for device in devices] == [None, None]
    assert world.groups.scan() == {}
    world.lvm.refuse.clear()
    world.groups.create(NAME, devices, [], force=False)
    assert len(world.groups.find(NAME).read().pvs) == 2


def test_a_death_in_the_middle_can_be_repeated_without_force(world: World) -> None:
    devices = world.loops(2, 2 * GIB)

    class Death(BaseException):
        pass

    for failing in ("pvchange", "vgcreate"):
        world.lvm.refuse[failing] = Death()  # type: ignore[assignment]
        with pytest.raises(Death):
            world.groups.create(NAME, devices, [], force=False)
        world.lvm.refuse.clear()
        assert world.groups.scan() == {}
        assert [world.groups.can_create(device) for device in devices] == [None, None]
    world.groups.create(NAME, devices, [], force=False)
    assert [used_areas(device) for device in devices] == [[True, True], [False, False]]


# -- growing, shrinking, removing ------------------------------------------------------------


def test_a_group_gets_devices_and_gives_them_back(world: World) -> None:
    first, second, third = world.loops(3, 2 * GIB)
    world.groups.create(NAME, [first], [UNREADY], force=False)
    group = world.groups.find(NAME)
    metadata = group.apply(CreateLv("metadata", EXTENT))
    world.groups.extend(NAME, [second, third], force=False)
    model = group.read()
    assert list(group.devices().values()) == [first, second, third]
    assert [used_areas(device) for device in (second, third)] == 2 * [[False, False]]
    world.lvm.ran.clear()
    world.groups.extend(NAME, [second], force=False)
    assert world.changed() == []
    whole = model.pvs["pv0"].pe_count + model.pvs["pv1"].pe_count
    group.apply(CreateLv("a", (whole - 1) * EXTENT))
    with pytest.raises(VolumeGroupReduceError, match="it has data"):
        world.groups.reduce(NAME, second)
    with pytest.raises(ForbiddenPhysicalVolumeOperation, match="has the metadata"):
        world.groups.reduce(NAME, first)
    world.groups.reduce(NAME, third)
    assert list(group.devices().values()) == [first, second]
    assert world.groups.can_create(third) is None
    with pytest.raises(NoSuchPhysicalVolume, match=f"no device {third}; it has /dev"):
        world.groups.reduce(NAME, third)
    group.apply(RemoveLv("a"))
    world.groups.reduce(NAME, second)
    assert group.read().lvs == metadata.lvs
    check(world.tool, group.read())


def test_a_failed_extend_leaves_the_group_and_free_devices(world: World) -> None:
    first, second = world.loops(2, 2 * GIB)
    world.groups.create(NAME, [first], [], force=False)
    world.lvm.refuse["vgextend"] = LvmCommandError(command="vgextend", vg=NAME, reason="no luck")
    with pytest.raises(VolumeGroupExtendError, match="no luck"):
        world.groups.extend(NAME, [second], force=False)
    assert len(world.groups.find(NAME).read().pvs) == 1
    assert read_label(second) is None
    world.lvm.refuse.clear()
    world.groups.extend(NAME, [second], force=False)
    assert len(world.groups.find(NAME).read().pvs) == 2


def test_a_group_of_ten_devices_is_full(world: World) -> None:
    devices = world.loops(11, 2 * GIB)
    world.groups.create(NAME, devices[:10], [], force=False)
    with pytest.raises(TooManyPVsInVG, match="11 devices"):
        world.groups.extend(NAME, devices[10:], force=False)


def test_a_device_that_grew(world: World) -> None:
    first, second = world.loops(2, 2 * GIB)
    world.groups.create(NAME, [first, second], [], force=False)
    group = world.groups.find(NAME)
    group.apply(CreateLv("a", 20 * EXTENT))
    before = group.read()
    for device in (second, first):
        image = program("losetup", "--noheadings", "--output", "BACK-FILE", device).strip()
        os.truncate(image, 4 * GIB)
        program("losetup", "--set-capacity", device)
        size = world.groups.resize(NAME, device)
        assert size == (4 * GIB - 258 * MIB) // EXTENT * EXTENT
    model = group.read()
    assert [pv.pe_count * EXTENT for pv in model.pvs.values()] == [size, size]
    assert (model.lvs, model.uuid) == (before.lvs, before.uuid)
    assert used_areas(first) == [True, True]
    assert used_areas(second) == [False, False]
    group.apply(CreateLv("b", 30 * EXTENT), RetagVg(("T",)))
    check(world.tool, group.read())
    assert told(world.tool, NAME).extents == group.read().extents
    with pytest.raises(NoSuchPhysicalVolume):
        world.groups.resize(NAME, "/dev/no-such-device")
    world.lvm.refuse["pvresize"] = LvmCommandError(command="pvresize", vg=NAME, reason="no luck")
    with pytest.raises(CouldNotResizePhysicalVolume, match="no luck"):
        world.groups.resize(NAME, first)


def test_a_domains_group_goes_with_its_volumes(world: World) -> None:
    devices = world.loops(2, 2 * GIB)
    world.groups.create(NAME, devices, ["RHAT_storage_domain"], force=False)
    group = world.groups.find(NAME)
    model = group.apply(*(CreateLv(f"v{n}", EXTENT) for n in range(5)))
    world.lvm.ran.clear()
    world.groups.remove(NAME)
    assert world.changed() == ["lvremove", "vgremove", "pvremove"]
    assert [read_label(device) for device in devices] == [None, None]
    with pytest.raises(VolumeGroupDoesNotExist):
        world.groups.find(NAME)
    with pytest.raises(VolumeGroupDoesNotExist):
        world.groups.remove(NAME)
    with pytest.raises(VolumeGroupDoesNotExist):
        group.apply(CreateLv("a", 1))
    kept = group.archive.kept(NAME)
    assert [int(path.rpartition("_")[2][:-3]) for path in kept] == [3, 2, 1]
    assert model.seqno == 2
    world.groups.create(NAME, devices, [], force=False)
    assert world.groups.find(NAME).read().lvs == {}


def test_a_foreign_group_with_volumes_stays(world: World) -> None:
    devices = world.loops(1, 2 * GIB)
    world.tool.make_group("foreign", devices)
    world.tool.create("foreign", "precious")
    with pytest.raises(VolumeGroupRemoveError, match="no storage domain"):
        world.groups.remove("foreign")
    assert world.changed() == []
    world.tool("lvremove", "-y", "foreign/precious")
    world.groups.remove("foreign")
    assert world.groups.scan() == {}


# -- finding ---------------------------------------------------------------------------------


def test_groups_are_found_by_reading_alone(world: World) -> None:
    devices = world.loops(4, 2 * GIB)
    one = world.groups.create("one", devices[:2], ["A"], force=False)
    two = world.groups.create("two", devices[2:3], [], force=False)
    model = world.groups.find("one").apply(*(CreateLv(f"v{n}", EXTENT) for n in range(3)))
    world.lvm.ran.clear()
    found = world.another().scan()
    assert world.lvm.ran == []
    assert found.keys() == {one, two}
    assert (found[one].name, found[one].seqno, found[one].tags) == ("one", model.seqno, ("A",))
    assert list(found[one].devices.values()) == devices[:2]
    assert list(found[one].devices) == [pv.uuid for pv in model.pvs.values()]
    assert found[one].head.lvs == {}
    assert found[one].head.pvs == model.pvs
    alone = world.groups.scan([devices[0]])[one]
    assert list(alone.devices.values()) == [devices[0], None]
    assert world.groups.scan([devices[1], devices[3]]) == {}
    with pytest.raises(VolumeGroupDoesNotExist):
        world.groups.find("three")
    with pytest.raises(VolumeGroupDoesNotExist):
        world.groups.find_uuid("three")
    assert world.groups.find("one") is world.groups.find("one")


def test_copies_of_a_device_are_told(world: World, tmp_path: Path) -> None:
    (device, copy) = world.loops(2, 2 * GIB)
    uuid = world.groups.create(NAME, [device], [UNREADY], force=False)
    link = tmp_path / "link"
    link.symlink_to(device)
    assert world.groups.scan([device, str(link), copy])[uuid].doubles == ()
    subprocess.run(["cp", "--sparse=always", device, copy], check=True)
    found = world.groups.scan()[uuid]
    assert sorted(found.doubles) == sorted([device, copy])
    with pytest.raises(UnexpectedVolumeGroupMetadata):
        world.another().find(NAME)
    for force in (False, True):
        with pytest.raises(AgentError):
            world.groups.create("other", [copy], [], force)
        if not force:
            assert world.groups.can_create(copy)


class Lane:
    """Lanes in which chosen devices hang until they are let go."""

    def __init__(self, hanging: set[str]) -> None:
        self.hanging = hanging
        self.go = threading.Event()
        self.asked: list[str] = []

    def submit(self, key: str, call: Any, timeout: float) -> Future[Any]:
        self.asked.append(key)
        if not any(key.endswith(device) for device in self.hanging):
            return at_once(key, call, timeout)
        future: Future[Any] = Future()

        def work() -> None:
            self.go.wait(10)
            future.set_result(call())

        threading.Thread(target=work).start()
        return future


def test_a_device_that_hangs_is_waited_for_once(world: World) -> None:
    first, second = world.loops(2, 2 * GIB)
    one = world.groups.create("one", [first], [], force=False)
    two = world.groups.create("two", [second], [], force=False)
    lane = Lane({second})
    groups = Groups(world.lvm, lambda: world.loops.paths, lane.submit, 0.2)
    assert groups.scan().keys() == {one}
    asked = len(lane.asked)
    assert groups.scan().keys() == {one}
    assert lane.asked[asked:] == [f"device {first}"]
    assert groups.find("one").read().uuid == one
    with pytest.raises(VolumeGroupDoesNotExist):
        groups.find("two")
    with pytest.raises(InaccessiblePhysDev, match=second):
        groups.create("three", [second], [], force=True)
    assert str(groups.can_create(second)).startswith(f"Devices {second} are not there")
    lane.go.set()
    lane.hanging.clear()
    while two not in groups.scan():
        pass
    assert groups.find("two").read().uuid == two
