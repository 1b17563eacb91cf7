# SPDX-License-Identifier: GPL-2.0-or-later
"""The master role: making a pool, moving its master, rebuilding and destroying it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.domains import metadata as md
from vdsm_storage.domains.domain import Domain
from vdsm_storage.domains.hostid import TEMPORARY, host_id, leave
from vdsm_storage.domains.layout import check_name
from vdsm_storage.domains.members import FREE, in_pool
from vdsm_storage.domains.pool import ACTIVE, Pool, Pools
from vdsm_storage.errors import (
    AgentError,
    StorageDomainAccessError,
    StorageDomainAlreadyAttached,
    StorageDomainDoesNotExist,
    StorageDomainNotInPool,
    StoragePoolConnected,
)
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request, Runner

log = logging.getLogger("pool.master")

CREATE: Final = "pool.create"
RECONSTRUCT: Final = "pool.reconstruct"
SWITCH: Final = "pool.switch_master"
DESTROY: Final = "pool.destroy"
FOUND: Final = "found:"  # an operation's domain that has to be found; host ids it gets itself

# Renewal interval, lease time, I/O time-out, retries; with them the format turns LOCKPOLICY on.
DEFAULT_LEASE: Final = (5, 60, 10, 3)
_LEASE_KEYS: Final = ("LOCKRENEWALINTERVALSEC", "LEASETIMESEC", "IOOPTIMEOUTSEC", "LEASERETRIES")


@dataclass(frozen=True)
class NewPool:
    """StoragePool.create and reconstructMaster; `lease` are the four numbers as in _LEASE_KEYS."""

    id: str
    name: str
    master: str
    master_version: int
    domains: Sequence[str]
    lease: Sequence[int] = DEFAULT_LEASE
    host_id: int = TEMPORARY


def master_metadata(params: Mapping[str, Any]) -> dict[str, str | None]:
    """What a master domain's metadata says of its pool, as others write it too."""
    lease = params["lease"]
    changes: dict[str, str | None] = {
        "POOL_UUID": params["id"],
        "ROLE": md.MASTER,
        "MASTER_VERSION": str(params["master_version"]),
        "POOL_DESCRIPTION": params["name"],
        "POOL_DOMAINS": ",".join(f"{sd}:{ACTIVE}" for sd in params["domains"]),
        "POOL_SPM_ID": "-1",
        "POOL_SPM_LVER": "-1",
    }
    if not all(lease):
        lease = DEFAULT_LEASE
        changes["LOCKPOLICY"] = "ON"
    changes.update({key: str(value) for key, value in zip(_LEASE_KEYS, lease, strict=True)})
    return changes


class Masters:
    """Needs Pools and the runner; `lock_timeout` and `host_id_timeout` in seconds.

    `moved(pool)` is told while both domains are still locked, so that a pool manager on this host
    can take the new master's lease without a gap.
    """

    def __init__(
        self,
        pools: Pools,
        runner: Runner,
        moved: Callable[[Pool], None],
        lock_timeout: float,
        host_id_timeout: float,
    ) -> None:
        self._pools = pools
        self._registry = pools.registry
        self._runner = runner
        self._moved = moved
        self._lock_timeout = lock_timeout
        self._host_id_timeout = host_id_timeout
        self._locked_here: set[str] = set()  # pools that a thread in switch() or destroy() holds

    def kinds(self) -> Sequence[Kind]:
        return (
            Kind(CREATE, ("members", "written"), self._create, self._recover_create),
            Kind(RECONSTRUCT, ("promoted",), self._reconstruct, self._recover_reconstruct),
            Kind(SWITCH, ("promoted", "known"), self._switch, self._recover_switch),
            Kind(DESTROY, ("members",), self._destroy, self._recover_destroy),
        )

    # -- create ------------------------------------------------------------------------------

    def create(self, new: NewPool) -> None:
        """Make a pool of free domains.  Raises 325, 379, 380, 661."""
        if (pool := self._pools.connected()) is not None and pool.id == new.id:
            raise StoragePoolConnected(pool=new.id)
        with self._pools.locked(new.id):
            for sd_id in new.domains:
                try:
                    found = self._registry.get(sd_id).metadata().pools
                except StorageDomainDoesNotExist as error:  # 379: the engine asks another host
                    raise StorageDomainAccessError(domain=sd_id, reason=error) from error
                if found:
                    raise StorageDomainAlreadyAttached(domain=sd_id, pool=found[0])
            self._runner.run(_request(CREATE, new, "StoragePool.create"))

    def _create(self, op: Operation) -> None:
        master = self._registry.get(op.params["master"])
        number = op.params["host_id"]
        with (
            host_id(master, number, self._host_id_timeout),
            master.own_lock.held(self._lock_timeout),
        ):
            for sd_id in _others(op.params):
                self._write(self._registry.get(sd_id), number, in_pool(op.params["id"]))
            op.step("members")
            master.update_metadata(master_metadata(op.params))
            op.step("written", abortable=False)

    def _write(
        self, domain: Domain, number: int, changes: Mapping[str, str | None]
    ) -> None:
        with (
            host_id(domain, number, self._host_id_timeout),
            domain.own_lock.held(self._lock_timeout),
        ):
            domain.update_metadata(changes)

    def _recover_create(self, op: Operation) -> bool:
        """The master is written last: it decides whether the pool was made."""
        pool_id, number = op.params["id"], op.params["host_id"]
        master = self._registry.get(op.params["master"])
        if pool_id in master.metadata().pools:
            self._leave(master, number)
            return True
        for sd_id in _others(op.params):
            domain = self._registry.get(sd_id)
            if pool_id in domain.metadata().pools:
                self._write(domain, number, FREE)
            self._leave(domain, number)
        self._leave(master, number)
        return False

    @staticmethod
    def _leave(domain: Domain, number: int) -> None:
        """Give back a temporary host id that a crash left."""
        lockspace = domain.lockspace
        if lockspace is None or number != TEMPORARY:
            return
        if lockspace.joined_as() == TEMPORARY:
            lockspace.start_acquire(TEMPORARY)
            leave(domain)

    # -- reconstruct -------------------------------------------------------------------------

    def reconstruct(self, new: NewPool) -> None:
        """Make another domain the master of a pool that lost its own.  Raises 325, 353, 358."""
        if (pool := self._pools.connected()) is not None and pool.id == new.id:
            raise StoragePoolConnected(pool=new.id)
        with self._pools.locked(new.id):
            found = self._registry.get(new.master).metadata().pools
            if new.id not in found:
                raise StorageDomainNotInPool(domain=new.master, pool=new.id)
            self._runner.run(_request(RECONSTRUCT, new, "StoragePool.reconstructMaster"))

    def _reconstruct(self, op: Operation) -> None:
        master = self._registry.get(op.params["master"])
        self._write(master, op.params["host_id"], master_metadata(op.params))
        op.step("promoted", abortable=False)
        for sd_id in _others(op.params):
            try:
                domain = self._registry.get(sd_id)
                if domain.metadata().is_master and op.params["id"] in domain.last.pools:
                    self._write(domain, op.params["host_id"], in_pool(op.params["id"]))
            except AgentError as error:  # the lost master, most likely
                log.warning("Domain %s keeps the role that it has: %s", sd_id, error)

    def _recover_reconstruct(self, op: Operation) -> bool:
        found = self._registry.get(op.params["master"]).metadata()
        return found.is_master and found.master_version == op.params["master_version"]

    # -- move the role -----------------------------------------------------------------------

    def switch(self, pool: Pool, new_master: str, version: int) -> None:
        """Move the role inside the connected pool; the caller holds Pools.locked."""
        request = self.switch_request(pool, new_master, version, locked=True)
        self._locked_here.add(pool.id)
        try:
            self._runner.run(request)
        finally:
            self._locked_here.discard(pool.id)

    def switch_request(
        self, pool: Pool, new_master: str, version: int, locked: bool = False
    ) -> Request:
        """The operation that moves the role; `locked`: whoever runs it holds Pools.locked."""
        if new_master not in pool.domains:
            raise StorageDomainNotInPool(domain=new_master, pool=pool.id)
        params = {
            "id": pool.id,
            "old": pool.master,
            "new": new_master,
            "version": version,
            "host_id": pool.host_id,
            "locked": locked,
        }
        domains = [FOUND + pool.master, FOUND + new_master]
        return Request(SWITCH, params, domains, "switchMaster", lane=pool.id)

    def _switch(self, op: Operation) -> None:
        old = self._registry.get(op.params["old"])
        new = self._registry.get(op.params["new"])
        locked = op.params["locked"]
        with (
            contextlib.nullcontext() if locked else self._pools.locked(op.params["id"]),
            old.lock.held(self._lock_timeout),
            new.lock.held(self._lock_timeout),
        ):
            new.update_metadata({"ROLE": md.MASTER})
            op.step("promoted", abortable=False)
            # From here on a restart connects the pool with the new master.
            self._now_master(op)
            op.step("known", abortable=False)
            old.update_metadata({"ROLE": md.REGULAR})

    def _recover_switch(self, op: Operation) -> bool:
        old = self._registry.get(op.params["old"])
        new = self._registry.get(op.params["new"])
        if not new.metadata().is_master:
            return False
        pool_id = op.params["id"]
        here = pool_id in self._locked_here  # by switch(), whose failed run this is
        with contextlib.nullcontext() if here else self._pools.locked(pool_id):
            self._now_master(op)
        if old.metadata().is_master:
            number = op.params["host_id"]
            with (
                host_id(new, number, self._host_id_timeout),
                new.own_lock.held(self._lock_timeout),
            ):
                self._write(old, number, {"ROLE": md.REGULAR})
        return True

    def _now_master(self, op: Operation) -> None:
        params = op.params
        pool = self._pools.master_moved(params["id"], params["new"], params["version"])
        if pool is not None:
            self._moved(pool)

    # -- destroy -----------------------------------------------------------------------------

    def destroy(self, pool_id: str) -> None:
        """Free every domain of the connected pool, and disconnect it.  Raises 309."""
        with self._pools.locked(pool_id):
            pool = self._pools.get(pool_id)
            for sd_id in pool.domains:
                self._registry.get(sd_id)
            others = [sd for sd in pool.domains if sd != pool.master]
            params = {
                "id": pool_id,
                "master": pool.master,
                "domains": others,
                "host_id": pool.host_id,
            }
            needed = [FOUND + sd_id for sd_id in pool.domains]
            self._locked_here.add(pool_id)
            try:
                self._runner.run(Request(DESTROY, params, needed, "StoragePool.destroy"))
            finally:
                self._locked_here.discard(pool_id)
        self._pools.disconnect(pool_id)

    def _destroy(self, op: Operation) -> None:
        master = self._registry.get(op.params["master"])
        number = op.params["host_id"]
        with (
            host_id(master, number, self._host_id_timeout),
            master.own_lock.held(self._lock_timeout),
        ):
            for sd_id in op.params["domains"]:
                self._write(self._registry.get(sd_id), number, FREE)
            op.step("members", abortable=False)
            master.update_metadata(FREE)

    def _recover_destroy(self, op: Operation) -> bool:
        """Goes on to the end: some domains may be free already.  A restart connected the pool."""
        pool_id = op.params["id"]
        if pool_id in self._registry.get(op.params["master"]).metadata().pools:
            self._destroy(op)
        if pool_id not in self._locked_here:
            self._pools.disconnect(pool_id)
        return True


def _request(kind: str, new: NewPool, verb: str) -> Request:
    params = {
        "id": new.id,
        "name": check_name(new.name),
        "master": new.master,
        "master_version": new.master_version,
        "domains": list(new.domains),
        "lease": list(new.lease),
        "host_id": new.host_id,
    }
    # A lost domain must not keep the reconstruction of its pool from being recovered.
    needed = [new.master] if kind == RECONSTRUCT else new.domains
    return Request(kind, params, [FOUND + sd_id for sd_id in needed], verb)


def _others(params: Mapping[str, Any]) -> list[str]:
    return [sd for sd in params["domains"] if sd != params["master"]]
