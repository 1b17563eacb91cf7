# SPDX-License-Identifier: GPL-2.0-or-later
"""The storage pool that this host is connected to.

A pool is a set of domains with one master.  The engine tells the set and the master with every
connect; the agent keeps it in memory (and, for a restart after a crash, in a file), watches the
active domains, acquires a host id on each, and keeps the tree of links.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Protocol

from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.domains import remembered
from vdsm_storage.domains.connection import Connections
from vdsm_storage.domains.domain import Capacity, Domain
from vdsm_storage.domains.links import MASTER, Links
from vdsm_storage.domains.metadata import DomainMetadata
from vdsm_storage.domains.registry import Registry
from vdsm_storage.domains.remembered import Remembered
from vdsm_storage.errors import (
    AgentError,
    CannotConnectMultiplePools,
    HostIdMismatch,
    StorageDomainDoesNotExist,
    StorageDomainNotInPool,
    StoragePoolMasterNotFound,
    StoragePoolUnknown,
    StoragePoolWrongMaster,
)
from vdsm_storage.leases.model import ClusterLock

log = logging.getLogger("pool")

ACTIVE: Final = "Active"
ATTACHED: Final = "Attached"
LOCK_TIMEOUT: Final = 160.0


class Watcher(Protocol):
    """Domain monitoring (monitor/health.py).  No method waits for storage."""

    def start(self, sd_id: str, host_id: int | None) -> None:
        """Watch a domain and acquire the host id on it; nothing new if it is watched already."""

    def stop(self, sd_id: str) -> None:
        """Watch no longer, and release the host id in the background, watched or not."""

    def capacity(self, sd_id: str) -> Capacity | None:
        """As of the last good check."""

    def busy(self, sd_id: str) -> bool:
        """Whether the domain is watched, or its host id not released yet."""


@dataclass(frozen=True)
class Pool:
    """`domains` maps the UUIDs to Active or Attached."""

    id: str
    host_id: int
    master: str
    master_version: int
    domains: Mapping[str, str] = field(default_factory=dict)

    @property
    def active(self) -> list[str]:
        return sorted(sd for sd, status in self.domains.items() if status == ACTIVE)


class Pools:
    """The connected pool, at most one.  Needs everything below; `watcher` comes with `watch`."""

    def __init__(
        self,
        registry: Registry,
        connections: Connections,
        memory: Remembered,
        links: Links,
        locks: Locks,
        clock: Clock,
    ) -> None:
        self.registry = registry
        self._connections = connections
        self._memory = memory
        self._links = links
        self._locks = locks
        self._clock = clock
        self._mutex = threading.Lock()
        self._pool: Pool | None = None
        self._watcher: Watcher | None = None
        self._on_disconnect: Callable[[], None] = lambda: None

    def watch(self, watcher: Watcher, on_disconnect: Callable[[], None]) -> None:
        """Wiring.  `on_disconnect()` is called before the storage of a pool is let go."""
        self._watcher = watcher
        self._on_disconnect = on_disconnect

    @property
    def watcher(self) -> Watcher:
        assert self._watcher is not None, "Pools.watch was not called"
        return self._watcher

    def locked(self, pool_id: str) -> Any:
        """Held around every change of the pool's state."""
        return self._locks.held([Lock("01_pool", pool_id)], LOCK_TIMEOUT)

    # -- looking -----------------------------------------------------------------------------

    def connected(self) -> Pool | None:
        with self._mutex:
            return self._pool

    def get(self, pool_id: str) -> Pool:
        """The connected pool.  Raises StoragePoolUnknown (309)."""
        pool = self.connected()
        if pool is None or pool.id != pool_id:
            raise StoragePoolUnknown(pool=pool_id)
        return pool

    def member(self, pool_id: str, sd_id: str) -> Pool:
        """The connected pool, which has the domain.  Raises 309, 353."""
        pool = self.get(pool_id)
        if sd_id not in pool.domains:
            raise StorageDomainNotInPool(domain=sd_id, pool=pool_id)
        return pool

    def user_of(self, sd_id: str) -> str | None:
        """The connected pool in which the domain is active or that it is the master of."""
        pool = self.connected()
        if pool is not None and (sd_id == pool.master or pool.domains.get(sd_id) == ACTIVE):
            return pool.id
        return None

    def master_lock(self, sd_id: str) -> ClusterLock | None:
        """The lock of another domain that also guards this one: its pool's master's."""
        pool = self.connected()
        if pool is None or sd_id == pool.master or sd_id not in pool.domains:
            return None
        master = self.registry.peek(pool.master)
        return master.own_lock if master is not None and master.type.leases else None

    def ready(self, sd_id: str, timeout: float) -> None:
        """Wait for the host ids that a writer to the domain needs.  Raises 661.

        Only those of a connected pool are acquired here; others have to be held already.
        """
        pool = self.connected()
        if pool is None or sd_id not in pool.domains:
            return
        deadline = Deadline(self._clock, timeout)
        for needed in dict.fromkeys((pool.master, sd_id)):
            domain = self.registry.peek(needed)
            lockspace = domain.lockspace if domain is not None else None
            if domain is not None and lockspace is not None and not lockspace.is_held():
                domain.check_special_files()
                lockspace.acquire(pool.host_id, deadline.left())

    def in_use(self, mount: str) -> list[str]:
        """Domains of a connection that are watched or whose host id is held."""
        return [d.id for d in self.registry.on_mount(mount) if self.watcher.busy(d.id)]

    # -- connect and disconnect --------------------------------------------------------------

    def connect(self, wanted: Pool, with_map: bool) -> None:
        """Connect, or refresh the map and the master of what is connected.

        `with_map` tells that the engine sent the domains; otherwise the old map stays.
        Raises 304, 323, 324, 700.
        """
        with self.locked(wanted.id):
            old = self.connected()
            if old is not None and old.id != wanted.id:
                raise CannotConnectMultiplePools(connected=old.id, pool=wanted.id)
            if old is not None and old.host_id != wanted.host_id:
                raise HostIdMismatch(
                    pool=wanted.id, connected=old.host_id, asked=wanted.host_id
                )
            if old is not None and wanted.master_version < old.master_version:
                raise StoragePoolWrongMaster(
                    domain=wanted.master,
                    pool=wanted.id,
                    version=wanted.master_version,
                    reason=f"the pool is at version {old.master_version}",
                )
            if not with_map:
                domains = old.domains if old is not None else {wanted.master: ACTIVE}
                wanted = replace(wanted, domains=domains)
            if old != wanted:
                self._check_master(wanted, with_map)
            self.apply(wanted)

    def _check_master(self, pool: Pool, with_map: bool) -> None:
        try:
            master = self.registry.get(pool.master)
            found = master.metadata()
        except AgentError as error:
            raise StoragePoolMasterNotFound(
                domain=pool.master, pool=pool.id, reason=error
            ) from error
        reason = _wrong_master(pool, found, with_map)
        if reason:
            raise StoragePoolWrongMaster(
                domain=pool.master, pool=pool.id, version=pool.master_version, reason=reason
            )

    def apply(self, pool: Pool) -> None:
        """Make `pool` what this host is connected to; the caller holds `locked`."""
        with self._mutex:
            old, self._pool = self._pool, pool
        for sd_id in set(old.active if old is not None else ()) - set(pool.active):
            self._stop_watching(sd_id)
        for sd_id in pool.active:
            self.watcher.start(sd_id, pool.host_id)
        self._link(pool)
        if old != pool:
            for other in set(self._memory.all(remembered.POOLS)) - {pool.id}:
                self._memory.drop(remembered.POOLS, other)  # it was not restored
            self._memory.put(remembered.POOLS, pool.id, asdict(pool))
            log.info("Pool %s: master %s, domains %s", pool.id, pool.master, dict(pool.domains))

    def _link(self, pool: Pool) -> None:
        names = {*pool.active, pool.master}
        for sd_id in names:
            domain = self.registry.peek(sd_id)
            if domain is not None:
                self._links.put(pool.id, sd_id, domain.path)
                if sd_id == pool.master:
                    self._links.put(pool.id, MASTER, domain.path)
        self._links.keep(pool.id, {*names, MASTER})

    def domain_available(self, sd_id: str) -> None:
        """A watched domain was found: make its link."""
        pool = self.connected()
        if pool is not None and sd_id in (*pool.active, pool.master):
            with self.locked(pool.id):
                if self.connected() == pool:
                    self._link(pool)

    def disconnect(self, pool_id: str) -> None:
        """Forget the pool; host ids are released in the background.  Unknown pools are fine."""
        with self.locked(pool_id):
            pool = self.connected()
            if pool is None or pool.id != pool_id:
                self._memory.drop(remembered.POOLS, pool_id)  # it was not restored
                return
            self._on_disconnect()
            with self._mutex:
                self._pool = None
            for sd_id in {*pool.domains, pool.master}:
                self._stop_watching(sd_id)
            self._links.remove(pool_id)
            self._memory.drop(remembered.POOLS, pool_id)
            log.info("Pool %s was disconnected", pool_id)

    # -- domains watched without a pool ------------------------------------------------------

    def monitor(self, sd_id: str, host_id: int) -> None:
        """Host.startMonitoringDomain: watch a domain and hold a host id on it, pool or not."""
        self._memory.put(remembered.MONITORED, sd_id, host_id)
        pool = self.connected()
        if pool is None or sd_id not in pool.active:
            self.watcher.start(sd_id, host_id)

    def unmonitor(self, sd_id: str) -> None:
        """Host.stopMonitoringDomain; a domain that the pool uses is watched further."""
        self._memory.drop(remembered.MONITORED, sd_id)
        pool = self.connected()
        if pool is None or sd_id not in pool.active:
            self.watcher.stop(sd_id)

    def _stop_watching(self, sd_id: str) -> None:
        if sd_id not in self._memory.all(remembered.MONITORED):
            self.watcher.stop(sd_id)

    def set_status(self, pool_id: str, sd_id: str, status: str | None) -> None:
        """Change one domain's entry (None removes it); the caller holds `locked`."""
        pool = self.get(pool_id)
        domains = {**pool.domains, sd_id: status or ""}
        if status is None:
            del domains[sd_id]
        self.apply(replace(pool, domains=domains))

    def restore(self) -> None:
        """After a crash in this boot: connect what was connected, whether or not its storage is
        there: monitoring tells when it comes.  A pool that has moved on waits for the engine.
        """
        for pool_id in self._memory.all(remembered.POOLS):
            with self.locked(pool_id):  # a recovery may move its master meanwhile
                record = self._memory.all(remembered.POOLS).get(pool_id)
                if record is not None and self.connected() is None:
                    self._restore(Pool(**record))
        for sd_id, host_id in self._memory.all(remembered.MONITORED).items():
            self.watcher.start(sd_id, host_id)

    def _restore(self, pool: Pool) -> None:
        try:
            self._check_master(pool, with_map=True)
        except StoragePoolMasterNotFound as error:
            log.warning("Pool %s is connected again without its master: %s", pool.id, error)
        except AgentError as error:
            log.warning("Pool %s could not be connected again: %s", pool.id, error)
            return
        self.apply(pool)

    def master_moved(self, pool_id: str, master: str, version: int) -> Pool | None:
        """The role moved; the caller holds `locked`.  None: only a restart will connect it."""
        pool = self.connected()
        here = pool is not None and pool.id == pool_id
        if not here:
            record = self._memory.all(remembered.POOLS).get(pool_id)
            pool = Pool(**record) if record is not None else None
        if pool is None:
            return None
        pool = replace(pool, master=master, master_version=max(version, pool.master_version))
        if here:
            self.apply(pool)
            return pool
        self._memory.put(remembered.POOLS, pool_id, asdict(pool))
        return None

    # -- what the engine reads ---------------------------------------------------------------

    def info(self, pool_id: str, spm_id: int, lver: int) -> dict[str, Any]:
        """As StoragePool.getInfo answers, from what monitoring knows."""
        pool = self.get(pool_id)
        found = self._master(pool).last
        return {
            "info": {
                "name": self._name(pool, found),
                "type": found.type,
                "master_uuid": pool.master,
                "master_ver": pool.master_version,
                "domains": ",".join(f"{sd}:{pool.domains[sd]}" for sd in sorted(pool.domains)),
                "lver": lver,
                "spm_id": spm_id,
                "version": str(found.version),
                "isoprefix": "",
                "pool_status": "connected",
            },
            "dominfo": {sd_id: self._domain_info(pool, sd_id) for sd_id in sorted(pool.domains)},
        }

    def _name(self, pool: Pool, master: DomainMetadata) -> str:
        """The pool's name stays with the domain that was the master when the pool was made."""
        known = [self.registry.peek(sd_id) for sd_id in sorted(pool.domains)]
        metadata = [master, *(domain.last for domain in known if domain is not None)]
        names = [m.values["POOL_DESCRIPTION"] for m in metadata if "POOL_DESCRIPTION" in m.values]
        return names[0] if names else ""

    def _domain_info(self, pool: Pool, sd_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = {"status": pool.domains[sd_id], "alerts": [], "isoprefix": ""}
        domain = self.registry.peek(sd_id)
        answer["version"] = domain.version if domain is not None else -1
        capacity = self.watcher.capacity(sd_id)
        if capacity is not None:
            answer["disktotal"] = str(capacity.total)
            answer["diskfree"] = str(capacity.free)
            answer["alerts"] = [{"code": a.code, "message": a.message} for a in capacity.alerts]
        return answer

    def _master(self, pool: Pool) -> Domain:
        try:
            return self.registry.get(pool.master)
        except StorageDomainDoesNotExist as error:
            raise StoragePoolMasterNotFound(
                domain=pool.master, pool=pool.id, reason=error
            ) from error

    def containing_image(self, pool_id: str, image: str) -> list[str]:
        """Active domains of the pool that have the image."""
        pool = self.get(pool_id)
        return [sd for sd in pool.active if image in self.registry.get(sd).store.images()]


def _wrong_master(pool: Pool, found: DomainMetadata, with_map: bool) -> str:
    """Why the domain cannot be the pool's master, or "".

    With a map in the request, the version on disk may be older than the engine's: it is not kept
    up to date then, by this agent as by the others.
    """
    if pool.id not in found.pools:
        return f"it belongs to {', '.join(found.pools) or 'no pool'}"
    if not found.is_master:
        return f"its role is {found.role}"
    on_disk = found.master_version
    if on_disk is None:
        return ""
    if pool.master_version < on_disk or (not with_map and pool.master_version != on_disk):
        return f"its metadata says version {on_disk}"
    return ""
