# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains in and out of a pool: attach, detach, activate, deactivate; names.

Each change of a domain's metadata is one atomic write under the domain's lock, so a crash leaves
the old state or the new one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from vdsm_storage.base.uuids import BLANK
from vdsm_storage.domains import metadata as md
from vdsm_storage.domains.domain import Domain
from vdsm_storage.domains.hostid import TEMPORARY, host_id
from vdsm_storage.domains.layout import check_name
from vdsm_storage.domains.pool import ACTIVE, ATTACHED, Pool, Pools
from vdsm_storage.errors import (
    AcquireHostIdFailure,
    CannotDetachMaster,
    StorageDomainActive,
    StorageDomainAlreadyAttached,
    StorageDomainNotInPool,
)

log = logging.getLogger("pool.members")

FREE: Final[Mapping[str, str | None]] = {
    "POOL_UUID": "",
    "ROLE": md.REGULAR,
    **dict.fromkeys(md.POOL_KEYS),
}


def in_pool(pool_id: str) -> dict[str, str | None]:
    """The metadata of a regular member; what a former pool left goes."""
    return {**FREE, "POOL_UUID": pool_id}


class Members:
    """Needs Pools; `lock_timeout` and `host_id_timeout` in seconds.

    `switch_master` moves the master role of the connected pool (domains/masters.py);
    `upgrade(pool, version)` begins to bring its active domains to a version.
    """

    def __init__(
        self,
        pools: Pools,
        lock_timeout: float,
        host_id_timeout: float,
        switch_master: Callable[[Pool, str, int], None],
        upgrade: Callable[[str, int], None],
    ) -> None:
        self._pools = pools
        self._registry = pools.registry
        self._lock_timeout = lock_timeout
        self._host_id_timeout = host_id_timeout
        self._switch_master = switch_master
        self._upgrade = upgrade

    @contextlib.contextmanager
    def writing(self, domain: Domain, number: int) -> Iterator[None]:
        """Host id and lock of a domain, for one change of its metadata."""
        with (
            host_id(domain, number, self._host_id_timeout),
            domain.lock.held(self._lock_timeout),
        ):
            yield

    def attach(self, sd_id: str, pool_id: str) -> None:
        """Make a free domain a member.  Raises 309, 358, 380, 654."""
        pool = self._pools.get(pool_id)
        domain = self._registry.get(sd_id)
        master = self._registry.get(pool.master)
        with (
            self._pools.locked(pool_id),
            master.lock.held(self._lock_timeout),
            self.writing(domain, pool.host_id),
        ):
            pools = domain.metadata().pools
            if pools:
                raise StorageDomainAlreadyAttached(domain=sd_id, pool=pools[0])
            domain.update_metadata(in_pool(pool_id))
            self._pools.set_status(pool_id, sd_id, ATTACHED)

    def detach(self, sd_id: str, pool_id: str) -> None:
        """Make an attached domain free.  Raises 309, 353, 382, 383."""
        with self._pools.locked(pool_id):
            pool = self._pools.member(pool_id, sd_id)
            if sd_id == pool.master:
                raise CannotDetachMaster(domain=sd_id, pool=pool_id)
            if pool.domains[sd_id] == ACTIVE:
                raise StorageDomainActive(domain=sd_id, pool=pool_id)
            domain = self._registry.get(sd_id)
            with self.writing(domain, pool.host_id):
                if pool_id not in domain.metadata().pools:
                    raise StorageDomainNotInPool(domain=sd_id, pool=pool_id)
                domain.update_metadata(FREE)
            self._pools.set_status(pool_id, sd_id, None)

    def force_detach(self, sd_id: str, pool_id: str) -> None:
        """Strip all that ties a domain to any pool; no pool needs to be connected.

        A domain whose lease is held by a living host is in use: 654.
        """
        domain = self._registry.get(sd_id)
        pool = self._pools.connected()
        number = pool.host_id if pool is not None else TEMPORARY
        with contextlib.ExitStack() as stack:
            if pool is not None and sd_id in pool.domains:
                stack.enter_context(self._pools.locked(pool.id))
                if sd_id == pool.master or pool.domains[sd_id] == ACTIVE:
                    raise StorageDomainActive(domain=sd_id, pool=pool.id)
            try:
                stack.enter_context(self.writing(domain, number))
            except AcquireHostIdFailure as error:
                log.warning("Forced detach of %s without a host id: %s", sd_id, error)
            domain.update_metadata(FREE)
            if pool is not None and sd_id in pool.domains:
                self._pools.set_status(pool.id, sd_id, None)
        log.info("Domain %s was freed by force (pool %s)", sd_id, pool_id)

    def activate(self, sd_id: str, pool_id: str) -> None:
        """Start to use an attached domain; one older than its pool is upgraded in the background.

        Raises 309, 353, 358.
        """
        domain = self._registry.get(sd_id)
        if pool_id not in domain.metadata().pools:
            raise StorageDomainNotInPool(domain=sd_id, pool=pool_id)
        with self._pools.locked(pool_id):
            pool = self._pools.get(pool_id)
            self._pools.set_status(pool_id, sd_id, ACTIVE)
        master = self._registry.peek(pool.master)
        if master is not None and domain.version < master.version:
            self._upgrade(pool_id, master.version)

    def deactivate(self, sd_id: str, pool_id: str, new_master: str, version: int) -> None:
        """Stop to use a domain; a master first hands its role to `new_master`, if given."""
        with self._pools.locked(pool_id):
            pool = self._pools.member(pool_id, sd_id)
            if sd_id == pool.master and new_master not in ("", BLANK, sd_id):
                self._switch_master(pool, new_master, version)
            self._pools.set_status(pool_id, sd_id, ATTACHED)

    # -- names -------------------------------------------------------------------------------

    def set_description(self, sd_id: str, description: str) -> None:
        """The domain's name.  Raises 387, 1001."""
        name = check_name(description)
        domain = self._registry.get(sd_id)
        with self.writing(domain, self._number()):
            domain.update_metadata({"DESCRIPTION": name})

    def set_pool_description(self, pool_id: str, description: str) -> None:
        name = check_name(description)
        master = self._registry.get(self._pools.get(pool_id).master)
        with master.lock.held(self._lock_timeout):
            master.update_metadata({"POOL_DESCRIPTION": name})

    def _number(self) -> int:
        pool = self._pools.connected()
        return pool.host_id if pool is not None else TEMPORARY
