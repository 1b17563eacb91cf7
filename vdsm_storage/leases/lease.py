# SPDX-License-Identifier: GPL-2.0-or-later
"""Leases: written, taken, given back, asked about, and the data that goes with them."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections.abc import Iterator
from typing import Final

from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.base.files import read_direct
from vdsm_storage.errors import AgentError, LeaseHeldElsewhere, SanlockInquireError, SanlockLVBError
from vdsm_storage.host.sanlock import LVB_SIZE, Sanlock
from vdsm_storage.host.sanlock_model import Place
from vdsm_storage.leases.index import Index
from vdsm_storage.leases.leader import LEADER_SIZE, Leader, parse_leader
from vdsm_storage.leases.lost import LostLeases
from vdsm_storage.leases.model import Geometry, LeaseSpec, LeaseState
from vdsm_storage.leases.slots import Slots

log = logging.getLogger("leases")

# Seconds that an answer of the daemon holds.  Six I/O time-outs lie between its "no" and the moment
# when another host gets the lease, so that this one is far away from both.
FRESH: Final = 0.2
# I/O time-outs that this process may stand still; a host id expires after eight without renewal.
STILL: Final = 6
_DATA_SECTOR: Final = 2002

ATTEMPT: Final = 10.0  # seconds for the I/O of one attempt, at least
# A short holder has a lease for 10 to 50 ms; hosts that meet must not keep meeting.
BACK_OFF: Final = (0.01, 0.08)  # seconds


class Leases:
    """All of it through sanlock.  A lease can be taken on a domain whose host id is held."""

    def __init__(self, sanlock: Sanlock, clock: Clock) -> None:
        self._sanlock = sanlock
        self._clock = clock
        still = STILL * sanlock.io_timeout
        self.lost = LostLeases(sanlock.lost_dir, sanlock.hung_up, still, clock)
        self._fresh_lock = threading.Lock()
        self._fresh: dict[LeaseSpec, float] = {}  # until when nobody needs to ask again

    # -- on storage --------------------------------------------------------------------------

    def write_lockspace(self, lockspace: str, path: str, geometry: Geometry) -> None:
        """Make an empty lockspace at the start of `path`.  Raises 701."""
        self._sanlock.write_lockspace(
            lockspace, Place(path, 0, geometry.alignment, geometry.block_size)
        )

    def write(self, spec: LeaseSpec) -> None:
        """Write a free lease.  The file must exist; it grows to the lease's end.  Raises 701."""
        self._sanlock.write_resource(spec.lockspace, spec.resource, place(spec))

    def clear(self, spec: LeaseSpec) -> None:
        """Write a lease without names at the place: nobody can take it any more."""
        self._sanlock.write_resource("", "", place(spec))

    def state(self, spec: LeaseSpec) -> LeaseState:
        """Who holds it, from the storage; works without a host id.  Raises 704.

        Owners that died count until another host takes the lease from them.
        """
        leader = self.leader(spec)
        if leader is None:
            raise SanlockInquireError(
                resource=spec.resource,
                lockspace=spec.lockspace,
                path=spec.path,
                offset=spec.offset,
                reason="no such lease is there; make the volume or lease anew",
            )
        owners = tuple(self._sanlock.owners(spec.lockspace, spec.resource, place(spec)))
        return LeaseState(
            owners=owners,
            version=leader.version if owners else None,
            last_owner=leader.owner_id if leader.version else None,
            last_version=leader.version if leader.version else None,
        )

    def is_fresh(self, spec: LeaseSpec) -> bool:
        """Whether a lease that this process holds keeps others out, for some seconds to come.

        Asks this process's own clock, the daemon, and the storage; at most every FRESH seconds.
        """
        if self.lost.stood_still():
            return False
        now = self._clock.monotonic()
        with self._fresh_lock:
            until = self._fresh.get(spec, 0.0)
        if now < until:
            return True
        try:
            fresh = self._is_ours(spec)
        except AgentError as error:
            log.warning("Lease %s of %s: %s", spec.resource, spec.lockspace, error)
            fresh = False
        with self._fresh_lock:
            self._fresh[spec] = now + FRESH if fresh else 0.0
        return fresh

    def _is_ours(self, spec: LeaseSpec) -> bool:
        own = self._sanlock.host_ids().get(spec.lockspace)
        if own is None or not self._sanlock.is_renewed(spec.lockspace, own):
            return False
        leader = self.leader(spec)
        return leader is not None and leader.owner_id == own and leader.timestamp != 0

    def leader(self, spec: LeaseSpec) -> Leader | None:
        """The lease's own record; None where there is none or another one.  Raises 704."""
        try:
            data = read_direct(spec.path, LEADER_SIZE, spec.offset)
        except OSError as error:
            raise SanlockInquireError(
                resource=spec.resource,
                lockspace=spec.lockspace,
                path=spec.path,
                offset=spec.offset,
                reason=error.strerror,
            ) from error
        leader = parse_leader(data)
        if leader is None or (leader.lockspace, leader.resource) != (spec.lockspace, spec.resource):
            return None
        return leader

    def format_xleases(self, path: str, lockspace: str, geometry: Geometry) -> None:
        """Write an empty index of external leases.  Raises OSError."""
        Slots(path, lockspace, geometry).write(Index(lockspace, int(self._clock.time()), ()))

    # -- held by this process ----------------------------------------------------------------

    def acquire(self, spec: LeaseSpec, timeout: float, lvb: bool = False) -> None:
        """Take it, with `lvb` in order to use its data; waits at most `timeout` seconds.

        Raises LeaseHeldElsewhere (651) after that, AcquireLockFailure (651) or, where there is
        no room for data, SanlockLVBError (703) at once.
        """
        if lvb and not has_room_for_data(spec.geometry):
            raise _data_error(spec, "leases of this size have no room for data")
        deadline = Deadline(self._clock, timeout)
        while True:
            # The attempt gets time for its I/O, however short the wait for others is.
            attempt = max(deadline.left(), ATTEMPT)
            try:
                self._sanlock.acquire(spec.lockspace, spec.resource, place(spec), attempt, lvb)
                return
            except LeaseHeldElsewhere:
                if deadline.passed():
                    raise
            pause = random.uniform(*BACK_OFF)  # noqa: S311 - no secret
            self._clock.wait(threading.Event(), min(pause, deadline.left() + 0.001))

    def release(self, spec: LeaseSpec) -> None:
        """Give it back.  Raises ReleaseLockFailure (660)."""
        self._sanlock.release(spec.lockspace, spec.resource, place(spec))

    @contextlib.contextmanager
    def held(self, spec: LeaseSpec, timeout: float, lvb: bool = False) -> Iterator[None]:
        """Hold it; see acquire()."""
        self.acquire(spec, timeout, lvb)
        try:
            yield
        finally:
            self.release(spec)

    def get_data(self, spec: LeaseSpec) -> bytes:
        """The 512 bytes of data of a lease held with `lvb`.  Raises 703."""
        return self._sanlock.get_lvb(spec.lockspace, spec.resource, place(spec))

    def read_data(self, spec: LeaseSpec) -> bytes:
        """The data as it was when the lease was released last, whoever holds it.  Raises 703."""
        if not has_room_for_data(spec.geometry):
            return b""
        offset = spec.offset + _DATA_SECTOR * spec.geometry.block_size
        try:
            return read_direct(spec.path, LVB_SIZE, offset)
        except OSError as error:
            raise _data_error(spec, str(error)) from error

    def set_data(self, spec: LeaseSpec, data: bytes) -> None:
        """Give a lease held with `lvb` its data; on the storage once it is released."""
        self._sanlock.set_lvb(spec.lockspace, spec.resource, place(spec), data)


def has_room_for_data(geometry: Geometry) -> bool:
    """sanlock 3.8 keeps the data in sector 2002, whatever the lease's size: with sectors of 4096
    and less than 8 MiB a lease, that is inside another lease."""
    return (_DATA_SECTOR + 1) * geometry.block_size <= geometry.alignment


def _data_error(spec: LeaseSpec, reason: str) -> SanlockLVBError:
    return SanlockLVBError(
        resource=spec.resource,
        lockspace=spec.lockspace,
        path=spec.path,
        offset=spec.offset,
        reason=reason,
    )


def place(spec: LeaseSpec) -> Place:
    return Place(spec.path, spec.offset, spec.geometry.alignment, spec.geometry.block_size)
