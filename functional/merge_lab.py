# SPDX-License-Identifier: GPL-2.0-or-later
"""Live merges for tests: disks of several volumes, and what must hold of them.

Most need no guest that boots: QEMU is paused, and writes for it by its monitor.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt_qemu

from functional.vm_lab import MIB, Machine, VmDisk, VmLab
from functional.world import COW, RAW, SPARSE, new_id
from vdsm_storage.rpc.client import NoResponse, RemoteError

HMP = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
SIZE = 32 * MIB  # of a disk
PIECE = 64 * 1024  # bytes that each layer writes at places of its own
BULK = 8 * MIB  # where the many bytes are that make a merge last
INNER, ACTIVE = 1, 2  # what is merged of three layers


# -- disks and guests ------------------------------------------------------------------------


def tower(lab: VmLab, height: int, base: int = COW, bulk: int = 0) -> VmDisk:
    """A disk of `height` volumes.  Layer n wrote the byte n+1 at its own place (n+1) MiB, and over
    what the layers below wrote at place 0; and `bulk` bytes at BULK."""
    image = new_id()
    disk = VmDisk(image, [lab.world.create(image, volFormat=base, size=str(SIZE))])
    write(lab, disk, 0, bulk, "raw" if base == RAW else "qcow2")
    for number in range(1, height):
        disk.volumes.append(above(lab, disk))
        write(lab, disk, number, bulk)
    return disk


def above(lab: VmLab, disk: VmDisk, size: int = 0) -> str:
    """A volume on the leaf, of its size or of another."""
    capacity = str(size) if size else lab.world.info(disk.image, disk.leaf)["capacity"]
    return lab.world.create(
        disk.image, volFormat=COW, preallocate=SPARSE, size=capacity, srcImgUUID=disk.image,
        srcVolUUID=disk.leaf, sequence=len(disk.volumes) + 1,
    )  # fmt: skip


def write(lab: VmLab, disk: VmDisk, number: int, bulk: int = 0, fmt: str = "qcow2") -> None:
    commands = [f"write -P {number + 1} {place} {PIECE}" for place in (0, (number + 1) * MIB)]
    if bulk:
        commands.append(f"write -P {number + 1} {BULK} {bulk}")
    argv = ["qemu-io", "-f", fmt]
    for command in commands:
        argv += ["-c", command]
    subprocess.run([*argv, lab.prepare(disk)], check=True, timeout=60, capture_output=True)


def qemu_io(machine: Machine, command: str, disk: int = 0) -> None:
    """By the guest's own disk."""
    device = f"/machine/peripheral/virtio-disk{disk}/virtio-backend"
    libvirt_qemu.qemuMonitorCommand(
        machine.guest.domain, f'qemu-io -d {device} "{command}"', HMP
    )


def reads(machine: Machine, byte: int, place: int) -> bool:
    """Whether the guest's disk has a piece of these bytes there."""
    qemu_io(machine, "flush")
    root = ET.fromstring(machine.guest.domain.XMLDesc())
    disk = root.find("./devices/disk")
    assert disk is not None
    source, driver = disk.find("source"), disk.find("driver")
    assert source is not None
    assert driver is not None
    path = source.get("file") or source.get("dev")
    argv = ["qemu-io", "-U", "-r", "-n", "-f", driver.get("type", ""), "-c",
            f"read -P {byte} {place} {PIECE}", path or ""]  # fmt: skip
    done = subprocess.run(argv, check=False, timeout=60, capture_output=True, text=True)
    assert f"read {PIECE}/" in done.stdout, done
    return "Pattern verification failed" not in done.stdout


def check_data(machine: Machine, layers: int) -> None:
    """What a tower shows."""
    assert reads(machine, layers, 0)
    for number in range(layers):
        assert reads(machine, number + 1, (number + 1) * MIB), f"layer {number}"


def path_of(lab: VmLab, disk: VmDisk, volume: str) -> str:
    domain = lab.world.places[lab.world.main].spec
    return f"{domain}/{lab.world.main}/images/{disk.image}/{volume}"


# -- merging ---------------------------------------------------------------------------------


def ask(lab: VmLab, machine: Machine, top: int, disk: int = 0, **more: Any) -> str:
    """Volume number `top` into the one below it; returns the job."""
    what = machine.disks[disk]
    job = more.pop("job", new_id())
    drive = {
        "device": "disk", "poolID": lab.world.pool, "domainID": lab.world.main,
        "imageID": what.image, "volumeID": what.leaf,
    }  # fmt: skip
    lab.call(
        "VM.merge", vmID=machine.id, drive=drive, baseVolUUID=what.volumes[top - 1],
        topVolUUID=what.volumes[top], jobUUID=job, bandwidth=str(more.pop("bandwidth", 0)), **more,
    )  # fmt: skip
    return job


def jobs(lab: VmLab, machine: Machine) -> dict[str, Any]:
    found = lab.stats(machine.id)["vmJobs"]
    assert isinstance(found, dict)
    return found


def outcome(lab: VmLab, job: str) -> dict[str, Any]:
    """As Host.getJobs has it when it has ended."""
    found: dict[str, Any] = {}

    def ended() -> bool:
        found.update(lab.call("Host.getJobs", job_type="virt", job_ids=[job])[job])
        return found["status"] in ("done", "failed", "aborted")

    lab.wait(ended, "the job to end")
    return found


def chain(machine: Machine, disk: int = 0) -> list[str]:
    """The volumes that the VM uses, base first, by libvirt."""
    image = machine.disks[disk].image
    xml = re.sub(r"<mirror.*?</mirror>", "", machine.guest.domain.XMLDesc(), flags=re.DOTALL)
    return re.findall(rf"<source (?:file|dev)='[^']*/{image}/([0-9a-f-]+)'", xml)[::-1]


def check_chain(lab: VmLab, machine: Machine, expected: list[str], disk: int = 0) -> None:
    """libvirt, the headers and the metadata agree on it."""
    world, image = lab.world, machine.disks[disk].image
    assert chain(machine, disk) == expected
    where = lab.world.ids(image, expected[-1])
    names = {"leafVolID": where.pop("volumeID"), **where}
    assert lab.call("Image.reconcileVolumeChain", **names) == expected
    for number, volume in enumerate(expected):
        info = world.info(image, volume)
        parent = expected[number - 1] if number else "00000000-0000-0000-0000-000000000000"
        role = "LEAF" if volume == expected[-1] else "INTERNAL"
        assert (info["parent"], info["voltype"]) == (parent, role)
        assert info["legality"] == "LEGAL"


def finish(lab: VmLab, machine: Machine, top: int, disk: int = 0) -> None:
    """What an engine does when the job has gone; the disk has one volume less then."""
    what = machine.disks[disk]
    gone = what.volumes.pop(top)
    check_chain(lab, machine, what.volumes, disk)
    assert lab.world.info(what.image, gone)["legality"] == "ILLEGAL"
    ids = lab.world.ids(what.image, gone)
    ids["volumeList"] = [ids.pop("volumeID")]
    assert lab.world.task("Image.deleteVolumes", **ids, postZero="false", force="false") == ""
    check_chain(lab, machine, what.volumes, disk)


def merge(lab: VmLab, machine: Machine, top: int) -> None:
    """One that succeeds."""
    job = ask(lab, machine, top)
    lab.wait(lambda: not jobs(lab, machine), "the job to end")
    assert outcome(lab, job)["status"] == "done", outcome(lab, job)
    finish(lab, machine, top)


@contextlib.contextmanager
def guest(lab: VmLab, disk: VmDisk) -> Iterator[Machine]:
    machine = lab.machine_of(f"m{new_id()[:8]}", [disk])
    try:
        yield machine
    finally:
        machine.guest.destroy()
        with contextlib.suppress(RemoteError, NoResponse):
            lab.call("Image.teardown", **lab.world.ids(disk.image, disk.leaf))


@contextlib.contextmanager
def slow(lab: VmLab, height: int = 3) -> Iterator[Machine]:
    """A guest whose merges last for some seconds, with `bandwidth=1`."""
    with guest(lab, tower(lab, height, bulk=10 * MIB)) as machine:
        yield machine


def begin(lab: VmLab, machine: Machine, top: int, job: str) -> None:
    """The agent may die, or be stopped, before it has answered."""
    with contextlib.suppress(NoResponse):
        ask(lab, machine, top, job=job)


@contextlib.contextmanager
def continued(pid: int) -> Iterator[None]:
    """It goes on whenever it is stopped: a pivot that is tried again comes to its step again."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(0.1):
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
