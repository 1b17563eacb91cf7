# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes of running VMs grow before their guests are out of space: on LUNs, by a stand-in for
device-mapper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.merge_lab import qemu_io
from functional.vm_lab import MIB, Machine, VmDisk, VmLab
from functional.vm_luns import MakeStandIn, StartAgent, luns_lab, standin_of
from functional.world import COW, SPARSE, new_id

pytestmark = pytest.mark.timeout(1500)

GIB = 1024 * MIB
EXTENT = 128 * MIB
CAPACITY = 20 * GIB


@pytest.fixture(scope="module")
def lab(
    workdir: Path, start_agent: StartAgent, make_standin: MakeStandIn,
    make_luns: Callable[..., list[str]],
) -> Iterator[VmLab]:  # fmt: skip
    with luns_lab(workdir, start_agent, make_standin, make_luns(2)) as one:
        yield one


def thin_disk(lab: VmLab, initial: int = 512 * MIB, capacity: int = CAPACITY) -> VmDisk:
    image = new_id()
    more = {"size": str(capacity), "initialSize": str(initial * 10 // 11), "preallocate": SPARSE}
    return VmDisk(image, [lab.world.create(image, volFormat=COW, **more)])


def thin(lab: VmLab, machine: Machine, name: str = "vda") -> dict[str, Any]:
    found: dict[str, Any] = lab.stats(machine.id)["disks"][name].get("thin", {})
    return found


def lv_size(lab: VmLab, disk: VmDisk) -> int:
    return int(lab.world.info(disk.image, disk.leaf)["truesize"])


def wait_armed(lab: VmLab, machine: Machine, name: str = "vda") -> dict[str, Any]:
    lab.wait(lambda: thin(lab, machine, name).get("state") == "armed", "the disk to be armed")
    return thin(lab, machine, name)


def test_a_volume_grows(lab: VmLab) -> None:
    disk = thin_disk(lab)
    before = lv_size(lab, disk)
    machine = lab.machine_of("grows", [disk])
    armed = wait_armed(lab, machine)
    assert int(armed["size"]) == before
    for step in range(1, 8):
        qemu_io(machine, f"write {step * 100 * MIB} {100 * MIB}")
    lab.wait(lambda: lv_size(lab, disk) > before, "the volume to grow", 5)
    armed = wait_armed(lab, machine)
    print(armed)
    assert int(armed["size"]) == lv_size(lab, disk)
    assert int(armed["allocation"]) < int(armed["threshold"]) < int(armed["size"])
    assert standin_of(lab).active(lab.world.main)[disk.leaf]["size"] == int(armed["size"])
