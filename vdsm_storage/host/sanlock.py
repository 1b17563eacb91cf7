# SPDX-License-Identifier: GPL-2.0-or-later
"""sanlock: host ids and leases on shared storage.  The one module that loads its binding.

The binding's calls have no time-out of their own and wait for the daemon, which waits for the
storage.  So every call runs in a thread of its own that its caller stops waiting for in time; what
such a late call still obtains is given back by the thread itself.

Leases belong to this process through a registered connection.  There is one a lockspace: the
daemon serves one command at a time on a connection, and a domain that hangs must not keep the
others waiting.  When the process ends, however it ends, the daemon frees all its leases.

When a host id cannot be renewed, the daemon wants the process that has leases under it to let go,
and kills it after 40 seconds if it does not: before any other host can take those leases.  It
tells by making a file named after the lockspace in `lost_dir` (leases/lost.py looks there).
Without such a directory it sends SIGTERM.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final

import sanlock

from vdsm_storage.base.files import make_shared_directory
from vdsm_storage.errors import (
    AcquireHostIdFailure,
    AcquireLockFailure,
    AgentError,
    ClusterLockInitError,
    LeaseHeldElsewhere,
    ReleaseHostIdFailure,
    ReleaseLockFailure,
    SanlockInquireError,
    SanlockLVBError,
)
from vdsm_storage.host.bounded import BoundedCall
from vdsm_storage.host.sanlock_model import (
    HELD,
    NO_LEASE,
    Failure,
    HostState,
    Place,
    Resource,
    host_facts,
    lease_facts,
    place_facts,
    reason,
)

IO_CALL: Final = 6.0  # I/O time-outs that one call may take: a few reads and writes in a row
SHORT: Final = 20.0  # seconds for what the daemon answers from memory
LVB_SIZE: Final = 512  # bytes
DAEMON_GROUP: Final = "sanlock"  # in production the daemon runs as sanlock:sanlock
TELL: Final = "/usr/bin/touch"  # run by the daemon with the marker's path


@dataclass
class _Connection:
    fd: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    marker: str = ""  # the file that tells that the lockspace's leases are lost

    def registered(self) -> int:
        """The descriptor; registers this process the first time.  Called with the lock held."""
        if self.fd is None:
            fd = sanlock.register()
            if self.marker:
                sanlock.killpath(TELL, [self.marker], slkfd=fd)
            self.fd = fd
        return self.fd


class Sanlock:
    """`run_dir` is the daemon's run directory, "" for the system's; `io_timeout` in seconds;
    `lost_dir`, made here, is where the daemon tells of leases that are lost, "" for SIGTERM.

    The binding reads the run directory from the environment, so one process talks to one daemon.
    """

    def __init__(self, run_dir: str = "", io_timeout: int = 10, lost_dir: str = "") -> None:
        if run_dir:
            os.environ["SANLOCK_RUN_DIR"] = run_dir
            os.environ["SANLOCK_PRIVILEGED"] = "0"
        if lost_dir:
            make_shared_directory(lost_dir, DAEMON_GROUP)
        self.io_timeout = io_timeout
        self.lost_dir = lost_dir
        self._lock = threading.Lock()
        self._connections: dict[str, _Connection] = {}

    @property
    def io_seconds(self) -> float:
        """How long one call that touches the storage may take."""
        return IO_CALL * self.io_timeout + 5

    # -- host ids ----------------------------------------------------------------------------

    def write_lockspace(self, lockspace: str, place: Place, max_hosts: int = 0) -> None:
        """Make an empty lockspace.  Raises ClusterLockInitError (701)."""

        def call() -> None:
            sanlock.write_lockspace(
                lockspace.encode(),
                place.path,
                offset=place.offset,
                max_hosts=max_hosts,
                iotimeout=self.io_timeout,
                align=place.align,
                sector=place.sector,
            )

        facts = {"what": "The lockspace", "lockspace": lockspace, **place_facts(place)}
        self._io(call, ClusterLockInitError, facts)

    def start_host_id(self, lockspace: str, host_id: int, place: Place) -> bool:
        """Begin to acquire a host id; returns at once.  Fine if it is held or under way.

        False while the daemon gives one back there: to be asked again.
        """

        def call() -> bool:
            try:
                sanlock.add_lockspace(
                    lockspace.encode(),
                    host_id,
                    place.path,
                    offset=place.offset,
                    iotimeout=self.io_timeout,
                    wait=False,
                )
            except sanlock.SanlockException as error:
                if error.errno == errno.EAGAIN:
                    return False
                if error.errno not in (errno.EEXIST, errno.EINPROGRESS):
                    raise
            return True

        facts = host_facts(lockspace, host_id, place)
        return bool(self._short("add", call, AcquireHostIdFailure, facts))

    def has_host_id(self, lockspace: str, host_id: int, place: Place) -> bool | None:
        """True: held.  False: not, and nothing is under way.  None: being acquired or released."""

        def call() -> bool | None:
            answer = sanlock.inq_lockspace(
                lockspace.encode(), host_id, place.path, offset=place.offset
            )
            return None if answer is None else bool(answer)

        facts = host_facts(lockspace, host_id, place)
        result: bool | None = self._short("inq", call, AcquireHostIdFailure, facts)
        return result

    def release_host_id(self, lockspace: str, host_id: int, place: Place) -> None:
        """Leave the lockspace.  Refused (662) while this host has a lease in it."""

        def call() -> None:
            try:
                sanlock.rem_lockspace(
                    lockspace.encode(), host_id, place.path, offset=place.offset, unused=True
                )
            except sanlock.SanlockException as error:
                if error.errno != errno.ENOENT:
                    raise

        failure = Failure(ReleaseHostIdFailure, host_facts(lockspace, host_id, place))
        # In turn with acquire(): the daemon kills who takes a lease while it is leaving.
        self._run("leave", call, self.io_seconds, failure, self._connection(lockspace).lock)

    def host_ids(self) -> dict[str, int]:
        """The lockspaces that the daemon has joined or is joining, and the host id in each."""

        def call() -> dict[str, int]:
            return {ls["lockspace"].decode(): ls["host_id"] for ls in sanlock.get_lockspaces()}

        facts = {"domain": "*", "host_id": "*", "path": "*"}
        result: dict[str, int] = self._short("list", call, AcquireHostIdFailure, facts)
        return result

    def hosts(self, lockspace: str) -> list[HostState]:
        """Every host that uses the lockspace; [] in the first second after joining."""

        def call() -> list[HostState]:
            try:
                found = sanlock.get_hosts(lockspace.encode())
            except sanlock.SanlockException as error:
                if error.errno == errno.EAGAIN:
                    return []
                raise
            return [
                HostState(h["host_id"], h["generation"], h["timestamp"], h["flags"]) for h in found
            ]

        facts = {"resource": "hosts", "lockspace": lockspace, "path": "ids", "offset": 0}
        result: list[HostState] = self._short("hosts", call, SanlockInquireError, facts)
        return result

    def is_renewed(self, lockspace: str, own: int) -> bool:
        """Whether this host's id `own` was renewed in time, as the daemon sees it now.

        Its answer counts from the last renewal that reached the storage: it is "no" after eight
        I/O time-outs, long before other hosts may take this one's leases (14 of them).
        """
        known = [host for host in self.hosts(lockspace) if host.host_id == own]
        return not known or known[0].alive  # not known: it joined a second ago

    # -- leases on storage -------------------------------------------------------------------

    def write_resource(self, lockspace: str, resource: str, place: Place) -> None:
        """Write a free lease.  Empty names clear the place.  Raises ClusterLockInitError (701)."""

        def call() -> None:
            sanlock.write_resource(
                lockspace.encode(),
                resource.encode(),
                place.disks,
                align=place.align,
                sector=place.sector,
            )

        facts = {"what": f"Lease {resource}", "lockspace": lockspace, **place_facts(place)}
        self._io(call, ClusterLockInitError, facts)

    def read_resource(self, place: Place) -> Resource | None:
        """What is there; None where no lease was ever written.  Raises 704."""

        def call() -> Resource | None:
            try:
                found = sanlock.read_resource(
                    place.path, place.offset, align=place.align, sector=place.sector
                )
            except sanlock.SanlockException as error:
                if error.errno == NO_LEASE:
                    return None
                raise
            return Resource(
                found["lockspace"].decode(errors="replace"),
                found["resource"].decode(errors="replace"),
                found["version"],
            )

        facts = {"resource": "the lease", "lockspace": "the domain", **place_facts(place)}
        result: Resource | None = self._io(call, SanlockInquireError, facts)
        return result

    def owners(self, lockspace: str, resource: str, place: Place) -> list[int]:
        """Host ids of the owners, read from the storage.  Raises SanlockInquireError (704)."""

        def call() -> list[int]:
            found = sanlock.read_resource_owners(
                lockspace.encode(),
                resource.encode(),
                place.disks,
                align=place.align,
                sector=place.sector,
            )
            return [owner["host_id"] for owner in found]

        facts = lease_facts(lockspace, resource, place)
        result: list[int] = self._io(call, SanlockInquireError, facts)
        return result

    # -- leases held by this process ---------------------------------------------------------

    def acquire(
        self, lockspace: str, resource: str, place: Place, timeout: float, lvb: bool = False
    ) -> None:
        """Take a lease exclusively, in one attempt of at most `timeout` seconds.

        Raises LeaseHeldElsewhere or AcquireLockFailure (651).
        """
        connection = self._connection(lockspace)

        def call() -> None:
            sanlock.acquire(
                lockspace.encode(),
                resource.encode(),
                place.disks,
                slkfd=connection.registered(),
                lvb=lvb,
            )

        def undo() -> None:
            with contextlib.suppress(sanlock.SanlockException):
                names = lockspace.encode(), resource.encode()
                sanlock.release(*names, place.disks, slkfd=connection.fd)

        facts = lease_facts(lockspace, resource, place)
        failure = Failure(AcquireLockFailure, facts, LeaseHeldElsewhere)
        self._run("acquire", call, timeout, failure, connection.lock, undo)

    def release(self, lockspace: str, resource: str, place: Place) -> None:
        """Give a lease back.  Raises ReleaseLockFailure (660)."""
        connection = self._connection(lockspace)

        def call() -> None:
            names = lockspace.encode(), resource.encode()
            sanlock.release(*names, place.disks, slkfd=connection.registered())

        failure = Failure(ReleaseLockFailure, lease_facts(lockspace, resource, place))
        self._run("release", call, self.io_seconds, failure, connection.lock)

    def held(self, lockspace: str) -> list[str]:
        """Names of the leases that this process has in the lockspace, as the daemon sees it."""
        connection = self._connection(lockspace)

        def call() -> list[str]:
            found = sanlock.inquire(slkfd=connection.registered())
            return [lease["resource"].decode() for lease in found]

        facts = {"resource": "leases", "lockspace": lockspace, "path": "-", "offset": 0}
        failure = Failure(SanlockInquireError, facts)
        result: list[str] = self._run("inquire", call, SHORT, failure, connection.lock)
        return result

    def get_lvb(self, lockspace: str, resource: str, place: Place) -> bytes:
        """The data of a lease that was acquired with `lvb`.  Raises SanlockLVBError (703)."""

        def call() -> bytes:
            data: bytes = sanlock.get_lvb(
                lockspace.encode(), resource.encode(), place.disks, LVB_SIZE
            )
            return data

        facts = lease_facts(lockspace, resource, place)
        result: bytes = self._short("get_lvb", call, SanlockLVBError, facts)
        return result

    def set_lvb(self, lockspace: str, resource: str, place: Place, data: bytes) -> None:
        """Store data with a lease held with `lvb`; it is on the storage once it is released."""
        facts = lease_facts(lockspace, resource, place)

        def call() -> None:
            sanlock.set_lvb(lockspace.encode(), resource.encode(), place.disks, data)

        self._short("set_lvb", call, SanlockLVBError, facts)

    def hung_up(self) -> list[str]:
        """Lockspaces whose connection the daemon closed: it died, and what was held is lost.

        Each is told once; the next call registers anew.
        """
        with self._lock:
            open_ones = {c.fd: name for name, c in self._connections.items() if c.fd is not None}
        poll = select.poll()
        for fd in open_ones:
            poll.register(fd, 0)  # POLLHUP and POLLERR are always told
        gone = []
        for fd, _ in poll.poll(0):
            connection = self._connections[open_ones[fd]]
            with connection.lock:
                connection.fd = None
                os.close(fd)
            gone.append(open_ones[fd])
        return gone

    # -- inside ------------------------------------------------------------------------------

    def _connection(self, lockspace: str) -> _Connection:
        with self._lock:
            connection = self._connections.get(lockspace)
            if connection is None:
                marker = os.path.join(self.lost_dir, lockspace) if self.lost_dir else ""
                connection = self._connections[lockspace] = _Connection(marker=marker)
            return connection

    def _io(self, call: Callable[[], Any], error: type[AgentError], facts: dict[str, Any]) -> Any:
        return self._run("io", call, self.io_seconds, Failure(error, facts))

    def _short(
        self, name: str, call: Callable[[], Any], error: type[AgentError], facts: dict[str, Any]
    ) -> Any:
        return self._run(name, call, SHORT, Failure(error, facts))

    @staticmethod
    def _run(
        name: str,
        call: Callable[[], Any],
        timeout: float,
        failure: Failure,
        turn: AbstractContextManager[Any] | None = None,
        undo: Callable[[], None] | None = None,
    ) -> Any:
        try:
            bounded = BoundedCall(call, turn or contextlib.nullcontext(), undo)
            return bounded.run(f"sanlock {name}", timeout)
        except sanlock.SanlockException as cause:
            text = reason(cause.errno, str(cause.args[-1]))
            raise failure.of(text, busy=cause.errno in HELD) from cause
        except TimeoutError as cause:
            text = f"no answer in {timeout:.0f} s; the storage hangs, or the owner has just died"
            raise failure.of(text, busy=True) from cause
