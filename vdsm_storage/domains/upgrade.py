# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains of format 3 and 4 become format 5.

Volumes first, the domain's own metadata last: an upgrade that was cut off is simply gone through
again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.domains import layout
from vdsm_storage.domains.domain import SUPPORTED_VERSIONS
from vdsm_storage.domains.hostid import host_id
from vdsm_storage.domains.masters import FOUND
from vdsm_storage.domains.pool import Pools
from vdsm_storage.errors import AgentError, UnsupportedDomainVersion, VersionTooAdvanced
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request, Runner

log = logging.getLogger("upgrade")

UPGRADE: Final = "domain.upgrade"
EXCLUSIVE_TIMEOUT: Final = 3600.0  # seconds that work on the domain's images may take before


class Upgrades:
    """`lock_timeout` and `host_id_timeout` in seconds."""

    def __init__(
        self,
        pools: Pools,
        runner: Runner,
        locks: Locks,
        lock_timeout: float,
        host_id_timeout: float,
    ) -> None:
        self._pools = pools
        self._registry = pools.registry
        self._runner = runner
        self._locks = locks
        self._lock_timeout = lock_timeout
        self._host_id_timeout = host_id_timeout

    def kinds(self) -> Sequence[Kind]:
        steps = ("xleases", "volumes", "metadata")
        return (Kind(UPGRADE, steps, self._upgrade, self._recover),)

    def start(self, pool_id: str, version: int) -> None:
        """Begin to upgrade the active domains of the pool that are older, one job each.

        Raises 309, 394, 395.
        """
        pool = self._pools.get(pool_id)
        if version not in SUPPORTED_VERSIONS:
            raise UnsupportedDomainVersion(version=version, supported="3, 4, 5")
        master = self._registry.get(pool.master)
        if master.version > version:
            raise VersionTooAdvanced(domain=pool.master, version=master.version, wanted=version)
        for sd_id in pool.active:
            try:
                old = self._registry.get(sd_id).version
            except AgentError as error:
                log.warning("Domain %s is not upgraded: %s", sd_id, error)
                continue
            if old < version:
                params = {"id": sd_id, "version": version, "host_id": pool.host_id}
                request = Request(
                    UPGRADE, params, [FOUND + sd_id], "StoragePool.upgrade", sd_id,
                    f"Upgrade domain {sd_id} from version {old} to {version}",
                )  # fmt: skip
                self._runner.start_job(new_uuid(), request)

    def _upgrade(self, op: Operation) -> None:
        domain = self._registry.get(op.params["id"])
        version = int(op.params["version"])
        with (
            self._locks.held([Lock("00_storage", domain.id)], EXCLUSIVE_TIMEOUT),
            host_id(domain, op.params["host_id"], self._host_id_timeout),
            domain.lock.held(self._lock_timeout),
        ):
            if domain.metadata().version >= version:
                return
            if domain.type.leases and version >= layout.XLEASES_VERSION:
                domain.make_xleases()
            op.step("xleases")
            domain.upgrade_volumes(version, op.progress, op.cancel)
            op.step("volumes")
            domain.update_metadata(domain.upgrade_changes(version))
            op.step("metadata", abortable=False)
            domain.clean_upgrade()
        log.info("Domain %s has version %s now", domain.id, version)

    def _recover(self, op: Operation) -> bool:
        """Up to the change of the metadata it is a sound domain of the old version, from there on
        one of the new version."""
        domain = self._registry.get(op.params["id"])
        domain.clean_upgrade()
        return domain.metadata().version >= int(op.params["version"])
