# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that grow as callers see them: how each stands and what became of it, in the form that the
wire has."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vdsm_storage.base.clock import Clock
from vdsm_storage.monitor.thin_drive import FULL, Board, Watched
from vdsm_storage.monitor.thin_history import History, Point

Shown = dict[str, float | str]


class ThinView:
    """`time_to_full(domain)` in seconds, None when it is not known or never.  Waits for nobody."""

    def __init__(
        self,
        history: History,
        board: Board,
        clock: Clock,
        time_to_full: Callable[[str], float | None],
    ) -> None:
        self._history = history
        self._board = board
        self._clock = clock
        self._time_to_full = time_to_full

    def history(self, vm: str, drive: str = "", since: float = 0.0) -> Mapping[str, list[Shown]]:
        """By drive, of one or of all of a VM; schema: ThinHistory.  ValueError for a name that
        cannot be one."""
        names = [drive] if drive else self._history.drives(vm)
        return {
            name: [shown(point) for point in self._history.points(vm, name, since)]
            for name in names
        }

    def stats(self, vm: str) -> Mapping[str, Mapping[str, str]]:
        """By drive, of those that are watched; schema: VmDiskThin."""
        return {each.name: self._stats(each) for each in self._board.of(vm)}

    def _stats(self, each: Watched) -> dict[str, str]:
        now = self._clock.monotonic()
        slowed = each.throttle_time + (now - each.throttle_since if each.throttle else 0.0)
        found = {
            "state": "throttled" if each.throttle and each.state != FULL else each.state,
            "size": str(each.size),
            "allocation": str(each.allocation),
            "threshold": str(each.threshold),
            "headroom": str(each.headroom),
            "chunk": str(each.chunk),
            "limit": str(each.limit),
            "writeRate": f"{each.rate.now(now):.2f}",
            "events": str(each.events),
            "extends": str(each.extends),
            "lastLatency": f"{each.last_latency:.4f}",
            "maxLatency": f"{each.max_latency:.4f}",
            "pauses": str(each.pauses),
            "pausesAvoided": str(each.pauses_avoided),
            "throttleTime": f"{slowed:.3f}",
            "throttle": str(each.throttle),
        }
        seconds = self._time_to_full(each.volume.domain)
        if seconds is not None:
            found["timeToFull"] = f"{seconds:.0f}"
        if each.error:
            found["error"] = each.error
        return found


def shown(point: Point) -> Shown:
    """As the schema has a ThinPoint."""
    return {
        "when": point.when,
        "allocation": str(point.allocation),
        "size": str(point.size),
        "threshold": str(point.threshold),
        "what": point.what,
    }
