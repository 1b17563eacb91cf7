# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that would be out of space before its volume has grown is slowed, not stopped.

At the beginning of an extension, when what is free would not last as long as extensions may take.
While one takes longer than that it is looked again, and what is free then must last for as long
again as it took so far, and until the next look: the guest has always some room left, and writes
ever slower.  One that failed is tried again in a while, and may fail again: it must last for
several of these.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vdsm_storage.errors import AgentError
from vdsm_storage.host.libvirt_model import VmError
from vdsm_storage.monitor.crew import Crew
from vdsm_storage.monitor.thin_drive import Watched
from vdsm_storage.monitor.thin_history import RELEASED, THROTTLED
from vdsm_storage.monitor.thin_tools import ThinTools
from vdsm_storage.monitor.watermark import brake

WORKERS: Final = 8
SOONEST: Final = 0.25  # seconds until it is looked whether an extension is still under way
RETRIES: Final = 4  # attempts that may fail before a guest is out of space
SHARE: Final = 0.5  # of the time that it took so far, until it is looked again

log = logging.getLogger("thin")


@dataclass(frozen=True, slots=True)
class _Slow:
    """What a drive has free must last for so many seconds.  `measure`: more was written since."""

    each: Watched
    seconds: float
    measure: bool


class Brake:
    """Off: nothing is ever slowed; what was is released."""

    def __init__(self, tools: ThinTools) -> None:
        self._tools = tools
        self._crew: Crew[_Slow] = Crew(
            tools.lanes, "thin brake", WORKERS, lambda slow: slow.each.vm, self._lower
        )

    @property
    def _on(self) -> bool:
        return self._tools.settings.throttle

    def begin(self, drives: Sequence[Watched]) -> None:
        """They are about to be extended.  Returns at once."""
        if not self._on or not drives:
            return
        tools = self._tools
        now = tools.clock.monotonic()
        for each in drives:
            seconds = tools.tail(each.volume.domain)
            if self._rate(each, seconds) is not None:  # seldom; the others cost nothing
                self._crew.put(_Slow(each, seconds, measure=False))
        self._look_later(drives, now)

    def failed(self, each: Watched, delay: float) -> None:
        """It could not be extended, and is tried again after `delay` seconds.  Returns at once."""
        if self._on:
            elapsed = self._tools.clock.monotonic() - each.started
            seconds = elapsed + self._tools.tail(each.volume.domain) + RETRIES * delay
            self._crew.put(_Slow(each, seconds, measure=True))

    def _rate(self, each: Watched, seconds: float) -> int | None:
        """What it may write a second; None for as much as it does, or may already."""
        now = self._tools.clock.monotonic()
        rate = brake(self._tools.policy, each.free, each.rate.now(now), seconds)
        if rate is None or (each.throttle and rate >= each.throttle):
            return None
        return rate

    def _look_later(self, drives: Sequence[Watched], since: float) -> None:
        self._tools.alarms.after(self._pause(since), lambda: self._look_again(drives, since))

    def _pause(self, since: float) -> float:
        """Seconds until it is looked again."""
        return max(SOONEST, (self._tools.clock.monotonic() - since) * SHARE)

    def _look_again(self, drives: Sequence[Watched], since: float) -> None:
        late = [each for each in drives if each.started and each.started <= since]
        if not late:
            return
        elapsed = self._tools.clock.monotonic() - since
        for each in late:
            seconds = max(elapsed, self._tools.tail(each.volume.domain)) + self._pause(since)
            self._crew.put(_Slow(each, seconds, measure=True))
        self._look_later(late, since)

    def _lower(self, work: list[_Slow]) -> None:
        (slow,) = work
        each, tools = slow.each, self._tools
        try:
            if slow.measure:
                allocation, _size = tools.libvirt.written(each.vm, each.name)
                each.saw(tools.clock.monotonic(), allocation)
            rate = self._rate(each, slow.seconds)
            if rate is None or not each.started or each.paused:
                return
            tools.throttles.lower(each.vm, each.name, rate)
            if not each.started:  # it got it just now, and whoever gave it saw nothing to release
                tools.throttles.lift(each.vm, each.name)
                return
        except (AgentError, VmError, OSError) as error:
            log.warning("VM %s disk %s is not slowed: %s", each.vm, each.name, error)
            return
        log.info("VM %s disk %s: %d bytes a second for now", each.vm, each.name, rate)
        if not each.throttle:
            each.throttle_since = tools.clock.monotonic()
        each.throttle = rate
        tools.note(each, THROTTLED)

    def release(self, each: Watched) -> None:
        """It has room again.  Raises VmError, 59, OSError."""
        tools = self._tools
        tools.throttles.lift(each.vm, each.name)
        if each.throttle:
            each.throttle_time += tools.clock.monotonic() - each.throttle_since
            each.throttle = 0
            if not each.paused:
                each.pauses_avoided += 1
            tools.note(each, RELEASED)

    def release_all(self) -> None:
        """The agent stops, and cannot help them any more."""
        for vm, disk in self._tools.throttles.lowered():
            try:
                self._tools.throttles.lift(vm, disk)
            except (AgentError, VmError, OSError) as error:
                log.warning("VM %s disk %s stays slowed: %s", vm, disk, error)
