# SPDX-License-Identifier: GPL-2.0-or-later
"""The disk of a VM that a merge is about: whether it can be merged, and how it stands."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from vdsm_storage.errors import (
    ImageFileNotFound,
    NoSuchVM,
    UnsupportedDriveType,
    VMIsDown,
)
from vdsm_storage.host.libvirt_blockjobs import BlockJob, LibvirtBlockJobs
from vdsm_storage.host.libvirt_model import VmError, Why
from vdsm_storage.vms.drives import REPLICATED, Drive
from vdsm_storage.vms.merge_request import MergeRequest, Standing
from vdsm_storage.vms.merge_storage import MergeStorage
from vdsm_storage.vms.registry import Registry


@dataclass(frozen=True)
class MergedDisks:
    """Everything is asked of libvirt each time."""

    jobs: LibvirtBlockJobs
    registry: Registry
    storage: MergeStorage

    def find(self, asked: MergeRequest) -> Drive | None:
        """The disk of the VM that uses the image.  Raises NoSuchVM (1), VMIsDown (6), 59."""
        self.registry.state(asked.vm)
        for drive in self.registry.definition(asked.vm, fresh=True).drives:
            volume = drive.volume
            if volume is not None and (volume.domain, volume.image) == (asked.domain, asked.image):
                return drive
        return None

    def check(self, asked: MergeRequest) -> Drive:
        """The disk, if it can be merged as asked, or was before.

        Raises 1, 6, ImageFileNotFound (13), UnsupportedDriveType (36), MergeFailed (52), 59.
        """
        drive = self.find(asked)
        if drive is None or not drive.is_volume(asked.domain, asked.image, asked.leaf):
            disk = f"volume {asked.leaf} of image {asked.image} as its leaf"
            raise ImageFileNotFound(vm=asked.vm, disk=disk)
        if drive.kind not in ("file", "block"):
            raise UnsupportedDriveType(
                vm=asked.vm, operation="a merge", disk=drive.name, reason=f"it is a {drive.kind}"
            )
        if drive.transient or drive.readonly or drive.shared:
            raise asked.failed(f"disk {drive.name} is transient, shared or read-only")
        if drive.is_replicated:
            raise asked.failed(f"disk {drive.name} {REPLICATED}")
        volumes = drive.volumes
        if asked.top not in volumes and asked.base in volumes:
            self.storage.check_merged(asked)
            return drive  # its metadata are seen to
        if (asked.top, asked.base) not in itertools.pairwise(volumes):
            raise asked.failed(f"the VM has the chain {', '.join(reversed(volumes))}")
        self.storage.check(asked, asked.child(volumes))
        return drive

    def job(self, vm: str, disk: str) -> BlockJob | None:
        """The block job on a disk.  Raises 1, 6, 59, and 100 for another failure of libvirt's."""
        try:
            return self.jobs.job(vm, disk)
        except VmError as error:
            raise self.registry.gone(vm, error) from error

    def standing(self, asked: MergeRequest, disk: str) -> Standing | None:
        """As the VM has it now; None when the VM has ended.  Raises 52, 59.

        The job is looked at first: one that has ended has changed the XML.
        """
        try:
            job = self.jobs.job(asked.vm, disk)
            busy = self.jobs.busy(asked.vm)
            drive = self.find(asked)
        except (NoSuchVM, VMIsDown):
            return None
        except VmError as error:
            if error.why in (Why.NO_VM, Why.NOT_RUNNING):
                return None
            raise self.registry.gone(asked.vm, error) from error
        if drive is None:
            raise asked.failed("the VM has no such disk any more")
        return Standing(drive.volumes, job, drive.mirror, busy)

    def flush_base(self, asked: MergeRequest) -> None:
        """Let QEMU write what it keeps of `base`, after the merge.  Raises 1, 6, 52, 59."""
        drive = self.find(asked)
        node = drive.nodes.get(asked.base) if drive is not None else None
        if node is None:
            raise asked.failed(f"libvirt has no name for the layer {asked.base}")
        try:
            self.jobs.flush(asked.vm, node)
        except VmError as error:
            raise self.registry.gone(asked.vm, error) from error
