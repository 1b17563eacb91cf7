# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests do with guests: snapshots of them, and a log that a guest writes meanwhile."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from functional.vm_lab import Machine, VmDisk, VmLab
from functional.world import MIB, RAW, new_id

PATIENCE = 60.0  # seconds


def follow(lab: VmLab, machine: Machine, disk: VmDisk) -> None:
    """Learn from the XML which volume the guest writes to; others that were made are deleted."""
    xml = re.sub("<mirror .*?</mirror>", "", machine.guest.domain.XMLDesc(), flags=re.DOTALL)
    chain = re.findall(rf"<source (?:file|dev)='[^']*/{disk.image}/([0-9a-f-]+)'", xml)
    assert chain
    disk.volumes = chain[::-1]
    for volume in set(lab.world.volumes(disk.image)) - set(chain):
        names = lab.world.ids(disk.image, volume)
        assert lab.world.task("Volume.delete", **names, postZero="false", force="false") == ""


def check_chain(lab: VmLab, disk: VmDisk) -> None:
    """Metadata and headers agree; no volume but the leaf, which the guest writes, is damaged."""
    for parent, volume in zip(disk.volumes, disk.volumes[1:], strict=False):
        info = lab.world.info(disk.image, volume)
        assert (info["parent"], info["legality"]) == (parent, "LEGAL")
    for volume in disk.volumes[:-1]:
        path = path_of(lab, disk, volume)
        subprocess.run(["qemu-img", "check", "-q", "-U", path], check=True, timeout=60)


def path_of(lab: VmLab, disk: VmDisk, volume: str) -> str:
    """On a block domain of a volume that is prepared, as those of a guest's disk are."""
    domain = lab.world.places[lab.world.main].spec
    if lab.world.block:
        domain = f"{lab.agent.dir}/data-center/mnt/blockSD"
    return f"{domain}/{lab.world.main}/images/{disk.image}/{volume}"


def ask(
    lab: VmLab, machine: Machine, disks: list[VmDisk] | None = None, job: str = "", **more: Any
) -> str:
    """Make new volumes and ask for a snapshot; returns the job."""
    job = job or new_id()
    drives = [drive(lab, disk) for disk in (machine.disks if disks is None else disks)]
    lab.call("VM.snapshot", vmID=machine.id, snapDrives=drives, jobUUID=job, **more)
    return job


def drive(lab: VmLab, disk: VmDisk, leaf: str = "") -> dict[str, str]:
    """Onto a new volume, or onto `leaf`."""
    return {
        "domainID": lab.world.main, "imageID": disk.image, "baseVolumeID": disk.leaf,
        "volumeID": leaf or lab.new_leaf(disk),
    }  # fmt: skip


def end(lab: VmLab, job: str) -> dict[str, Any]:
    """The job when it has ended."""
    found: dict[str, Any] = {}

    def ended() -> bool:
        nonlocal found
        found = lab.call("Host.getJobs", job_type="virt", job_ids=[job])[job]
        return found["status"] in ("done", "failed", "aborted")

    lab.wait(ended, "the job to end", PATIENCE)
    return found


def snapshot(
    lab: VmLab, machine: Machine, disks: list[VmDisk] | None = None, **more: Any
) -> dict[str, Any]:
    """One that succeeds; `machine.disks` know the new leaves."""
    found = end(lab, ask(lab, machine, disks, **more))
    assert found["status"] == "done", found
    for disk in machine.disks:
        follow(lab, machine, disk)
    return found


def leaves(machine: Machine) -> set[str]:
    """The volumes that the guest writes to, by libvirt."""
    xml = re.sub(r"<backingStore.*?</disk>", "", machine.guest.domain.XMLDesc(), flags=re.DOTALL)
    return set(re.findall(r"<source (?:file|dev)='[^']*/([0-9a-f-]{36})'", xml))


def memory_volumes(lab: VmLab) -> tuple[str, VmDisk, VmDisk]:
    """The string that engines send, the volume for the memory, that for the configuration."""
    made = []
    for kind, size in (("MEMD", 512 * MIB), ("MEMM", 64 * 1024)):
        image = new_id()
        volume = lab.world.create(image, volFormat=RAW, size=str(size), diskType=kind)
        made.append(VmDisk(image, [volume]))
    memory, conf = made
    names = (lab.world.main, lab.world.pool, memory.image, memory.leaf, conf.image, conf.leaf)
    return ",".join(names), memory, conf


class Log:
    """The guest writes numbered lines to both disks; each is acknowledged when it is on disk."""

    def __init__(self, machine: Machine) -> None:
        self._guest = machine.guest
        self.acked = 0
        append = "dd oflag=append conv=notrunc,fsync 2>/dev/null"
        self._guest.run("rm -f /mnt/vd?/log; sync")
        self._guest.send(
            f"(i=0; while i=$((i+1)); do echo $i | {append} of=/mnt/vda/log &&"
            f" echo $i | {append} of=/mnt/vdb/log && echo ack $i; done) & writer=$!"
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        self.wait(3)

    def wait(self, more: int) -> int:
        """Until so many more lines are on disk; returns how many are."""
        wanted, limit = self.acked + more, time.monotonic() + PATIENCE
        while self.acked < wanted:
            assert time.monotonic() < limit, "the guest does not write"
            time.sleep(0.01)
        return self.acked

    def _read(self) -> None:
        while (line := self._guest.line()) != "stopped":
            if line.startswith("ack "):
                self.acked = int(line[4:])

    def stop(self) -> None:
        self._guest.send("kill $writer; sleep 0.5; echo; echo stopped")
        self._thread.join()
        assert self._guest.line() == "=0"


def read_log(scratch: Path, path: str, *, clean: bool = True, form: str = "qcow2") -> int:
    """Mount what a volume holds, read-only; returns how many lines are there, none missing.

    On a read-only device ext4 refuses what wants its journal replayed.
    """
    raw, place = scratch / "copy.raw", scratch / "copy"
    copy = ["qemu-img", "convert", "-U", "-f", form, "-O", "raw", path, str(raw)]
    subprocess.run(copy, check=True, timeout=60)
    place.mkdir(exist_ok=True)
    how = ["--read-only"] if clean else []
    attach = ["losetup", "--find", "--show", *how, str(raw)]
    loop = subprocess.check_output(attach, text=True, timeout=60).strip()
    try:
        option = "ro" if clean else "rw"
        subprocess.run(["mount", "-t", "ext4", "-o", option, loop, place], check=True, timeout=60)
        try:
            lines = (place / "log").read_text().splitlines()
        finally:
            subprocess.run(["umount", place], check=True, timeout=60)
        subprocess.run(["e2fsck", "-fn", loop], check=True, timeout=60, capture_output=True)
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True, timeout=60)
        raw.unlink()
    assert lines == [str(number) for number in range(1, len(lines) + 1)]
    return len(lines)
