# SPDX-License-Identifier: GPL-2.0-or-later
"""Asking work to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vdsm_storage.errors import ActionStopped


class Cancel:
    """One per job.  `request()` may come from any thread; the work looks at it between steps.

    A callback registered with `on_request` runs in the requesting thread (kill a child, wake a
    waiter) and at once if the request had come before.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self.event = threading.Event()

    @property
    def requested(self) -> bool:
        return self.event.is_set()

    def request(self) -> None:
        with self._lock:
            self.event.set()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()

    def on_request(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Register; the returned function takes the registration back."""
        with self._lock:
            self._callbacks.append(callback)
            already = self.event.is_set()
        if already:
            callback()

        def forget() -> None:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

        return forget

    def check(self) -> None:
        """Raises ActionStopped once a stop was requested."""
        if self.event.is_set():
            raise ActionStopped()
