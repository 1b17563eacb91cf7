# SPDX-License-Identifier: GPL-2.0-or-later
"""The storage pool manager as engines want to have one.

Nothing in this agent needs the role.  An engine that elects this host gets what it expects: the
lease of the master domain is taken and kept until spmStop.  After a restart the role is gone (the
lease went with the process), and the engine elects again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final, Protocol

from vdsm_storage.base.lanes import Lanes
from vdsm_storage.domains.domain import Domain
from vdsm_storage.domains.pool import Pool, Pools
from vdsm_storage.errors import AgentError, IsSpm, NotSpm, TaskInProgress
from vdsm_storage.jobs import journal
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request, Runner
from vdsm_storage.leases.model import ClusterLock, LeaseState

log = logging.getLogger("spm")

START: Final = "spm.start"
FREE: Final = "Free"
CONTEND: Final = "Contend"
SPM: Final = "SPM"
NOBODY: Final = -1
MOST_HOSTS: Final = 250
STATUS_WAIT: Final = 5.0  # seconds; engines ask every ten


class Role(Protocol):
    """What a manager does beside holding the lease (monitor/pool_mailbox.py)."""

    def begin(self, master: Domain, hosts: int) -> None:
        """Serve hosts with ids below `hosts`."""

    def end(self) -> None: ...


class Spm:
    """The role on this host.  `host_id_timeout` and `lock_timeout` in seconds; `upgrade(pool,
    version)` begins to bring the pool's domains to a version."""

    def __init__(
        self,
        pools: Pools,
        runner: Runner,
        lanes: Lanes,
        upgrade: Callable[[str, int], None],
        lock_timeout: float,
        host_id_timeout: float,
    ) -> None:
        self._pools = pools
        self._runner = runner
        self._lanes = lanes
        self._upgrade = upgrade
        self._lock_timeout = lock_timeout
        self._host_id_timeout = host_id_timeout
        self._mutex = threading.Lock()
        self._role = FREE
        self._pool_id = ""
        self._held: ClusterLock | None = None
        self._lver = NOBODY
        self._last = (NOBODY, NOBODY)  # owner and version as last read
        self._asking: Future[LeaseState] | None = None
        self._serving: Role | None = None
        self._hosts = MOST_HOSTS

    def watch(self, role: Role) -> None:
        """Wiring."""
        self._serving = role

    def kinds(self) -> Sequence[Kind]:
        return (Kind(START, ("locked", "ready"), self._start, self._recover_start),)

    # -- looking -----------------------------------------------------------------------------

    def is_spm(self, pool_id: str) -> bool:
        with self._mutex:
            held = self._held
            if self._role != SPM or self._pool_id != pool_id:
                return False
            if held is not None and held.is_held():
                return True
            self._drop()
            return False

    def lost(self, sd_id: str) -> None:
        """The leases on a domain are gone (and given back already): the role is, if it was the
        master.  An operation that takes the lease anew does not make this host the manager."""
        pool = self._pools.connected()
        with self._mutex:
            if self._role == SPM and pool is not None and pool.master == sd_id:
                self._drop()

    def _drop(self) -> None:
        log.error("The lease of pool %s was lost: its manager is no longer here", self._pool_id)
        self._role, self._held, self._lver = FREE, None, NOBODY
        # Not waited for here: storage may hang.  What it would still write is fenced by the lease.
        self._lanes.submit("spm end", self._end, 60.0)

    def require_not(self, pool_id: str) -> None:
        """Raises IsSpm (656)."""
        if self.is_spm(pool_id):
            raise IsSpm(pool=pool_id)

    def status(self, pool_id: str) -> dict[str, Any]:
        """As StoragePool.getSpmStatus answers.  Raises 309."""
        pool = self._pools.get(pool_id)
        if self.is_spm(pool_id):
            return {"spmStatus": SPM, "spmLver": self._lver, "spmId": pool.host_id}
        with self._mutex:
            contending = self._role == CONTEND and self._pool_id == pool_id
        owner, version = self._inquire(pool)
        status = CONTEND if contending else FREE
        return {"spmStatus": status, "spmLver": version, "spmId": owner}

    def cached(self, pool_id: str) -> tuple[int, int]:
        """Owner and lease version without I/O, for StoragePool.getInfo."""
        pool = self._pools.get(pool_id)
        if self.is_spm(pool_id):
            return pool.host_id, self._lver
        return self._last

    def _inquire(self, pool: Pool) -> tuple[int, int]:
        state = self._state(pool)
        if state is None:
            return self._last
        owner = state.owners[0] if state.owners else NOBODY
        if owner == pool.host_id:
            owner = NOBODY  # an operation of this very host, which is no manager
        version = NOBODY if owner == NOBODY or state.version is None else state.version
        self._last = (owner, version)
        return self._last

    def _state(self, pool: Pool) -> LeaseState | None:
        """Read from the storage; None when it is slow or dead, and then asked only once."""

        def inquire() -> LeaseState:
            return self._pools.registry.get(pool.master).own_lock.inquire()

        with self._mutex:
            if self._asking is None or self._asking.done():
                self._asking = self._lanes.submit(f"spm status {pool.id}", inquire, 60.0)
            asking = self._asking
        try:
            return asking.result(STATUS_WAIT)
        except (TimeoutError, AgentError) as error:
            log.warning("The manager of pool %s cannot be told: %s", pool.id, error)
            return None

    # -- start and stop ----------------------------------------------------------------------

    def start(
        self, pool_id: str, version: int | None = None, hosts: int | None = None
    ) -> str:
        """Begin to become the manager; returns the task's id.  Raises 309, 656.

        Domains older than `version` are upgraded once this host is the manager; it serves hosts
        with ids below `hosts`.
        """
        pool = self._pools.get(pool_id)
        self.require_not(pool_id)
        params = {"id": pool.id, "version": version, "hosts": hosts or MOST_HOSTS}
        request = Request(START, params, [], "spmStart", lane=f"spm {pool_id}")
        return self._runner.start_task(request)

    def _start(self, op: Operation) -> None:
        pool = self._pools.get(op.params["id"])
        if self.is_spm(pool.id):
            return
        with self._mutex:
            self._role, self._pool_id = CONTEND, pool.id
        master = self._pools.registry.get(pool.master)
        self._pools.ready(pool.master, self._host_id_timeout)
        master.own_lock.acquire(self._lock_timeout)
        with self._mutex:
            self._held = master.own_lock
        op.step("locked")
        master.prepare_master()
        version = master.own_lock.inquire().version
        with self._mutex:
            self._lver = NOBODY if version is None else version
        op.step("ready")
        self._hosts = op.params.get("hosts", MOST_HOSTS)
        with self._mutex:
            self._role = SPM
        self._begin(master)
        if op.params["version"]:
            self._upgrade(pool.id, int(op.params["version"]))
        log.info("This host manages pool %s (lease version %s)", pool.id, self._lver)

    def _recover_start(self, op: Operation) -> bool:
        """Never silently the manager: a start that did not end well is taken back."""
        if self.is_spm(op.params["id"]):
            return True
        self._give_back()
        return False

    def stop(self, pool_id: str) -> None:
        """Give the role back.  Raises 309, 654 (not the manager), 406 (tasks run)."""
        self._pools.get(pool_id)
        if not self.is_spm(pool_id):
            raise NotSpm(pool=pool_id)
        running = [
            task
            for task in self._runner.all(journal.TASK)
            if task.entry.state != journal.FINISHED
        ]
        if running:
            raise TaskInProgress(count=len(running), pool=pool_id)
        self._give_back()
        log.info("This host no longer manages pool %s", pool_id)

    def close(self) -> None:
        """The clean stop of the agent."""
        try:
            self._give_back()
        except AgentError as error:
            log.warning("The pool manager's lease: %s", error)

    def moved(self, pool: Pool) -> None:
        """The master role moved to another domain: take that one's lease, drop the old one."""
        if not self.is_spm(pool.id):
            return
        master = self._pools.registry.get(pool.master)
        with self._mutex:
            old = self._held
        if old is master.own_lock:
            return
        self._pools.ready(pool.master, self._host_id_timeout)
        master.own_lock.acquire(self._lock_timeout)
        master.prepare_master()
        version = master.own_lock.inquire().version
        with self._mutex:
            self._held = master.own_lock
            self._lver = NOBODY if version is None else version
        self._end()
        self._begin(master)
        if old is not None:
            old.release()

    def _begin(self, master: Domain) -> None:
        if self._serving is not None:
            self._serving.begin(master, self._hosts)

    def _end(self) -> None:
        if self._serving is not None:
            self._serving.end()

    def _give_back(self) -> None:
        with self._mutex:
            held, self._held = self._held, None
            self._role, self._lver = FREE, NOBODY
        self._end()
        if held is not None:
            held.release()
