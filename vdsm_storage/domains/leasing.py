# SPDX-License-Identifier: GPL-2.0-or-later
"""The leases floor as domains use it, in one object."""

from __future__ import annotations

from vdsm_storage.base.clock import Clock
from vdsm_storage.leases.cluster_lock import SanlockClusterLock
from vdsm_storage.leases.index import Index
from vdsm_storage.leases.lease import Leases
from vdsm_storage.leases.local_lock import FileLock
from vdsm_storage.leases.lockspace import Lockspace, Lockspaces
from vdsm_storage.leases.model import ClusterLock, Geometry, LeaseSpec
from vdsm_storage.leases.slots import Slots


class DomainLeasing:
    """Fulfils domains.family.Leasing."""

    def __init__(self, lockspaces: Lockspaces, leases: Leases, clock: Clock) -> None:
        self._lockspaces = lockspaces
        self._leases = leases
        self._clock = clock

    def lockspace(self, sd_id: str, path: str, geometry: Geometry) -> Lockspace:
        return self._lockspaces.open(sd_id, path, geometry)

    def forget_lockspace(self, sd_id: str) -> None:
        self._lockspaces.forget(sd_id)

    def cluster_lock(self, spec: LeaseSpec) -> ClusterLock:
        return SanlockClusterLock(self._leases, spec, self._clock)

    def file_lock(self, sd_id: str, path: str) -> ClusterLock:
        return FileLock(sd_id, path, self._clock)

    def write_lockspace(self, lockspace: str, path: str, geometry: Geometry) -> None:
        self._leases.write_lockspace(lockspace, path, geometry)

    def write(self, spec: LeaseSpec) -> None:
        self._leases.write(spec)

    def clear(self, spec: LeaseSpec) -> None:
        self._leases.clear(spec)

    def format_xleases(self, path: str, lockspace: str, geometry: Geometry) -> None:
        """Write an empty index into the file."""
        Slots(path, lockspace, geometry).write(Index(lockspace, int(self._clock.time()), ()))
