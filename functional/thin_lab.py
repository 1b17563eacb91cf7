# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that grow, for tests: guests that write, what the agent says of them, what must hold."""

from __future__ import annotations

import contextlib
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from typing import Any

from functional.checker.group import read_group
from functional.merge_lab import qemu_io
from functional.vm_lab import MIB, Machine, VmDisk, VmLab
from functional.vm_luns import standin_of
from functional.vm_work import path_of
from functional.world import COW, PREALLOCATED, RAW, SPARSE, new_id

GIB = 1024 * MIB
EXTENT = 128 * MIB
CAPACITY = 16 * GIB
PIECE = 32 * MIB  # what a guest writes at once
BYTE = 0x45  # all of it


def thin_disk(lab: VmLab, size: int = 512 * MIB, capacity: int = CAPACITY) -> VmDisk:
    """A qcow2 volume that begins with `size` bytes."""
    image = new_id()
    more = {"size": str(capacity), "initialSize": str(size * 10 // 11), "preallocate": SPARSE}
    return VmDisk(image, [lab.world.create(image, volFormat=COW, **more)])


def new_leaf(lab: VmLab, disk: VmDisk, size: int = 256 * MIB) -> str:
    """What an engine makes before VM.snapshot."""
    capacity = lab.world.info(disk.image, disk.leaf)["capacity"]
    return lab.world.create(
        disk.image, volFormat=COW, preallocate=SPARSE, size=capacity,
        initialSize=str(size * 10 // 11), srcImgUUID=disk.image, srcVolUUID=disk.leaf,
        sequence=len(disk.volumes) + 1,
    )  # fmt: skip


def filler(lab: VmLab, leave: int) -> VmDisk:
    """A raw volume that takes all of the domain's space but `leave` bytes."""
    stats = lab.call("StorageDomain.getStats", storagedomainID=lab.world.main)
    size = (int(stats["diskfree"]) - leave) // EXTENT * EXTENT
    image = new_id()
    more = {"size": str(size), "volFormat": RAW, "preallocate": PREALLOCATED}
    return VmDisk(image, [lab.world.create(image, **more)])


def delete(lab: VmLab, disk: VmDisk) -> None:
    assert lab.world.task(
        "Image.delete", storagepoolID=lab.world.pool, storagedomainID=lab.world.main,
        imageID=disk.image, postZero="false", force="false",
    ) == ""  # fmt: skip


def thin(lab: VmLab, machine: Machine, name: str = "vda") -> dict[str, Any]:
    """What the agent says of a disk; {} if it is not watched."""
    disks = lab.stats(machine.id)["disks"]  # without those that QEMU is busy with
    found: dict[str, Any] = disks.get(name, {}).get("thin", {})
    return found


def wait_thin(
    lab: VmLab, machine: Machine, holds: Callable[[dict[str, Any]], object], what: str,
    name: str = "vda", timeout: float = 60.0,
) -> dict[str, Any]:  # fmt: skip
    found: dict[str, Any] = {}

    def there() -> bool:
        nonlocal found
        found = thin(lab, machine, name)
        return bool(found and holds(found))

    try:
        lab.wait(there, what, timeout)
    except AssertionError as error:
        raise AssertionError(f"{error}; {found}") from None
    return found


def wait_armed(lab: VmLab, machine: Machine, name: str = "vda") -> dict[str, Any]:
    return wait_thin(lab, machine, lambda one: one["state"] == "armed", "it to be armed", name)


def lv_size(lab: VmLab, volume: str, domain: str = "") -> int:
    """As the LUN has it, read by the parser of the checker."""
    problems: list[str] = []
    devices = [d for place in lab.world.places.values() for d in place.devices]
    group = read_group(devices, domain or lab.world.main, problems)
    assert problems == []
    assert group is not None
    return group.size(volume)


def device_size(lab: VmLab, volume: str, domain: str = "") -> int:
    """As this host has it."""
    size: int = standin_of(lab).active(domain or lab.world.main)[volume]["size"]
    return size


def grow(machine: Machine, start: int, end: int, disk: int = 0, step: int = 64 * MIB) -> None:
    """QEMU writes the bytes from start to end for a guest that does not run."""
    for place in range(start, end, step):
        qemu_io(machine, f"write -P 7 {place} {min(step, end - place)}", disk)


def check(lab: VmLab, machine: Machine, name: str = "vda") -> dict[str, Any]:
    """What must hold of a disk that is at rest: QEMU's threshold is where the agent says, below
    the end and above what was written; LUN, device and agent agree."""
    found = wait_armed(lab, machine, name)
    number = "abcdefgh".index(name[-1])
    disk = machine.disks[number]
    size, threshold = int(found["size"]), int(found["threshold"])
    assert int(found["allocation"]) < threshold < size
    assert (size, size) == (lv_size(lab, disk.leaf), device_size(lab, disk.leaf)), found
    stats = machine.guest.domain.connect().domainListGetStats([machine.guest.domain])[0][1]
    index = next(n for n in range(stats["block.count"]) if stats[f"block.{n}.name"] == name)
    assert stats[f"block.{index}.threshold"] == threshold
    return found


def sound(lab: VmLab, disk: VmDisk) -> None:
    """The image of a guest that has ended; a QEMU that was killed may have left clusters that
    nothing uses (3), which harm nobody."""
    path = path_of(lab, disk, disk.leaf)
    done = subprocess.run(["qemu-img", "check", "-q", path], check=False, timeout=120)
    assert done.returncode in (0, 3), done


@contextlib.contextmanager
def broken_lvm(lab: VmLab) -> Iterator[None]:
    """No volume of its host can be changed."""
    locks = lab.agent.dir / "run" / "lvm" / "locks"
    locks.rename(locks.with_name("away"))
    locks.write_text("lvm cannot make its locks here")
    try:
        yield
    finally:
        locks.unlink()
        locks.with_name("away").rename(locks)


def history(lab: VmLab, machine: Machine, name: str = "vda") -> list[str]:
    """What became of a disk, word by word."""
    points = lab.call("VM.getThinHistory", vmID=machine.id, drive=name)[name]
    return [point["what"] for point in points]


def limits(machine: Machine, name: str = "vda") -> dict[str, int]:
    """Of the disk, as QEMU has them."""
    found: dict[str, int] = machine.guest.domain.blockIoTune(name)
    return {key: value for key, value in found.items() if key != "group_name"}


def node(machine: Machine, name: str = "vda") -> str:
    """libvirt's name of the layer that the guest writes to."""
    for disk in ET.fromstring(machine.guest.domain.XMLDesc()).iterfind("./devices/disk"):
        target, source = disk.find("target"), disk.find("source")
        if target is not None and target.get("dev") == name and source is not None:
            return f"{name}[{source.get('index')}]"
    raise AssertionError(f"no disk {name}")


# -- in a guest that runs ----------------------------------------------------------------------


def begin(machine: Machine) -> None:
    """Something to write."""
    machine.guest.wait_ready()
    machine.guest.run(f"tr '\\0' '\\{BYTE:o}' </dev/zero | head -c {PIECE} >/run/piece", 120)


def writing(first: int, pieces: int, device: str = "vda") -> str:
    """A command that writes pieces, one after the other."""
    return (
        f"i={first}; while [ $i -lt {first + pieces} ]; do dd if=/run/piece of=/dev/{device} bs=1M"
        f" seek=$((i * {PIECE // MIB})) oflag=direct conv=notrunc 2>/dev/null || break;"
        f" i=$((i + 1)); done; echo $i >/run/written; [ $i = {first + pieces} ]"
    )


def check_written(lab: VmLab, machine: Machine, first: int, pieces: int) -> None:
    """They are in the image, as the host reads it."""
    qemu_io(machine, "flush")
    disk = machine.disks[0]
    argv = ["qemu-io", "-U", "-r", "-f", "qcow2"]
    for number in range(first, first + pieces):
        argv += ["-c", f"read -P {BYTE} {number * PIECE} {PIECE}"]
    done = subprocess.run(
        [*argv, path_of(lab, disk, disk.leaf)], check=False, timeout=300, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stdout.count(f"read {PIECE}/{PIECE}") == pieces, done
    assert "Pattern verification failed" not in done.stdout
