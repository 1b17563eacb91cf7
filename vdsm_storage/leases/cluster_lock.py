# SPDX-License-Identifier: GPL-2.0-or-later
"""The lock of a domain's metadata between hosts: sanlock's SDM lease, held exclusively.

Always exclusively: the pool manager of an oVirt host holds it so, and one process cannot have a
lease shared and exclusively at once, as it would when one of its operations reads what another
writes.

Counted: the first holder in this process takes the lease, the last gives it back, and whoever
comes between joins without I/O.  While one thread talks to sanlock the others wait for it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Protocol

from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.errors import (
    AcquireLockFailure,
    AgentError,
    LeaseHeldElsewhere,
    ReleaseLockFailure,
    SpmStatusError,
)
from vdsm_storage.leases.lease import Leases
from vdsm_storage.leases.model import LeaseSpec, LeaseState

log = logging.getLogger("leases")


class _Backend(Protocol):
    """What is counted: acquire() raises SpmStatusError when another holder outwaits us."""

    def acquire(self, timeout: float) -> None: ...

    def release(self) -> None: ...

    def lost(self) -> AgentError: ...

    def fresh(self) -> bool:
        """Whether it still keeps others out, for some seconds to come."""


class CountedLock:
    """Counts the holds of `backend` within this process."""

    def __init__(self, domain: str, backend: _Backend, clock: Clock) -> None:
        self._domain = domain
        self._backend = backend
        self._clock = clock
        self._changed = threading.Condition()
        self._count = 0  # holds in all
        self._kept = 0  # those of acquire(), without an operation behind them
        self._lost = False
        self._busy = False  # a thread is acquiring or releasing

    @contextlib.contextmanager
    def held(self, timeout: float) -> Iterator[None]:
        self._enter(timeout)
        try:
            yield
        finally:
            with self._changed:
                last = self._leave()
            if last:
                self._give_back()

    def acquire(self, timeout: float) -> None:
        self._enter(timeout)
        with self._changed:
            self._kept += 1

    def release(self) -> None:
        """Give one acquire() back; nothing happens when it was lost."""
        with self._changed:
            if not self._kept:
                return
            self._kept -= 1
            last = self._leave()
        if last:
            self._give_back()

    def lose(self) -> None:
        """The daemon wants the lease back: others may have it soon.

        No operation joins any more, those that run have to end, and the last one gives it back.
        """
        with self._changed:
            if self._count == 0:
                return
            self._lost = True
            self._count -= self._kept
            self._kept = 0
            last = self._count == 0
            self._busy = last
        if last:
            self._give_back()

    def _enter(self, timeout: float) -> None:
        deadline = Deadline(self._clock, timeout)
        with self._changed:
            while self._busy:
                if deadline.passed():
                    raise SpmStatusError(
                        domain=self._domain, owner="another operation here", seconds=timeout
                    )
                self._changed.wait(deadline.left())
            if self._lost:
                raise self._backend.lost()
            if self._count:
                self._count += 1
                return
            self._busy = True
        taken = False
        try:
            self._backend.acquire(deadline.left())
            taken = True
        finally:
            with self._changed:
                self._busy = False
                self._count = int(taken)
                self._changed.notify_all()

    def _leave(self) -> bool:
        """Take one hold off; True: the caller gives the lock back.  Called with `_changed`."""
        self._count -= 1
        self._busy = self._count == 0
        return self._busy

    def _give_back(self) -> None:
        try:
            self._backend.release()
        except ReleaseLockFailure as error:
            # The operation is done; the lease goes back at the latest with this process.
            log.error("%s", error)
        finally:
            with self._changed:
                self._busy = self._lost = False
                self._changed.notify_all()

    def is_held(self) -> bool:
        with self._changed:
            return self._count > 0 and not self._lost

    def verify(self) -> None:
        """To be called right before what the lock guards is written.

        Raises AcquireLockFailure (651) when it was held and may be another host's soon: this
        process, or all of the host, may have stood still since it took the lock.
        """
        with self._changed:
            held, lost = self._count > 0, self._lost
        if lost or (held and not self._backend.fresh()):
            raise self._backend.lost()


class _SanlockBackend:
    def __init__(self, leases: Leases, spec: LeaseSpec) -> None:
        self._leases = leases
        self._spec = spec

    def acquire(self, timeout: float) -> None:
        try:
            self._leases.acquire(self._spec, timeout)
        except LeaseHeldElsewhere as error:
            raise SpmStatusError(
                domain=self._spec.lockspace, owner=self._owner(), seconds=round(timeout, 1)
            ) from error

    def release(self) -> None:
        self._leases.release(self._spec)

    def lost(self) -> AgentError:
        return AcquireLockFailure(
            lockspace=self._spec.lockspace,
            resource=self._spec.resource,
            path=self._spec.path,
            offset=self._spec.offset,
            reason="this host's id on the domain could not be renewed; look at its storage",
        )

    def fresh(self) -> bool:
        return self._leases.is_fresh(self._spec)

    def _owner(self) -> str:
        try:
            owners = self._leases.state(self._spec).owners
        except AgentError:
            return "another host"
        return "host id " + ", ".join(map(str, owners)) if owners else "hosts that take turns"


class SanlockClusterLock(CountedLock):
    """Fulfils leases.model.ClusterLock with the lease `spec` (resource SDM of the domain)."""

    def __init__(self, leases: Leases, spec: LeaseSpec, clock: Clock) -> None:
        super().__init__(spec.lockspace, _SanlockBackend(leases, spec), clock)
        self._leases = leases
        self.spec = spec
        leases.lost.watch(spec.lockspace, self)

    def inquire(self) -> LeaseState:
        return self._leases.state(self.spec)
