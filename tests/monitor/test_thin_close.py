# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that cannot be armed are looked at until they can."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.units import MIB
from vdsm_storage.errors import LibvirtTimeout, LibvirtUnavailable
from vdsm_storage.host.libvirt_model import VmError, Why
from vdsm_storage.monitor import thin_drive as td
from vdsm_storage.monitor.thin_close import ARMING, BUSY, EVERY, Closely
from vdsm_storage.monitor.thin_drive import Board, Watched
from vdsm_storage.monitor.watermark import Policy
from vdsm_storage.vms.drives import VolumePath

VM = "6d0ee6a1-9b6c-4c6e-8a3f-0d0b7a8f6c11"
TAIL = 0.25
SIZE = 1024 * MIB


class World:
    """A libvirt that may keep calls waiting, and what was made of what it told."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sending = False
        self.error: Exception | None = None  # of the next calls
        self.allocation = 0
        self.armed: list[int] = []
        self.alarms: list[tuple[float, Callable[[], None]]] = []
        self.told: list[str] = []
        self.happened = threading.Semaphore(0)
        board = Board()
        tools: Any = SimpleNamespace(
            lanes=Lanes(SystemClock()), clock=SimpleNamespace(monotonic=lambda: self.now),
            libvirt=SimpleNamespace(arm=self._arm, written=self._written), policy=Policy(),
            alarms=SimpleNamespace(after=self._after), board=board, tail=lambda _domain: TAIL,
            note=lambda _each, what: self.told.append(what), sending=lambda _vm: self.sending,
        )  # fmt: skip
        self.each = Watched(VM, "vda", "ua-disk").successor("vda[1]", VolumePath("d", "i", "v"))
        self.each.size, self.each.limit, self.each.threshold = SIZE, 16 * SIZE, 768 * MIB
        board.add(self.each)
        self.board = board
        self.closely = Closely(
            tools, lambda _each: self._tell("want"), lambda _each: self._tell("arm again"),
            lambda _vm: self._tell("look"),
        )  # fmt: skip

    def _arm(self, vm: str, node: str, offset: int, timeout: float) -> None:
        assert (vm, node, timeout) == (VM, "vda[1]", ARMING)
        if self.error is not None:
            raise self.error
        self.armed.append(offset)

    def _written(self, vm: str, layer: str) -> tuple[int, int]:
        assert (vm, layer) == (VM, "vda")
        if self.error is not None:
            raise self.error
        return self.allocation, SIZE

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        self.alarms.append((seconds, call))
        self.happened.release()

    def _tell(self, what: str) -> None:
        self.told.append(what)
        self.happened.release()

    def pass_time(self) -> None:
        """Until the next look has come to its end."""
        ((seconds, call),) = self.alarms
        assert seconds == EVERY
        self.alarms.clear()
        self.now += seconds
        while self.happened.acquire(blocking=False):
            pass
        call()
        assert self.happened.acquire(timeout=10)


def test_usually_it_is_armed() -> None:
    world = World()
    assert world.closely.arm(world.each)
    assert world.armed == [768 * MIB]
    assert (world.alarms, world.each.state) == ([], td.UNARMED)
    assert world.closely.latency(world.each) == TAIL


def test_one_that_moves_is_looked_at() -> None:
    """Until it needs more: then it is extended, and looked at again; until it may be armed."""
    world = World()
    world.sending = True
    assert not world.closely.arm(world.each)
    assert not world.closely.arm(world.each)  # once more changes nothing
    assert (world.armed, world.each.state, world.each.threshold) == ([], td.POLLED, 0)
    assert world.told == ["looked"]
    assert world.closely.latency(world.each) == TAIL + EVERY
    world.allocation = 400 * MIB
    world.pass_time()
    assert world.each.allocation == 400 * MIB
    assert world.told == ["looked"]
    world.allocation = 900 * MIB
    world.pass_time()
    assert world.told == ["looked", "want"]
    assert world.alarms == []
    assert not world.closely.arm(world.each)
    world.sending = False
    world.pass_time()
    assert world.told == ["looked", "want", "arm again"]
    assert world.closely.arm(world.each)


def test_libvirt_keeps_the_call_waiting() -> None:
    """It is not asked again before it has given the first one up."""
    world = World()
    world.error = LibvirtTimeout(call="watch a disk", seconds=ARMING)
    assert not world.closely.arm(world.each)
    assert world.closely.must(VM)
    world.pass_time()  # it does not tell how full the disk is either
    world.error = None
    world.pass_time()
    assert world.armed == []
    world.now += BUSY
    assert not world.closely.must(VM)
    world.pass_time()
    assert world.told[-1] == "arm again"
    assert world.closely.arm(world.each)


@pytest.mark.parametrize("error", [
    LibvirtUnavailable(uri="qemu:///system", reason="it restarts"),
    VmError(Why.OTHER, "no such layer"),
])  # fmt: skip
def test_other_failures_are_the_callers(error: Exception) -> None:
    world = World()
    world.error = error
    with pytest.raises(type(error)):
        world.closely.arm(world.each)
    assert (world.alarms, world.each.state) == ([], td.UNARMED)


def test_a_vm_that_changed_is_looked_at_anew() -> None:
    world = World()
    world.sending = True
    world.closely.arm(world.each)
    world.error = VmError(Why.OTHER, "no such disk")
    world.pass_time()
    assert world.told == ["looked", "look"]
    assert world.alarms == []


def test_one_that_is_gone_is_left_alone() -> None:
    world = World()
    world.sending = True
    world.closely.arm(world.each)
    world.board.keep(VM, ())
    ((_, call),) = world.alarms
    call()
    assert not world.happened.acquire(timeout=0.2) or world.told == ["looked"]
    assert world.told == ["looked"]
