# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes as devices of a real kernel, and data that moves under them."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from functional.lab.inner.dm import Layer, Loops
from functional.lab.inner.io import BLOCK, read, write
from functional.lab.inner.tool import run, wait_for
from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.errors import (
    ActionStopped,
    AgentError,
    CannotDeactivateLogicalVolume,
    UnexpectedVolumeGroupMetadata,
    VolumeGroupRemoveError,
)
from vdsm_storage.lvm.activation import DeviceMapper
from vdsm_storage.lvm.allocation import free_areas
from vdsm_storage.lvm.changes import CreateLv, ExtendLv, RetagLv, RetagVg
from vdsm_storage.lvm.command import Lvm
from vdsm_storage.lvm.group import Group
from vdsm_storage.lvm.groups import Groups
from vdsm_storage.lvm.moves import unfinished

pytestmark = [pytest.mark.dm, pytest.mark.timeout(600)]

MIB = 1024**2
GIB = 1024**3
EXTENT = 128 * MIB
VG = "0a9b1ae6-2c0d-4bd4-9c2c-5e1b2a3c4d5e"
ONES = b"\1" * BLOCK
SIZE = 4  # extents of data that is moved: enough to be looked at while it moves


class World:
    """A domain's group on three devices, of which the second can be slowed."""

    def __init__(self, directory: Path, loops: Loops) -> None:
        self.layer = Layer(loops.make(3 * GIB))
        self.devices = [loops.make(2 * GIB), self.layer.path, loops.make(3 * GIB)]
        self.lvm = Lvm(str(directory), 120.0, 10)
        self.groups = Groups(
            self.lvm, lambda: self.devices, Lanes(SystemClock()).submit, scan_timeout=30.0
        )
        self.mapper = DeviceMapper(self.lvm)
        self.groups.create(VG, self.devices, ["RHAT_storage_domain"], force=False)
        self.group.apply(CreateLv("metadata", EXTENT), CreateLv("c", EXTENT))

    @property
    def group(self) -> Group:
        return self.groups.find(VG)

    def path(self, lv: str) -> str:
        return self.mapper.path(VG, lv)

    def size(self, lv: str) -> int:
        return int(run("blockdev", "--getsize64", self.path(lv)))

    def remove(self) -> None:
        self.layer.heal()
        self.groups.abort_move(VG, self.devices[1])
        self.mapper.deactivate(self.group, list(self.mapper.active(VG)))
        self.groups.remove(VG)
        self.layer.remove()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, loops: Loops) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("lvm"), loops)
    yield made
    made.remove()


def test_active_volumes(world: World) -> None:
    group, mapper = world.group, world.mapper
    group.apply(CreateLv("a-b", 2 * EXTENT))
    assert mapper.active(VG) == {}
    mapper.activate(group, ["a-b", "c"])
    assert {lv: active.size for lv, active in mapper.active(VG).items()} == {
        "a-b": 2 * EXTENT,
        "c": EXTENT,
    }
    assert mapper.active(VG, ["c"]) == {"c": mapper.active(VG)["c"]}  # found by its name alone
    write(world.path("a-b"), ONES, EXTENT)
    mapper.activate(group, ["c"])

    # Grown by another host, or by this one: the device follows when it is told.
    group.apply(ExtendLv("c", 2 * EXTENT))
    assert world.size("c") == EXTENT
    mapper.refresh(group, ["a-b", "c", "metadata"])
    assert world.size("c") == 2 * EXTENT
    assert "metadata" not in mapper.active(VG)

    # Many changes in one commit, with volumes active.
    group.apply(
        ExtendLv("c", 3 * EXTENT),
        ExtendLv("a-b", 3 * EXTENT),
        RetagLv("c", ("T",)),
        RetagVg(("T",)),
    )
    mapper.refresh(group, ["a-b", "c"])
    assert (world.size("c"), world.size("a-b")) == (3 * EXTENT, 3 * EXTENT)
    assert read(world.path("a-b"), EXTENT) == ONES
    run("lvm", "vgck", VG)

    with pytest.raises(VolumeGroupRemoveError, match="a-b, c"):
        world.groups.remove(VG)
    fd = os.open(world.path("c"), os.O_RDONLY)
    try:
        with pytest.raises(CannotDeactivateLogicalVolume, match="in use"):
            mapper.deactivate(group, ["a-b", "c"])
        assert mapper.active(VG).keys() == {"c"}
    finally:
        os.close(fd)
    mapper.deactivate(group, ["a-b", "c"])
    assert mapper.active(VG) == {}
    assert not os.path.exists(world.path("c"))


@pytest.fixture
def moving(world: World) -> Iterator[World]:
    """The second device has a volume with data, active; it has it again afterwards."""
    group = world.group
    if "data" not in group.read().lvs:
        free = free_areas(group.read())
        assert free is not None
        fill = sum(count for _, count in free.areas["pv0"])
        group.apply(CreateLv("fill", fill * EXTENT), CreateLv("data", SIZE * EXTENT))
        world.mapper.activate(group, ["data"])
        for extent in range(SIZE):
            write(world.path("data"), ONES, extent * EXTENT)
    assert places(world) == {"pv1"}
    yield world
    world.layer.heal()
    world.groups.abort_move(VG, world.devices[1])
    for extent in range(SIZE):
        assert read(world.path("data"), extent * EXTENT) == ONES
    world.groups.move(VG, world.devices[2], [world.devices[1]])


def places(world: World) -> set[str]:
    return {segment.pv for segment in world.group.read().lvs["data"].segments}


def test_data_moves_under_an_active_volume(moving: World) -> None:
    percents: list[float] = []
    moving.groups.move(VG, moving.devices[1], [moving.devices[2]], percents.append)
    assert percents[-1] == 100.0
    assert places(moving) == {"pv2"}
    assert not unfinished(moving.group.read())


def background(call: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except AgentError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, errors


def test_a_move_that_is_cancelled(moving: World) -> None:
    moving.layer.slow(read_ms=200, write_ms=0)
    cancel = Cancel()
    percents: list[float] = []
    call = (VG, moving.devices[1], [], percents.append, cancel)
    thread, errors = background(lambda: moving.groups.move(*call))
    wait_for("the move to tell how far it is", lambda: percents, timeout=200.0)
    cancel.request()
    thread.join(300)
    assert [type(error) for error in errors] == [ActionStopped]
    assert not unfinished(moving.group.read())


def test_a_move_whose_process_dies_is_made_anew(moving: World) -> None:
    """As it is when the agent is killed: the kernel's mirror stays, and so does pvmove0."""
    moving.layer.slow(read_ms=200, write_ms=0)
    group = moving.group
    devices = ",".join(moving.devices)
    argv = ["lvm", "pvmove", "--devices", devices, "--interval", "1", moving.devices[1]]
    process = subprocess.Popen(
        argv,
        env={**os.environ, "LVM_SYSTEM_DIR": moving.lvm.directory},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    wait_for("the move", lambda: unfinished(group.read()))
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(UnexpectedVolumeGroupMetadata, match=r"being moved|not a plain one"):
        group.apply(ExtendLv("c", 9 * EXTENT))
    group.apply(RetagLv("c", ("WHILE",)))
    moving.layer.heal()
    moving.groups.move(VG, moving.devices[1], [])
    assert places(moving) == {"pv2"}
    group.apply(ExtendLv("c", group.read().size_of("c") + EXTENT))


def test_an_emptied_device_is_given_back(world: World) -> None:
    world.groups.move(VG, world.devices[1], [world.devices[2]])
    world.groups.reduce(VG, world.devices[1])
    assert world.groups.can_create(world.devices[1]) is None
    world.groups.extend(VG, [world.devices[1]], force=False)
    assert len(world.group.read().pvs) == 3
    run("lvm", "vgck", VG)
