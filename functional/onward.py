# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that writes ever onward, and so needs ever more of a thin volume, on real device-mapper.

See guests/spread.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import libvirt

from functional.checker.group import Group, read_group
from functional.guests import spread, writer
from functional.guests.guest import Disk, Plan
from functional.lab.inner.tool import run
from functional.vm_lab import Machine, VmDisk, VmLab
from functional.vm_work import path_of
from functional.world import COW, new_id

EXTENT = 128 * 1024**2


class Onward:
    """`device` is what the domain is on.  The guest runs, `pace` writes a second at most; or it is
    still to `goes_on`.  `placed` as in guests/spread.py."""

    def __init__(
        self, lab: VmLab, name: str, device: str, initial: int, pace: int, *, runs: bool = True,
        placed: bool = False,
    ) -> None:  # fmt: skip
        self.lab = lab
        self.name = name
        self.device = device
        self.serial = lab.libvirtd.directory / f"{name}.numbers"
        image = new_id()
        size = {"size": str(spread.CAPACITY), "initialSize": str(initial)}
        self.disk = VmDisk(image, [lab.world.create(image, volFormat=COW, **size)])
        path = lab.prepare(self.disk)
        sector = lab.agent.dir / "sector"
        sector.write_bytes(spread.boot_sector())
        commands = spread.commands(path, str(sector))
        if placed:
            commands = spread.placed_commands(path, str(sector), f"{sector}.image")
        for argv in commands:
            run(*argv)
        tune = f"<iotune><write_iops_sec>{pace}</write_iops_sec></iotune>"
        plan = Plan(
            name, (Disk(path, image=image, more=tune),), agent=False,
            devices=writer.serial_xml(self.serial),
        )  # fmt: skip
        self.machine = Machine(lab.guests.create(plan), [self.disk])
        if runs:
            self.goes_on()

    # -- the guest ---------------------------------------------------------------------------

    @property
    def id(self) -> str:
        return self.machine.id

    @property
    def domain(self) -> libvirt.virDomain:
        return self.machine.guest.domain

    @property
    def path(self) -> str:
        return path_of(self.lab, self.disk, self.disk.leaf)

    def goes_on(self) -> None:
        self.domain.resume()

    def stops(self) -> None:
        self.domain.suspend()

    def told(self) -> int:
        """The last number that is known to be on the storage."""
        return writer.told(self.serial)

    def writes(self, more: int = 1, timeout: float = 120.0) -> None:
        before = self.told()
        self.lab.wait(lambda: self.told() >= before + more, f"{more} more numbers", timeout)

    def pace(self, writes: int) -> None:
        """As its user limits the disk; 0 for no limit."""
        tunables = [{"name": "vda", "ioTune": {"write_iops_sec": writes}}]
        self.lab.call("VM.setIoTune", vmID=self.id, tunables=tunables)

    def limits(self) -> dict[str, int]:
        """Those that libvirt has, but for those that are none."""
        found = self.domain.blockIoTune("vda")
        return {key: value for key, value in found.items() if isinstance(value, int) and value}

    def waits_for_space(self) -> bool:
        state, reason = self.domain.state()
        return (state, reason) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR)

    def written(self) -> int:
        """The end of what it has written to the volume."""
        allocation: int = self.domain.blockInfo("vda")[1]
        return allocation

    # -- its volume --------------------------------------------------------------------------

    def thin(self) -> dict[str, Any]:
        """As the statistics have it: nothing while its QEMU is too busy to be asked."""
        found: dict[str, Any] = {}

        def told() -> bool:
            disks = self.lab.stats(self.id)["disks"]
            found.update(disks.get("vda", {}).get("thin", {}))
            return bool(found)

        self.lab.wait(told, "statistics of the disk")
        return found

    def number(self, key: str) -> float:
        return float(self.thin()[key])

    def wait_state(self, state: str, timeout: float = 120.0) -> dict[str, Any]:
        self.lab.wait(lambda: self.thin().get("state") == state, f"the disk to be {state}", timeout)
        return self.thin()

    def wait_extends(self, more: int, timeout: float = 300.0) -> None:
        wanted = self.number("extends") + more
        self.lab.wait(lambda: self.number("extends") >= wanted, f"{more} extensions", timeout)

    def group(self) -> Group:
        """As it is on the storage, read by the checker: not as this kernel remembers it, which is
        not told of what goes through the volumes."""
        run("blockdev", "--flushbufs", self.device)
        problems: list[str] = []
        group = read_group([self.device], self.lab.world.main, problems)
        assert problems == []
        assert group is not None
        return group

    def size(self) -> int:
        """Of the volume, in the group's metadata."""
        return self.group().size(self.disk.leaf)

    def check(self) -> None:
        """All that it was told is written is there, and all agree on how large the volume is.  It
        is stopped meanwhile, so that nothing changes."""
        self.stops()
        known = self.told()
        armed = self.wait_state("armed")
        size = int(armed["size"])
        assert self.size() == size
        assert mapped(self.path) == on_storage(self.group(), self.disk.leaf)
        assert int(run("blockdev", "--getsize64", self.path)) == size
        assert int(armed["allocation"]) < int(armed["threshold"]) < size
        assert self.check_numbers(known) >= known
        self.goes_on()

    def check_numbers(self, known: int) -> int:
        """Returns the last one."""
        return spread.check(self.group(), self.disk.leaf, known)

    def close(self) -> None:
        self.machine.guest.destroy()
        self.lab.call("Image.teardown", **self.lab.world.ids(self.disk.image, self.disk.leaf))


def mapped(path: str) -> Mapping[int, tuple[str, int]]:
    """Extent by extent of an active volume, where device-mapper has it: device, sector."""
    unit, found = EXTENT // writer.SECTOR, {}
    for row in run("dmsetup", "table", path).splitlines():
        first, count, kind, device, start = row.split()
        assert kind == "linear"
        for at in range(0, int(count), unit):
            found[(int(first) + at) // unit] = (device, int(start) + at)
    return found


def on_storage(group: Group, lv: str) -> Mapping[int, tuple[str, int]]:
    """The same, as the group's metadata have it."""
    unit, found = EXTENT // writer.SECTOR, {}
    assert group.extent_size == EXTENT
    for segment in group.lvs[lv].segments:
        pv = group.pvs[segment.pv]
        number = os.stat(pv.device).st_rdev
        device = f"{os.major(number)}:{os.minor(number)}"
        for at in range(segment.count):
            sector = pv.pe_start // writer.SECTOR + (segment.pv_start + at) * unit
            found[segment.start + at] = (device, sector)
    return found
