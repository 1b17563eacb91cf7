# SPDX-License-Identifier: GPL-2.0-or-later
"""Making and formatting file domains: operations that survive a crash at any step."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.base.owner import Owner
from vdsm_storage.domains import layout
from vdsm_storage.domains.connection import Connections
from vdsm_storage.domains.domain import SUPPORTED_VERSIONS
from vdsm_storage.domains.family import Found, Leasing
from vdsm_storage.domains.file import read_metadata
from vdsm_storage.domains.layout import NewDomain, check_name
from vdsm_storage.domains.new_domain import CreateRequest
from vdsm_storage.domains.posix import FILE_TYPES
from vdsm_storage.domains.registry import Registry
from vdsm_storage.errors import (
    CannotFormatAttached,
    CannotFormatConnected,
    StorageDomainAlreadyExists,
    StorageDomainClassError,
    StorageDomainDoesNotExist,
    StorageDomainNotEmpty,
    StorageDomainNotMounted,
    StorageDomainTypeError,
    UnsupportedDomainVersion,
)
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request, Runner
from vdsm_storage.leases.model import Geometry

log = logging.getLogger("domain")

CREATE = "domain.create"
FORMAT = "domain.format"
BUILT_TYPES = ("LOCALFS", "POSIXFS")
LOCK_TIMEOUT = 120.0  # seconds to wait for other work on the same connection


class Lifecycle:
    """Creates and formats domains.  `kinds()` go to the runner."""

    def __init__(
        self,
        registry: Registry,
        connections: Connections,
        leasing: Leasing,
        owner: Owner,
        locks: Locks,
        runner: Runner,
    ) -> None:
        self._registry = registry
        self._connections = connections
        self._leasing = leasing
        self._owner = owner
        self._locks = locks
        self._runner = runner

    def kinds(self) -> Sequence[Kind]:
        return (
            Kind(CREATE, ("laid_out", "leases", "complete"), self._create, self._recover_create),
            Kind(FORMAT, ("hidden",), self._format, self._recover_format),
        )

    # -- create ------------------------------------------------------------------------------

    def create(self, request: CreateRequest) -> None:
        """Make an unattached domain.  Raises 348, 360, 361, 365, 372, 385, 386, 394, 397, 399."""
        if request.type not in BUILT_TYPES:
            reason = f"this version makes {' and '.join(BUILT_TYPES)} domains"
            raise StorageDomainTypeError(type=request.type, reason=reason)
        if request.klass != "Data":
            raise StorageDomainClassError(klass=request.klass)
        version = SUPPORTED_VERSIONS[-1] if request.version is None else request.version
        if version not in SUPPORTED_VERSIONS:
            raise UnsupportedDomainVersion(version=version, supported="3, 4, 5")
        name = check_name(request.name)
        mount = self._connections.find(request.remote_path, request.type)
        if mount is None:
            raise StorageDomainNotMounted(path=request.remote_path)
        remote_path = self._connections.mounts()[mount].remote_path
        locks = [Lock("00_storage", request.id), Lock("02_connection", mount)]
        with self._locks.held(locks, LOCK_TIMEOUT):
            self._check_free(request.id, mount)
            geometry = self._geometry(request, version, mount)
            params = {
                "id": request.id,
                "mount": mount,
                "type": request.type,
                "name": name,
                "version": version,
                "remote_path": remote_path,
                "block_size": geometry.block_size,
                "alignment": geometry.alignment,
            }
            self._runner.run(Request(CREATE, params, [mount], "StorageDomain.create"))
        found = read_metadata(os.path.join(mount, request.id), request.id)
        self._registry.adopt(Found(mount, found))

    def _check_free(self, sd_id: str, mount: str) -> None:
        try:
            known = self._registry.get(sd_id)
        except StorageDomainDoesNotExist:
            pass
        else:
            raise StorageDomainAlreadyExists(domain=sd_id, path=known.path)
        with layout.storage_errors(sd_id, mount, self._user):
            others = layout.domains_in(mount)
            if sd_id in others or os.path.lexists(os.path.join(mount, sd_id)):
                raise StorageDomainAlreadyExists(domain=sd_id, path=mount)
            if others:
                raise StorageDomainNotEmpty(path=mount, other=others[0])

    def _geometry(self, request: CreateRequest, version: int, mount: str) -> Geometry:
        with layout.storage_errors(request.id, mount, self._user):
            found = layout.probe_block_size(mount, request.id)
        size = layout.choose_block_size(
            found, request.block_size, FILE_TYPES[request.type], version, mount
        )
        return Geometry(size, layout.alignment(size, request.max_hosts))

    @property
    def _user(self) -> str:
        return f"user {self._owner.uid}, group {self._owner.gid}"

    def _create(self, op: Operation) -> None:
        new, mount = _new_domain(op.params), str(op.params["mount"])
        name = layout.hidden(new.id, "new")
        root = os.path.join(mount, name)
        leasing = self._leasing if new.type.leases else None
        with layout.storage_errors(new.id, mount, self._user):
            layout.remove(mount, name)
            layout.make_directories(root, self._owner)
            op.step("laid_out")
            layout.make_special_files(root, new, self._owner, leasing)
            op.step("leases")
            layout.write_metadata(root, new, self._owner)
            op.step("complete")
            layout.move(mount, name, new.id)
        log.info("Made domain %s (%s) in %s", new.id, new.type.name, mount)

    def _recover_create(self, op: Operation) -> bool:
        mount, sd_id = str(op.params["mount"]), str(op.params["id"])
        self._require(mount)
        layout.remove(mount, layout.hidden(sd_id, "new"))
        layout.remove(mount, layout.hidden(sd_id, "probe"))
        return os.path.isdir(os.path.join(mount, sd_id))

    def _require(self, mount: str) -> None:
        if not self._connections.is_connected(mount):
            raise StorageDomainNotMounted(path=mount)

    # -- format ------------------------------------------------------------------------------

    def format(self, sd_id: str, auto_detach: bool, pool: str | None) -> None:
        """Remove a domain with all it holds.  `pool` is the connected pool that uses it, if any.

        Raises 358, 391 (attached and not `auto_detach`), 392.
        """
        with self._locks.held([Lock("00_storage", sd_id)], LOCK_TIMEOUT):
            if pool is not None:
                raise CannotFormatConnected(domain=sd_id, pool=pool)
            domain = self._registry.get(sd_id)
            pools = domain.metadata().pools
            if pools and not auto_detach:
                raise CannotFormatAttached(domain=sd_id, pool=pools[0])
            if domain.lockspace is not None:
                domain.lockspace.release()
            params = {"id": sd_id, "mount": domain.mount}
            try:
                self._runner.run(Request(FORMAT, params, [domain.mount], "StorageDomain.format"))
            finally:
                self._registry.forget(sd_id)

    def _format(self, op: Operation) -> None:
        mount, sd_id = str(op.params["mount"]), str(op.params["id"])
        name = layout.hidden(sd_id, "removed")
        with layout.storage_errors(sd_id, mount, self._user):
            layout.remove(mount, name)
            layout.move(mount, sd_id, name)
            op.step("hidden", abortable=False)
            layout.remove(mount, name)
        log.info("Removed domain %s from %s", sd_id, mount)

    def _recover_format(self, op: Operation) -> bool:
        mount, sd_id = str(op.params["mount"]), str(op.params["id"])
        self._require(mount)
        layout.remove(mount, layout.hidden(sd_id, "removed"))
        return not os.path.lexists(os.path.join(mount, sd_id))


def _new_domain(params: Mapping[str, Any]) -> NewDomain:
    return NewDomain(
        id=params["id"],
        type=FILE_TYPES[params["type"]],
        name=params["name"],
        version=params["version"],
        remote_path=params["remote_path"],
        geometry=Geometry(params["block_size"], params["alignment"]),
    )
