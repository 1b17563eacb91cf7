# SPDX-License-Identifier: GPL-2.0-or-later
"""What guests write, how long extending takes, and the policy that the simulator compares with."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path

from tests.monitor.simulator import Latency, Pattern, Segment
from vdsm_storage.base.units import MIB, round_up
from vdsm_storage.monitor.watermark import Plan, Policy, View

RECORDED = Path(__file__).parent.parent / "data" / "thin"


def constant(rate: float, seconds: float) -> Pattern:
    return [Segment(rate, seconds)]


def burst(idle: float, rate: float, seconds: float, trickle: float = 0.0) -> Pattern:
    """Nearly idle, then all at once."""
    return [Segment(trickle, idle), Segment(rate, seconds)]


def sawtooth(rate: float, seconds: float, valley: float, teeth: int) -> Pattern:
    return [Segment(rate, seconds), Segment(0, valley)] * teeth


def climb(first: float, last: float, factor: float, seconds: float) -> Pattern:
    """From one rate to the other by steps, and a while at the last one."""
    steps = math.ceil(math.log(last / first, factor))
    rates = [min(last, first * factor**step) for step in range(steps + 1)]
    return [*(Segment(rate, seconds) for rate in rates), Segment(last, 5 * seconds)]


def walk(rng: random.Random, first: float, highest: float, steps: int) -> Pattern:
    """A rate that becomes up to 1.5 times more or less each two seconds."""
    rate, found = first, []
    for _ in range(steps):
        rate = min(highest, max(first / 8, rate * rng.uniform(1 / 1.5, 1.5)))
        found.append(Segment(rate, 2.0))
    return found


def trickle(rng: random.Random, seconds: float) -> Pattern:
    """An idle guest: logs all the time, and each minute or so a file of some MiB."""
    found: list[Segment] = []
    while sum(s.seconds for s in found) < seconds:
        found.append(Segment(rng.uniform(0.01, 0.3) * MIB, rng.uniform(20, 90)))
        found.append(Segment(rng.uniform(5, 40) * MIB, rng.uniform(0.1, 1.0)))
    return found


def recorded_writer(name: str) -> Pattern:
    """A writer that was watched: its points are [seconds, highest offset written]."""
    points = json.loads((RECORDED / name).read_text())["points"]
    return [
        Segment(max(0, b - a) / (then - at), then - at) for (at, a), (then, b) in pairwise(points)
    ]


def exactly(seconds: float, each_more: float = 0.0) -> Latency:
    """What a commit takes, and each drive more in it."""
    return lambda _rng, batch: seconds + each_more * (batch - 1)


def uniform(least: float, most: float) -> Latency:
    return lambda rng, _batch: rng.uniform(least, most)


def lognormal(median: float, sigma: float) -> Latency:
    return lambda rng, _batch: median * math.exp(rng.gauss(0, sigma))


def with_outliers(latency: Latency, every: int, seconds: float) -> Latency:
    """One of so many takes `seconds`; by chance, as outliers come."""
    return lambda rng, batch: seconds if rng.random() < 1 / every else latency(rng, batch)


def recorded(name: str) -> Latency:
    """One of those that were measured."""
    measured = json.loads((RECORDED / name).read_text())["seconds"]
    return lambda rng, _batch: rng.choice(measured)


def vdsm(policy: Policy, view: View, _rate: float, _latency: float) -> Plan:
    """The same 2.5 GiB for all drives, asked for when 2 GiB are left."""
    chunk, headroom = 2560 * MIB, 2048 * MIB
    end = round_up(view.limit, policy.extent)
    if view.size >= end:
        return Plan(None, None, headroom, chunk)
    if view.allocation < view.size - headroom:
        return Plan(None, view.size - headroom, headroom, chunk)
    target = min(round_up(view.size + chunk, policy.extent), end)
    return Plan(target, max(1, target - headroom), headroom, chunk)


VDSM_START = 2560 * MIB
VDSM_LATENCY = uniform(0.77, 1.39)  # seconds; what was published of it
