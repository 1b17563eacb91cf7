# SPDX-License-Identifier: GPL-2.0-or-later
"""The lock around a domain's metadata when the domain is in a pool.

A VDSM pool manager holds one lease, the master domain's, and writes to every domain of the pool
under it.  So a writer to another domain of the pool takes the master's lease first, then the
domain's own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.leases.model import ClusterLock, LeaseState

HOST_ID_WAIT = 90.0  # seconds; a host id takes 20 to 30 with sanlock's usual time-outs


class CheckedLock:
    """A domain's own lock, used only while `check()` finds the files that it is made of sound."""

    def __init__(self, lock: ClusterLock, check: Callable[[], None]) -> None:
        self._lock = lock
        self._check = check

    @contextlib.contextmanager
    def held(self, timeout: float) -> Iterator[None]:
        self._check()
        with self._lock.held(timeout):
            yield

    def acquire(self, timeout: float) -> None:
        self._check()
        self._lock.acquire(timeout)

    def release(self) -> None:
        self._lock.release()

    def is_held(self) -> bool:
        return self._lock.is_held()

    def held_for(self) -> float:
        return self._lock.held_for()

    def verify(self) -> None:
        self._lock.verify()

    def inquire(self) -> LeaseState:
        self._check()
        return self._lock.inquire()


class PoolLock:
    """Fulfils leases.model.ClusterLock with the locks that a writer needs now.

    `master` gives the lock of the pool's master domain, or None: no pool, the domain is the
    master itself, or the master has no leases.  `ready(timeout)` waits for the host ids that are
    still being acquired: a pool may have been connected a second ago.
    """

    def __init__(
        self,
        own: ClusterLock,
        master: Callable[[], ClusterLock | None],
        ready: Callable[[float], None],
        clock: Clock,
    ) -> None:
        self._own = own
        self._master = master
        self._ready = ready
        self._clock = clock
        self._mutex = threading.Lock()
        self._holds: list[contextlib.ExitStack] = []

    @contextlib.contextmanager
    def held(self, timeout: float) -> Iterator[None]:
        if not self.is_held():
            self._ready(max(timeout, HOST_ID_WAIT))
        deadline = Deadline(self._clock, timeout)
        with contextlib.ExitStack() as stack:
            master = self._master()
            if master is not None:
                stack.enter_context(master.held(timeout))
            stack.enter_context(self._own.held(deadline.left()))
            yield

    def acquire(self, timeout: float) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.held(timeout))
            hold = stack.pop_all()
        with self._mutex:
            self._holds.append(hold)

    def release(self) -> None:
        with self._mutex:
            hold = self._holds.pop()
        hold.close()

    def is_held(self) -> bool:
        master = self._master()
        return self._own.is_held() and (master is None or master.is_held())

    def held_for(self) -> float:
        master = self._master()
        own = self._own.held_for()
        return own if master is None else min(own, master.held_for())

    def verify(self) -> None:
        master = self._master()
        if master is not None:
            master.verify()
        self._own.verify()

    def inquire(self) -> LeaseState:
        """Of the master, which a writer needs first: a manager has only that one."""
        return (self._master() or self._own).inquire()
