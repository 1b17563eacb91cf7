# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains in volume groups, all found in one place: the devices of this host."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from vdsm_storage.base.owner import Owner
from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.domains import block_names as names
from vdsm_storage.domains import block_tags
from vdsm_storage.domains.block import (
    BLOCK,
    BLOCK_TYPES,
    BlockDomain,
    Parts,
    read_metadata,
    sdm_lease,
)
from vdsm_storage.domains.block_active import ActiveVolumes
from vdsm_storage.domains.block_special import DIRECTORY, Specials
from vdsm_storage.domains.block_store import BlockStore, Needs
from vdsm_storage.domains.block_use import Uses
from vdsm_storage.domains.domain import Domain, DomainType, check_version
from vdsm_storage.domains.family import DomainLocks, Found, Leasing
from vdsm_storage.domains.lock import CheckedLock
from vdsm_storage.errors import StorageDomainTypeError, VolumeGroupDoesNotExist
from vdsm_storage.host.master_fs import MasterFs
from vdsm_storage.leases.model import ClusterLock, Geometry
from vdsm_storage.lvm.activation import Activation
from vdsm_storage.lvm.groups import Groups

# Seconds.  While this host has the domain's lock nobody else changes the group: what was read under
# it so short a time ago is as good as what would be read now.
RECENT: Final = 0.01


@dataclass(frozen=True)
class BlockBase:
    """What block domains are built upon.  `mounts` is <data_center>/mnt; `busy(sd_id)` tells how
    many operations are at work on a domain.
    """

    groups: Groups
    activation: Activation
    leasing: Leasing
    owner: Owner
    uses: Uses
    master: MasterFs
    mounts: str
    busy: Callable[[str], int] = lambda _sd_id: 0


class BlockFamily:
    """Fulfils domains.family.Family."""

    def __init__(self, base: BlockBase) -> None:
        self.base = base
        self._mutex = threading.Lock()
        self._specials: dict[str, Specials] = {}

    def places(self) -> Sequence[str]:
        return (BLOCK,)

    def find(self, place: str, sd_id: str) -> Found | None:
        try:
            group = self.base.groups.find(sd_id).read()
        except VolumeGroupDoesNotExist:
            return None
        if block_tags.READY not in group.tags:
            return None
        return Found(BLOCK, read_metadata(group))

    def scan(self, place: str) -> list[str]:
        found = self.base.groups.scan()
        return [group.name for group in found.values() if is_domain(group.name, group.tags)]

    def specials(self, sd_id: str) -> Specials:
        """A domain's special volumes: one object a group.  Raises 506."""
        group = self.base.groups.find(sd_id)
        with self._mutex:
            known = self._specials.get(sd_id)
            if known is None or known.group is not group:
                root = os.path.join(self.base.mounts, DIRECTORY, sd_id)
                known = Specials(group, self.base.activation, root, self.base.owner)
                self._specials[sd_id] = known
            return known

    def own_lock(self, found: Found) -> ClusterLock:
        _, geometry = _look(found)
        specials = self.specials(found.metadata.id)
        lock = self.base.leasing.cluster_lock(sdm_lease(specials, geometry))
        return CheckedLock(lock, specials.open)

    def build(self, found: Found, locks: DomainLocks) -> Domain:
        kind, geometry = _look(found)
        sd_id, base = found.metadata.id, self.base
        specials = self.specials(sd_id)
        specials.group.fence = locks.all.verify
        specials.group.peers = lambda: base.busy(sd_id)
        specials.group.unchanged = lambda: min(RECENT, locks.all.held_for())
        active = ActiveVolumes(specials, base.uses)
        lockspace = base.leasing.lockspace(sd_id, specials.device(names.IDS), geometry)
        lockspace.prepare = specials.open
        needs = Needs(specials, locks.all, base.leasing.write, lambda: lockspace.host_id)
        store = BlockStore(sd_id, found.metadata.version, geometry, needs, active)
        parts = Parts(specials, store, locks, lockspace, base.leasing, base.master)
        return BlockDomain(kind, found.metadata, parts)


def is_domain(name: str, tags: Sequence[str]) -> bool:
    return is_uuid(name) and block_tags.READY in tags


def _look(found: Found) -> tuple[DomainType, Geometry]:
    metadata = found.metadata
    kind = BLOCK_TYPES.get(metadata.type)
    if kind is None:
        raise StorageDomainTypeError(type=metadata.type, reason=f"domain {metadata.id} is one")
    check_version(metadata)
    return kind, Geometry(metadata.block_size, metadata.alignment)
