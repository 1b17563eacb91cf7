# SPDX-License-Identifier: GPL-2.0-or-later
"""Leases that are being lost, and who must let go of them.

When this host's id on a domain could not be renewed for eight I/O time-outs, sanlock makes a file
named after the domain in a directory (see host/sanlock.py).  From then on this process has 40
seconds to give the domain's leases back, or it is killed.  So the locks on that domain take no
operation in any more, and the operations that run there are stopped; those on other domains do
not notice.  The same happens when the daemon itself dies.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from vdsm_storage.base.clock import Clock
from vdsm_storage.base.files import unlink_if_there
from vdsm_storage.base.uuids import is_uuid

log = logging.getLogger("leases")

POLL: Final = 0.5  # seconds


class Losable(Protocol):
    """A lock that can be lost."""

    def doom(self) -> None:
        """It guards nothing any more; returns at once."""

    def lose(self) -> None:
        """After doom(): whoever keeps it lets go of it."""


class LostLeases:
    """Looks into `directory` while it runs; "" for none.

    `hung_up()` tells the domains whose connection to the daemon broke.  `still` is how many seconds
    this process may stand still (stopped, or the whole host suspended) without losing all leases.
    """

    def __init__(
        self, directory: str, hung_up: Callable[[], Sequence[str]], still: float, clock: Clock
    ) -> None:
        self._directory = directory
        self._hung_up = hung_up
        self._still = still
        self._clock = clock
        self._looked: float | None = None  # monotonic; None when nobody looks
        self._lock = threading.Lock()
        self._locks: dict[str, weakref.WeakSet[Losable]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, lockspace: str, lock: Losable) -> None:
        """`lock` is told when leases of the lockspace are lost, as long as it lives."""
        with self._lock:
            self._locks.setdefault(lockspace, weakref.WeakSet()).add(lock)

    def start(self, on_lost: Callable[[str], None]) -> None:
        """Begin to look; `on_lost(lockspace)` stops the operations that need its leases."""
        if not self._directory:
            return
        for name in os.listdir(self._directory):  # of a process before us
            unlink_if_there(os.path.join(self._directory, name))
        self._thread = threading.Thread(
            target=self._run, args=(on_lost,), name="lost leases", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._looked = None
        if self._thread is not None:
            self._thread.join(5)

    def stood_still(self) -> bool:
        """Whether this process does not run as it should: nobody looked for too long.

        A daemon that stood still with it may renew the host id as if nothing had happened, after
        another host took the leases.  So whoever is about to write asks here.
        """
        looked = self._looked
        return looked is not None and self._clock.monotonic() - looked > self._still

    def _run(self, on_lost: Callable[[str], None]) -> None:
        self._looked = self._clock.monotonic()
        while not self._stop.wait(POLL):
            try:
                self._look(on_lost)
            except Exception:
                log.exception("Leases that are being lost could not be given back")

    def _look(self, on_lost: Callable[[str], None]) -> None:
        lost = set(self._hung_up())
        if self.stood_still():
            with self._lock:
                lost.update(self._locks)
        self._doom(lost)
        self._looked = self._clock.monotonic()  # not before: nobody must think that all is well
        for name in os.listdir(self._directory):
            unlink_if_there(os.path.join(self._directory, name))
            if is_uuid(name):
                self._doom([name])
                lost.add(name)
        for name in lost:
            log.error(
                "Domain %s: this host's id could not be renewed, its leases are being lost."
                " Work on the domain stops; look at its storage and at sanlock",
                name,
            )
            on_lost(name)
            for lock in self._locks_of([name]):
                threading.Thread(target=lock.lose, name="lose", daemon=True).start()

    def _doom(self, lockspaces: Iterable[str]) -> None:
        for lock in self._locks_of(lockspaces):
            lock.doom()

    def _locks_of(self, lockspaces: Iterable[str]) -> list[Losable]:
        with self._lock:
            return [lock for name in lockspaces for lock in self._locks.get(name, ())]
