# SPDX-License-Identifier: GPL-2.0-or-later
"""What a storage domain is to pools, monitors and verbs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vdsm_storage.domains.metadata import DomainMetadata
from vdsm_storage.images.store import Store
from vdsm_storage.leases.lockspace import Lockspace
from vdsm_storage.leases.model import ClusterLock, Geometry

SUPPORTED_VERSIONS = (3, 4, 5)
ISO_IMAGE = "11111111-1111-1111-1111-111111111111"


@dataclass(frozen=True)
class DomainType:
    """What distinguishes one sort of storage.

    `leases`: sanlock guards it (several hosts see it).  `block_sizes`: sector sizes in bytes that
    the format allows on it.
    """

    name: str
    leases: bool
    block_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Capacity:
    """Bytes."""

    total: int
    free: int


class Domain(Protocol):
    """One domain that is connected to this host.  Every method may block on its storage."""

    @property
    def id(self) -> str: ...

    @property
    def type(self) -> DomainType: ...

    @property
    def path(self) -> str:
        """The domain's directory."""

    @property
    def mount(self) -> str:
        """The directory of the connection that it lives on."""

    @property
    def version(self) -> int:
        """As of the last reading of the metadata."""

    @property
    def geometry(self) -> Geometry: ...

    @property
    def store(self) -> Store: ...

    @property
    def lock(self) -> ClusterLock:
        """The lock that guards this domain's metadata, its pool's master included."""

    @property
    def own_lock(self) -> ClusterLock:
        """This domain's own lease or file lock alone (what a pool manager holds of a master)."""

    @property
    def lockspace(self) -> Lockspace | None:
        """None where the format has no leases."""

    @property
    def xleases_path(self) -> str | None: ...

    @property
    def metadata_path(self) -> str:
        """What monitoring reads."""

    def metadata(self) -> DomainMetadata:
        """Read from the storage.  Raises 358, 379, 751, 752."""

    def update_metadata(self, changes: Mapping[str, str | None]) -> DomainMetadata:
        """Set or (None) remove keys; the caller holds the lock.  One atomic write."""

    def check_special_files(self) -> None:
        """Before sanlock is given names of the domain's files.  Raises 358, 371."""

    def capacity(self) -> Capacity: ...

    def info(self) -> dict[str, Any]:
        """As StorageDomain.getInfo answers."""

    def stats(self) -> dict[str, Any]:
        """As StorageDomain.getStats answers."""

    def self_test(self) -> None:
        """Raises what is wrong with the domain."""
