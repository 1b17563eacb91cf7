# SPDX-License-Identifier: GPL-2.0-or-later
"""Host ids: this host's place among the hosts that share a domain's leases.

A host id is acquired once a domain is in use and kept until the pool is disconnected.  It is the
daemon that holds it, not this process: it outlives a restart of the agent, which then finds it.
Acquiring takes 20 to 30 seconds with the usual I/O time-out, and minutes if another host used the
id and died, so `start_acquire` does not wait.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.errors import (
    AcquireHostIdFailure,
    AgentError,
    HostIdConflict,
    ReleaseHostIdFailure,
)
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.host.sanlock_model import HostState, Place
from vdsm_storage.leases.model import Geometry

log = logging.getLogger("leases")

POLL: Final = 0.1  # seconds between two looks at a host id under way
LEAVING: Final = 5.0  # seconds that another id of this host may take to be given back
SEEN: Final = 2.5  # seconds after which the daemon is at what it was asked: it looks once a second


def nothing() -> None:
    """For lockspaces whose files are always there."""


class Lockspace:
    """The lockspace of the domain `sd_id`, whose file or device `ids_path` is.

    `prepare` makes that usable, each time before a host id is asked for.
    """

    def __init__(
        self, sanlock: Sanlock, sd_id: str, ids_path: str, geometry: Geometry, clock: Clock
    ) -> None:
        self._sanlock = sanlock
        self.id = sd_id
        self._place = Place(ids_path, 0, geometry.alignment, geometry.block_size)
        self._clock = clock
        self._host_id: int | None = None
        self._changing = threading.Lock()  # one comes or goes at a time
        self._leaving = False
        self._users = 0
        self._unwanted = False  # it was to be given back while somebody used it
        self.prepare: Callable[[], None] = nothing

    @property
    def host_id(self) -> int | None:
        """The host id asked for last; None when none was."""
        return self._host_id

    def joined_as(self) -> int | None:
        """The host id that the daemon has or is getting here, whoever asked for it."""
        return self._sanlock.host_ids().get(self.id)

    def start_acquire(self, host_id: int) -> bool:
        """Ask for the host id; returns at once, or when a release that is under way has ended.
        Does nothing if it is held or under way.

        False while the daemon still releases one for an earlier life of this agent: ask again.
        Raises AcquireHostIdFailure (661), HostIdConflict (700): another one is held already.
        """
        with self._changing:
            self.prepare()
            held = self._sanlock.host_ids().get(self.id)
            if held is not None and held != host_id:
                self._leave_behind(held, host_id)
            if not self._sanlock.start_host_id(self.id, host_id, self._place):
                return False
            self._host_id = host_id
            self._unwanted = False
            return True

    def _leave_behind(self, held: int, asked: int) -> None:
        """Give back what an earlier life of this agent held when it was killed, and nobody uses."""
        conflict = HostIdConflict(domain=self.id, held=held, asked=asked)
        if self._host_id is not None:
            raise conflict
        log.info("Lockspace %s: host id %s was left behind, and is given back", self.id, held)
        try:
            self._sanlock.release_host_id(self.id, held, self._place)
        except ReleaseHostIdFailure as error:
            raise conflict from error

    def acquire(self, host_id: int, timeout: float) -> None:
        """Ask and wait at most `timeout` seconds.  Raises 661, 700."""
        deadline = Deadline(self._clock, timeout)
        was_joined = self._host_id is None and self.joined_as() is not None
        self._acquire(host_id, deadline, was_joined)
        if was_joined:  # it may be leaving, which the daemon shows a moment later
            self._clock.wait(threading.Event(), SEEN)
            self._acquire(host_id, deadline, was_joined)

    def _acquire(self, host_id: int, deadline: Deadline, leaving: bool) -> None:
        """`leaving`: an earlier life of this agent may have been killed as it gave the id back."""
        # A pool that was disconnected just now gives its id back a moment later.
        patience = Deadline(self._clock, min(LEAVING, deadline.left()))
        while True:
            while not self._start(host_id, patience):
                if deadline.passed():
                    raise self._failure("an earlier one is still being given back", host_id)
                self._clock.wait(threading.Event(), POLL)
            try:
                return self.wait(deadline.left())
            except AcquireHostIdFailure:
                if deadline.passed() or (self._host_id is not None and not leaving):
                    raise
                leaving = False
            # The same id was held for that pool, and is given back now: it is asked for anew.

    def _start(self, host_id: int, patience: Deadline) -> bool:
        try:
            return self.start_acquire(host_id)
        except HostIdConflict:
            if patience.passed():
                raise
            return False

    def wait(self, timeout: float) -> None:
        """Wait until the host id that was asked for is held.  Raises 661."""
        deadline = Deadline(self._clock, timeout)
        while True:
            state = self._state()
            if state is True:
                return
            if state is False:
                raise self._failure(
                    "another host uses it or its storage cannot be written; give each host an id"
                    " of its own, and see sanlock's log"
                )
            if deadline.passed():
                raise self._failure(
                    f"not done in {timeout:.0f} s and still going on; if a host with this id"
                    " died, that takes up to three minutes"
                )
            self._clock.wait(threading.Event(), POLL)

    def is_held(self) -> bool:
        """Whether leases can be taken on the domain now.  Asks the daemon, not the storage."""
        try:
            return self._host_id is not None and self._state() is True
        except AgentError as error:
            log.warning("Lockspace %s: %s", self.id, error)
            return False

    def begin_use(self) -> bool:
        """False if no host id is held.  Else it stays until end_use(): who gives it back meanwhile
        leaves that to the user, see `unwanted`."""
        with self._changing:
            held = self.is_held()
            self._users += held
            return held

    def end_use(self) -> None:
        with self._changing:
            self._users -= 1

    @property
    def unwanted(self) -> bool:
        """Whether somebody gave the host id back while it was used: the user has to do it."""
        return self._unwanted

    def release(self, then: Callable[[], None] = nothing) -> None:
        """Give the host id back, if there is one; and then do `then`, before one is asked for anew.
        Left to who uses it now.

        Raises ReleaseHostIdFailure (662).
        """
        with self._changing:
            if self._users:
                self._unwanted = True
                return
            if self._host_id is not None:
                self._release(self._host_id)
            then()

    def _release(self, host_id: int) -> None:
        # The daemon calls the host id held until it is gone, but takes leases under it away.
        self._leaving = True
        try:
            self._sanlock.release_host_id(self.id, host_id, self._place)
            self._host_id = None
        finally:
            self._leaving = False

    def hosts(self) -> list[HostState]:
        """The hosts of the lockspace as this one sees them; [] at first."""
        return self._sanlock.hosts(self.id)

    def _state(self) -> bool | None:
        if self._host_id is None:
            return False
        if self._leaving:
            return None
        return self._sanlock.has_host_id(self.id, self._host_id, self._place)

    def _failure(self, reason: str, host_id: int | None = None) -> AcquireHostIdFailure:
        return AcquireHostIdFailure(
            host_id=host_id or self._host_id,
            domain=self.id,
            path=self._place.path,
            reason=reason,
        )


class Lockspaces:
    """All lockspaces of this process, by domain.  agent.py builds one."""

    def __init__(self, sanlock: Sanlock, clock: Clock) -> None:
        self._sanlock = sanlock
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[str, Lockspace] = {}

    def open(self, sd_id: str, ids_path: str, geometry: Geometry) -> Lockspace:
        """The domain's lockspace, the same object every time until forget()."""
        with self._lock:
            known = self._known.get(sd_id)
            if known is None:
                known = Lockspace(self._sanlock, sd_id, ids_path, geometry, self._clock)
                self._known[sd_id] = known
            return known

    def get(self, sd_id: str) -> Lockspace | None:
        with self._lock:
            return self._known.get(sd_id)

    def forget(self, sd_id: str) -> None:
        """Drop a lockspace whose host id was released (its domain is gone or was moved)."""
        with self._lock:
            self._known.pop(sd_id, None)

    def release_all(self) -> None:
        """At a clean stop: leave every lockspace at once, in parallel; failures are logged."""
        with self._lock:
            known = list(self._known.values())
        threads = [
            threading.Thread(target=self._release, args=(each,), daemon=True) for each in known
        ]
        for thread in threads:
            thread.start()
        deadline = Deadline(self._clock, self._sanlock.io_seconds)
        for thread in threads:
            thread.join(deadline.left())

    @staticmethod
    def _release(lockspace: Lockspace) -> None:
        try:
            lockspace.release()
        except AgentError as error:
            log.warning("%s", error)
