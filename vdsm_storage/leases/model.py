# SPDX-License-Identifier: GPL-2.0-or-later
"""What a lease is, and the lock that guards a domain's metadata between hosts."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from vdsm_storage.base.units import MIB


@dataclass(frozen=True)
class Geometry:
    """Sizes in bytes.  `alignment` is the distance between two leases: 1 MiB with sectors of 512;
    1, 2, 4 or 8 MiB with sectors of 4096, for at most 250, 500, 1000 or 2000 hosts."""

    block_size: int = 512
    alignment: int = MIB


@dataclass(frozen=True)
class LeaseSpec:
    """Where a lease is: `resource` of `lockspace` at `offset` bytes of the file or device."""

    lockspace: str
    resource: str
    path: str
    offset: int
    geometry: Geometry = field(default_factory=Geometry)


@dataclass(frozen=True)
class LeaseState:
    """Who holds a lease.  `owners` are host ids, empty when it is free; `version` is None then.

    `last_owner` and `last_version` are what the leader record says even when nobody holds it
    (that is how a pool manager's history is told).
    """

    owners: tuple[int, ...]
    version: int | None
    last_owner: int | None = None
    last_version: int | None = None


class ClusterLock(Protocol):
    """Guards the metadata of one domain between hosts (sanlock's SDM lease, or a file lock).

    Counted: several operations of this process hold it together and are kept apart by
    base.locks; the lease goes back when the last one is done.
    """

    def held(self, timeout: float) -> AbstractContextManager[None]:
        """Hold it; waits at most `timeout` seconds for another host, then SpmStatusError (654)."""

    def acquire(self, timeout: float) -> None:
        """Take one hold that lasts until release() (the storage pool manager's)."""

    def release(self) -> None:
        """Give one hold back."""

    def is_held(self) -> bool:
        """Whether this process holds it now, without I/O."""

    def held_for(self) -> float:
        """Seconds that this process has held it without a break, without I/O; 0.0 if it does not.
        """

    def verify(self) -> None:
        """Right before a write that it guards: AcquireLockFailure (651) if it was held and no
        longer keeps other hosts out.  Nothing happens when it is not held."""

    def inquire(self) -> LeaseState:
        """Who holds it, read from the storage."""
