# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.merge as it is asked for, and how a VM's disk stands to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from vdsm_storage.errors import MergeFailed
from vdsm_storage.host.libvirt_blockjobs import BlockJob
from vdsm_storage.images.guard import VolumeRef
from vdsm_storage.jobs.runner import Request

KIND: Final = "vm.merge"


@dataclass(frozen=True)
class MergeRequest:
    """Merge `top` into `base`, the volume below it, while the VM runs.

    `leaf` is the volume that the disk writes to; `bandwidth` MiB a second, 0 for no limit.
    """

    vm: str
    domain: str
    image: str
    leaf: str
    base: str
    top: str
    bandwidth: int = 0

    @property
    def active(self) -> bool:
        """Whether the guest writes to `top`."""
        return self.top == self.leaf

    def child(self, volumes: Sequence[str]) -> str | None:
        """What a VM with these volumes, from the top down, has above `top`, or has there now."""
        place = volumes.index(self.top if self.top in volumes else self.base)
        return volumes[place - 1] if place > 0 else None

    @property
    def target(self) -> VolumeRef:
        return VolumeRef(self.domain, self.image, self.base)

    def as_request(self) -> Request:
        return Request(
            kind=KIND,
            params=asdict(self),
            domains=[self.domain],
            verb="VM.merge",
            lane=self.vm,
            description=f"Merge volume {self.top} into {self.base} of VM {self.vm}",
        )

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> MergeRequest:
        return cls(**params)

    def failed(self, reason: object) -> MergeFailed:
        return MergeFailed(top=self.top, base=self.base, reason=reason)


@dataclass(frozen=True)
class Standing:
    """A disk at one moment: its volumes from the top down, and the job on it.

    `mirror` is how far libvirt is with the guest's own layer: "" (nothing to say), "yes" (it can
    pivot), "pivot" or "abort" (it is doing that).  `busy`: libvirt is at work on the VM.
    """

    volumes: Sequence[str]
    job: BlockJob | None
    mirror: str
    busy: bool = False

    @property
    def is_settling(self) -> bool:
        """Whether it may change by itself in a moment."""
        return self.busy or self.mirror in ("pivot", "abort")

    def has_merged(self, asked: MergeRequest) -> bool:
        return asked.top not in self.volumes and asked.base in self.volumes
