# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that would be out of space before its volume has grown is slowed, not stopped.

At the beginning of an extension, when what is free would not last as long as extensions may take.
While one is under way it is looked again, and what is free then must last for as long as it may
take yet (`watermark.expected`): the guest has always some room left, and writes ever slower.  One
that failed is tried again in a while, and may fail again: it must last for several of these.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from vdsm_storage.errors import AgentError
from vdsm_storage.host.libvirt_model import VmError
from vdsm_storage.monitor.crew import Crew
from vdsm_storage.monitor.thin_drive import Watched
from vdsm_storage.monitor.thin_history import RELEASED, THROTTLED
from vdsm_storage.monitor.thin_tools import ThinTools
from vdsm_storage.monitor.watermark import brake, expected

WORKERS: Final = 8
SOONEST: Final = 0.1  # seconds until it is looked whether an extension is still under way
SHARE: Final = 0.5  # of the time that it took so far, until it is looked again
RETRIES: Final = 4  # attempts that may fail before a guest is out of space
READ: Final = 10.0  # seconds that a look may wait for its thread

log = logging.getLogger("thin")


@dataclass(frozen=True, slots=True)
class _Slow:
    """What a drive has free must last for so many seconds."""

    each: Watched
    seconds: float


class Brake:
    """Off: nothing is ever slowed; what was is released.  `busy(vm)`: libvirt would keep calls
    waiting that change something of the VM."""

    def __init__(self, tools: ThinTools, busy: Callable[[str], bool]) -> None:
        self._tools = tools
        self._busy = busy
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
        for each in drives:
            self._slow(each, tools.tail(each.volume.domain))
        self._look_later(drives, tools.clock.monotonic())

    def failed(self, each: Watched, delay: float) -> None:
        """It could not be extended, and is tried again after `delay` seconds.  Returns at once."""
        if self._on:
            elapsed = self._tools.clock.monotonic() - each.started
            self._slow(each, elapsed + self._tools.tail(each.volume.domain) + RETRIES * delay)

    def _slow(self, each: Watched, seconds: float) -> None:
        if self._rate(each, seconds) is not None:
            self._crew.put(_Slow(each, seconds))

    def _rate(self, each: Watched, seconds: float) -> int | None:
        """What it may write a second; None for as much as it does, or may already.  What a backup
        writes to is as fast as its guest's disk, which is watched for itself."""
        if each.is_scratch:
            return None
        now = self._tools.clock.monotonic()
        rate = brake(self._tools.policy, each.free, each.rate.now(now), seconds)
        if rate is None or (each.throttle and rate >= each.throttle):
            return None
        return rate

    # -- while it takes long -----------------------------------------------------------------

    def _look_later(self, drives: Sequence[Watched], since: float) -> None:
        tools = self._tools
        pause = max(SOONEST, (tools.clock.monotonic() - since) * SHARE)

        def look() -> None:
            late = [d for d in drives if d.started and d.started <= since and not d.paused]
            if late:
                work = functools.partial(self._look_again, late, since)
                tools.lanes.submit("thin late", work, READ)

        tools.alarms.after(pause, look)

    def _look_again(self, late: Sequence[Watched], since: float) -> None:
        """What they have written meanwhile: one call for all.  A QEMU that hangs writes nothing."""
        tools = self._tools
        try:
            vms = sorted({each.vm for each in late if tools.board.has(each)})
            extents = tools.libvirt.extents(vms) if vms else {}
        except (AgentError, VmError) as error:
            log.info("What guests wrote meanwhile is not known: %s", error)
            extents = {}
        now = tools.clock.monotonic()
        for each in late:
            extent = extents.get(each.vm, {}).get(each.name)
            if extent is not None and each.started:
                each.saw(now, extent.allocation)
            self._slow(each, expected(tools.tail(each.volume.domain), now - since))
        self._look_later(late, since)

    def _lower(self, work: list[_Slow]) -> None:
        (slow,) = work
        each, tools = slow.each, self._tools
        try:
            rate = self._rate(each, slow.seconds)
            if rate is None or not self._wanting(each) or self._busy(each.vm):
                return
            tools.throttles.lower(each.vm, each.name, rate)
            if not self._wanting(each):  # since just now, and nobody saw that it is to be released
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

    def _wanting(self, each: Watched) -> bool:
        return bool(each.started) and not each.paused and self._tools.board.has(each)

    def release(self, each: Watched) -> None:
        """It has room again; later, if its VM is busy.  Raises VmError, 59, OSError."""
        tools = self._tools
        if self._busy(each.vm):
            return
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
