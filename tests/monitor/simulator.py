# SPDX-License-Identifier: GPL-2.0-or-later
"""Drives that are written and grown, in simulated time: what a policy does, without storage.

A guest writes its pattern at the rates that this names; a pause or a throttle makes it later, not
less.  Between two happenings everything is linear, so that each is computed, not approached.

The service is modelled as monitor/ does it:

    threshold passed ─ delay ─→ rate.add(event) → plan → extension asked for → (batch, latency)
      → size grows, guest resumed → statistics read: rate.add → plan → again, or armed

An extension under way that is braked: every `probe` seconds statistics are read, and the throttle
is what lets the free space last as long as the extension is expected to take yet.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vdsm_storage.base.units import MIB
from vdsm_storage.monitor.watermark import (
    Latencies,
    Plan,
    Policy,
    Rate,
    View,
    brake,
    expected,
    plan,
)

Planner = Callable[[Policy, View, float, float], Plan]
Latency = Callable[[random.Random, int], float]  # of a commit for so many drives, in seconds
NEVER = math.inf


@dataclass(frozen=True)
class Segment:
    """A guest writes `rate` bytes a second for so long, if nobody stops it."""

    rate: float
    seconds: float


Pattern = Sequence[Segment]


@dataclass(frozen=True)
class Setup:
    latency: Latency
    policy: Policy = field(default_factory=Policy)
    planner: Planner = plan
    braked: bool = False
    delay: float = 0.01  # seconds from a threshold, or the end of the space, to its event
    probe: float = 0.1
    start: int = 512 * MIB  # size of a new volume
    limit: int = 1 << 50
    stall: tuple[float, float] = (NEVER, NEVER)  # from when until when no commit ends
    seed: int = 1
    known: int = 64  # so many extensions have been measured before


@dataclass
class Drive:
    """What became of one drive; bytes and seconds."""

    pauses: int = 0
    pauses_at: list[float] = field(default_factory=list)
    paused: float = 0.0
    throttled: float = 0.0
    extensions: int = 0
    most_free: float = 0.0
    free_seconds: float = 0.0  # free space times how long it was there
    seconds: float = 0.0
    least_free_at_end: float = NEVER  # when an extension was done, before it
    headrooms: list[tuple[float, int]] = field(default_factory=list)  # when planned


@dataclass
class Result:
    drives: list[Drive]
    batches: list[int]
    seconds: float
    written: float

    @property
    def pauses(self) -> int:
        return sum(d.pauses for d in self.drives)

    @property
    def throttled(self) -> float:
        return sum(d.throttled for d in self.drives)

    @property
    def extensions(self) -> int:
        return sum(d.extensions for d in self.drives)

    @property
    def mean_free(self) -> float:
        return sum(d.free_seconds for d in self.drives) / sum(d.seconds for d in self.drives)

    @property
    def most_free(self) -> float:
        return max(d.most_free for d in self.drives)

    def __str__(self) -> str:
        return (
            f"{len(self.drives)} drives, {self.seconds:.0f} s, {self.written / MIB:,.0f} MiB:"
            f" pauses {self.pauses} ({sum(d.paused for d in self.drives):.1f} s),"
            f" throttled {self.throttled:.1f} s, extensions {self.extensions}"
            f" in {len(self.batches)} commits, free mean {self.mean_free / MIB:,.0f}"
            f" max {self.most_free / MIB:,.0f} MiB"
        )


class Time:
    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        if seconds < NEVER:
            self._count += 1
            heapq.heappush(self._queue, (self.now + seconds, self._count, what))

    def run(self) -> None:
        while self._queue:
            self.now, _, what = heapq.heappop(self._queue)
            what()


class Guest:
    """A writer and its volume: when it passes the threshold or the end, it says so."""

    def __init__(self, time: Time, pattern: Pattern, size: int, drive: Drive) -> None:
        self.size, self.allocation = size, 0.0
        self.throttle, self.threshold = NEVER, NEVER
        self.drive = drive
        self.passed: Callable[[], None] = lambda: None
        self.full: Callable[[], None] = lambda: None
        self._time, self._then, self._turn = time, 0.0, 0
        self._pattern, self._at, self._done = pattern, 0, 0.0  # bytes done, or idle seconds
        self._paused = False
        self.ended_at = NEVER
        self.change()

    @property
    def free(self) -> float:
        return self.size - self.allocation

    @property
    def ended(self) -> bool:
        return self._at >= len(self._pattern)

    def change(self, **values: float) -> None:
        """Size, throttle or threshold become another now."""
        self.catch_up()
        for name, value in values.items():
            setattr(self, name, value)
        self._paused = self._paused and self.free < 1
        self._turn += 1
        turn, seconds = self._turn, self._next()
        self._time.later(max(0.0, seconds), lambda: self._happens(turn))

    def catch_up(self) -> None:
        """Write what was written since."""
        seconds, self._then = self._time.now - self._then, self._time.now
        if self.ended:
            return
        speed, before = self._speed(), self.free
        self.allocation = min(self.allocation + speed * seconds, self.size)
        self._done += speed * seconds if self._wanted() else seconds
        drive = self.drive
        drive.most_free = max(drive.most_free, before)
        drive.free_seconds += (before + self.free) / 2 * seconds
        drive.seconds += seconds
        drive.paused += seconds if self._paused else 0
        drive.throttled += seconds if not self._paused and self.throttle < self._wanted() else 0

    def _wanted(self) -> float:
        return self._pattern[self._at].rate

    def _speed(self) -> float:
        return 0.0 if self._paused else min(self._wanted(), self.throttle)

    def _next(self) -> float:
        """Seconds until something happens."""
        if self.ended or self._paused:
            return NEVER
        segment, speed = self._pattern[self._at], self._speed()
        if not segment.rate:
            return segment.seconds - self._done
        marks = [segment.rate * segment.seconds - self._done, self.free]
        if self.threshold < NEVER:
            marks.append(self.threshold - self.allocation)
        return min(marks) / speed

    def _happens(self, turn: int) -> None:
        if turn != self._turn:
            return  # something came in between
        self.catch_up()
        segment = self._pattern[self._at]
        whole = segment.rate * segment.seconds - 1 if segment.rate else segment.seconds - 1e-9
        if self._done >= whole:  # to a byte, for times are not more exact than that
            self._at, self._done = self._at + 1, 0.0
            if self.ended:
                self.ended_at = self._time.now
        if self.allocation >= self.threshold - 1:
            self.threshold = NEVER  # libvirt's threshold tells once
            self.passed()
        if self.free < 1 and not self.ended and self._wanted():
            self._paused = True
            self.drive.pauses += 1
            self.drive.pauses_at.append(self._time.now)
            self.full()
        self.change()


class Group:
    """Extensions of one volume group: who comes while a commit is made goes with the next."""

    def __init__(self, time: Time, setup: Setup) -> None:
        self._time, self._setup = time, setup
        self._random = random.Random(setup.seed)
        self._waiting: list[Callable[[], None]] = []
        self._busy = False
        self.batches: list[int] = []
        self.latencies = Latencies(setup.policy.first_latency)
        for _ in range(setup.known):
            self.latencies.add(setup.latency(self._random, 1))

    def ask(self, done: Callable[[], None]) -> None:
        self._waiting.append(done)
        if not self._busy:
            self._commit()

    def _commit(self) -> None:
        batch, self._waiting, self._busy = self._waiting, [], True
        seconds = self._setup.latency(self._random, len(batch))
        begin, end = self._setup.stall
        if self._time.now < end and self._time.now + seconds > begin:
            seconds = max(seconds, end - self._time.now)
        self.batches.append(len(batch))
        self._time.later(seconds, lambda: self._committed(batch))

    def _committed(self, batch: list[Callable[[], None]]) -> None:
        for done in batch:
            done()  # who needs more at once waits with the others
        self._busy = False
        if self._waiting:
            self._commit()


class Watch:
    """What the service does for one drive."""

    def __init__(self, time: Time, setup: Setup, guest: Guest, group: Group) -> None:
        self._time, self._setup, self._guest, self._group = time, setup, guest, group
        self._rate = Rate(setup.policy.half_life)
        self._armed = 0.0
        self._since: float | None = None  # when what is being extended was known to be needed
        guest.passed = lambda: time.later(setup.delay, self._event)
        guest.full = lambda: time.later(setup.delay, self._enospc)
        self._look()

    def _event(self) -> None:
        if self._since is None:
            self._rate.add(self._time.now, int(self._armed))
            self._act(int(self._armed))

    def _enospc(self) -> None:
        self._measure()  # else the rate would be that of writing and waiting
        if self._since is None and self._guest.free < 1:
            self._look()

    def _look(self) -> None:
        """Read the statistics, and act."""
        self._measure()
        self._act(int(self._guest.allocation))

    def _measure(self) -> None:
        self._guest.catch_up()
        self._rate.add(self._time.now, int(self._guest.allocation))

    def _act(self, allocation: int) -> None:
        setup, guest = self._setup, self._guest
        rate, tail = self._rate.now(self._time.now), self._group.latencies.tail()
        view = View(guest.size, allocation, setup.limit)
        planned = setup.planner(setup.policy, view, rate, tail)
        guest.drive.headrooms.append((self._time.now, planned.headroom))
        if planned.target is not None:
            target = planned.target
            assert guest.size < target
            self._since = self._time.now
            guest.drive.extensions += 1
            if setup.braked:
                self._brake(self._since)
            self._group.ask(lambda: self._extended(target))
            return
        self._since = None
        guest.change(throttle=NEVER)
        if planned.threshold is not None:
            self._arm(planned.threshold)

    def _arm(self, threshold: int) -> None:
        self._armed = threshold
        self._guest.change(threshold=threshold)
        if self._guest.allocation >= threshold:  # passed while nobody looked
            self._guest.change(threshold=NEVER)
            self._look()

    def _brake(self, since: float) -> None:
        if self._since != since:
            return
        self._measure()
        seconds = expected(self._group.latencies.tail(), self._time.now - since)
        rate = self._rate.now(self._time.now)
        throttle = brake(self._setup.policy, int(self._guest.free), rate, seconds)
        self._guest.change(throttle=NEVER if throttle is None else throttle)
        self._time.later(self._setup.probe, lambda: self._brake(since))

    def _extended(self, target: int) -> None:
        assert self._since is not None
        guest, took = self._guest, self._time.now - self._since
        guest.catch_up()
        guest.drive.least_free_at_end = min(guest.drive.least_free_at_end, guest.free)
        self._group.latencies.add(took)
        self._since = None
        guest.change(size=target)
        self._look()


def simulate(setup: Setup, *patterns: Pattern) -> Result:
    """All patterns at once on one volume group, each until its guest has written it all."""
    time = Time()
    group = Group(time, setup)
    guests = [Guest(time, pattern, setup.start, Drive()) for pattern in patterns]
    for guest in guests:
        Watch(time, setup, guest, group)
    time.run()
    assert all(guest.ended for guest in guests), "a guest was stopped for good"
    seconds = max(guest.ended_at for guest in guests)
    written = sum(guest.allocation for guest in guests)
    result = Result([guest.drive for guest in guests], group.batches, seconds, written)
    print(result)  # pytest shows it for tests that fail, and with -s
    return result
