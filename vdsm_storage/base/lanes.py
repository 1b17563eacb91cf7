# SPDX-License-Identifier: GPL-2.0-or-later
"""Lanes: blocking work, kept apart by what it may hang on.

Every storage domain has a lane of its own: a few threads and a bounded queue.  Storage that hangs
fills its own lane and no other.  A call that passes its deadline is answered to its caller by the
one who waits (rpc.dispatch); the thread that hangs stays counted in its lane until it comes back.
"""

from __future__ import annotations

import collections
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vdsm_storage.base.clock import Clock
from vdsm_storage.errors import AccessTimeout, ResourceExhausted

IDLE_SECONDS = 30.0  # an idle thread ends after this, so that thousands of lanes cost nothing


@dataclass
class _Work:
    call: Callable[[], object]
    future: Future[Any]
    deadline: float
    timeout: float
    context: contextvars.Context


@dataclass
class _Lane:
    changed: threading.Condition  # of the one mutex; a lane's own, so that one thread wakes
    queue: collections.deque[_Work] = field(default_factory=collections.deque)
    threads: int = 0
    idle: int = 0
    busy_since: dict[int, float] = field(default_factory=dict)


class Lanes:
    """`submit(key, call, timeout)` runs `call` in the lane `key`.

    `workers` threads at most work in one lane, `queue` calls at most wait for them.
    """

    def __init__(self, clock: Clock, workers: int = 8, queue: int = 1000) -> None:
        self._clock = clock
        self._workers = workers
        self._queue = queue
        self._mutex = threading.Lock()
        self._lanes: dict[str, _Lane] = {}
        self._closed = False

    def submit(
        self, key: str, call: Callable[[], object], timeout: float, workers: int | None = None
    ) -> Future[Any]:
        """Queue `call`; its result or error comes in the future.  `workers` is this lane's own.

        A call that could not start within `timeout` seconds is never started: AccessTimeout.
        Raises ResourceExhausted when the lane's queue is full.
        """
        future: Future[Any] = Future()
        deadline = self._clock.monotonic() + timeout
        work = _Work(call, future, deadline, timeout, contextvars.copy_context())
        with self._mutex:
            if self._closed:
                raise ResourceExhausted(resource="The agent is stopping; its queue", limit=0)
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lanes[key] = _Lane(threading.Condition(self._mutex))
            if len(lane.queue) >= self._queue:
                raise ResourceExhausted(resource=f"The queue of lane {key}", limit=self._queue)
            lane.queue.append(work)
            if lane.idle >= len(lane.queue):
                lane.changed.notify()
            elif lane.threads < (workers or self._workers):
                lane.threads += 1
                # Daemon threads: one that hangs in a dead server's I/O must not keep us alive.
                threading.Thread(
                    target=self._work, args=(key, lane), name=f"lane {key}", daemon=True
                ).start()
        return future

    def stats(self) -> dict[str, dict[str, float]]:
        """Per lane: threads, queued calls, and the age in seconds of the oldest running call."""
        now = self._clock.monotonic()
        with self._mutex:
            return {
                key: {
                    "threads": lane.threads,
                    "queued": len(lane.queue),
                    "oldest": max((now - t for t in lane.busy_since.values()), default=0.0),
                }
                for key, lane in self._lanes.items()
            }

    def close(self) -> None:
        """Refuse new work and drop what waits; running calls are left to end."""
        with self._mutex:
            self._closed = True
            waiting = [work for lane in self._lanes.values() for work in lane.queue]
            for lane in self._lanes.values():
                lane.queue.clear()
                lane.changed.notify_all()
        for work in waiting:
            work.future.cancel()

    def _work(self, key: str, lane: _Lane) -> None:
        me = threading.get_ident()
        while (work := self._next(key, lane)) is not None:
            if not work.future.set_running_or_notify_cancel():
                continue
            if self._clock.monotonic() >= work.deadline:
                late = AccessTimeout(what=f"Lane {key}", seconds=work.timeout)
                work.future.set_exception(late)
                continue
            lane.busy_since[me] = self._clock.monotonic()
            try:
                result = work.context.run(work.call)
            except BaseException as error:  # noqa: BLE001 - handed on to who waits for it
                work.future.set_exception(error)
            else:
                work.future.set_result(result)
            finally:
                del lane.busy_since[me]
            del work

    def _next(self, key: str, lane: _Lane) -> _Work | None:
        with self._mutex:
            while not lane.queue:
                lane.idle += 1
                woken = lane.changed.wait(IDLE_SECONDS) if not self._closed else False
                lane.idle -= 1
                if not lane.queue and not woken:
                    lane.threads -= 1
                    if lane.threads == 0 and self._lanes.get(key) is lane:
                        del self._lanes[key]
                    return None
            return lane.queue.popleft()
