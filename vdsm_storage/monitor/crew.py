# SPDX-License-Identifier: GPL-2.0-or-later
"""Work on many things by a few threads, which are there only while there is work."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

from vdsm_storage.base.lanes import Lanes
from vdsm_storage.errors import AgentError

WAIT: Final = 600.0  # seconds that work may wait for a thread

log = logging.getLogger("crew")

T = TypeVar("T", bound=Hashable)


class Crew(Generic[T]):
    """`work([item, ...])` is called with what was put in since, each item once, and never at the
    same time for two of one `key`; `whole` gives it all items of a key at once, else one by one.

    `work` deals with its errors; one that it does not is logged, and the rest goes on.
    """

    def __init__(
        self,
        lanes: Lanes,
        name: str,
        workers: int,
        key: Callable[[T], str],
        work: Callable[[list[T]], None],
        *,
        whole: bool = False,
    ) -> None:
        self._lanes = lanes
        self._name = name
        self._workers = workers
        self._key = key
        self._work = work
        self._whole = whole
        self._mutex = threading.Lock()
        self._waiting: dict[str, dict[T, None]] = {}  # by key
        self._busy: set[str] = set()
        self._threads = 0

    def put(self, item: T) -> None:
        """Does not wait."""
        with self._mutex:
            self._waiting.setdefault(self._key(item), {})[item] = None
            if self._threads >= self._workers or not self._free():
                return
            self._threads += 1
        try:
            self._lanes.submit(self._name, self._run, WAIT, self._workers)
        except AgentError as error:  # the agent stops
            log.info("%s: %s", self._name, error)
            with self._mutex:
                self._threads -= 1

    def _free(self) -> bool:
        return any(key not in self._busy for key in self._waiting)

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            key, items = taken
            try:
                self._work(items)
            except Exception:
                log.exception("%s: %s", self._name, key)
            with self._mutex:
                self._busy.discard(key)

    def _take(self) -> tuple[str, list[T]] | None:
        with self._mutex:
            key = next((key for key in self._waiting if key not in self._busy), None)
            if key is None:
                self._threads -= 1
                return None
            waiting = self._waiting[key]
            items = list(waiting) if self._whole else [next(iter(waiting))]
            for item in items:
                del waiting[item]
            if not waiting:
                del self._waiting[key]
            self._busy.add(key)
            return key, items
