# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import contextvars
import threading
import time

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.errors import AccessTimeout, ResourceExhausted


def test_results_errors_and_context_cross_over() -> None:
    lanes = Lanes(SystemClock())
    flow: contextvars.ContextVar[str] = contextvars.ContextVar("flow")
    flow.set("abc")
    assert lanes.submit("a", flow.get, 10).result(10) == "abc"
    with pytest.raises(ZeroDivisionError):
        lanes.submit("a", lambda: 1 // 0, 10).result(10)


def test_a_hung_lane_delays_no_other() -> None:
    lanes = Lanes(SystemClock(), workers=2, queue=3)
    hang = threading.Event()
    stuck = [lanes.submit("dead", lambda: hang.wait(60), 60) for _ in range(2)]
    while len(lanes.stats()["dead"]) == 0 or lanes.stats()["dead"]["queued"]:
        time.sleep(0.01)
    waiting = [lanes.submit("dead", lambda: True, 0.2) for _ in range(3)]
    with pytest.raises(ResourceExhausted, match="lane dead"):
        lanes.submit("dead", lambda: True, 10)
    assert [lanes.submit("alive", lambda: 1, 10).result(10) for _ in range(20)] == [1] * 20
    time.sleep(0.3)
    hang.set()
    assert all(future.result(10) for future in stuck)
    for future in waiting:  # their time had passed before a thread was free: never started
        with pytest.raises(AccessTimeout):
            future.result(10)


def test_a_lane_may_have_workers_of_its_own() -> None:
    lanes = Lanes(SystemClock(), workers=1)
    meet = threading.Barrier(3)
    waiting = [lanes.submit("wide", meet.wait, 30, workers=3) for _ in range(3)]
    assert sorted(future.result(10) for future in waiting) == [0, 1, 2]  # they met


def test_many_calls_use_no_more_than_the_workers() -> None:
    lanes = Lanes(SystemClock(), workers=3, queue=1000)
    lock = threading.Lock()
    now, most = 0, 0

    def work() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.001)
        with lock:
            now -= 1

    for future in [lanes.submit("x", work, 30) for _ in range(300)]:
        future.result(30)
    assert most == 3


def test_close_cancels_what_waits() -> None:
    lanes = Lanes(SystemClock(), workers=1)
    go = threading.Event()
    first = lanes.submit("x", lambda: go.wait(30), 30)
    while lanes.stats()["x"]["queued"]:
        time.sleep(0.01)
    second = lanes.submit("x", lambda: True, 30)
    lanes.close()
    assert second.cancelled()
    go.set()
    assert first.result(10) is True
    with pytest.raises(ResourceExhausted):
        lanes.submit("x", lambda: True, 30)
