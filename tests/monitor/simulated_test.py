# SPDX-License-Identifier: GPL-2.0-or-later
"""What comes of the policy in simulated days of guests: pauses, throttles, commits, free space.

`pytest -s` prints a line a run.  A rate fits where rate × (delay of the event + slowest extension)
is at most the headroom.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.monitor.patterns import (
    VDSM_LATENCY,
    VDSM_START,
    burst,
    climb,
    constant,
    exactly,
    lognormal,
    recorded,
    recorded_writer,
    sawtooth,
    trickle,
    uniform,
    vdsm,
    walk,
    with_outliers,
)
from tests.monitor.simulator import Latency, Pattern, Segment, Setup, simulate
from vdsm_storage.base.units import GIB, MIB
from vdsm_storage.monitor.watermark import Policy, View, plan

POLICY = Policy()
WRITER = "qemu-storage-daemon-7.2-ext4-copies-and-dd.json"
LVEXTEND = "lvextend-2.03.16-350-volumes.json"
MARGIN = 0.98  # of the bound: floats, and writes that libvirt tells of a byte late


# -- the simulator is right about what was measured elsewhere ---------------------------------


@pytest.mark.parametrize(
    ("rate", "pauses"), [(1300, False), (1450, False), (1600, True), (2500, True)]
)
def test_static_headroom_tolerates_what_was_published_of_it(rate: int, pauses: bool) -> None:
    """2 GiB and 0.77 … 1.39 s: no pause at 1,300 MiB/s, and so up to 2048 / 1.39 = 1,473."""
    static = Setup(VDSM_LATENCY, planner=vdsm, start=VDSM_START)
    assert bool(simulate(static, constant(rate * MIB, 300)).pauses) is pauses


def test_static_headroom_with_polling_tolerates_what_was_published_of_it() -> None:
    """2.2 … 4.4 s: clean at 350 MiB/s, pauses in some extensions at 500."""
    polled = Setup(uniform(2.2, 4.4), planner=vdsm, start=VDSM_START)
    assert simulate(polled, constant(350 * MIB, 300)).pauses == 0
    some = simulate(polled, constant(500 * MIB, 300))
    assert 0.05 < some.pauses / some.extensions < 0.5


@pytest.mark.parametrize("headroom", [512, 2048])
def test_fixed_headroom_is_enough_exactly_when_it_is_rate_times_latency(headroom: int) -> None:
    fixed = Policy(
        headroom_min=headroom * MIB,
        headroom_max=headroom * MIB,
        chunk_min=2560 * MIB,
        chunk_max=2560 * MIB,
    )
    setup = Setup(exactly(0.8), policy=fixed, delay=0.0, start=2560 * MIB)
    rate = headroom * MIB / 0.8
    assert simulate(setup, constant(rate * 0.99, 60)).pauses == 0
    assert simulate(setup, constant(rate * 1.01, 60)).pauses > 5


# -- no pause while rate × latency fits the headroom ------------------------------------------


@given(
    slowest=st.floats(0.02, 20),
    delay=st.floats(0, 0.1),
    share=st.floats(0.05, 1),
    seed=st.integers(),
)
@settings(max_examples=40)
def test_idle_drive_survives_a_burst_that_fits_headroom_min(
    slowest: float, delay: float, share: float, seed: int
) -> None:
    """Without the brake, and without one latency known before."""
    setup = Setup(uniform(slowest * 0.3, slowest), delay=delay, seed=seed, known=0)
    rate = MARGIN * share * POLICY.headroom_min / (slowest + delay)
    found = simulate(setup, burst(3600, rate, 20 * GIB / rate))
    assert found.pauses == 0
    assert found.extensions > 5


@given(slowest=st.floats(0.05, 20), share=st.floats(0.2, 1), seed=st.integers())
@settings(max_examples=40)
def test_hot_drive_never_pauses_while_it_fits_headroom_max(
    slowest: float, share: float, seed: int
) -> None:
    """Up to 4 GiB within the slowest extension, reached by steps that an extension saw each."""
    setup = Setup(uniform(slowest * 0.5, slowest), delay=slowest / 50, seed=seed)
    last = MARGIN * share * POLICY.headroom_max / (slowest * 1.02)
    first = MARGIN * POLICY.headroom_min / (slowest * 1.02)
    found = simulate(setup, climb(first, max(first, last), 1.6, 4 * max(4.0, slowest)))
    assert found.pauses == 0


@pytest.mark.parametrize("highest", [500, 4000])
def test_random_walks_do_not_pause(highest: int) -> None:
    """From a rate that an idle drive survives to one that takes nearly all of headroom_max.

    It may rise 1.5 times each two seconds.  When it does so again and again while nothing is
    extended, it can outrun `safety`: of 5,000 such walks one paused, for a moment.
    """
    for seed in range(20):
        setup = Setup(uniform(0.1, 0.9), seed=seed)
        pattern = walk(random.Random(seed), 170 * MIB, highest * MIB, 300)
        assert simulate(setup, pattern).pauses == 0


@given(seed=st.integers(0, 1 << 30), highest=st.floats(170, 4000))
@example(215, 1500)
@settings(max_examples=15)
def test_random_walk_with_brake_does_not_pause(seed: int, highest: float) -> None:
    setup = Setup(uniform(0.1, 0.9), seed=seed, braked=True)
    found = simulate(setup, walk(random.Random(seed), 170 * MIB, highest * MIB, 300))
    assert found.pauses == 0
    assert found.throttled < 0.06 * found.seconds


def test_no_pause_with_p99_of_a_long_tailed_distribution() -> None:
    """2,000 extensions of which 1 % take longer than the p99 by any time up to twice of it."""
    p99 = 0.25 * 2.718281828 ** (0.4 * 2.326)
    setup = Setup(lognormal(0.25, 0.4))
    rate = POLICY.headroom_max / 2 / (p99 + setup.delay)
    found = simulate(setup, [*climb(400 * MIB, rate, 1.6, 20), Segment(rate, 4000)])
    assert found.extensions > 2000
    assert found.pauses == 0


def test_beyond_the_bound_it_does_pause() -> None:
    """The bounds are where they are said to be: 3 % above there is a pause, and with no brake."""
    above = POLICY.headroom_min / (1.0 + 0.01) * 1.03
    assert 1 <= simulate(Setup(exactly(1.0)), burst(3600, above, 60)).pauses <= 2
    above = POLICY.headroom_max * 1.03
    assert simulate(Setup(exactly(1.0)), climb(200 * MIB, above, 1.6, 16)).pauses > 5


def test_volume_is_written_to_its_limit() -> None:
    limit = 10 * GIB + 5 * MIB
    found = simulate(Setup(exactly(0.5), limit=limit), constant(300 * MIB, limit / 300 / MIB))
    assert found.pauses == 0
    assert found.written == pytest.approx(limit)
    assert found.extensions < 12


# -- the brake --------------------------------------------------------------------------------


@given(rate=st.floats(1, 1000), length=st.floats(0.6, 10), begin=st.floats(0, 60))
@settings(max_examples=30)
def test_brake_keeps_guests_going_through_a_stall(rate: float, length: float, begin: float) -> None:
    """Up to twice what an idle drive survives without, and storage 20 times slower than known."""
    setup = Setup(exactly(0.5), stall=(begin, begin + length), braked=True)
    found = simulate(setup, burst(10, rate * MIB, 60, trickle=0.1 * MIB))
    assert found.pauses == 0
    assert found.throttled <= length + 0.5 * found.extensions


@pytest.mark.parametrize("mib", [600, 1000, 2000])
def test_brake_saves_an_idle_drive_from_a_burst_that_is_too_fast(mib: int) -> None:
    pattern = burst(600, mib * MIB, 60)
    assert 1 <= simulate(Setup(exactly(0.5)), pattern).pauses <= 2
    braked = simulate(Setup(exactly(0.5), braked=True), pattern)
    assert braked.pauses == 0
    assert 0 < braked.throttled < 1.5, "for the first extension only"


def test_brake_lets_a_guest_go_that_is_always_too_fast() -> None:
    """8 GiB/s where 4 GiB/s fit: as fast as extending is, and nearly that fast."""
    pattern = climb(200 * MIB, 8 * GIB, 1.6, 16)
    assert simulate(Setup(exactly(1.0)), pattern).pauses > 10
    braked = simulate(Setup(exactly(1.0), braked=True), pattern)
    assert braked.pauses == 0
    written_at_the_end = 5 * 16 * 8 * GIB
    assert braked.seconds < 2.2 * (written_at_the_end / (4 * GIB)) + 16 * 9


def test_brake_does_nothing_where_extensions_are_as_they_were() -> None:
    """Half of what an idle drive survives; ten times as much when it became fast by steps."""
    setup = Setup(uniform(0.2, 0.5), braked=True)
    for mib in (1, 50, 250):
        assert simulate(setup, burst(100, mib * MIB, 200)).throttled == 0
    assert simulate(setup, climb(250 * MIB, 2500 * MIB, 1.5, 20)).throttled < 0.5, "in 240 s"


def test_stall_without_brake_pauses_once_and_goes_on() -> None:
    found = simulate(Setup(exactly(0.5), stall=(5.0, 25.0)), constant(200 * MIB, 60))
    assert found.pauses == 1
    assert 15 < found.drives[0].paused < 20


# -- outliers ---------------------------------------------------------------------------------


def outliers(braked: bool) -> Any:
    """200 MiB/s, extensions of a quarter of a second, each hundredth or so of 5 s."""
    setup = Setup(with_outliers(lognormal(0.25, 0.3), 100, 5.0), braked=braked, seed=6, known=0)
    return simulate(setup, [*constant(100 * MIB, 20), *constant(200 * MIB, 4000)])


def test_outlier_pauses_only_when_none_was_seen_lately() -> None:
    found = outliers(braked=False).drives[0]
    prepared = [at for at, headroom in found.headrooms if headroom >= 1999 * MIB]
    assert found.pauses > 0
    assert prepared
    since_prepared = [
        min((p - at for at in prepared if at < p), default=1e9) for p in found.pauses_at
    ]
    assert all(seconds > 60 for seconds in since_prepared), "headroom was there for it"
    assert len(prepared) < 0.9 * len(found.headrooms), "it is given up"


def test_outliers_never_pause_a_guest_that_is_braked() -> None:
    found = outliers(braked=True)
    assert found.pauses == 0
    assert 0 < found.throttled < 0.02 * found.seconds


# -- bursts and valleys -----------------------------------------------------------------------


def teeth(policy: Policy) -> Any:
    pattern = [*sawtooth(800 * MIB, 5, 60, 10), Segment(0.5 * MIB, 7200)]
    return simulate(Setup(exactly(0.5), policy=policy), pattern)


def test_headroom_is_kept_through_valleys_and_given_up_later() -> None:
    """800 MiB/s for 5 s, then a minute of nothing: only the first tooth finds an idle drive."""
    found = teeth(POLICY).drives[0]
    assert [at < 5 for at in found.pauses_at] == [True]
    kept = [headroom for at, headroom in found.headrooms if 60 < at < 650]
    assert min(kept) > 800 * MIB * 0.5, "rate × latency at least"
    assert found.headrooms[-1][1] == POLICY.headroom_min


def test_without_memory_each_tooth_would_pause() -> None:
    assert teeth(Policy(half_life=5.0)).pauses >= 8


# -- storage that is not needed ---------------------------------------------------------------


def test_idle_drives_waste_a_fifth_at_most() -> None:
    """Two hours of 40 guests that hardly write, in the same simulator with both policies."""
    patterns = [trickle(random.Random(seed), 7200) for seed in range(40)]
    static = simulate(Setup(VDSM_LATENCY, planner=vdsm, start=VDSM_START), *patterns)
    ours = simulate(Setup(lognormal(0.3, 0.4)), *patterns)
    assert ours.pauses == static.pauses == 0
    assert ours.most_free <= 2560 * MIB / 5, "at no moment"
    assert ours.mean_free <= static.mean_free / 5
    assert ours.most_free <= static.most_free / 5


# -- many drives ------------------------------------------------------------------------------


def test_500_drives_at_once_are_a_handful_of_commits() -> None:
    latency = exactly(0.35, each_more=0.002)  # 1.35 s for all of them
    found = simulate(Setup(latency), *[constant(20 * MIB, 30)] * 500)
    assert found.pauses == 0
    assert found.extensions == 1000
    assert len(found.batches) <= 5
    assert max(found.batches) == 499


def test_500_drives_with_their_own_rates_pause_nobody() -> None:
    rng = random.Random(3)
    patterns: list[Pattern] = [constant(rng.uniform(1, 40) * MIB, 60) for _ in range(500)]
    found = simulate(Setup(exactly(0.35, each_more=0.002)), *patterns)
    assert found.pauses == 0
    assert len(found.batches) < found.extensions / 5
    assert found.mean_free < 512 * MIB


@pytest.mark.parametrize("mib", [10, 100, 300, 900])
def test_commits_are_bounded_by_the_time_that_a_chunk_lasts(mib: int) -> None:
    found = simulate(Setup(exactly(0.2)), constant(mib * MIB, 400))
    assert found.extensions <= 400 / POLICY.chunk_seconds + 3
    small = Policy(chunk_max=POLICY.chunk_min)
    if mib >= 300:
        assert simulate(Setup(exactly(0.2), policy=small), constant(mib * MIB, 400)).extensions > (
            3 * found.extensions
        )


# -- what was recorded ------------------------------------------------------------------------


def test_recorded_writer_with_recorded_extensions() -> None:
    """ext4 copies and dd through QEMU, up to 1.4 GiB/s; lvextend among 350 volumes."""
    pattern = recorded_writer(WRITER)
    found = simulate(Setup(recorded(LVEXTEND), known=0), pattern)
    static = simulate(Setup(VDSM_LATENCY, planner=vdsm, start=VDSM_START), pattern)
    assert found.pauses == 0
    assert found.written == pytest.approx(static.written, rel=1e-6)
    assert found.mean_free < static.mean_free / 2


@pytest.mark.parametrize(
    "latency", [exactly(0.5), exactly(1.0), VDSM_LATENCY], ids=["half", "one", "VDSM"]
)
def test_recorded_writer_is_never_paused_with_the_brake(latency: Latency) -> None:
    found = simulate(Setup(latency, braked=True), recorded_writer(WRITER))
    assert found.pauses == 0
    assert found.throttled < 3.0


def test_headroom_that_full_speed_needs_is_a_fifth_of_what_published_latency_needs() -> None:
    """Found by bisection, with the extensions that were recorded here, at 1 GiB/s from idle."""
    rate = 1024.0 * MIB

    def pauses(headroom_min: int) -> int:
        policy = Policy(headroom_min=headroom_min, chunk_min=max(headroom_min, 256 * MIB))
        setup = Setup(recorded(LVEXTEND), policy=policy, known=0)
        return simulate(setup, burst(600, rate, 120)).pauses

    low, high = 1 * MIB, 2048 * MIB
    while high - low > MIB:
        middle = (low + high) // 2
        low, high = (middle, high) if pauses(middle) else (low, middle)
    print(f"headroom_min {high / MIB:.0f} MiB; published latency: {rate * 1.39 / MIB:.0f} MiB")
    assert high <= rate * 1.39 / 5


def test_a_plan_with_less_is_seen_by_these_tests() -> None:
    """The simulator does not hide a bad policy: half the headroom pauses."""

    def half(policy: Policy, view: View, rate: float, latency: float) -> Any:
        return plan(Policy(headroom_min=policy.headroom_min // 2), view, rate, latency / 4)

    found = simulate(Setup(exactly(1.0), planner=half), climb(200 * MIB, 2 * GIB, 1.6, 16))
    assert found.pauses > 3
