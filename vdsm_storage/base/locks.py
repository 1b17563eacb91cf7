# SPDX-License-Identifier: GPL-2.0-or-later
"""Groups of shared and exclusive locks inside this process, taken in one order.

Names are (namespace, name) pairs.  A group is sorted before it is taken, so that two groups never
wait for each other.  Locks between hosts are sanlock's and live in leases/.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vdsm_storage.base.clock import Clock
from vdsm_storage.errors import ResourceTimeout


@dataclass(frozen=True, order=True)
class Lock:
    """`namespace` sorts first: take domains (`00_storage`) before images (`01_image`) ..."""

    namespace: str
    name: str
    exclusive: bool = True


@dataclass
class _State:
    shared: int = 0
    exclusive: bool = False
    waiting: int = 0


class Locks:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._states: dict[tuple[str, str], _State] = {}

    @contextlib.contextmanager
    def held(self, locks: Sequence[Lock], timeout: float) -> Iterator[None]:
        """Hold all of `locks`; ResourceTimeout (851) if that takes more than `timeout` seconds.

        The same lock asked for shared and exclusive in one group is held exclusive.
        """
        strongest: dict[tuple[str, str], Lock] = {}
        for lock in locks:
            key = (lock.namespace, lock.name)
            if key not in strongest or lock.exclusive:
                strongest[key] = lock
        deadline = self._clock.monotonic() + timeout
        taken: list[Lock] = []
        try:
            for key in sorted(strongest):
                self._take(strongest[key], deadline, timeout)
                taken.append(strongest[key])
            yield
        finally:
            for lock in reversed(taken):
                self._release(lock)

    def _take(self, lock: Lock, deadline: float, timeout: float) -> None:
        key = (lock.namespace, lock.name)
        with self._changed:
            state = self._states.setdefault(key, _State())
            state.waiting += 1
            try:
                while state.exclusive or (lock.exclusive and state.shared):
                    left = deadline - self._clock.monotonic()
                    if left <= 0:
                        raise ResourceTimeout(namespace=key[0], name=key[1], seconds=timeout)
                    self._changed.wait(left)
                if lock.exclusive:
                    state.exclusive = True
                else:
                    state.shared += 1
            finally:
                state.waiting -= 1
                self._forget(key, state)

    def _release(self, lock: Lock) -> None:
        key = (lock.namespace, lock.name)
        with self._changed:
            state = self._states[key]
            if lock.exclusive:
                state.exclusive = False
            else:
                state.shared -= 1
            self._forget(key, state)
            self._changed.notify_all()

    def _forget(self, key: tuple[str, str], state: _State) -> None:
        if not (state.exclusive or state.shared or state.waiting):
            self._states.pop(key, None)
