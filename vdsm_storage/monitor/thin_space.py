# SPDX-License-Identifier: GPL-2.0-or-later
"""Volume groups that come to their end: told ahead of time, and noticed when they have space again.

While somebody waits for space, the group is looked at twice a second; that is one read of its
metadata header.  Otherwise it is looked at when something was extended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from typing import Final

from vdsm_storage.errors import AgentError
from vdsm_storage.monitor.thin_drive import Watched
from vdsm_storage.monitor.thin_tools import ThinTools
from vdsm_storage.monitor.watermark import seconds_to_full

LOOK: Final = 0.5  # seconds between two looks while somebody waits
READ: Final = 60.0  # seconds that such a look may wait for its thread
CLEAR: Final = 2.0  # times the warning's seconds, until it is over
ENOUGH, LOW, FULL = "enough", "low", "full"  # levels; somebody waits in the last one

log = logging.getLogger("thin")


class Space:
    """`want(drive)` has it extended."""

    def __init__(self, tools: ThinTools, want: Callable[[Watched], None]) -> None:
        self._tools = tools
        self._want = want
        self._mutex = threading.Lock()
        self._waiting: dict[str, dict[Watched, None]] = {}  # by domain, those without space
        self._told: dict[str, str] = {}  # by domain, the level
        self._free: dict[str, int] = {}  # by domain, bytes when it was last looked at

    # -- waiting -----------------------------------------------------------------------------

    def is_gone(self, each: Watched) -> bool:
        """Whether the domain has not got an extent for it."""
        try:
            return self._tools.free(each.volume.domain) < self._tools.policy.extent
        except AgentError:
            return False

    def wait_for(self, each: Watched) -> None:
        """The domain has no extent left for it."""
        domain = each.volume.domain
        with self._mutex:
            first = domain not in self._waiting
            self._waiting.setdefault(domain, {})[each] = None
        if first:
            self._later(domain)

    def _later(self, domain: str) -> None:
        def look() -> None:
            try:
                self._tools.lanes.submit(f"thin space {domain}", lambda: self._look(domain), READ)
            except AgentError as error:  # the agent stops
                log.info("Domain %s: %s", domain, error)

        self._tools.alarms.after(LOOK, look)

    def _look(self, domain: str) -> None:
        try:
            there = self._tools.free(domain) >= self._tools.policy.extent
        except AgentError as error:
            log.info("Domain %s: %s", domain, error)
            there = False
        with self._mutex:
            waiting = self._waiting.get(domain, {})
            for each in [each for each in waiting if not self._tools.board.has(each)]:
                del waiting[each]
            ready = list(waiting) if there else []
            if there or not waiting:
                self._waiting.pop(domain, None)
        for each in ready:
            self._want(each)
        if waiting and not there:
            self._later(domain)
        if there:
            self.changed([domain])

    # -- ahead of time -----------------------------------------------------------------------

    def rate(self, domain: str) -> float:
        """Bytes a second that guests of this host write into new space of a domain."""
        now = self._tools.clock.monotonic()
        drives = self._tools.board.all()
        return sum(each.rate.now(now) for each in drives if each.volume.domain == domain)

    def known(self, domain: str) -> float | None:
        """Seconds until the domain is full at that rate, by what was free when it was last looked
        at; None for never, or when it is not known.  Does not wait."""
        with self._mutex:
            free = self._free.get(domain)
        return None if free is None else seconds_to_full(free, self.rate(domain))

    def changed(self, domains: Collection[str]) -> None:
        """Volumes of these have grown, or could not: tell when the end is near."""
        for domain in domains:
            try:
                free, rate = self._tools.free(domain), self.rate(domain)
            except AgentError as error:
                log.info("Domain %s: %s", domain, error)
                continue
            seconds = seconds_to_full(free, rate)
            with self._mutex:
                self._free[domain] = free
                before = self._told.get(domain, ENOUGH)
                waiting = len(self._waiting.get(domain, ()))
                level = FULL if waiting else self._level(free, seconds, before)
                self._told[domain] = level
            if level != before:
                facts = {"level": level, "free": str(free), "rate": f"{rate:.0f}",
                         "waiting": waiting}  # fmt: skip
                if seconds is not None:
                    facts["timeToFull"] = f"{seconds:.0f}"
                log.warning("Domain %s: %s", domain, facts)
                self._tools.publish(f"|storage|space_low|{domain}", {domain: facts})

    def _level(self, free: int, seconds: float | None, before: str) -> str:
        """It is not low any more only when there is clearly more than at first."""
        if free < self._tools.policy.extent:
            return LOW
        limit = self._tools.settings.warn_seconds
        if before != ENOUGH:
            limit *= CLEAR
        return LOW if seconds is not None and seconds < limit else ENOUGH
