# SPDX-License-Identifier: GPL-2.0-or-later
"""Work by a few threads, and calls that are due later."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.monitor.alarms import Alarms
from vdsm_storage.monitor.crew import Crew

PATIENCE = 20.0  # seconds


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    made = Lanes(SystemClock())
    yield made
    made.close()


@pytest.fixture
def alarms() -> Iterator[Alarms]:
    made = Alarms(SystemClock())
    made.start()
    yield made
    made.close()


def wait(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_comes_meanwhile_is_done_together(lanes: Lanes) -> None:
    first, go_on = threading.Event(), threading.Event()
    batches: list[list[int]] = []

    def work(items: Sequence[int]) -> None:
        batches.append(sorted(items))
        first.set()
        assert go_on.wait(PATIENCE)

    crew: Crew[int] = Crew(lanes, "crew", 4, lambda _: "one", work, whole=True)
    crew.put(0)
    assert first.wait(PATIENCE)
    for number in [1, 2, 3, 2, 1]:
        crew.put(number)
    go_on.set()
    wait(lambda: len(batches) == 2)
    assert batches == [[0], [1, 2, 3]]


def test_never_two_of_one_key_and_several_keys_at_once(lanes: Lanes) -> None:
    together = threading.Barrier(3)
    mutex = threading.Lock()
    busy: Counter[str] = Counter()
    worst: Counter[str] = Counter()
    done: list[tuple[str, int]] = []

    def work(items: Sequence[tuple[str, int]]) -> None:
        ((key, number),) = items
        with mutex:
            busy[key] += 1
            worst[key] = max(worst[key], busy[key])
        if number == 0:
            together.wait(PATIENCE)  # all three keys are at work
        with mutex:
            busy[key] -= 1
            done.append((key, number))

    crew: Crew[tuple[str, int]] = Crew(lanes, "crew", 3, lambda item: item[0], work)
    wanted = [(key, number) for number in range(20) for key in "abc"]
    for item in wanted:
        crew.put(item)
    wait(lambda: len(done) == len(wanted))
    assert sorted(done) == sorted(wanted)
    assert worst == Counter("abc")
    for key in "abc":
        assert [n for k, n in done if k == key] == list(range(20))


def test_an_item_that_is_being_done_is_done_again(lanes: Lanes) -> None:
    begun, go_on = threading.Event(), threading.Event()
    count = 0

    def work(_items: Sequence[str]) -> None:
        nonlocal count
        count += 1
        begun.set()
        assert go_on.wait(PATIENCE)

    crew: Crew[str] = Crew(lanes, "crew", 2, str, work)
    crew.put("x")
    assert begun.wait(PATIENCE)
    crew.put("x")
    go_on.set()
    wait(lambda: count == 2)


def test_a_failure_does_not_end_the_work(lanes: Lanes) -> None:
    done: list[int] = []

    def work(items: Sequence[int]) -> None:
        if items[0] == 1:
            raise KeyError(items[0])
        done.extend(items)

    crew: Crew[int] = Crew(lanes, "crew", 1, lambda _: "all", work)
    for number in range(4):
        crew.put(number)
    wait(lambda: len(done) == 3)
    assert done == [0, 2, 3]


def test_it_costs_no_thread_while_it_rests(lanes: Lanes) -> None:
    crew: Crew[int] = Crew(lanes, "crew", 4, str, lambda _: None)
    assert "crew" not in lanes.stats()
    crew.put(1)
    wait(lambda: lanes.stats().get("crew", {"queued": 1, "oldest": 1})["oldest"] == 0)
    lanes.close()
    crew.put(2)  # nothing happens any more, and nobody is hurt


def test_calls_are_made_in_their_order(alarms: Alarms) -> None:
    called: list[str] = []
    for seconds, name in ((0.3, "last"), (0.0, "first"), (0.1, "second"), (0.1, "third")):
        alarms.after(seconds, lambda name=name: called.append(name))  # type: ignore[misc]
    wait(lambda: len(called) == 4)
    assert called == ["first", "second", "third", "last"]


def _fail() -> None:
    raise KeyError("nothing")


def test_a_call_that_fails_does_not_keep_others(alarms: Alarms) -> None:
    called = threading.Event()
    alarms.after(0.0, _fail)
    alarms.after(0.01, called.set)
    assert called.wait(PATIENCE)


def test_nothing_is_called_after_the_end(alarms: Alarms) -> None:
    called = threading.Event()
    alarms.after(0.2, called.set)
    alarms.close()
    assert not called.wait(0.5)
