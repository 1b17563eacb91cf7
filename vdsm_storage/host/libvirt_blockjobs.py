# SPDX-License-Identifier: GPL-2.0-or-later
"""Block jobs of running VMs, as libvirt has them: at most one a disk.

Every method raises LibvirtUnavailable or LibvirtTimeout (59), and VmError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import libvirt
import libvirt_qemu

from vdsm_storage.host.libvirt_vms import LibvirtVms

COMMIT: Final = "commit"
# virDomainBlockJobType
_KINDS: Final[Mapping[int, str]] = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL: "pull",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY: "copy",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT: COMMIT,
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT: COMMIT,
}


@dataclass(frozen=True)
class BlockJob:
    """`cur` of `end` bytes are done; `bandwidth` is MiB a second, 0 without a limit."""

    kind: str  # commit, copy, pull, unknown
    cur: int
    end: int
    bandwidth: int


@dataclass(frozen=True)
class Commit:
    """What to write where: `top`, and no layer between it and `base`, into `base`; both as the
    VM's XML names them.  `active`: the guest writes to `top`.  `bandwidth` in MiB a second, 0 sets
    no limit."""

    disk: str
    base: str
    top: str
    active: bool
    bandwidth: int


@dataclass(frozen=True)
class Copy:
    """Copy a disk to what `xml` (a <disk>) names, which is there already, and keep both in step.

    `shallow`: the top layer only.  `bandwidth` in MiB a second, 0 sets no limit.
    """

    disk: str
    xml: str
    shallow: bool
    bandwidth: int


class LibvirtBlockJobs(LibvirtVms):
    """Disks are named by their targets (vda)."""

    def job(self, vm: str, disk: str) -> BlockJob | None:
        """The job on a disk; None without one."""

        def call(domain: Any) -> BlockJob | None:
            info = domain.blockJobInfo(disk, 0)
            if not info:
                return None
            kind = _KINDS.get(info["type"], "unknown")
            return BlockJob(kind, info["cur"], info["end"], info["bandwidth"])

        return self._on(vm, "block job of a VM", call)

    def commit(self, vm: str, what: Commit, timeout: float) -> None:
        """Start it.  An active `top` is copied until `pivot`; else the job ends by itself, and
        the layer above has got `base` as its backing file.

        The names in headers stay relative, so that an image can be found by any path.
        """
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_RELATIVE
        if what.active:
            flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE

        def call(domain: Any) -> None:
            domain.blockCommit(what.disk, what.base, what.top, what.bandwidth, flags)

        self._on(vm, "start a merge", call, timeout)

    def copy(self, vm: str, what: Copy, timeout: float) -> None:
        """Start it.  It goes on until `pivot` or `abort`, or until it fails."""
        flags = (
            libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT | libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
        )
        if what.shallow:
            flags |= libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW
        limits = {}
        if what.bandwidth:
            limits[libvirt.VIR_DOMAIN_BLOCK_COPY_BANDWIDTH] = what.bandwidth * 1024**2

        def call(domain: Any) -> None:
            domain.blockCopy(what.disk, what.xml, limits or None, flags)

        self._on(vm, "start a replication", call, timeout)

    def set_bandwidth(self, vm: str, disk: str, bandwidth: int) -> None:
        """Of a job that runs, in MiB a second; 0 takes its limit away."""
        self._on(vm, "limit a job", lambda domain: domain.blockJobSetSpeed(disk, bandwidth, 0))

    def pivot(self, vm: str, disk: str, timeout: float) -> None:
        """Let the guest go on with the base alone, or the copy; done when it returns."""
        flags = libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT
        self._on(vm, "pivot", lambda domain: domain.blockJobAbort(disk, flags), timeout)

    def abort(self, vm: str, disk: str) -> None:
        """Stop a job; it may take some time to end."""
        flags = libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_ASYNC
        self._on(vm, "stop a block job", lambda domain: domain.blockJobAbort(disk, flags))

    def flush(self, vm: str, node: str) -> None:
        """Let QEMU write what it keeps of a layer, by QEMU's name of it; libvirt has no call for
        that, and notes in the VM's log that its monitor was used.  Errors are not told."""
        hmp = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP

        def call(domain: Any) -> None:
            libvirt_qemu.qemuMonitorCommand(domain, f'qemu-io {node} "flush"', hmp)

        self._on(vm, "flush a layer", call)
