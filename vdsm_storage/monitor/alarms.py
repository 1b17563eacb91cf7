# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls that are due later, in one thread that sleeps while nothing is."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable

from vdsm_storage.base.clock import Clock

log = logging.getLogger("alarms")

Call = Callable[[], None]


class Alarms:
    """Calls must be short: they hold up each other."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Call]] = []  # monotonic seconds, then order
        self._numbers = itertools.count()
        self._closed = False

    def start(self) -> None:
        threading.Thread(target=self._run, name="thin alarms", daemon=True).start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def after(self, seconds: float, call: Call) -> None:
        when = self._clock.monotonic() + seconds
        with self._changed:
            heapq.heappush(self._due, (when, next(self._numbers), call))
            if self._due[0][0] == when:
                self._changed.notify()

    def _run(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except Exception:
                log.exception("Something that was due could not be done")

    def _next(self) -> Call | None:
        """None at the end."""
        with self._changed:
            while not self._closed:
                if not self._due:
                    self._changed.wait()
                    continue
                left = self._due[0][0] - self._clock.monotonic()
                if left <= 0:
                    return heapq.heappop(self._due)[2]
                self._changed.wait(left)
            return None
