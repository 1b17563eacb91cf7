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
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from vdsm_storage.base.files import unlink_if_there
from vdsm_storage.base.uuids import is_uuid

log = logging.getLogger("leases")

POLL: Final = 0.5  # seconds


class Losable(Protocol):
    """A lock that can be lost."""

    def lose(self) -> None: ...


class LostLeases:
    """Looks into `directory` while it runs; "" for none.

    `hung_up()` tells the domains whose connection to the daemon broke.
    """

    def __init__(self, directory: str, hung_up: Callable[[], Sequence[str]]) -> None:
        self._directory = directory
        self._hung_up = hung_up
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
        if self._thread is not None:
            self._thread.join(5)

    def _run(self, on_lost: Callable[[str], None]) -> None:
        while not self._stop.wait(POLL):
            try:
                self._look(on_lost)
            except Exception:
                log.exception("Leases that are being lost could not be given back")

    def _look(self, on_lost: Callable[[str], None]) -> None:
        lost = set(self._hung_up())
        for name in os.listdir(self._directory):
            unlink_if_there(os.path.join(self._directory, name))
            if is_uuid(name):
                lost.add(name)
        for name in lost:
            log.error(
                "Domain %s: this host's id could not be renewed, its leases are being lost."
                " Work on the domain stops; look at its storage and at sanlock",
                name,
            )
            with self._lock:
                locks = list(self._locks.get(name, ()))
            on_lost(name)
            for lock in locks:
                threading.Thread(target=lock.lose, name="lose", daemon=True).start()
