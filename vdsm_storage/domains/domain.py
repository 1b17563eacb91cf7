# SPDX-License-Identifier: GPL-2.0-or-later
"""What a storage domain is to pools, monitors and verbs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.domains.metadata import DomainMetadata
from vdsm_storage.errors import UnsupportedDomainVersion
from vdsm_storage.images.store import Progress, Store
from vdsm_storage.leases.lockspace import Lockspace
from vdsm_storage.leases.model import ClusterLock, Geometry, LeaseSpec

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
class Alert:
    """Something of a domain that its administrator should look at; `code` is an error's."""

    code: int
    message: str


@dataclass(frozen=True)
class Capacity:
    """Bytes, and what is wrong with the place where they are."""

    total: int
    free: int
    alerts: tuple[Alert, ...] = ()


def check_version(metadata: DomainMetadata) -> None:
    """Raises UnsupportedDomainVersion (394)."""
    if metadata.version not in SUPPORTED_VERSIONS:
        raise UnsupportedDomainVersion(version=metadata.version, supported="3, 4, 5")


class Domain(Protocol):
    """One domain that is connected to this host.  Every method may block on its storage."""

    @property
    def id(self) -> str: ...

    @property
    def type(self) -> DomainType: ...

    @property
    def last(self) -> DomainMetadata:
        """The metadata as last read."""

    @property
    def path(self) -> str:
        """The domain's directory."""

    @property
    def mount(self) -> str:
        """The place where it was found: the directory of its connection; BLOCK for LUNs."""

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
    def ids_path(self) -> str: ...

    @property
    def sdm_lease(self) -> LeaseSpec: ...

    @property
    def mailboxes(self) -> tuple[str, str]:
        """Inbox and outbox, as a pool manager calls them; used on a master domain with leases."""

    @property
    def metadata_path(self) -> str:
        """What monitoring reads."""

    def volume_leases(self) -> list[LeaseSpec]:
        """The leases that lie beside `sdm_lease`: those of the volumes of block domains."""

    def metadata(self) -> DomainMetadata:
        """Read from the storage.  Raises 358, 379, 751, 752."""

    def update_metadata(self, changes: Mapping[str, str | None]) -> DomainMetadata:
        """Set or (None) remove keys; the caller holds the lock.  One atomic write."""

    def check_special_files(self) -> None:
        """Before sanlock is given names of the domain's files: they are there, and the domain's.

        Block: the special volumes are activated.  Raises 358, 371, 558.
        """

    def close(self) -> None:
        """Nobody on this host works on the domain any more (block: special volumes go)."""

    def capacity(self) -> Capacity: ...

    def info(self) -> dict[str, Any]:
        """As StorageDomain.getInfo answers."""

    def stats(self) -> dict[str, Any]:
        """As StorageDomain.getStats answers."""

    def self_test(self) -> None:
        """Raises what is wrong with the domain."""

    def file_stats(self, pattern: str, case_sensitive: bool) -> dict[str, dict[str, int]]:
        """ISO images, as StorageDomain.getFileStats answers; none on block domains."""

    def collect(self, timeout: float, idle: Callable[[], bool]) -> None:
        """Remove what hosts that died have half made (block); waits `timeout` s for the lock.

        `idle()`: this host does nothing on the domain and has nothing to recover there; what bore
        its id before is of a host that had that once, or of a journal that was lost.
        """

    # -- a pool manager's corner ---------------------------------------------------------------

    def prepare_master(self) -> None:
        """Make sure that a pool manager finds <master>/{vms,tasks}; the caller holds the lock.

        Nothing of it stays mounted: this agent keeps nothing there.  Raises 367, 368.
        """

    # -- from one version of the format to the next; the domain's lock is held -------------------

    def make_xleases(self) -> None:
        """The place for external leases, which version 3 has not; idempotent."""

    def upgrade_volumes(self, version: int, progress: Progress, cancel: Cancel) -> None:
        """Write every volume's metadata in the form of `version`; idempotent."""

    def upgrade_changes(self, version: int) -> dict[str, str | None]:
        """The changes of the domain's own metadata that make it `version`."""

    def clean_upgrade(self) -> None:
        """Remove what an upgrade leaves behind, done or cut off; idempotent."""
