# SPDX-License-Identifier: GPL-2.0-or-later
"""When a thin volume is to grow, and by how much: the policy, without I/O, threads or a clock.

Units: bytes, seconds, bytes a second.  Times come from the caller, from one monotonic clock.

    limit      the most that the volume may have
    size       ├────────────────────┼─────────────────┤ what it has
    allocation ├───────────┤ the highest offset written
    threshold  ├────────────────────┤ size - headroom: libvirt tells when it is passed
    target     = allocation + headroom + chunk, in whole extents, at most limit

    headroom = rate × latency × safety, in steps,           in headroom_min … headroom_max
    chunk    = max(rate × chunk_seconds, headroom)          in chunk_min … chunk_max

**Headroom** is what the guest lives on while the volume is being extended: what it writes in that
time.  The *tail* of the latencies counts, not their mean: a guest pauses in the one case of a
hundred that takes long, and nobody notices the others.  `safety` covers what is not measured: the
way of the event, and a guest that becomes so many times faster until the next extension.  The
headroom changes in steps: when a threshold is passed after the rate has decayed, the next one is a
step above at least.  With bytes for steps a drive that cools down would have a dozen events more.

**Rate** rises at once and sinks slowly.  Too little headroom stops a guest, too much costs some
storage for some minutes: the two errors are not equal.  Guests write in bursts, with valleys in
which a mean would forget them.  Nothing is polled: a rate is measured between the points that are
known anyway (event, statistics when a threshold is armed, slow scan), over valleys and bursts
alike, and the highest counts until it has decayed, to half in each `half_life`.

**Chunk** follows the rate, so that an extension lasts `chunk_seconds` however fast the guest is:
the commits of a volume group, each of which costs all its hosts something, are bounded by drives
/ chunk_seconds.  It is never below the headroom, which is where a guest becomes faster than was
known: the first extension then uses up the headroom, and while the second is made, which has the
right size, there is the chunk of the first.

**An idle drive** has headroom_min + chunk_min free at most: its chunk is rounded down to extents.
A burst finds it with headroom_min, and its rate is known only when the first extension is done,
because the time before the event was mostly idle.  As chunk_min ≥ headroom_min, it is survived
without a pause up to

    rate ≤ headroom_min / latency         (the defaults and 0.5 s: 512 MiB/s, at 0.1 s 2.5 GiB/s)

A faster one is slowed by the brake, if the rate is measured again while the first extension is
under way.  From then on, until it was idle for some half lives, the drive is safe up to
headroom_max / latency.

**Brake.**  A guest that may write free / seconds bytes a second still has room after `seconds`.
Asked for again and again while an extension is late, each time for as long as that is expected to
take yet (`expected`), it never lets the free space be used up, only shrink, down to
`throttle_floor`: below that a guest would not seem slow but dead.  256 MiB with a tail of 0.5 s
outlast storage that does not answer for 10 s at the full 512 MiB/s, for 25 s at half of it.

Where minima are above maxima the minima count.  With headroom_min = headroom_max and chunk_min =
chunk_max the policy is the one with fixed sizes.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import Final

from vdsm_storage.base.units import MIB, round_up

# Headroom is a multiple of it, or one of its bounds.
STEP: Final = 16 * MIB
# Over less than that a rate says how a guest's writes are cut into pieces, not how fast it is.
SHORTEST: Final = 0.05  # seconds
# How many latencies are remembered.  The next one exceeds the highest of these in 1.5 % of cases.
REMEMBERED: Final = 64
# As long as there are fewer, the one that is assumed counts as one of them.
ENOUGH: Final = 16


@dataclass(frozen=True)
class Policy:
    """Bytes and seconds; the defaults are the product's.  Config section [thin] has these names."""

    extent: int = 128 * MIB  # sizes are multiples of it
    headroom_min: int = 256 * MIB  # an idle drive's
    headroom_max: int = 4096 * MIB
    chunk_min: int = 256 * MIB  # an idle drive's; at least headroom_min, see above
    chunk_max: int = 4096 * MIB
    chunk_seconds: float = 4.0  # what an extension should last at the present rate
    safety: float = 2.0
    half_life: float = 120.0  # of the remembered rate
    first_latency: float = 0.5  # assumed before enough was measured
    throttle_floor: int = MIB  # bytes a second that a brake leaves


class Rate:
    """How fast a drive is written, from points (time, allocation); any interval of time will do.

    When a guest pauses, that should be a point as well: else the pause makes it seem slow.  Not for
    bogus allocations (`is_possible`).  Less than 256 bytes.
    """

    __slots__ = ("_allocation", "_half_life", "_rate", "_since", "_when")

    def __init__(self, half_life: float = Policy.half_life) -> None:
        self._half_life = half_life
        self._rate = 0.0  # what it was at _since, where _when and _allocation are the last point
        self._since = 0.0
        self._when: float | None = None
        self._allocation = 0

    def add(self, when: float, allocation: int) -> None:
        """The drive was written up to `allocation` at `when`.

        Less than before is another layer, and begins anew.  Points too close to the last one
        (or before it) are left out: a later one covers their time as well.
        """
        if self._when is None or allocation < self._allocation:
            self._when, self._allocation = self._at_least(when), allocation
            return
        elapsed = when - self._when
        if elapsed < SHORTEST:
            return
        measured = (allocation - self._allocation) / elapsed
        self._rate = max(measured, self.now(when))
        self._since = self._when = when
        self._allocation = allocation

    def now(self, when: float) -> float:
        """Bytes a second: the highest that was measured, decayed until `when`."""
        age = max(0.0, when - self._since)
        return self._rate * math.exp2(-age / self._half_life)

    def reset(self) -> None:
        """The drive writes to another layer (snapshot, merge): the next point is the first.

        The guest is the one that it was, so its rate stays.
        """
        self._when = None

    def _at_least(self, when: float) -> float:
        """Time does not go back, even if a point does: else the next interval were too long."""
        return when if self._when is None else max(when, self._when)


class Latencies:
    """How long extending took, the last 64 times; about 700 bytes."""

    __slots__ = ("_first", "_next", "_seconds")

    def __init__(self, first_latency: float = Policy.first_latency) -> None:
        self._first = first_latency
        self._seconds = array("d")
        self._next = 0

    def add(self, seconds: float) -> None:
        """From the event until the guest can use the space; of one that failed, until then."""
        if len(self._seconds) < REMEMBERED:
            self._seconds.append(seconds)
        else:
            self._seconds[self._next] = seconds
            self._next = (self._next + 1) % REMEMBERED

    def tail(self) -> float:
        """Seconds that hardly any takes longer than: the slowest of those remembered.

        That is their p99, rises with a slow one at once, and forgets it after 64 better ones.
        """
        slowest = max(self._seconds, default=0.0)
        return slowest if len(self._seconds) >= ENOUGH else max(slowest, self._first)


@dataclass(frozen=True)
class View:
    """A volume as it is seen now, in bytes."""

    size: int  # what the volume has
    allocation: int  # the highest offset that was written
    limit: int  # the most that it may ever have: its format's for its capacity; 0: not known


@dataclass(frozen=True)
class Plan:
    """What is to be done, in bytes."""

    target: int | None  # extend to this size now; None: there is room enough
    threshold: int | None  # to be armed once the volume has that size; None: it is at its limit
    headroom: int
    chunk: int


def plan(policy: Policy, view: View, rate: float, latency: float) -> Plan:
    """What a volume needs that is written at `rate` bytes/s where extending takes `latency` s.

    The target leaves headroom and chunk above the allocation, however far that is past the
    threshold, but the limit (in whole extents) is never exceeded, and the chunk of an idle drive
    lacks what makes no whole extent.  Planned again when the volume has its target, and with the
    same facts, there is nothing to do.
    """
    headroom, chunk = headroom_for(policy, rate, latency), chunk_for(policy, rate, latency)
    end = round_up(view.limit, policy.extent)
    if view.size >= end:
        return Plan(None, None, headroom, chunk)
    if view.allocation < view.size - headroom:
        return Plan(None, view.size - headroom, headroom, chunk)
    wanted = view.allocation + headroom + chunk
    if headroom <= policy.headroom_min and chunk <= smallest_chunk(policy):
        wanted -= wanted % policy.extent
    target = min(round_up(wanted, policy.extent), end)
    return Plan(target, target - headroom if target < end else None, headroom, chunk)


def headroom_for(policy: Policy, rate: float, latency: float) -> int:
    """Bytes that must be free when an extension begins."""
    written = min(rate * latency * policy.safety, policy.headroom_max)  # it may be infinite
    wanted = round_up(math.ceil(written), STEP)
    return max(policy.headroom_min, min(wanted, policy.headroom_max))


def chunk_for(policy: Policy, rate: float, latency: float) -> int:
    """Bytes that an extension adds to the headroom; at least one extent, so that it is one."""
    lasting = math.ceil(min(rate * policy.chunk_seconds, policy.chunk_max))
    wanted = max(lasting, headroom_for(policy, rate, latency))
    return max(smallest_chunk(policy), min(wanted, policy.chunk_max))


def smallest_chunk(policy: Policy) -> int:
    """An idle drive's chunk."""
    return max(policy.chunk_min, policy.extent)


def expected(tail: float, elapsed: float) -> float:
    """Seconds that an extension may take yet which has taken `elapsed`, for `brake`.

    Up to the tail: what is left of that, but at least as long again, for it may be the one of a
    hundred.  After the tail it is something else (storage that does not answer), and the longer
    that has lasted the longer it will last: the overdue time counts twice.
    """
    return max(tail - elapsed, elapsed, 2 * elapsed - tail)


def brake(policy: Policy, free: int, rate: float, seconds: float) -> int | None:
    """Bytes a second that a guest may write so that `free` bytes last `seconds`.

    None: at `rate` they do.
    """
    free = max(0, free)
    if rate * seconds <= free:
        return None
    return max(policy.throttle_floor, int(free / seconds))


def is_possible(view: View) -> bool:
    """Whether the device could hold what is said to be written.

    That may be more than it has: QEMU (7.2) counts a write past the end although it failed.  But it
    is never more than the volume may ever have.  A capacity that libvirt gives as 0 (it does after
    a backup) makes no limit: the caller must know another one, or pass 0 and is told so.
    """
    return view.limit > 0 and view.size > 0 and 0 <= view.allocation <= max(view.size, view.limit)


def seconds_to_full(free_in_group: int, rate: float) -> float | None:
    """How long `free_in_group` bytes of a volume group last at the sum `rate` of its drives.

    None: for ever, nobody writes.
    """
    return max(0, free_in_group) / rate if rate > 0 else None
