# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast work on data may go, and a way to make programs keep to it that know no such limit, or
none that can be changed while they run (qemu-img): they are stopped for moments."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Final

MIB: Final = 1024 * 1024
TICK: Final = 0.02  # seconds between two looks at a process that has a limit
PAUSE: Final = 0.2  # and at one that stands still, or has none: it may be changed
CREDIT: Final = 0.1  # seconds' worth that one who was slower may do at once


class Pace:
    """MiB a second, 0 for no limit.  Any thread may change it."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit


class Throttle:
    """Keeps a process group to a pace, by the bytes that its first process has read or written,
    whichever are more.  `tick` is to be called again and again, `release` at the end.
    """

    def __init__(
        self,
        pace: Pace,
        pid: int,
        moved: Callable[[int], int] | None = None,
        send: Callable[[int, int], None] = os.killpg,
    ) -> None:
        self._pace = pace
        self._pid = pid
        self._moved = moved or bytes_moved
        self._send = send
        self._stopped = False
        self._when = time.monotonic()
        self._seen = 0
        self._credit = 0.0  # bytes that it may move; what it did too much counts below zero

    def tick(self) -> float:
        """Returns the seconds after which to call it again."""
        limit = self._pace.limit * MIB
        now = time.monotonic()
        moved = self._moved(self._pid)
        if not limit:
            self._credit = 0.0
            self.release()
        else:
            earned = (now - self._when) * limit
            self._credit = min(self._credit + earned, CREDIT * limit) - (moved - self._seen)
        self._when, self._seen = now, moved
        if self._credit >= 0:
            self.release()
            return TICK if limit else PAUSE
        self._signal(signal.SIGSTOP)
        self._stopped = True
        return min(PAUSE, max(TICK, -self._credit / limit))

    def release(self) -> None:
        """It goes on."""
        if self._stopped:
            self._stopped = False
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._send(self._pid, number)


def bytes_moved(pid: int) -> int:
    """By read() and write() and the like, of all threads.  0 when it has ended.

    rchar: 4292
    wchar: 0
    ...
    """
    try:
        with open(f"/proc/{pid}/io", encoding="ascii") as file:
            lines = dict(line.split(": ", 1) for line in file)
        return max(int(lines["rchar"]), int(lines["wchar"]))
    except (OSError, KeyError, ValueError):
        return 0
