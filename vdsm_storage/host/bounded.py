# SPDX-License-Identifier: GPL-2.0-or-later
"""A call of a library that has no time-outs: its caller stops waiting in time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


class BoundedCall:
    """One call in a thread of its own, on `turn` (one at a time on a connection).

    `undo` takes back what a call obtained that nobody waited for; such a call is not even made
    when its turn comes too late.
    """

    def __init__(
        self,
        call: Callable[[], Any],
        turn: AbstractContextManager[Any],
        undo: Callable[[], None] | None,
    ) -> None:
        self._call = call
        self._turn = turn
        self._undo = undo
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._abandoned = False
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self, name: str, timeout: float) -> Any:
        threading.Thread(target=self._work, name=name, daemon=True).start()
        self._done.wait(timeout)
        with self._lock:
            if not self._done.is_set():
                self._abandoned = True
                raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._result

    def give_up(self, error: BaseException) -> None:
        """Nobody waits any longer, from now on: run() raises `error`.  Nothing if it is done."""
        with self._lock:
            if not self._done.is_set():
                self._abandoned = True
                self._error = error
                self._done.set()

    def _work(self) -> None:
        with self._turn:
            if self._undo is not None and self._is_abandoned():
                return
            result, failure = None, None
            try:
                result = self._call()
            except BaseException as error:  # noqa: BLE001 - handed on to who waits for it
                failure = error
            with self._lock:
                abandoned = self._abandoned
                if not abandoned:
                    self._result, self._error = result, failure
                self._done.set()
            if abandoned and failure is None and self._undo is not None:
                self._undo()

    def _is_abandoned(self) -> bool:
        with self._lock:
            return self._abandoned
