# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain in a volume group: its metadata in tags, its leases in special volumes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.base import files
from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.units import MIB
from vdsm_storage.domains import block_names as names
from vdsm_storage.domains import block_tags, block_upgrade, layout
from vdsm_storage.domains.block_special import Specials
from vdsm_storage.domains.block_store import BlockStore
from vdsm_storage.domains.domain import Alert, Capacity, DomainType
from vdsm_storage.domains.family import DomainLocks, Leasing
from vdsm_storage.domains.metadata import DomainMetadata
from vdsm_storage.errors import (
    InaccessiblePhysDev,
    SmallVgMetadata,
    StorageDomainAccessError,
    StorageDomainDoesNotExist,
    StorageDomainLayoutError,
    VgMetadataCriticallyFull,
    VolumeGroupDoesNotExist,
)
from vdsm_storage.host.master_fs import MasterFs
from vdsm_storage.images.store import Progress
from vdsm_storage.leases.lockspace import Lockspace
from vdsm_storage.leases.model import Geometry, LeaseSpec
from vdsm_storage.lvm.changes import CreateLv, RetagVg
from vdsm_storage.lvm.group import Group
from vdsm_storage.lvm.model import PhysicalVolume, VolumeGroup

log = logging.getLogger("domain.block")

BLOCK: Final = ":volume-groups"  # the place where block domains are found
ISCSI: Final = DomainType("ISCSI", leases=True, block_sizes=(512,))
FCP: Final = DomainType("FCP", leases=True, block_sizes=(512,))
BLOCK_TYPES: Final[Mapping[str, DomainType]] = {kind.name: kind for kind in (ISCSI, FCP)}

# Below these a group's metadata areas are an administrator's business, as upstream warns too.
MIN_METADATA_AREA: Final = 64 * MIB
MIN_METADATA_FREE: Final = 0.2  # of the area; an empty one has a half free: lvm writes beside


@dataclass(frozen=True)
class Parts:
    """What is built around a domain."""

    specials: Specials
    store: BlockStore
    locks: DomainLocks
    lockspace: Lockspace
    leasing: Leasing
    master: MasterFs


def read_metadata(group: VolumeGroup) -> DomainMetadata:
    """A domain's metadata out of its group's tags.  Raises 371, 751, 752."""
    found = DomainMetadata(block_tags.decode_tags(group.tags, group.name))
    if found.id != group.name:
        reason = f"its metadata is that of domain {found.id}"
        raise StorageDomainLayoutError(domain=group.name, reason=reason)
    return found


def pv_changes(group: Group, values: Mapping[str, str]) -> dict[str, str | None]:
    """What the keys PVn must become for the devices that the group has now."""
    vg, devices = group.read(), group.devices()
    first = metadata_pv(vg)
    ordered = sorted(vg.pvs.values(), key=lambda pv: pv.name != first.name)
    known = [(guid(devices.get(pv.uuid) or pv.device), pv.uuid, pv.pe_count) for pv in ordered]
    return block_tags.pv_changes(values, known)


def metadata_pv(vg: VolumeGroup) -> PhysicalVolume:
    """The device on which `metadata` begins; the first one before there is any."""
    lv = vg.lvs.get(names.METADATA)
    name = lv.segments[0].pv if lv is not None else next(iter(vg.pvs))
    return vg.pvs[name]


def guid(device: str) -> str:
    """What engines call a device."""
    return os.path.basename(device)


class BlockDomain:
    """Fulfils domains.domain.Domain."""

    def __init__(self, kind: DomainType, found: DomainMetadata, parts: Parts) -> None:
        self.id = found.id
        self.type = kind
        self.mount = BLOCK
        self.geometry = Geometry(found.block_size, found.alignment)
        self.store = parts.store
        self.lock = parts.locks.all
        self.own_lock = parts.locks.own
        self.lockspace = parts.lockspace
        self.group = parts.specials.group
        self.last = found  # as of the last reading
        self._specials = parts.specials
        self._leasing = parts.leasing
        self._master = parts.master

    @property
    def path(self) -> str:
        return self._specials.root

    @property
    def version(self) -> int:
        return self.last.version

    @property
    def metadata_path(self) -> str:
        return self._specials.device(names.METADATA)

    @property
    def xleases_path(self) -> str | None:
        if self.version < layout.XLEASES_VERSION:
            return None
        self.check_special_files()
        self._specials.open(names.XLEASES)  # the domain may have been upgraded since it was opened
        return self._specials.device(names.XLEASES)

    @property
    def ids_path(self) -> str:
        return self._specials.device(names.IDS)

    @property
    def sdm_lease(self) -> LeaseSpec:
        return sdm_lease(self._specials, self.geometry)

    @property
    def mailboxes(self) -> tuple[str, str]:
        return self._specials.device(names.INBOX), self._specials.device(names.OUTBOX)

    def volume_leases(self) -> list[LeaseSpec]:
        return self.store.leases()

    # -- metadata ------------------------------------------------------------------------------

    def _read(self) -> VolumeGroup:
        """Raises StorageDomainDoesNotExist (358) when the devices are gone, 379."""
        try:
            group = self.group.read()
        except VolumeGroupDoesNotExist as error:
            raise StorageDomainDoesNotExist(domain=self.id) from error
        except OSError as error:
            raise StorageDomainAccessError(domain=self.id, reason=error) from error
        if block_tags.READY not in group.tags:  # formatted, by some host
            raise StorageDomainDoesNotExist(domain=self.id)
        return group

    def metadata(self) -> DomainMetadata:
        self.last = read_metadata(self._read())
        return self.last

    def update_metadata(self, changes: Mapping[str, str | None]) -> DomainMetadata:
        group = self._read()
        old = read_metadata(group)
        new = old.with_changes(changes)
        if new.values != old.values:
            add, remove = block_tags.changes(group.tags, new.values)
            self.group.apply(RetagVg(add, remove))
            self.last = new
        return new

    def check_special_files(self) -> None:
        self._specials.open()
        self.store.active.tidy()  # an earlier life of the agent may have left volumes active

    def close(self) -> None:
        self.store.active.settle()
        self._specials.close()

    # -- how it is -------------------------------------------------------------------------------

    def capacity(self) -> Capacity:
        group = self._read()
        return Capacity(group.size, group.free, tuple(self._alerts()))

    def _alerts(self) -> list[Alert]:
        size, free = self.group.metadata_area()
        if size < MIN_METADATA_AREA:
            error = SmallVgMetadata(vg=self.id, size=size)
            return [Alert(error.code, str(error))]
        if free < size * MIN_METADATA_FREE:
            full = VgMetadataCriticallyFull(vg=self.id, free=free, size=size)
            return [Alert(full.code, str(full))]
        return []

    def info(self) -> dict[str, Any]:
        group = self._read()
        found = self.metadata()
        devices = self.group.devices()
        keeper = self.group.metadata_device()
        first = metadata_pv(group)
        return {
            **found.as_info(self.id),
            "vguuid": group.uuid,
            "state": "PARTIAL" if self._missing() else "OK",
            "metadataDevice": guid(devices.get(first.uuid) or first.device),
            "vgMetadataDevice": guid(keeper),
        }

    def _missing(self) -> list[str]:
        """Devices of the group that are not there."""
        group, devices = self.group.read(), self.group.devices()
        return [
            guid(pv.device) for pv in group.pvs.values() if pv.missing or pv.uuid not in devices
        ]

    def stats(self) -> dict[str, Any]:
        group = self._read()
        size, free = self.group.metadata_area()
        return {
            "disktotal": str(group.size),
            "diskfree": str(group.free),
            "mdasize": str(size),
            "mdafree": str(free),
            "mdavalid": size >= MIN_METADATA_AREA,
            "mdathreshold": free >= size * MIN_METADATA_FREE,
        }

    def self_test(self) -> None:
        """Devices are there, and what leases and metadata of volumes live on can be read."""
        self._read()
        if missing := self._missing():
            raise InaccessiblePhysDev(devices=", ".join(missing))
        self.check_special_files()
        try:
            files.read_direct(self.metadata_path, 4096)
        except OSError as error:
            raise StorageDomainAccessError(domain=self.id, reason=error) from error

    def file_stats(self, pattern: str, case_sensitive: bool) -> dict[str, dict[str, int]]:
        return {}

    # -- what dead hosts left ------------------------------------------------------------------

    def collect(self, timeout: float, idle: Callable[[], bool]) -> None:
        """Remove the half-made volumes of hosts whose leases are gone with them."""
        hosts = {host.host_id: host for host in self.lockspace.hosts()}
        own = self.lockspace.host_id

        def dead(host_id: int) -> bool:
            if host_id == own:  # asked after its volumes were listed: they are of none that begins
                return idle()
            return host_id in hosts and hosts[host_id].gone

        if abandoned := self.store.abandoned(dead):
            with self.lock.held(timeout):
                still = set(self.store.abandoned(dead))
                log.warning("Domain %s: removing what dead hosts left: %s", self.id, abandoned)
                self.store.collect([volume for volume in abandoned if volume in still])

    # -- a pool manager's corner -------------------------------------------------------------

    def prepare_master(self) -> None:
        self._specials.open()
        self._specials.activation.activate(self.group, [names.MASTER])
        try:
            device = self._specials.device(names.MASTER)
            self.own_lock.verify()
            self._master.prepare(self.id, device, layout.MASTER_DIRECTORIES)
        finally:
            self._specials.activation.deactivate(self.group, [names.MASTER])

    # -- to another version --------------------------------------------------------------------

    def make_xleases(self) -> None:
        """An index that was cut off is not complete: it is written anew until the version is."""
        special = {found.name: found for found in special_volumes(self.geometry)}
        if names.XLEASES not in self.group.read().lvs:
            self.group.apply(CreateLv(names.XLEASES, special[names.XLEASES].size))
        elif self.version >= layout.XLEASES_VERSION:
            return
        self._specials.open(names.XLEASES)
        device = self._specials.device(names.XLEASES)
        self.lock.verify()
        self._leasing.format_xleases(device, self.id, self.geometry)

    def upgrade_volumes(self, version: int, progress: Progress, cancel: Cancel) -> None:
        if version >= 5 > self.version:
            self.check_special_files()
            self.lock.verify()
            block_upgrade.copy_slots(self.metadata_path, self.store.by_slot(), self.version)
        progress(1.0)

    def upgrade_changes(self, version: int) -> dict[str, str | None]:
        return layout.upgrade_changes(version, self.geometry)

    def clean_upgrade(self) -> None:
        """The slots of the old format, which only a domain of the new one has no use for."""
        if self.metadata().version >= 5:
            self.check_special_files()
            block_upgrade.zero_old_slots(self.metadata_path)


def special_volumes(geometry: Geometry) -> tuple[names.SpecialVolume, ...]:
    """Those of the newest version."""
    return names.special_volumes(5, geometry.alignment)


def sdm_lease(specials: Specials, geometry: Geometry) -> LeaseSpec:
    path = specials.device(names.LEASES)
    return LeaseSpec(specials.group.name, layout.SDM, path, geometry.alignment, geometry)
