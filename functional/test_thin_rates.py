# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that write at different rates, all at once, each until its disk is full, through some
dozens of extensions: none of them meets the end of its volume.

QEMU storage daemons do the same in benchmarks/extend_cycles.py, more slowly and faster.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from functional.guests.spread import STRIDE
from functional.guests.writer import SLOTS
from functional.onward import EXTENT, Onward
from functional.thin_lab import device_size, history, lv_size, wait_armed, wait_thin
from functional.vm_lab import VmLab
from functional.vm_luns import MakeStandIn, StartAgent, luns_lab
from vdsm_storage.monitor.thin_look import RETRY

PACES = (1, 8, 32, 64, 128)  # numbers a second, each of which takes 2 MiB
FASTER = 32  # these write all of their disks
HEADROOM = EXTENT  # of an idle disk
NICE = 10  # of guests: the agent's unit puts it above them
PATIENCE = 400.0  # seconds; 70 on a quiet machine
RESTS = ("armed", "at limit")  # a disk that is full may need no more

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def lab(
    workdir: Path, start_agent: StartAgent, make_standin: MakeStandIn,
    make_luns: Callable[..., list[str]],
) -> Iterator[VmLab]:  # fmt: skip
    policy = {
        "headroom_min": HEADROOM, "headroom_max": 2 * HEADROOM, "chunk_min": EXTENT,
        "chunk_max": EXTENT,
    }  # fmt: skip
    limits = {f"thin__{name}": str(value) for name, value in policy.items()}
    luns = make_luns(2, 64 * 1024**3)
    with luns_lab(workdir, start_agent, make_standin, luns, **limits) as one:
        yield one


@pytest.fixture(scope="module")
def guests(lab: VmLab) -> Iterator[list[Onward]]:
    """They run when all are there."""
    device = lab.world.places[lab.world.main].devices[0]
    made, waits = [], []
    for number, pace in enumerate(PACES):
        guest = Onward(lab, f"rate-{number}", device, 2 * EXTENT, pace, runs=False, placed=True)
        made.append(guest)
        began = time.monotonic()
        wait_armed(lab, guest.machine)
        waits.append(time.monotonic() - began)
        for thread in os.listdir(f"/proc/{lab.libvirtd.qemu(guest.name)}/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), NICE)
    # libvirt tells of them before it can be asked about their disks.
    assert statistics.median(waits) < RETRY
    for guest in made:
        guest.goes_on()
    yield made
    for guest in made:
        guest.close()


def test_none_meets_the_end(lab: VmLab, guests: list[Onward]) -> None:
    fast = [guest for guest, pace in zip(guests, PACES, strict=True) if pace >= FASTER]
    lab.wait(lambda: all(guest.told() > SLOTS for guest in fast), "disks to be full", PATIENCE)
    for guest in guests:
        guest.stops()
    extends = 0
    for guest, pace in zip(guests, PACES, strict=True):
        known, machine = guest.told(), guest.machine
        found = wait_thin(lab, machine, lambda one: one["state"] in RESTS, "it to be at rest")
        size, volume = int(found["size"]), guest.disk.leaf
        assert int(found["allocation"]) < size
        assert (lv_size(lab, volume), device_size(lab, volume)) == (size, size)
        assert guest.check_numbers(known) >= known
        extends += int(found["extends"])
        # What it writes while it waits for space is less than what it has: promised.
        if pace * STRIDE * float(found["maxLatency"]) <= HEADROOM:
            assert found["pauses"] == "0", found
            assert "paused" not in history(lab, machine)
        if guest in fast:
            assert size >= SLOTS * STRIDE
            assert int(found["extends"]) >= SLOTS * STRIDE // EXTENT // 3
    assert extends > 40
