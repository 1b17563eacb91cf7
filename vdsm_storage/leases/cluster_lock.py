# SPDX-License-Identifier: GPL-2.0-or-later
"""The lock of a domain's metadata between hosts: sanlock's SDM lease, held exclusively.

Always exclusively: the pool manager of an oVirt host holds it so, and one process cannot have a
lease shared and exclusively at once, as it would when one of its operations reads what another
writes.

Counted: the first holder in this process takes the lease, the last gives it back, and whoever
comes between joins without I/O.  While one thread talks to sanlock the others wait for it.

Operations that follow each other closely would keep the lease from the other hosts for ever.  So
after a while nobody joins any more until it has been given back, and left alone for a moment.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Final, Protocol

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

TURN: Final = 2.0  # seconds that operations of one host may take turns
# Seconds that others of this host then wait for those that go on; one may take very long.
GRACE: Final = 3.0
# Seconds that the lease is left alone then: other hosts look for it about every 50 ms.
PAUSE: Final = 0.2


class _Backend(Protocol):
    """What is counted: acquire() raises SpmStatusError when another holder outwaits us."""

    def acquire(self, timeout: float) -> None: ...

    def release(self) -> None: ...

    def lost(self) -> AgentError: ...

    def fresh(self) -> bool:
        """Whether it still keeps others out, for some seconds to come."""


class CountedLock:
    """Counts the holds of `backend` within this process, which has its turn for `turn` seconds."""

    def __init__(
        self, domain: str, backend: _Backend, clock: Clock, turn: float = math.inf
    ) -> None:
        self._domain = domain
        self._backend = backend
        self._clock = clock
        self._turn = turn
        self._changed = threading.Condition()
        self._count = 0  # holds in all
        self._kept = 0  # those of acquire(), without an operation behind them
        self._holders: Counter[int] = Counter()  # the other ones, by thread
        self._since = 0.0  # when it was taken
        self._yielding = False  # somebody waits for the end of this turn
        self._lost = False
        self._busy = False  # a thread is acquiring or releasing

    @contextlib.contextmanager
    def held(self, timeout: float) -> Iterator[None]:
        self._enter(timeout)
        try:
            yield
        finally:
            with self._changed:
                self._note(-1)
                last = self._leave()
            if last:
                self._give_back()

    def acquire(self, timeout: float) -> None:
        self._enter(timeout)
        with self._changed:
            self._note(-1)
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

    def doom(self) -> None:
        """The daemon wants the lease back, others may have it soon: nobody joins any more, and
        nobody writes under it."""
        with self._changed:
            self._lost = self._count > 0
            self._changed.notify_all()

    def lose(self) -> None:
        """After doom(): who keeps it without an operation lets go.

        Operations that run have to end, and the last one gives the lease back.
        """
        with self._changed:
            if not self._lost:  # those who had it then are gone
                return
            self._count -= self._kept
            self._kept = 0
            last = self._count == 0
            self._busy = last
        if last:
            self._give_back()

    def _enter(self, timeout: float) -> None:
        deadline = Deadline(self._clock, timeout)
        with self._changed:
            while True:
                if self._lost and not self._busy:
                    raise self._backend.lost()
                wait = math.inf if self._busy else self._others_turn()
                if not wait:
                    break
                if deadline.passed():
                    raise SpmStatusError(
                        domain=self._domain, owner="another operation here", seconds=timeout
                    )
                self._changed.wait(min(wait, deadline.left()))
            self._note(1)
            if self._count:
                self._count += 1
                return
            self._busy = True
            pause, self._yielding = PAUSE * self._yielding, False
        self._take(deadline, pause)

    def _take(self, deadline: Deadline, pause: float) -> None:
        """The first hold; called with `_busy` set, and not with `_changed`."""
        taken = False
        try:
            if pause:
                self._clock.wait(threading.Event(), min(pause, deadline.left()))
            self._backend.acquire(deadline.left())
            taken = True
        finally:
            with self._changed:
                self._busy = False
                self._count = int(taken)
                self._note(0 if taken else -1)
                self._since = self._clock.monotonic()
                self._changed.notify_all()

    def _others_turn(self) -> float:
        """Seconds that this thread must not join, because the turn of this host is over.

        Who holds it already may hold it once more, and a manager keeps it in any case.
        """
        if not self._count or self._kept or threading.get_ident() in self._holders:
            return 0.0
        over = self._clock.monotonic() - self._since - self._turn
        if not 0.0 <= over < GRACE:
            return 0.0
        self._yielding = True
        return GRACE - over

    def _note(self, more: int) -> None:
        """How often this thread holds it."""
        thread = threading.get_ident()
        self._holders[thread] += more
        if not self._holders[thread]:
            del self._holders[thread]

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

    def held_for(self) -> float:
        with self._changed:
            held = self._count > 0 and not self._lost
            return self._clock.monotonic() - self._since if held else 0.0

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
        super().__init__(spec.lockspace, _SanlockBackend(leases, spec), clock, TURN)
        self._leases = leases
        self.spec = spec
        leases.lost.watch(spec.lockspace, self)

    def inquire(self) -> LeaseState:
        return self._leases.state(self.spec)
