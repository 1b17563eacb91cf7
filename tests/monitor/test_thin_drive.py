# SPDX-License-Identifier: GPL-2.0-or-later
"""What is kept of disks that grow; functional/test_thin.py has them on real guests."""

from __future__ import annotations

import sys
import tracemalloc

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.units import MIB
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.monitor.thin_drive import ARMED, FULL, Board, Watched
from vdsm_storage.monitor.thin_history import History
from vdsm_storage.monitor.thin_view import ThinView
from vdsm_storage.monitor.watermark import Policy
from vdsm_storage.vms.drives import VolumePath

GIB = 1024 * MIB


def volume() -> VolumePath:
    return VolumePath(new_uuid(), new_uuid(), new_uuid())


def watched(name: str = "vda", vm: str = "") -> Watched:
    made = Watched(vm or new_uuid(), name, f"virtio-{name}").successor(f"{name}[1]", volume())
    made.size, made.limit = GIB, 4 * GIB
    return made


def test_what_was_written_never_goes_back() -> None:
    one = watched()
    one.saw(1.0, 500 * MIB)
    one.saw(2.0, 400 * MIB)
    assert (one.allocation, one.free) == (500 * MIB, 524 * MIB)


@pytest.mark.parametrize("allocation", [-1, 4 * GIB + 1, 2**62])
def test_what_cannot_be_is_not_believed(allocation: int) -> None:
    """No size is made of it: the plan is what it was."""
    one = watched()
    one.saw(1.0, 500 * MIB)
    before = one.plan(Policy(), 2.0, 0.1)
    one.saw(2.0, allocation)
    assert one.allocation == 500 * MIB
    assert one.plan(Policy(), 2.0, 0.1) == before


def test_nothing_is_believed_of_a_volume_whose_limit_is_not_known() -> None:
    one = watched()
    one.limit = 0
    one.saw(1.0, 500 * MIB)
    assert one.allocation == 0


def test_another_layer_begins_anew_and_its_guest_is_as_fast() -> None:
    old = watched()
    old.saw(1.0, 100 * MIB)
    old.saw(2.0, 600 * MIB)
    old.state, old.started, old.due, old.extends, old.paused = ARMED, 3.0, 4.0, 7, True
    old.throttle, old.throttle_since, old.error = 1000, 2.5, "something"
    new = old.successor("vda[9]", volume())
    assert (new.size, new.allocation, new.limit, new.threshold) == (0, 0, 0, 0)
    assert (new.started, new.due, new.error, new.state) == (0.0, 0.0, "", "unarmed")
    assert (new.extends, new.paused, new.throttle, new.throttle_since) == (7, True, 1000, 2.5)
    assert new.rate.now(2.0) == pytest.approx(500 * MIB)
    new.size, new.limit = GIB, 4 * GIB
    new.saw(10.0, 900 * MIB)  # the first point of this layer is no rate
    assert new.rate.now(10.0) < 500 * MIB
    assert (old.node, old.allocation) == ("vda[1]", 600 * MIB)


def test_what_a_backup_writes_to_is_no_disk() -> None:
    disk, scratch = watched(), watched("vda_7").successor("vda[7]", volume())
    assert (disk.is_scratch, disk.layer) == (False, "vda")
    assert (scratch.is_scratch, scratch.layer) == (True, "vda[7]")


def test_the_board_finds_them() -> None:
    board, vm = Board(), new_uuid()
    first, second, other = watched("vda", vm), watched("vdb", vm), watched()
    for each in (first, second, other):
        board.add(each)
    assert board.by_node(vm, "vdb[1]") is second
    assert board.by_node(vm, "vdb[2]") is None
    assert board.by_node(other.vm, "vdb[1]") is None
    assert board.by_alias(vm, "virtio-vda") is first
    assert sorted(each.name for each in board.of(vm)) == ["vda", "vdb"]
    assert set(board.vms()) == {vm, other.vm}
    assert len(board.all()) == 3


def test_one_that_was_replaced_or_went_is_not_there() -> None:
    board, vm = Board(), new_uuid()
    first, second = watched("vda", vm), watched("vdb", vm)
    board.add(first)
    board.add(second)
    again = first.successor("vda[2]", volume())
    board.add(again)
    assert not board.has(first)
    assert board.has(again)
    assert board.keep(vm, ["vda"]) == [second]
    assert not board.has(second)
    assert board.keep(vm, []) == [again]
    assert board.vms() == []


def test_memory_of_one_is_below_what_is_promised() -> None:
    board, count = Board(), 2000
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(count):
            board.add(watched())
        used = (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        tracemalloc.stop()
    assert used < 4096
    assert sys.getsizeof(watched()) < 512


def test_what_is_told(tmp_path_factory: pytest.TempPathFactory) -> None:
    board, one = Board(), watched()
    board.add(one)
    history = History(str(tmp_path_factory.mktemp("h")))
    view = ThinView(history, board, SystemClock(), {one.volume.domain: 12.4}.get)
    one.throttle, one.state = 5000, ARMED
    found = view.stats(one.vm)["vda"]
    assert (found["state"], found["throttle"], found["timeToFull"]) == ("throttled", "5000", "12")
    assert "error" not in found
    one.state, one.error = FULL, "no space"
    found = view.stats(one.vm)["vda"]
    assert (found["state"], found["error"]) == ("full", "no space")
    assert view.stats(new_uuid()) == {}
