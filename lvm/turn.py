# SPDX-License-Identifier: GPL-2.0-or-later
"""A lock that is not waited for any longer when there is no need for it.

Whoever has it may do the work of those that wait.  With a plain lock these would have to take it,
one after the other, to learn that; in between somebody with new work gets it, and nobody joins him:
they all wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Turn:
    """One thread has it, any number of times."""

    def __init__(self) -> None:
        self._free = threading.Condition(threading.Lock())
        self._holder: int | None = None
        self._depth = 0

    def take(
        self, needless: Callable[[], bool] = lambda: False, timeout: float | None = None
    ) -> bool:
        """True when the caller has it; False, and he has not, when `needless()` before that.

        Raises TimeoutError after `timeout` seconds.
        """
        me = threading.get_ident()
        with self._free:
            if not self._free.wait_for(lambda: needless() or self._holder in (None, me), timeout):
                raise TimeoutError
            if needless():
                return False
            self._holder = me
            self._depth += 1
            return True

    def release(self) -> None:
        """Once for each take() that was true.  All who wait look whether they still have to."""
        with self._free:
            self._depth -= 1
            if not self._depth:
                self._holder = None
                self._free.notify_all()
