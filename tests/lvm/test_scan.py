# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices that are asked by many at once, slowly, or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.lvm.writing import at_once, side_by_side
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.errors import ResourceExhausted
from vdsm_storage.lvm.scan import Scanner


class Slow:
    """A lane that answers when it is told to; counts what it is asked."""

    def __init__(self) -> None:
        self.open: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.asked = 0

    def submit(self, key: str, call: Callable[[], Any], timeout: float) -> Future[Any]:
        future: Future[Any] = Future()
        self.asked += 1
        self.open.append((future, call))
        return future

    def answer(self) -> None:
        for future, call in self.open:
            future.set_result(call())
        self.open.clear()


@pytest.fixture
def device(tmp_path: Path) -> str:
    path = tmp_path / "device"
    path.write_bytes(bytes(8192))
    return str(path)


def test_threads_that_look_at_once_all_get_an_answer(tmp_path: Path) -> None:
    devices = [str(tmp_path / f"d{n}") for n in range(20)]
    for path in devices:
        Path(path).write_bytes(bytes(8192))
    scanner = Scanner(Lanes(SystemClock(), workers=2).submit, 20.0)
    found: list[int] = []
    calls = [lambda: found.append(len(scanner.look(devices))) for _ in range(20)]
    assert side_by_side(*calls) == 20 * [None]
    assert found == 20 * [20]


def test_an_answer_is_not_older_than_the_question(device: str) -> None:
    """A read that was under way before may not know what the caller knows."""
    lane = Slow()
    scanner = Scanner(lane.submit, 20.0)
    first = threading.Thread(target=lambda: scanner.look([device]))
    first.start()
    while not lane.open:
        pass
    found: list[int] = []
    second = threading.Thread(target=lambda: found.append(len(scanner.look([device]))))
    second.start()
    second.join(0.2)
    assert lane.asked == 1
    lane.answer()
    while not lane.open:
        pass
    lane.answer()
    first.join()
    second.join()
    assert found == [1]
    assert lane.asked == 2


def test_a_device_that_owes_an_answer_costs_nothing(device: str, tmp_path: Path) -> None:
    now = [100.0]
    lane = Slow()
    scanner = Scanner(lane.submit, 0.05, lambda: now[0])
    scanner.timeout = 0.05
    first = threading.Thread(target=lambda: scanner.look([device]))
    first.start()
    first.join(0.5)
    now[0] += 1.0
    first.join()
    assert scanner.look([device]) == {}
    assert lane.asked == 1
    lane.answer()
    scanner.ask = at_once
    assert scanner.look([device]).keys() == {device}


def test_devices_that_cannot_be_read_are_left_out(device: str, tmp_path: Path) -> None:
    def ask(key: str, call: Callable[[], Any], timeout: float) -> Future[Any]:
        if key.endswith("full"):
            raise ResourceExhausted(resource="The lane", limit=1)
        return at_once(key, call, timeout)

    scanner = Scanner(ask, 1.0)
    assert scanner.look([str(tmp_path / "gone"), device, "full", device]).keys() == {device}
