# SPDX-License-Identifier: GPL-2.0-or-later
"""Replications for tests: a disk and the volumes that it shall move to, and what must hold of them.

Most need no guest that boots: QEMU is paused, and writes for it by its monitor.
"""

from __future__ import annotations

import contextlib
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from functional.guests.guest import Disk, Plan
from functional.merge_lab import qemu_io, reads
from functional.vm_disks import ENGINE, element, prepared, records, root, source
from functional.vm_lab import MIB, PATIENCE, Machine, VmDisk, VmLab
from functional.world import COW, PREALLOCATED, RAW, SPARSE, new_id
from vdsm_storage.rpc.client import NoResponse, RemoteError

NOT_YET = 40
SIZE = 128 * MIB  # of a disk: a whole number of extents


@dataclass
class Place:
    """An image on a domain, and its volumes from the bottom up."""

    domain: str
    image: str
    volumes: list[str] = field(default_factory=list)

    @property
    def leaf(self) -> str:
        return self.volumes[-1]


def new_place(
    lab: VmLab, domain: str, formats: tuple[int, ...] = (COW,), size: int = SIZE, **more: Any
) -> Place:
    """An image of volumes with these formats, base first, without data."""
    world = lab.world
    place = Place(domain, new_id())
    block = world.places[domain].is_block
    for number, fmt in enumerate(formats):
        new = {"volFormat": fmt, "size": str(size), "domain": domain, **more}
        new["preallocate"] = PREALLOCATED if fmt == RAW and block else SPARSE
        if number:
            new |= {"srcImgUUID": place.image, "srcVolUUID": place.leaf, "sequence": number + 1}
        place.volumes.append(world.create(place.image, **new))
    return place


def twin(lab: VmLab, place: Place, domain: str, **more: Any) -> Place:
    """The same image with the same volumes, qcow2, on another domain, as engines make them."""
    world = lab.world
    for number, volume in enumerate(place.volumes):
        capacity = world.info(place.image, volume, place.domain)["capacity"]
        new = {"volFormat": COW, "size": capacity, "domain": domain, "preallocate": SPARSE, **more}
        if number:
            parent = place.volumes[number - 1]
            new |= {"srcImgUUID": place.image, "srcVolUUID": parent, "sequence": number + 1}
        params = world.new_volume(place.image, volume, **new)
        assert world.task("Volume.create", **params) == ""
    return Place(domain, place.image, list(place.volumes))


def spec(lab: VmLab, place: Place) -> dict[str, str]:
    return {
        "device": "disk", "poolID": lab.world.pool, "domainID": place.domain,
        "imageID": place.image, "volumeID": place.leaf,
    }  # fmt: skip


def ids(lab: VmLab, place: Place) -> dict[str, str]:
    return lab.world.ids(place.image, place.leaf, place.domain)


@contextlib.contextmanager
def guest(lab: VmLab, *places: Place, **plan: Any) -> Iterator[Machine]:
    """A paused one, whose disks are these; what it was given is let go at its end."""
    drives = []
    for place in places:
        path = lab.call("Image.prepare", **ids(lab, place))["path"]
        info = lab.world.info(place.image, place.leaf, place.domain)
        fmt = "qcow2" if info["format"] == "COW" else "raw"
        drives.append(Disk(path, fmt, image=place.image))
    made = lab.guests.create(Plan(f"r{new_id()[:8]}", tuple(drives), **plan))
    machine = Machine(made, [VmDisk(place.image, place.volumes) for place in places])
    try:
        yield machine
    finally:
        made.destroy()
        for place in places:
            with contextlib.suppress(RemoteError, NoResponse):
                lab.call("Image.teardown", **ids(lab, place))


# -- replicating -----------------------------------------------------------------------------


def start(lab: VmLab, machine: Machine, here: Place, there: Place, **more: Any) -> None:
    lab.call(
        "VM.diskReplicateStart", vmID=machine.id, srcDisk=spec(lab, here),
        dstDisk=spec(lab, there), **more,
    )  # fmt: skip


def finish(lab: VmLab, machine: Machine, here: Place, there: Place) -> int:
    """As engines do it, which ask again as long as it is too early; how often it was."""
    early = 0
    end = time.monotonic() + PATIENCE
    while True:
        try:
            lab.call(
                "VM.diskReplicateFinish", vmID=machine.id, srcDisk=spec(lab, here),
                dstDisk=spec(lab, there),
            )  # fmt: skip
        except RemoteError as error:
            if error.code != NOT_YET or time.monotonic() > end:
                raise
            early += 1
            time.sleep(0.1)
        else:
            return early


class Pair:
    """A paused guest that moves between two places: what is `here` and `there` changes."""

    def __init__(self, lab: VmLab, machine: Machine, here: Place, there: Place) -> None:
        self.lab, self.machine = lab, machine
        self.here, self.there = here, there
        self._bytes: dict[int, int] = {}  # what was written, by MiB

    def write(self, place: int, mib: int = 0) -> None:
        """The guest writes there, a MiB or so many, something else than before."""
        byte = self._bytes.get(place, 16 * place % 200) % 250 + 1
        length = mib * MIB if mib else 65536
        qemu_io(self.machine, f"write -P {byte} {place * MIB} {length}")
        self._bytes[place] = byte

    def start(self, **more: Any) -> None:
        start(self.lab, self.machine, self.here, self.there, **more)
        self.check_both()

    def pivot(self) -> None:
        """To the end."""
        finish(self.lab, self.machine, self.here, self.there)
        self.here, self.there = self.there, self.here
        self.check_one()

    def cancel(self) -> None:
        finish(self.lab, self.machine, self.here, self.here)
        self.check_one()

    def move(self, **more: Any) -> None:
        """The guest writes before and meanwhile."""
        self.write(1)
        self.start(**more)
        self.write(2)
        self.pivot()

    def check_both(self) -> None:
        check_both(self.lab, self.machine, self.here, self.there)

    def check_one(self) -> None:
        """It is here and nowhere else, with all that it wrote."""
        check_on(self.lab, self.machine, self.here, self.there)
        for place, byte in self._bytes.items():
            assert reads(self.machine, byte, place * MIB), place


# -- what must hold --------------------------------------------------------------------------


def mirror(machine: Machine, target: str = "vda") -> ET.Element | None:
    disk = element(machine, target)
    assert disk is not None
    return disk.find("mirror")


def replicas(machine: Machine) -> set[str]:
    """Volumes that the VM's record says disks are copied to."""
    path = f"./metadata/{{{ENGINE}}}vm/{{{ENGINE}}}device/{{{ENGINE}}}replica/{{{ENGINE}}}volumeID"
    return {each.text or "" for each in root(machine).iterfind(path)}


def is_ready(machine: Machine, target: str = "vda") -> bool:
    """Whether it can leave its volume."""
    found = mirror(machine, target)
    return found is not None and found.get("ready") == "yes"


def held(lab: VmLab, place: Place) -> bool:
    """Whether the host keeps it for a VM."""
    if place.image not in prepared(lab):
        return False
    return (lab.agent.dir / "run" / "storage" / place.domain / place.image).exists()


def check_both(lab: VmLab, machine: Machine, here: Place, there: Place, disk: str = "vda") -> None:
    """It is copied, and both are kept."""
    assert mirror(machine, disk) is not None
    assert source(machine, disk).endswith(f"/{here.image}/{here.leaf}")
    assert there.leaf in replicas(machine)
    assert held(lab, there)


def check_on(lab: VmLab, machine: Machine, on: Place, off: Place, disk: str = "vda") -> None:
    """The guest is on exactly one of the two; the other is let go, and no job is left."""
    assert mirror(machine, disk) is None
    assert not machine.guest.domain.blockJobInfo(disk)
    assert source(machine, disk).endswith(f"/{on.image}/{on.leaf}")
    assert off.leaf not in replicas(machine)
    assert on.leaf not in replicas(machine)
    assert held(lab, on)
    assert not held(lab, off)
    record = records(machine).get(disk, {})
    assert record.get("volumeID", on.leaf) == on.leaf
    assert record.get("domainID", on.domain) == on.domain
