# SPDX-License-Identifier: GPL-2.0-or-later
"""Turns, deadlines and what becomes of requests whose client is gone."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.rpc.conftest import Start, rpc, wait_for
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.errors import AccessTimeout, ResourceExhausted
from vdsm_storage.rpc import dispatch
from vdsm_storage.rpc.fair import FairQueues, Work


class Bench:
    """Fair queues over real lanes, and what came out of them."""

    def __init__(self, width: int, queue: int = 1000) -> None:
        self.lanes = Lanes(SystemClock(), workers=width, queue=queue)
        self.fair = FairQueues(self.lanes, width)
        self.gate = threading.Event()
        self.done: list[tuple[str, BaseException | None]] = []

    def add(self, lane: str, client: str, label: str, timeout: float = 20.0) -> None:
        def ended(_result: object, error: BaseException | None) -> None:
            self.done.append((label, error))

        call: Callable[[], object] = lambda: self.gate.wait(20)  # noqa: E731
        self.fair.submit(lane, client, Work(call, timeout, ended, contextvars.copy_context()))

    async def ends(self, count: int) -> list[str]:
        while len(self.done) < count:
            await asyncio.sleep(0.005)
        return [label for label, _error in self.done]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def test_clients_take_turns() -> None:
    async def work() -> None:
        bench = Bench(width=1)
        for number in range(4):
            bench.add("lane", "a", f"a{number}")
        for number in range(2):
            bench.add("lane", "b", f"b{number}")
        bench.add("lane", "c", "c0")
        bench.gate.set()
        assert await bench.ends(7) == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]
        assert bench.fair.waiting() == 0

    run(work())


def test_lanes_do_not_wait_for_each_other() -> None:
    async def work() -> None:
        bench = Bench(width=1)
        bench.add("hangs", "a", "hangs")
        bench.fair.submit(
            "free",
            "a",
            Work(lambda: None, 20, lambda *_: bench.done.append(("free", None)), CONTEXT),
        )
        assert await bench.ends(1) == ["free"]
        bench.gate.set()
        assert await bench.ends(2) == ["free", "hangs"]

    run(work())


CONTEXT = contextvars.copy_context()


def test_deadlines_of_what_waits_and_of_what_runs() -> None:
    async def work() -> None:
        bench = Bench(width=1)
        bench.add("lane", "a", "runs", timeout=0.05)
        bench.add("lane", "a", "waits", timeout=0.1)
        assert await bench.ends(2) == ["runs", "waits"]
        assert all(isinstance(error, AccessTimeout) for _label, error in bench.done)
        assert "lane" in str(bench.done[0][1])
        bench.gate.set()
        bench.add("lane", "a", "next")
        assert await bench.ends(3) == ["runs", "waits", "next"], "the late end of `runs` is dropped"
        assert bench.done[2][1] is None

    run(work())


def test_a_lane_that_is_full() -> None:
    async def work() -> None:
        bench = Bench(width=4, queue=0)
        bench.add("lane", "a", "refused")
        assert await bench.ends(1) == ["refused"]
        assert isinstance(bench.done[0][1], ResourceExhausted)

    run(work())


def test_dropping_a_client() -> None:
    async def work() -> None:
        bench = Bench(width=1)
        for label in ("a0", "a1", "a2"):
            bench.add("lane", "a", label)
        bench.add("lane", "b", "b0")
        bench.fair.drop("a")
        bench.gate.set()
        assert await bench.ends(2) == ["a0", "b0"], "what runs, runs on"
        assert bench.fair.waiting() == 0

    run(work())


def test_requests_of_clients_that_are_gone_are_bounded(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "MAX_ORPHANS", 100)
    wire = start()
    for _ in range(5):
        with wire.peer() as peer:
            peer.connect()
            peer.request(*[rpc("Host.getAllTasksInfo", number=n) for n in range(50)])
            assert peer.call("Host.ping2", number="x")["id"] == "x"
        wait_for(lambda: wire.listener.connections == 0)

    async def waiting() -> int:
        return wire.dispatcher._fair.waiting()

    assert 50 <= wire.run(waiting()) <= 100
