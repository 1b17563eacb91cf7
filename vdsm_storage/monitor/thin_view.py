# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that grow as callers see them: what became of each, in the form that the wire has."""

from __future__ import annotations

from collections.abc import Mapping

from vdsm_storage.monitor.thin_history import History, Point

Shown = dict[str, float | str]


class ThinView:
    """Tells what was recorded; nothing is watched by it."""

    def __init__(self, history: History) -> None:
        self._history = history

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
        del vm
        return {}


def shown(point: Point) -> Shown:
    """As the schema has a ThinPoint."""
    return {
        "when": point.when,
        "allocation": str(point.allocation),
        "size": str(point.size),
        "threshold": str(point.threshold),
        "what": point.what,
    }
