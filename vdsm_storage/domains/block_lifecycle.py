# SPDX-License-Identifier: GPL-2.0-or-later
"""Making and formatting block domains: operations that survive a crash at any step.

A volume group bears the tag UNREADY from the moment it is made until it is a whole domain; no
host takes it for one before.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

from vdsm_storage.base import files
from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.domains import block_names as names
from vdsm_storage.domains import block_tags, layout
from vdsm_storage.domains import metadata as md
from vdsm_storage.domains.block import BLOCK, BLOCK_TYPES, BlockDomain, pv_changes, sdm_lease
from vdsm_storage.domains.block_family import BlockFamily
from vdsm_storage.domains.block_special import Specials
from vdsm_storage.domains.domain import SUPPORTED_VERSIONS
from vdsm_storage.domains.hostid import TEMPORARY, host_id
from vdsm_storage.domains.layout import check_name
from vdsm_storage.domains.metadata import DomainMetadata
from vdsm_storage.domains.new_domain import CreateRequest
from vdsm_storage.domains.registry import Registry
from vdsm_storage.errors import (
    AcquireHostIdFailure,
    CannotFormatAttached,
    CannotFormatConnected,
    StorageDomainAlreadyExists,
    StorageDomainBlockSizeMismatch,
    StorageDomainClassError,
    StorageDomainCreationError,
    UnsupportedDomainVersion,
    VolumeGroupDoesNotExist,
    VolumeGroupHasDomainTag,
)
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request, Runner
from vdsm_storage.leases.model import Geometry
from vdsm_storage.lvm.changes import Change, CreateLv, RemoveLv, RetagVg
from vdsm_storage.lvm.group import Group

log = logging.getLogger("domain.block")

CREATE: Final = "block.create"
FORMAT: Final = "block.format"
GROUP: Final = "vg:"  # an operation's volume group, by name, that has to be on this host
LOCK_TIMEOUT: Final = 120.0  # seconds to wait for other work on the same group
GEOMETRY: Final = Geometry()  # of every block domain


class BlockLifecycle:
    """Creates and formats block domains.  `kinds()` go to the runner; times in seconds."""

    def __init__(
        self,
        registry: Registry,
        family: BlockFamily,
        locks: Locks,
        runner: Runner,
        lock_timeout: float,
        host_id_timeout: float,
    ) -> None:
        self._registry = registry
        self._family = family
        self._base = family.base
        self._locks = locks
        self._runner = runner
        self._lock_timeout = lock_timeout
        self._host_id_timeout = host_id_timeout

    def kinds(self) -> Sequence[Kind]:
        create = ("volumes", "zeroed", "leases", "master", "ready")
        return (
            Kind(CREATE, create, self._create, self._recover_create),
            Kind(FORMAT, ("hidden", "volumes"), self._format, self._recover_format),
        )

    # -- create --------------------------------------------------------------------------------

    def create(self, request: CreateRequest) -> None:
        """Make a volume group an unattached domain; `remote_path` is its UUID.

        Raises 348, 351, 365, 386, 387, 394, 504, 506, 515.
        """
        if request.klass != "Data":
            raise StorageDomainClassError(klass=request.klass)
        version = SUPPORTED_VERSIONS[-1] if request.version is None else request.version
        if version not in SUPPORTED_VERSIONS:
            raise UnsupportedDomainVersion(version=version, supported="3, 4, 5")
        if request.block_size not in (layout.AUTO, GEOMETRY.block_size):
            raise StorageDomainBlockSizeMismatch(
                path=request.remote_path, found=GEOMETRY.block_size, asked=request.block_size,
                type=request.type, version=version, supported="512",
            )  # fmt: skip
        name = check_name(request.name)
        with self._locks.held([Lock("00_storage", request.id)], LOCK_TIMEOUT):
            self._check_group(request)
            params = {
                "id": request.id, "type": request.type, "name": name, "version": version
            }  # fmt: skip
            needed = [GROUP + request.id]
            self._runner.run(Request(CREATE, params, needed, "StorageDomain.create"))
        found = self._family.find(BLOCK, request.id)
        if found is not None:
            self._registry.adopt(found)

    def _check_group(self, request: CreateRequest) -> None:
        group = self._base.groups.find_uuid(request.remote_path)
        vg = group.read()
        if vg.name != request.id:
            reason = f"the volume group {request.remote_path} is {vg.name}, not the domain's"
            raise StorageDomainCreationError(domain=request.id, path=vg.name, reason=reason)
        if block_tags.READY in vg.tags:
            if block_tags.decode_tags(vg.tags, vg.name).get("SDUUID") == request.id:
                raise StorageDomainAlreadyExists(domain=request.id, path=vg.name)
            raise VolumeGroupHasDomainTag(vg=vg.name)
        if block_tags.UNREADY not in vg.tags or vg.lvs:
            reason = "it was not made by LVMVolumeGroup.create, or is in use"
            raise StorageDomainCreationError(domain=request.id, path=vg.name, reason=reason)

    def _create(self, op: Operation) -> None:
        sd_id, version = op.params["id"], op.params["version"]
        specials = self._family.specials(sd_id)
        wanted = names.special_volumes(version, GEOMETRY.alignment)
        specials.group.apply(*(CreateLv(volume.name, volume.size) for volume in wanted))
        op.step("volumes")
        everything = [volume.name for volume in wanted]
        self._base.activation.activate(specials.group, everything)
        specials.own(everything)
        for volume in wanted:
            if volume.zeroed:
                _zero(specials.device(volume.name), volume.zeroed)
        op.step("zeroed")
        self._write_leases(sd_id, version, specials)
        op.step("leases")
        self._base.master.make(sd_id, specials.device(names.MASTER))
        op.step("master")
        self._base.activation.deactivate(specials.group, everything)
        specials.group.apply(self._published(op.params, specials.group))
        op.step("ready", abortable=False)
        log.info("Made domain %s (%s)", sd_id, op.params["type"])

    def _write_leases(self, sd_id: str, version: int, specials: Specials) -> None:
        leasing = self._base.leasing
        leasing.write_lockspace(sd_id, specials.device(names.IDS), GEOMETRY)
        leasing.write(sdm_lease(specials, GEOMETRY))
        if version >= names.XLEASES_VERSION:
            leasing.format_xleases(specials.device(names.XLEASES), sd_id, GEOMETRY)

    def _published(self, params: Any, group: Group) -> RetagVg:
        """All of the domain's metadata, and the tag that makes it one, in one change."""
        vg = group.read()
        values = DomainMetadata(_new_metadata(params, vg.uuid)).with_changes(
            pv_changes(group, {})
        )
        add, remove = block_tags.changes(vg.tags, values.values)
        return RetagVg((block_tags.READY, *add), (block_tags.UNREADY, *remove))

    def _recover_create(self, op: Operation) -> bool:
        """A whole domain stays; of anything less the volumes go, the group stays UNREADY."""
        sd_id = op.params["id"]
        specials = self._family.specials(sd_id)
        specials.close([names.MASTER])
        vg = specials.group.read()
        if block_tags.READY in vg.tags:
            return True
        _clear(specials.group, {names.XLEASES, *names.SPECIAL})
        return False

    # -- format --------------------------------------------------------------------------------

    def format(self, domain: BlockDomain, auto_detach: bool, pool: str | None) -> None:
        """Remove a domain with all it holds, and its volume group.  `pool` is the connected pool
        that uses it, if any.

        Raises 391 (attached and not `auto_detach`), 392, 552 (a volume is open), 654 (another
        host works on it).
        """
        sd_id = domain.id
        with self._locks.held([Lock("00_storage", sd_id)], LOCK_TIMEOUT):
            if pool is not None:
                raise CannotFormatConnected(domain=sd_id, pool=pool)
            pools = domain.metadata().pools
            if pools and not auto_detach:
                raise CannotFormatAttached(domain=sd_id, pool=pools[0])
            self._claim(domain)
            params, needed = {"id": sd_id}, [GROUP + sd_id]
            try:
                self._runner.run(Request(FORMAT, params, needed, "StorageDomain.format"))
            finally:
                self._registry.forget(sd_id)
        self._base.uses.forget(sd_id)

    def _claim(self, domain: BlockDomain) -> None:
        """Whoever holds the domain's lease works on it: 654.  Damaged leases keep nobody."""
        try:
            with (
                host_id(domain, TEMPORARY, self._host_id_timeout),
                domain.own_lock.held(self._lock_timeout),
            ):
                domain.store.active.settle()
        except AcquireHostIdFailure as error:
            log.warning("Formatting %s without its lease: %s", domain.id, error)
        assert domain.lockspace is not None
        domain.lockspace.release()

    def _format(self, op: Operation) -> None:
        sd_id = op.params["id"]
        specials = self._family.specials(sd_id)
        specials.close(sorted(self._base.activation.active(sd_id)))
        specials.group.apply(RetagVg((block_tags.UNREADY,), (block_tags.READY,)))
        op.step("hidden", abortable=False)
        self._finish_format(op, specials)
        log.info("Removed domain %s", sd_id)

    def _finish_format(self, op: Operation, specials: Specials) -> None:
        _clear(specials.group, set(specials.group.read().lvs))
        op.step("volumes", abortable=False)
        self._base.groups.remove(op.params["id"])

    def _recover_format(self, op: Operation) -> bool:
        """Once hidden it goes; before that nothing has happened."""
        sd_id = op.params["id"]
        try:
            specials = self._family.specials(sd_id)
            vg = specials.group.read()
        except VolumeGroupDoesNotExist:
            return True
        if block_tags.READY in vg.tags:
            return False
        specials.close(sorted(self._base.activation.active(sd_id)))
        self._finish_format(op, specials)
        return True


def _new_metadata(params: Any, vg_uuid: str) -> dict[str, str]:
    """As upstream writes it for a domain that is attached to nothing."""
    version = params["version"]
    values = {
        **layout.common_metadata(params["id"], params["type"], params["name"], version),
        "VGUUID": vg_uuid,
    }
    if version >= 5:
        values["BLOCK_SIZE"] = str(GEOMETRY.block_size)
        values["ALIGNMENT"] = str(GEOMETRY.alignment)
    else:
        values["LOGBLKSIZE"] = values["PHYBLKSIZE"] = str(GEOMETRY.block_size)
    assert values["ROLE"] == md.REGULAR
    return values


def _zero(device: str, length: int) -> None:
    step = 1024 * 1024
    for start in range(0, length, step):
        size = min(step, length - start)
        files.write_direct(device, bytes(size), start)


def _clear(group: Group, volumes: set[str]) -> None:
    """Remove what there is of them."""
    there = group.read().lvs
    changes: list[Change] = [RemoveLv(name) for name in sorted(volumes) if name in there]
    if changes:
        group.apply(*changes)


def is_block_type(kind: str) -> bool:
    return kind in BLOCK_TYPES
