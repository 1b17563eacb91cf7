# SPDX-License-Identifier: GPL-2.0-or-later
"""The policy of thin provisioning, function by function; what comes of it: simulated_test.py."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vdsm_storage.base.units import GIB, KIB, MIB, round_up
from vdsm_storage.monitor.watermark import (
    ENOUGH,
    REMEMBERED,
    SHORTEST,
    Latencies,
    Policy,
    Rate,
    View,
    brake,
    expected,
    is_possible,
    plan,
    seconds_to_full,
)

POLICY = Policy()
HUGE = 1 << 46
VDSM_STATIC = 2560 * MIB

extents = st.sampled_from([4 * MIB, 128 * MIB, 192 * MIB])
byte_counts = st.integers(0, 16 * GIB)
rates = st.one_of(st.just(0.0), st.floats(0, 16 * GIB))
latencies = st.one_of(st.just(0.0), st.floats(0, 300))


@st.composite
def policies(draw: Any) -> Policy:
    low, high = sorted([draw(st.integers(0, 8 * GIB)), draw(st.integers(0, 8 * GIB))])
    small, large = sorted([draw(st.integers(0, 8 * GIB)), draw(st.integers(0, 8 * GIB))])
    return Policy(
        extent=draw(extents),
        headroom_min=low,
        headroom_max=high,
        chunk_min=small,
        chunk_max=large,
        chunk_seconds=draw(st.floats(0, 60)),
        safety=draw(st.floats(1, 4)),
    )


@st.composite
def views(draw: Any) -> View:
    """Any that is possible: also a size that is no multiple of extents, and above the limit."""
    limit = draw(st.integers(1, 64 * GIB))
    size = draw(st.integers(1, 64 * GIB))
    return View(size, draw(st.integers(0, max(size, limit))), limit)


# -- plan -------------------------------------------------------------------------------------


@given(policies(), views(), rates, latencies)
def test_a_plan_leaves_its_headroom_and_stays_within_the_limit(
    policy: Policy, view: View, rate: float, latency: float
) -> None:
    made = plan(policy, view, rate, latency)
    end = round_up(view.limit, policy.extent)
    size = view.size if made.target is None else made.target
    assert policy.headroom_min <= made.headroom <= policy.headroom_max
    assert made.chunk >= max(policy.chunk_min, policy.extent)
    assert made.chunk <= max(policy.chunk_max, policy.extent)
    assert (made.threshold is None) == (size >= end)
    if made.target is not None:
        assert view.size < made.target <= end
        assert made.target % policy.extent == 0
        assert view.allocation >= view.size - made.headroom, "there was room enough"
    if made.threshold is not None:
        assert made.threshold == size - made.headroom
        assert view.allocation < made.threshold
        assert 0 < made.threshold <= size


@given(policies(), views(), rates, latencies)
def test_after_the_extension_there_is_nothing_more_to_do(
    policy: Policy, view: View, rate: float, latency: float
) -> None:
    made = plan(policy, view, rate, latency)
    if made.target is not None:
        again = plan(policy, replace(view, size=made.target), rate, latency)
        assert again == replace(made, target=None)


@given(views(), rates, latencies)
@example(View(GIB, GIB - 256 * MIB, HUGE), 0.0, 0.0)
def test_a_target_leaves_headroom_and_chunk_however_far_the_drive_has_come(
    view: View, rate: float, latency: float
) -> None:
    view = replace(view, limit=HUGE)
    made = plan(POLICY, view, rate, latency)
    if made.target is not None:
        wanted = view.allocation + made.headroom + made.chunk
        idle = (made.headroom, made.chunk) == (POLICY.headroom_min, POLICY.chunk_min)
        least, most = (wanted - POLICY.extent, wanted) if idle else (wanted, wanted + POLICY.extent)
        assert least <= made.target <= most


@given(st.integers(0, 64 * GIB), st.integers(0, 64), rates)
def test_an_idle_drive_has_a_fifth_of_what_is_static_elsewhere(
    allocation: int, size: int, rate: float
) -> None:
    """However slow it is, whatever it had before: 64 MiB/s and more make a chunk larger."""
    view = View(size * POLICY.extent, allocation, HUGE)
    made = plan(POLICY, view, min(rate, 64 * MIB), 0.5)
    if made.target is not None:
        assert made.target - allocation <= VDSM_STATIC / 5


@given(policies(), views(), rates, rates, latencies, latencies)
def test_more_rate_or_latency_never_gives_less(
    policy: Policy, view: View, rate: float, more: float, latency: float, longer: float
) -> None:
    (rate, more), (latency, longer) = sorted([rate, more]), sorted([latency, longer])
    base = plan(policy, view, rate, latency)
    for made in (
        plan(policy, view, more, latency),
        plan(policy, view, rate, longer),
        plan(policy, view, more, longer),
    ):
        assert made.headroom >= base.headroom
        assert made.chunk >= base.chunk
        assert (made.target or view.size) >= (base.target or view.size)


@given(views(), rates, latencies, st.integers(1, 40), st.integers(1, 40))
def test_with_equal_bounds_sizes_are_fixed(
    view: View, rate: float, latency: float, headroom: int, chunk: int
) -> None:
    size, sizes = 128 * MIB, {"headroom": headroom * 128 * MIB, "chunk": chunk * 128 * MIB}
    fixed = Policy(
        headroom_min=sizes["headroom"],
        headroom_max=sizes["headroom"],
        chunk_min=sizes["chunk"],
        chunk_max=sizes["chunk"],
    )
    made = plan(fixed, view, rate, latency)
    assert (made.headroom, made.chunk) == (sizes["headroom"], sizes["chunk"])
    at = View(size + sizes["headroom"], size + 3 * MIB, HUGE)  # 3 MiB past the threshold
    assert plan(fixed, at, rate, latency).target == at.size + sizes["chunk"]


@pytest.mark.parametrize(
    ("rate", "latency", "headroom", "chunk"),
    [
        pytest.param(0, 0.5, 256, 256, id="idle"),
        pytest.param(64, 0.5, 256, 256, id="as fast as an idle drive may be"),
        pytest.param(500, 0.1, 256, 2000, id="quick storage"),
        pytest.param(500, 0.5, 512, 2000, id="fast guest"),
        pytest.param(500, 1.39, 1392, 2000, id="fast guest, storage that is slow"),
        pytest.param(100, 12, 2400, 2400, id="a chunk is not below the headroom"),
        pytest.param(2000, 1.5, 4096, 4096, id="the most that is allowed"),
    ],
)
def test_formulae(rate: int, latency: float, headroom: int, chunk: int) -> None:
    made = plan(POLICY, View(GIB, 0, HUGE), rate * MIB, latency)
    assert made.headroom == pytest.approx(headroom * MIB, abs=1)
    assert made.chunk == pytest.approx(chunk * MIB, abs=1)


def test_life_of_a_volume() -> None:
    """From its first bytes to its limit."""
    limit = GIB + 200 * MIB  # in whole extents: 1280 MiB
    at = View(512 * MIB, 200 * KIB, limit)
    assert plan(POLICY, at, 0, 0.1) == plan_of(None, 256)
    at = View(512 * MIB, 257 * MIB, limit)
    assert plan(POLICY, at, 0, 0.1) == plan_of(768, 512)
    at = View(768 * MIB, 513 * MIB, limit)
    assert plan(POLICY, at, 0, 0.1) == plan_of(1024, 768)
    at = View(1024 * MIB, 770 * MIB, limit)
    assert plan(POLICY, at, 0, 0.1) == plan_of(1280, None)
    at = View(1280 * MIB, limit, limit)
    assert plan(POLICY, at, 0, 0.1) == plan_of(None, None)


def plan_of(target: int | None, threshold: int | None) -> Any:
    def scaled(value: int | None) -> int | None:
        return None if value is None else value * MIB

    made = plan(POLICY, View(1, 0, 0), 0, 0.1)
    return replace(made, target=scaled(target), threshold=scaled(threshold))


def test_events_that_were_coalesced_make_one_large_extension() -> None:
    at = View(512 * MIB, 511 * MIB, HUGE)
    made = plan(POLICY, at, 500 * MIB, 0.5)
    assert made.target == round_up(511 * MIB + 512 * MIB + 2000 * MIB, 128 * MIB)


def test_a_volume_that_is_full_is_extended_although_a_write_past_it_failed() -> None:
    """QEMU counts the write that failed: the highest offset is past the end."""
    at = View(512 * MIB, 514 * MIB, HUGE)
    assert is_possible(at)
    made = plan(POLICY, at, 0, 0.1)
    assert made.target == 1024 * MIB


def test_minima_count_where_they_are_above_maxima() -> None:
    odd = Policy(headroom_min=8 * GIB, chunk_min=8 * GIB)
    made = plan(odd, View(GIB, 0, HUGE), 500 * MIB, 0.5)
    assert (made.headroom, made.chunk) == (8 * GIB, 8 * GIB)


# -- rate -------------------------------------------------------------------------------------


def test_rate_rises_at_once_and_sinks_slowly() -> None:
    rate = Rate(half_life=100.0)
    assert rate.now(0.0) == 0.0
    rate.add(1000.0, 5 * GIB)
    assert rate.now(1000.0) == 0.0, "one point makes no rate"
    rate.add(1002.0, 5 * GIB + 200 * MIB)
    assert rate.now(1002.0) == 100 * MIB
    rate.add(1102.0, 5 * GIB + 200 * MIB)
    assert rate.now(1102.0) == 50 * MIB
    rate.add(1103.0, 5 * GIB + 1000 * MIB)
    assert rate.now(1103.0) == 800 * MIB
    assert rate.now(1303.0) == 200 * MIB
    assert rate.now(1e9) == 0.0


def test_rate_of_a_valley_does_not_hide_the_burst_before() -> None:
    rate = Rate(half_life=100.0)
    rate.add(0.0, 0)
    rate.add(1.0, 100 * MIB)
    for second in range(2, 52):
        rate.add(float(second), 100 * MIB + second)
    assert rate.now(51.0) == pytest.approx(100 * MIB * math.sqrt(0.5))


def test_pieces_too_short_for_a_rate_are_measured_together() -> None:
    rate = Rate()
    rate.add(0.0, 0)
    for count in range(1, 11):  # 4 MiB in a millisecond are no 4 GiB/s
        rate.add(count * 1e-3, 4 * MIB)
    rate.add(0.0, 5 * MIB)  # at the same time, and before
    rate.add(-1.0, 6 * MIB)
    assert rate.now(0.01) == 0.0
    rate.add(0.5, 10 * MIB)
    assert rate.now(0.5) == 20 * MIB


def test_another_layer_keeps_the_rate_and_begins_anew() -> None:
    rate = Rate()
    rate.add(0.0, 0)
    rate.add(1.0, 300 * MIB)
    rate.add(1.2, 200 * KIB)  # a snapshot: the new leaf is empty
    assert rate.now(1.0) == 300 * MIB
    rate.add(2.2, 400 * MIB + 200 * KIB)
    assert rate.now(2.2) == pytest.approx(400 * MIB)
    rate.reset()  # a merge: the base has more than top, that nobody wrote now
    rate.add(3.2, 900 * GIB)
    assert rate.now(2.2) == pytest.approx(400 * MIB)
    rate.add(4.2, 901 * GIB)
    assert rate.now(4.2) == pytest.approx(GIB)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 1 << 50)), max_size=30))
def test_whatever_points_come_the_rate_is_one(points: list[tuple[float, int]]) -> None:
    rate = Rate()
    for when, allocation in points:
        rate.add(when, allocation)
        assert 0.0 <= rate.now(when) <= (1 << 50) / SHORTEST
        assert rate.now(when + 1.0) <= rate.now(when)


@given(st.floats(1, 1e9), st.lists(st.floats(SHORTEST * 1.01, 30), min_size=1, max_size=30))
def test_a_constant_rate_is_measured_whenever_one_looks(speed: float, pauses: list[float]) -> None:
    rate, when = Rate(), 1000.0
    rate.add(when, 0)
    for pause in pauses:
        when += pause
        rate.add(when, round((when - 1000.0) * speed))
        assert rate.now(when) == pytest.approx(speed, rel=1e-3, abs=2 / SHORTEST)


# -- latencies --------------------------------------------------------------------------------


def test_first_latency_counts_until_enough_are_known() -> None:
    seen = Latencies(first_latency=0.5)
    assert seen.tail() == 0.5
    for _ in range(ENOUGH - 1):
        seen.add(0.1)
    assert seen.tail() == 0.5
    seen.add(0.1)
    assert seen.tail() == 0.1


def test_a_slow_one_counts_at_once_and_is_forgotten() -> None:
    seen = Latencies(first_latency=0.5)
    seen.add(3.0)
    assert seen.tail() == 3.0, "before enough are known"
    for _ in range(3 * REMEMBERED + 5):
        seen.add(0.2)
    assert seen.tail() == 0.2
    seen.add(9.0)
    for _ in range(REMEMBERED - 1):
        assert seen.tail() == 9.0
        seen.add(0.2)
    assert seen.tail() == 9.0
    seen.add(0.2)
    assert seen.tail() == 0.2


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=300))
def test_tail_is_what_hardly_any_exceeds(seconds: list[float]) -> None:
    seen = Latencies(first_latency=0.0)
    for one in seconds:
        seen.add(one)
    recent = sorted(seconds[-REMEMBERED:])
    assert seen.tail() >= recent[math.ceil(0.99 * len(recent)) - 1]
    assert seen.tail() in recent


def test_what_is_remembered_of_a_drive_is_small() -> None:
    rate, seen = Rate(), Latencies()
    rate.add(1.5, 1 << 40)
    rate.add(2.5, 1 << 41)
    for _ in range(1000):
        seen.add(0.5)
    assert deep_size(rate) <= 256
    assert deep_size(seen) <= 1024


def deep_size(thing: object) -> int:
    assert not hasattr(thing, "__dict__")
    slots = thing.__class__.__slots__  # type: ignore[attr-defined]
    return sys.getsizeof(thing) + sum(sys.getsizeof(getattr(thing, name)) for name in slots)


# -- brake, time to full, what cannot be ------------------------------------------------------


@given(st.integers(-GIB, 8 * GIB), rates, latencies)
@example(0, 0.0, 0.0)
@example(-5, 10.0, 0.0)
def test_brake_lets_free_space_last(free: int, rate: float, seconds: float) -> None:
    limit = brake(POLICY, free, rate, seconds)
    if limit is None:
        assert rate * seconds <= max(0, free)
    else:
        assert rate * seconds > max(0, free)
        assert limit >= POLICY.throttle_floor
        assert limit == POLICY.throttle_floor or limit * seconds <= free


@given(st.floats(0.01, 10), st.floats(0, 100), st.floats(0, 100))
def test_an_overdue_extension_is_expected_to_take_longer(
    tail: float, elapsed: float, more: float
) -> None:
    assert expected(tail, 0.0) == tail
    assert expected(tail, tail + elapsed + more) >= expected(tail, tail + elapsed) >= tail
    assert expected(tail, elapsed) >= max(tail - elapsed, elapsed)


@pytest.mark.parametrize(("mib", "stall"), [(512, 10), (256, 25), (100, 40)])
def test_space_lasts_through_a_stall_when_the_brake_is_asked_again(mib: int, stall: int) -> None:
    """Each tenth of a second, with an idle drive's headroom; 512 MiB/s are what it is for."""
    free, rate, tail = float(POLICY.headroom_min), float(mib * MIB), 0.5
    for tick in range(stall * 10):
        limit = brake(POLICY, int(free), rate, expected(tail, tick / 10))
        free -= 0.1 * (rate if limit is None else min(rate, limit))
    assert free > 0


@pytest.mark.parametrize(
    ("view", "possible"),
    [
        pytest.param(View(GIB, 0, 10 * GIB), True, id="empty"),
        pytest.param(View(GIB, GIB, 10 * GIB), True, id="full"),
        pytest.param(View(GIB, 10 * GIB, 10 * GIB), True, id="failed write up to the limit"),
        pytest.param(View(GIB, 10 * GIB + 1, 10 * GIB), False, id="past the limit"),
        pytest.param(View(GIB, (1 << 63) - 512, 10 * GIB), False, id="end of all offsets"),
        pytest.param(View(11 * GIB, 11 * GIB, 10 * GIB), True, id="larger than its limit"),
        pytest.param(View(GIB, GIB // 2, 0), False, id="no capacity after a backup"),
        pytest.param(View(0, 0, 10 * GIB), False, id="no size"),
        pytest.param(View(GIB, -1, 10 * GIB), False, id="negative"),
    ],
)
def test_what_cannot_be_is_told(view: View, possible: bool) -> None:
    assert is_possible(view) is possible


def test_seconds_to_full() -> None:
    assert seconds_to_full(10 * GIB, 0.0) is None
    assert seconds_to_full(10 * GIB, float(GIB)) == 10.0
    assert seconds_to_full(0, 5.0) == 0.0
    assert seconds_to_full(-5, 5.0) == 0.0


def test_defaults_are_a_fifth_of_what_is_static_elsewhere() -> None:
    assert POLICY.headroom_min + POLICY.chunk_min <= VDSM_STATIC / 5
    assert POLICY.chunk_min >= POLICY.headroom_min, "the second extension of a burst needs it"
    sizes = ("headroom_min", "headroom_max", "chunk_min", "chunk_max")
    assert all(getattr(POLICY, name) % POLICY.extent == 0 for name in sizes)
    assert dataclasses.is_dataclass(POLICY)
