# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains in directories: found below the connections, one place each."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vdsm_storage.base.owner import Owner
from vdsm_storage.domains import layout
from vdsm_storage.domains.connection import Connections
from vdsm_storage.domains.domain import Domain, DomainType, check_version
from vdsm_storage.domains.family import DomainLocks, Found, Leasing
from vdsm_storage.domains.file import FileDomain, Parts, check_special_files, read_metadata
from vdsm_storage.domains.file_store import FileStore
from vdsm_storage.domains.lock import CheckedLock
from vdsm_storage.domains.posix import FILE_TYPES
from vdsm_storage.domains.tree import Tree
from vdsm_storage.errors import StorageDomainDoesNotExist, StorageDomainTypeError
from vdsm_storage.leases.model import ClusterLock, Geometry


class FileFamily:
    """Fulfils domains.family.Family."""

    def __init__(self, connections: Connections, leasing: Leasing, owner: Owner) -> None:
        self._connections = connections
        self._leasing = leasing
        self._owner = owner

    def places(self) -> Sequence[str]:
        return list(self._connections.mounts())

    def find(self, place: str, sd_id: str) -> Found | None:
        try:
            return Found(place, read_metadata(os.path.join(place, sd_id), sd_id))
        except StorageDomainDoesNotExist:
            return None

    def scan(self, place: str) -> list[str]:
        return layout.domains_in(place)

    def own_lock(self, found: Found) -> ClusterLock:
        kind, root, geometry = self._look(found)
        sd_id, tree = found.metadata.id, Tree(root, self._owner)
        lock = (
            self._leasing.cluster_lock(layout.sdm_lease(sd_id, root, geometry))
            if kind.leases
            else self._leasing.file_lock(sd_id, _ids(root))
        )
        return CheckedLock(lock, lambda: check_special_files(tree, sd_id))

    def build(self, found: Found, locks: DomainLocks) -> Domain:
        kind, root, geometry = self._look(found)
        metadata = found.metadata
        leasing = self._leasing if kind.leases else None
        store = FileStore(
            root, metadata.id, metadata.version, geometry, locks.all, leasing, self._owner
        )
        lockspace = None
        if leasing is not None:
            lockspace = leasing.lockspace(metadata.id, _ids(root), geometry)
        parts = Parts(store, locks, lockspace, leasing)
        return FileDomain(found.place, kind, metadata, self._owner, parts)

    def _look(self, found: Found) -> tuple[DomainType, str, Geometry]:
        metadata = found.metadata
        kind = FILE_TYPES.get(metadata.type)
        if kind is None:
            raise StorageDomainTypeError(
                type=metadata.type, reason=f"domain {metadata.id} is one"
            )
        check_version(metadata)
        root = os.path.join(found.place, metadata.id)
        check_special_files(Tree(root, self._owner), metadata.id)
        return kind, root, Geometry(metadata.block_size, metadata.alignment)


def _ids(root: str) -> str:
    return os.path.join(root, layout.DOM_MD, layout.IDS)
