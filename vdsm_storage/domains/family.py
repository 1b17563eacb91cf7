# SPDX-License-Identifier: GPL-2.0-or-later
"""The sorts of storage that domains are found on: directories and volume groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vdsm_storage.domains.domain import Domain
from vdsm_storage.domains.metadata import DomainMetadata
from vdsm_storage.leases.lockspace import Lockspace
from vdsm_storage.leases.model import ClusterLock, Geometry, LeaseSpec


class Leasing(Protocol):
    """What domains need of the leases floor (domains/leasing.py)."""

    def lockspace(self, sd_id: str, path: str, geometry: Geometry) -> Lockspace: ...

    def cluster_lock(self, spec: LeaseSpec) -> ClusterLock: ...

    def file_lock(self, sd_id: str, path: str) -> ClusterLock: ...

    def write_lockspace(self, lockspace: str, path: str, geometry: Geometry) -> None: ...

    def write(self, spec: LeaseSpec) -> None: ...

    def clear(self, spec: LeaseSpec) -> None: ...

    def format_xleases(self, path: str, lockspace: str, geometry: Geometry) -> None: ...


@dataclass(frozen=True)
class Found:
    """A domain, the place where it is, and its metadata as it was read there."""

    place: str
    metadata: DomainMetadata


@dataclass(frozen=True)
class DomainLocks:
    """`own` is the domain's own lock, `all` those of its pool's master too."""

    own: ClusterLock
    all: ClusterLock


class Family(Protocol):
    """Finds domains of one sort and builds their objects."""

    def places(self) -> Sequence[str]:
        """Where to look; each place is asked in a lane of its own.  No I/O."""

    def find(self, place: str, sd_id: str) -> Found | None:
        """The domain if it is there.  May block.  Raises 371, 379, 751, 752."""

    def scan(self, place: str) -> list[str]:
        """UUIDs of all domains there.  May block; raises OSError."""

    def own_lock(self, found: Found) -> ClusterLock:
        """A new lock of the domain itself.  Raises 371, 372, 394."""

    def build(self, found: Found, locks: DomainLocks) -> Domain:
        """The domain's object."""
