# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that would be out of space before its volume has grown is slowed, not stopped.

At the beginning of an extension, when what is free would not last as long as extensions may take;
and again while one takes longer, each time for as long again as it took so far: then the guest has
always some room left, and writes ever slower.
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
SHARE: Final = 0.5  # of the time that it took so far, until it is looked again

log = logging.getLogger("thin")


@dataclass(frozen=True, slots=True)
class _Slow:
    each: Watched
    rate: int  # bytes a second


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
            self._slow(each, now, tools.tail(each.volume.domain))
        self._look_later(drives, now)

    def _slow(self, each: Watched, now: float, seconds: float) -> None:
        rate = brake(self._tools.policy, each.free, each.rate.now(now), seconds)
        if rate is not None and not each.paused and (not each.throttle or rate < each.throttle):
            self._crew.put(_Slow(each, rate))

    def _look_later(self, drives: Sequence[Watched], since: float) -> None:
        elapsed = self._tools.clock.monotonic() - since
        self._tools.alarms.after(
            max(SOONEST, elapsed * SHARE), lambda: self._look_again(drives, since)
        )

    def _look_again(self, drives: Sequence[Watched], since: float) -> None:
        late = [each for each in drives if each.started and each.started <= since]
        if not late:
            return
        for each in late:
            self._crew.put(_Slow(each, 0))
        self._look_later(late, since)

    def _lower(self, work: list[_Slow]) -> None:
        (slow,) = work
        each, rate = slow.each, slow.rate
        tools = self._tools
        try:
            if not rate:
                self._measure(each)
                return
            if not each.started or each.paused:
                return  # it has its space, or is in need of nothing else
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

    def _measure(self, each: Watched) -> None:
        """How fast it really is, while its extension is late."""
        tools = self._tools
        if not each.started or each.paused:
            return
        allocation, _size = tools.libvirt.written(each.vm, each.name)
        now = tools.clock.monotonic()
        each.saw(now, allocation)
        self._slow(each, now, max(tools.tail(each.volume.domain), now - each.started))

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
