# SPDX-License-Identifier: GPL-2.0-or-later
"""A volume group as its metadata describes it.

Offsets and counts of extents are extents, everything else is bytes.  Objects are immutable and
small: a host may keep tens of thousands of logical volumes in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` extents of a volume from its extent `start` on, at extent `pv_start` of `pv`.

    `pv` is the physical volume's name inside the group (`pv0`); "" for a segment that is not
    linear (mirrors of a running pvmove, say), whose place is not told.
    """

    start: int
    count: int
    pv: str
    pv_start: int


@dataclass(frozen=True, slots=True)
class LogicalVolume:
    """`uuid` is LVM's (6-4-4-4-4-4-6); `tags` keep the order of the metadata.

    `visible` is false for volumes that LVM hides (pvmove0).
    """

    name: str
    uuid: str
    tags: tuple[str, ...]
    segments: tuple[Segment, ...]
    visible: bool = True

    @property
    def extents(self) -> int:
        return sum(segment.count for segment in self.segments)


@dataclass(frozen=True, slots=True)
class PhysicalVolume:
    """`device` is where it was when the metadata was written, a hint only."""

    name: str
    uuid: str
    device: str
    size: int
    pe_start: int
    pe_count: int
    tags: tuple[str, ...] = ()
    missing: bool = False
    allocatable: bool = True


@dataclass(frozen=True, slots=True)
class VolumeGroup:
    """`lvs` by name, `pvs` by their names inside the group; `text_size` bytes of metadata.

    `exported` and `partial` groups are not worked on.
    """

    name: str
    uuid: str
    seqno: int
    extent_size: int
    tags: tuple[str, ...]
    pvs: Mapping[str, PhysicalVolume]
    lvs: Mapping[str, LogicalVolume]
    exported: bool = False
    text_size: int = 0
    _used: int = field(default=-1, init=False, repr=False, compare=False)  # once it was counted

    @property
    def partial(self) -> bool:
        return any(pv.missing for pv in self.pvs.values())

    @property
    def extents(self) -> int:
        return sum(pv.pe_count for pv in self.pvs.values())

    @property
    def used(self) -> int:
        """Extents that belong to a logical volume."""
        if self._used < 0:
            object.__setattr__(self, "_used", sum(lv.extents for lv in self.lvs.values()))
        return self._used

    @property
    def size(self) -> int:
        return self.extents * self.extent_size

    @property
    def free(self) -> int:
        """Bytes that no logical volume has."""
        return (self.extents - self.used) * self.extent_size

    def size_of(self, lv: str) -> int:
        return self.lvs[lv].extents * self.extent_size
