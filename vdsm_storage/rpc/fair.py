# SPDX-License-Identifier: GPL-2.0-or-later
"""Fair queues before the lanes.

A lane serves its queue in order.  So that a client with a thousand requests does not keep the
others waiting for all of them, requests wait here, one queue a client, and the clients of a lane
take turns.  Only as many calls as the lane has threads are handed down at a time.
"""

from __future__ import annotations

import asyncio
import collections
import contextvars
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from vdsm_storage.errors import AccessTimeout, AgentError


class Lanes(Protocol):
    """base.lanes.Lanes, as far as it is used here."""

    def submit(self, key: str, call: Callable[[], object], timeout: float) -> Future[Any]: ...


@dataclass(slots=True, eq=False)
class Work:
    """A call for a lane, and what becomes of it.

    `done(result, error)` is called exactly once, on the event loop: with the call's end, or with
    AccessTimeout when `timeout` seconds have gone.
    """

    call: Callable[[], object]
    timeout: float
    done: Callable[[object, BaseException | None], None]
    context: contextvars.Context
    timer: asyncio.TimerHandle | None = None
    answered: bool = False


@dataclass(slots=True, eq=False)
class _Lane:
    running: int = 0
    queues: dict[object, collections.deque[Work]] = field(default_factory=dict)
    turns: collections.deque[object] = field(default_factory=collections.deque)


class FairQueues:
    """Lives on the event loop."""

    def __init__(self, lanes: Lanes, width: int) -> None:
        """`width`: calls handed to one lane at a time."""
        self._lanes = lanes
        self._width = width
        self._open: dict[str, _Lane] = {}

    def submit(self, key: str, client: object, work: Work) -> None:
        lane = self._open.get(key)
        if lane is None:
            lane = self._open[key] = _Lane()
        queue = lane.queues.get(client)
        if queue is None:
            queue = lane.queues[client] = collections.deque()
            lane.turns.append(client)
        queue.append(work)
        loop = asyncio.get_running_loop()
        work.timer = loop.call_later(work.timeout, self._late, key, work)
        self._pump(key, lane, loop)

    def drop(self, client: object) -> None:
        """Forget what waits of `client`; what runs, runs on.  `done` is not called."""
        for key, lane in tuple(self._open.items()):
            for work in lane.queues.pop(client, ()):
                work.answered = True
                if work.timer is not None:
                    work.timer.cancel()
            if client in lane.turns:
                lane.turns.remove(client)
            self._forget_if_idle(key, lane)

    def waiting(self) -> int:
        return sum(len(queue) for lane in self._open.values() for queue in lane.queues.values())

    def _pump(self, key: str, lane: _Lane, loop: asyncio.AbstractEventLoop) -> None:
        while lane.running < self._width and lane.turns:
            client = lane.turns.popleft()
            queue = lane.queues[client]
            work = queue.popleft()
            if queue:
                lane.turns.append(client)
            else:
                del lane.queues[client]
            if not work.answered:
                self._start(key, lane, work, loop)
        self._forget_if_idle(key, lane)

    def _start(self, key: str, lane: _Lane, work: Work, loop: asyncio.AbstractEventLoop) -> None:
        left = work.timeout if work.timer is None else work.timer.when() - loop.time()
        try:
            future = work.context.run(self._lanes.submit, key, work.call, max(0.001, left))
        except AgentError as error:
            self._answer(work, None, error)
            return
        lane.running += 1

        def ended(future: Future[Any]) -> None:  # in the lane's thread
            # A RuntimeError says that the loop is closed: nobody is left to be told.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._ended, key, lane, work, future)

        future.add_done_callback(ended)

    def _ended(self, key: str, lane: _Lane, work: Work, future: Future[Any]) -> None:
        lane.running -= 1
        if future.cancelled():
            self._answer(work, None, AccessTimeout(what=f"Lane {key}", seconds=0))
        else:
            error = future.exception()
            self._answer(work, None if error else future.result(), error)
        self._pump(key, lane, asyncio.get_running_loop())

    def _late(self, key: str, work: Work) -> None:
        self._answer(work, None, AccessTimeout(what=f"Lane {key}", seconds=work.timeout))

    def _answer(self, work: Work, result: object, error: BaseException | None) -> None:
        if not work.answered:
            work.answered = True
            if work.timer is not None:
                work.timer.cancel()
            work.done(result, error)

    def _forget_if_idle(self, key: str, lane: _Lane) -> None:
        if not lane.running and not lane.queues and self._open.get(key) is lane:
            del self._open[key]
