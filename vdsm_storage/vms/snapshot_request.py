# SPDX-License-Identifier: GPL-2.0-or-later
"""What a snapshot of a VM is asked to do, and how libvirt is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final
from xml.sax.saxutils import quoteattr

from vdsm_storage.jobs.runner import Request
from vdsm_storage.vms.drives import Drive
from vdsm_storage.vms.memory import MemoryVolumes

KIND: Final = "vm.snapshot"


@dataclass(frozen=True)
class NewLeaf:
    """A disk of the VM: its volume `base` becomes read-only, `volume` takes the writes."""

    domain: str
    image: str
    base: str
    volume: str


@dataclass(frozen=True)
class SnapshotRequest:
    """`timeout` seconds for all of it, `freeze_timeout` from its start until the disks switch.

    `frozen`: the caller froze the guest and thaws it.  `memory`: where its memory is kept.
    """

    vm: str
    drives: Sequence[NewLeaf]
    frozen: bool
    timeout: float
    freeze_timeout: float
    memory: MemoryVolumes | None = None

    def as_request(self) -> Request:
        return Request(
            kind=KIND,
            params=asdict(self),
            domains=sorted(self._domains()),
            verb="VM.snapshot",
            lane=self.vm,
            description=f"Snapshot of VM {self.vm}",
        )

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> SnapshotRequest:
        drives = tuple(NewLeaf(**drive) for drive in params["drives"])
        memory = MemoryVolumes(**params["memory"]) if params["memory"] else None
        return cls(**{**params, "drives": drives, "memory": memory})

    def _domains(self) -> set[str]:
        found = {drive.domain for drive in self.drives}
        return found | {self.memory.domain} if self.memory is not None else found


def snapshot_xml(
    there: Sequence[Drive],
    drives: Mapping[str, NewLeaf],
    paths: Mapping[str, str],
    memory: str | None = None,
) -> str:
    """libvirt's <domainsnapshot>: the new volumes by target, and no other disk."""
    disks = []
    kept = f"<memory snapshot='external' file={quoteattr(memory)}/>" if memory else ""
    for drive in there:
        leaf = drives.get(drive.name)
        if leaf is None:
            disks.append(f"<disk name={quoteattr(drive.name)} snapshot='no'/>")
            continue
        path = paths[leaf.volume]
        kind, where = ("block", "dev") if drive.kind == "block" else ("file", "file")
        disks.append(
            f"<disk name={quoteattr(drive.name)} snapshot='external' type='{kind}'>"
            f"<driver type='qcow2'/><source {where}={quoteattr(path)}>"
            # The volume has its owner already.
            "<seclabel model='dac' relabel='no'/></source></disk>"
        )
    return f"<domainsnapshot>{kept}<disks>{''.join(disks)}</disks></domainsnapshot>"
