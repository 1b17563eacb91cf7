# SPDX-License-Identifier: GPL-2.0-or-later
"""What an engine does with the disks of a VM that runs: snapshots, merges, moves elsewhere."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from functional.engine.datacenter import DataCenter, Disk, FlowError
from functional.engine.host import COW, RAW, Host
from functional.engine.replies import Job, VmStats
from functional.engine.wire import VdsError
from functional.guests import guest as tiny

NOT_READY = 40
PERHAPS_RUNNING = (13, 52)  # what VM.merge may answer although the job runs
MINUTES = {"freeze_timeout": 8}
MINUTES_WITH_MEMORY = {"timeout": 30}
SPACE = "http://ovirt.org/vm/1.0"


def nothing() -> None:
    """No storage of another kind takes part."""


def drive(dc: DataCenter, disk: Disk) -> dict[str, str]:
    """How verbs on VMs name a disk; the volume is the one that the guest writes to."""
    return {
        "poolID": dc.id, "domainID": disk.domain, "imageID": disk.image, "volumeID": disk.leaf,
    }  # fmt: skip


def fill(scratch: Path, path: str, fmt: int, size: int) -> None:
    """A file system, on what a guest will see."""
    raw = scratch / "fill.raw"
    form = "raw" if fmt == RAW else "qcow2"
    try:
        with raw.open("wb") as file:
            file.truncate(size)
        subprocess.run(["mkfs.ext4", "-q", raw], check=True, timeout=60)
        copy = ["qemu-img", "convert", "-n", "-f", "raw", "-O", form, str(raw), path]
        subprocess.run(copy, check=True, timeout=60)
    finally:
        raw.unlink(missing_ok=True)


def xml_disk(disk: Disk, path: str, fmt: int) -> tiny.Disk:
    """An engine's alias is how it finds the disk again."""
    form = "raw" if fmt == RAW else "qcow2"
    return tiny.Disk(path, form, disk.image, f"<alias name='ua-{disk.image}'/>")


def metadata(dc: DataCenter, disks: list[Disk]) -> str:
    devices = ""
    for number, disk in enumerate(disks):
        names = "".join(
            f"<ovirt-vm:{key}>{value}</ovirt-vm:{key}>" for key, value in drive(dc, disk).items()
        )
        target = quoteattr(f"vd{'abcdefgh'[number]}")
        devices += f"<ovirt-vm:device devtype='disk' name={target}>{names}</ovirt-vm:device>"
    return f"<ovirt-vm:vm xmlns:ovirt-vm='{SPACE}'>{devices}</ovirt-vm:vm>"


class RunningVm:
    """A VM on a host, as the engine has it: `disks` by the number, with their volumes."""

    def __init__(self, dc: DataCenter, host: Host, vm: str, disks: list[Disk]) -> None:
        self.dc, self.host, self.id = dc, host, vm
        self.disks = disks

    def stats(self) -> VmStats:
        found = self.host.vms().get(self.id)
        if found is None:
            raise FlowError(f"VM {self.id} is gone from its host")
        return found

    def chains(self) -> dict[str, list[str]]:
        return self.host.chains(self.id)

    def check(self) -> None:
        """The host has the chains that the engine has."""
        assert self.chains() == {disk.image: list(disk.volumes) for disk in self.disks}

    def _call(self, verb: str, **params: Any) -> Any:
        return self.host.vds.call(verb, {"vmID": self.id, **params})

    # -- a snapshot --------------------------------------------------------------------------

    def snapshot(
        self,
        numbers: list[int] | None = None,
        *,
        elsewhere: Callable[[], None] | None = None,
        migrating: bool = False,
        memory: str = "",
    ) -> Job:
        """Of all disks, or of some.

        `elsewhere` makes snapshots of other disks on storage of their own: the guest is frozen for
        that, if it can be.  The engine takes the new volumes for the disks' in any case.
        """
        frozen = elsewhere is not None and self._freeze()
        try:
            grown = self._new_leaves(range(len(self.disks)) if numbers is None else numbers)
            (elsewhere or nothing)()
            drives = [
                {
                    "domainID": disk.domain, "imageID": disk.image,
                    "baseVolumeID": self.disks[number].leaf, "volumeID": disk.leaf,
                }
                for number, disk in grown.items()
            ]  # fmt: skip
            state = self.ask_snapshot(drives, frozen=frozen or migrating, memory=memory)
        finally:
            if frozen:
                self._call("VM.thaw")
        for number, disk in grown.items():
            self.disks[number] = disk
        return state

    def ask_snapshot(self, drives: list[dict[str, str]], *, frozen: bool, memory: str = "") -> Job:
        job = str(uuid.uuid4())
        times = {**MINUTES_WITH_MEMORY, "snapMemory": memory} if memory else MINUTES
        self._call("VM.snapshot", snapDrives=drives, frozen=frozen, jobUUID=job, **times)
        state = self.dc.wait_job(self.host, job, "virt")
        if state is None:
            raise FlowError(f"the host lost job {job}")
        assert isinstance(state, Job)
        return state

    def _freeze(self) -> bool:
        """A guest that cannot be frozen is no obstacle."""
        try:
            self._call("VM.freeze")
        except VdsError as error:
            if error.code not in (19, 75, 76):
                raise
            return False
        return True

    def _new_leaves(self, numbers: Any) -> dict[int, Disk]:
        """All tasks at once."""
        dc, grown, tasks = self.dc, {}, []
        for number in numbers:
            disk = self.disks[number]
            size = dc.info(disk, self.host).capacity
            grown[number] = replace(disk, volumes=(*disk.volumes, str(uuid.uuid4())))
            parent = (disk.image, disk.leaf)
            asked = dc.new_leaf(grown[number], size, parent, len(disk.volumes) + 1)
            tasks.append(dc.irs("Volume.create", **asked))
        assert dc.spm is not None
        for task in tasks:
            dc.finish_task(dc.spm, "Volume.create", task)
        return grown

    # -- a merge -----------------------------------------------------------------------------

    def merge(self, number: int, top: int) -> None:
        """Volume number `top` of a disk goes into the one below it; the four steps."""
        disk = self.disks[number]
        base, gone = disk.volumes[top - 1], disk.volumes[top]
        job = str(uuid.uuid4())
        try:
            self._call(
                "VM.merge", drive=drive(self.dc, disk), baseVolUUID=base, topVolUUID=gone,
                bandwidth="0", jobUUID=job,
            )  # fmt: skip
        except VdsError as error:
            if error.code not in PERHAPS_RUNNING:
                raise
        self.dc.wait(lambda: job not in self.stats().jobs, f"block job {job}")
        chain = self.chains()[disk.image]
        if gone in chain or base not in chain:
            raise FlowError(f"{gone} was not merged into {base}: {chain}")
        where = {"storagedomainID": disk.domain, "imageID": disk.image}
        self.dc.task(
            "Image.deleteVolumes", **where, volumeList=[gone], postZero="false", force="false"
        )
        kept = tuple(volume for volume in disk.volumes if volume != gone)
        self.disks[number] = replace(disk, volumes=kept)
        if self.dc.domains[disk.domain].server.is_block:
            info = self.host.volume_info(self.dc.id, disk.domain, disk.image, base)
            if info.format == "COW":
                self.dc.task(
                    "StoragePool.reduceVolume", **where, volumeID=base,
                    allowActive=base == kept[-1],
                )  # fmt: skip

    # -- a move to another domain --------------------------------------------------------------

    def start_move(self, number: int, target: str) -> tuple[Disk, Disk]:
        """Snapshot, structure, replication of what the guest writes, and copies of the rest."""
        assert self.snapshot([number], migrating=True).status == "done"
        source = self.disks[number]
        moved = replace(source, domain=target)
        self._make_structure(source, moved)
        self._call(
            "VM.diskReplicateStart", srcDisk=self._replica(source), dstDisk=self._replica(moved),
            needExtend=False,
        )  # fmt: skip
        for volume in source.volumes[:-1]:
            self._copy_below(source, moved, volume)
        return source, moved

    def end_move(self, number: int, source: Disk, moved: Disk, *, back: bool = False) -> None:
        """To the new place, or `back`; what is left at the other one is deleted."""
        kept, left = (source, moved) if back else (moved, source)

        def over() -> bool:
            try:
                self._call(
                    "VM.diskReplicateFinish", srcDisk=self._replica(source),
                    dstDisk=self._replica(kept),
                )  # fmt: skip
            except VdsError as error:
                if error.code != NOT_READY:
                    raise
                return False
            return True

        self.dc.wait(over, "the replica to be in step")
        self.dc.delete(left)
        self.disks[number] = kept
        self.merge(number, len(kept.volumes) - 1)

    def _replica(self, disk: Disk) -> dict[str, str]:
        return {"device": "disk", **drive(self.dc, disk)}

    def _make_structure(self, source: Disk, moved: Disk) -> None:
        """The same volumes on the other domain, parents first."""
        parent = (str(uuid.UUID(int=0)), str(uuid.UUID(int=0)))
        for place, volume in enumerate(source.volumes):
            info = self.host.volume_info(self.dc.id, source.domain, source.image, volume)
            self.dc.create_volume(
                replace(moved, volumes=source.volumes[: place + 1]), info.capacity,
                fmt=RAW if info.format == "RAW" else COW, parent=parent, sequence=place + 1,
            )  # fmt: skip
            parent = (moved.image, volume)

    def _copy_below(self, source: Disk, moved: Disk, volume: str) -> None:
        """On the VM's host: both images are prepared there."""
        info = self.host.volume_info(self.dc.id, moved.domain, moved.image, volume)
        ends = {
            "source": {**self.dc.div(source, volume), "prepared": True},
            "destination": {**self.dc.div(moved, volume, info.generation), "prepared": True},
        }
        job = self.dc.start_job(
            self.host, "SDM.copy_data", {**ends, "copy_bitmaps": False, "legal": True}
        )
        state = self.dc.wait_job(self.host, job)
        if state is None or state.status != "done":
            raise FlowError(f"copying {volume}: {state}")


def prepare(dc: DataCenter, host: Host, disk: Disk) -> str:
    """The path that a VM is started with."""
    return host.prepare(dc.id, disk.domain, disk.image, disk.leaf)


__all__ = ["RunningVm", "drive", "fill", "metadata", "prepare", "xml_disk"]
