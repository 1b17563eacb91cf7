# SPDX-License-Identifier: GPL-2.0-or-later
"""Free extents of a volume group, and which of them a volume gets.  Pure.

A volume grows where it ends if there is space; else it gets the first free area that is large
enough; else areas from the lowest on, in the order of the group's physical volumes.  lvm's policy
"normal" does nearly the same; ours is exact, so that it can be told what to take.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vdsm_storage.lvm.model import LogicalVolume, Segment, VolumeGroup

Area = tuple[int, int]  # first extent, number of extents


@dataclass(frozen=True, slots=True)
class Free:
    """Free areas by physical volume, sorted and never touching.  Immutable: a change that fails
    leaves the one before as it was.
    """

    areas: Mapping[str, tuple[Area, ...]]

    @property
    def extents(self) -> int:
        return sum(count for areas in self.areas.values() for _, count in areas)

    def take(self, count: int, after: Segment | None = None) -> tuple[list[Segment], Free] | None:
        """Segments of `count` extents, their `start` from 0; None if there are not so many.

        `after` is the last segment of the volume that grows.
        """
        behind = self._take_behind(count, after)
        if behind is not None:
            return behind
        if count > self.extents:
            return None
        taken: list[Segment] = []
        areas = dict(self.areas)
        for pv, start, size in self._choose(count, after):
            done = sum(segment.count for segment in taken)
            taken.append(Segment(done, min(size, count - done), pv, start))
            areas[pv] = tuple(_without(areas[pv], start, taken[-1].count))
            if done + taken[-1].count == count:
                break
        return taken, Free(areas)

    def _take_behind(self, count: int, after: Segment | None) -> tuple[list[Segment], Free] | None:
        """Where the volume ends, if that is room enough: without a look at all free areas, which
        are many where hundreds of volumes grow at once."""
        if after is None:
            return None
        areas, begin = self.areas.get(after.pv, ()), after.pv_start + after.count
        at = bisect.bisect_left(areas, (begin, 0))
        if at == len(areas) or areas[at][0] != begin or areas[at][1] < count:
            return None
        left = areas[at][1] - count
        rest = ((begin + count, left),) if left else ()
        return [Segment(0, count, after.pv, begin)], Free(
            {**self.areas, after.pv: (*areas[:at], *rest, *areas[at + 1 :])}
        )

    def give(self, segments: Iterable[Segment]) -> Free:
        """With the extents of `segments`; those on volumes not allocated from are left out."""
        areas = dict(self.areas)
        for segment in segments:
            if segment.pv in areas:
                joined = _join([*areas[segment.pv], (segment.pv_start, segment.count)])
                areas[segment.pv] = tuple(joined)
        return Free(areas)

    def _choose(self, count: int, after: Segment | None) -> Iterator[tuple[str, int, int]]:
        """(physical volume, first extent, extents there) from the best on."""
        everywhere = [(pv, *area) for pv, areas in self.areas.items() for area in areas]
        if after is not None:
            end = (after.pv, after.pv_start + after.count)
            for place in everywhere:
                if place[:2] == end:
                    everywhere.remove(place)
                    yield place
                    count -= place[2]
                    break
        whole = next((place for place in everywhere if place[2] >= count), None)
        if whole is not None:
            yield whole
        yield from everywhere


def free_areas(group: VolumeGroup) -> Free | None:
    """None when it cannot be told, because a volume's place is not (a running pvmove)."""
    used: dict[str, list[Area]] = {pv: [] for pv in group.pvs}
    for lv in group.lvs.values():
        for segment in lv.segments:
            if segment.pv not in used:
                return None
            used[segment.pv].append((segment.pv_start, segment.count))
    return Free(
        {
            pv.name: tuple(_gaps(used[pv.name], pv.pe_count))
            for pv in group.pvs.values()
            if pv.allocatable and not pv.missing
        }
    )


def grown(lv: LogicalVolume, more: Sequence[Segment]) -> tuple[Segment, ...]:
    """The volume's segments with `more` behind them, joined where they touch."""
    segments = list(lv.segments)
    for segment in more:
        last = segments[-1] if segments else None
        if last and (last.pv, last.pv_start + last.count) == (segment.pv, segment.pv_start):
            segments[-1] = Segment(last.start, last.count + segment.count, last.pv, last.pv_start)
        else:
            start = last.start + last.count if last else 0
            segments.append(Segment(start, segment.count, segment.pv, segment.pv_start))
    return tuple(segments)


def shrunk(lv: LogicalVolume, extents: int) -> tuple[tuple[Segment, ...], list[Segment]]:
    """The first `extents` of the volume's extents, and what is cut off."""
    kept: list[Segment] = []
    cut: list[Segment] = []
    for s in lv.segments:
        keep = max(0, min(s.count, extents - s.start))
        if keep:
            kept.append(Segment(s.start, keep, s.pv, s.pv_start))
        if keep < s.count:
            cut.append(Segment(s.start + keep, s.count - keep, s.pv, s.pv_start + keep))
    return tuple(kept), cut


def _gaps(used: list[Area], total: int) -> Iterator[Area]:
    at = 0
    for start, count in sorted(used):
        if start > at:
            yield at, start - at
        at = max(at, start + count)
    if total > at:
        yield at, total - at


def _join(areas: list[Area]) -> list[Area]:
    joined: list[Area] = []
    for start, count in sorted(areas):
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((start, count))
    return joined


def _without(areas: Sequence[Area], start: int, count: int) -> Iterator[Area]:
    """`areas` without the first `count` extents of the one that begins at `start`."""
    for area in areas:
        if area[0] != start:
            yield area
        elif area[1] > count:
            yield start + count, area[1] - count
