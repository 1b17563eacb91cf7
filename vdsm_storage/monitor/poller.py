# SPDX-License-Identifier: GPL-2.0-or-later
"""A thread that looks at something again and again, and survives that it cannot."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from vdsm_storage.base.clock import Clock

log = logging.getLogger("poller")

FIRST_RETRY: Final = 0.5  # seconds after a failure; twice as long after each further one
LAST_RETRY: Final = 4.0
REMIND: Final = 60.0  # seconds until a failure that goes on is logged again


class Poller:
    """Calls `turn()`, which returns the seconds until it wants to be called again, or None for
    when `wake()` is called.

    An error of the storage is logged, and the turn tried again after a while that grows; `wake()`
    does not shorten it.  `finish()` is called once at the end, from the same thread.
    """

    def __init__(
        self,
        name: str,
        clock: Clock,
        turn: Callable[[], float | None],
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name
        self._clock = clock
        self._turn = turn
        self._finish = finish
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._retry = FIRST_RETRY
        self._logged: float | None = None
        self.trouble = ""  # what the storage said, while it fails

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Call the turn now."""
        self._wake.set()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def stop(self, timeout: float) -> bool:
        """End the thread; False when it hangs in the storage and could not end in `timeout` s."""
        self._stopping.set()
        self._wake.set()
        if self._thread is None:
            return True
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.error("%s: it hangs and is left behind", self._name)
            return False
        return True

    def _run(self) -> None:
        while not self.stopping:
            self._wake.clear()
            if self.stopping:
                break
            try:
                delay = self._turn()
            except OSError as error:
                self._failed(error)
            except Exception as error:
                log.exception("%s failed", self._name)
                self.trouble = str(error)
                self._pause()
            else:
                self._recovered()
                self._wait(delay)
        try:
            self._finish()
        except OSError as error:
            log.warning("%s: the end was not clean: %s", self._name, error)

    def _wait(self, delay: float | None) -> None:
        if delay is None:
            self._wake.wait()
        elif delay > 0:
            self._clock.wait(self._wake, delay)

    def _failed(self, error: OSError) -> None:
        now = self._clock.monotonic()
        if self._logged is None or now - self._logged >= REMIND:
            log.warning("%s: %s; it is tried again", self._name, error)
            self._logged = now
        self.trouble = str(error)
        self._pause()

    def _pause(self) -> None:
        self._clock.wait(self._stopping, self._retry)
        self._retry = min(LAST_RETRY, self._retry * 2)

    def _recovered(self) -> None:
        if self.trouble:
            log.info("%s works again", self._name)
        self.trouble, self._logged, self._retry = "", None, FIRST_RETRY
