# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a block domain keeps the metadata and the leases of its volumes.

A volume has a number, its slot.  Slot n of the `metadata` volume is 512 bytes at n * 512 (format
3 and 4) or at 1 MiB + n * 8 KiB (format 5); its lease lies at (100 + n) * alignment of `leases`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import Final

from vdsm_storage.base import files
from vdsm_storage.base.units import KIB, MIB
from vdsm_storage.errors import TooManyVolumes

SLOT_SIZE: Final = 512
LAST_SLOT: Final = 1947  # `leases` has room for 2048, and the first 100 are none of volumes
METADATA_SIZE: Final = 128 * MIB  # of the `metadata` volume
MOVED: Final = 5  # the first version of the format that has the slots at their new places
_RESERVED_LEASES: Final = 100
_V5_BASE: Final = MIB
_V5_STEP: Final = 8 * KIB
_READ: Final = MIB  # bytes read at once
# Slots that lie further apart than this are not worth reading what is between them.
_GAP: Final = 128 * KIB


def first_slot(version: int) -> int:
    """The first that a volume may have; before it old formats kept the domain's metadata."""
    return 1 if version >= MOVED else 4


def slot_offset(slot: int, version: int) -> int:
    """Bytes from the start of `metadata`."""
    return _V5_BASE + slot * _V5_STEP if version >= MOVED else slot * SLOT_SIZE


def lease_offset(slot: int, alignment: int) -> int:
    """Bytes from the start of `leases`."""
    return (_RESERVED_LEASES + slot) * alignment


def lowest_free(used: Collection[int], version: int, domain: str = "?") -> int:
    """The slot for a new volume.  Raises TooManyVolumes (397), naming `domain`."""
    first = first_slot(version)
    for slot in range(first, LAST_SLOT + 1):
        if slot not in used:
            return slot
    raise TooManyVolumes(domain=domain, limit=LAST_SLOT + 1 - first)


def lowest_free_many(
    used: Collection[int], version: int, count: int, domain: str = "?"
) -> list[int]:
    """Slots for `count` new volumes, all or none."""
    taken = set(used)
    found: list[int] = []
    for _ in range(count):
        found.append(lowest_free(taken, version, domain))
        taken.add(found[-1])
    return found


class Slots:
    """The slots in the `metadata` volume at `path` (a device, or a file), read and written past
    the page cache.  All methods may block and raise OSError, or ValueError for a slot that cannot
    be.
    """

    def __init__(self, path: str, version: int) -> None:
        # Links below /dev are followed in any case; finding their ends takes many calls.
        self._path = path if path.startswith("/dev/") else os.path.realpath(path)
        self._version = version

    def read(self, slot: int) -> bytes:
        """The 512 bytes of a slot."""
        offset = self._offset(slot)
        start = offset - offset % files.DIRECT_ALIGN
        data = files.read_direct(self._path, files.DIRECT_ALIGN, start)
        return data[offset - start : offset - start + SLOT_SIZE].ljust(SLOT_SIZE, b"\0")

    def read_all(self, slots: Collection[int]) -> dict[int, bytes]:
        """The same of many at once; what lies past the end of the file reads as NULs."""
        ordered = sorted(set(slots))
        if not ordered:
            return {}
        self._offset(ordered[0])
        self._offset(ordered[-1])  # when both ends can be, so can those between
        found: dict[int, bytes] = {}
        todo = iter([(slot, slot_offset(slot, self._version)) for slot in ordered])
        slot, offset = next(todo)
        ranges = list(_ranges([slot_offset(slot, self._version) for slot in ordered]))
        longest = max(end - start for start, end in ranges)
        with files.DirectReader(self._path, longest) as reader:
            for start, end in ranges:
                data = reader.read(start, end - start)
                while start <= offset < end:
                    text = data[offset - start : offset - start + SLOT_SIZE]
                    found[slot] = text.ljust(SLOT_SIZE, b"\0")
                    slot, offset = next(todo, (0, -1))
        return found

    def write(self, slot: int, data: bytes) -> None:
        """Write the 512 bytes of a slot; durable when this returns."""
        if len(data) != SLOT_SIZE:
            raise ValueError(f"a slot holds {SLOT_SIZE} bytes, not {len(data)}")
        files.write_direct(self._path, data, self._offset(slot))

    def clear(self, slot: int) -> None:
        """Write NULs over a slot, as when its volume is gone; durable when this returns."""
        self.write(slot, bytes(SLOT_SIZE))

    def _offset(self, slot: int) -> int:
        offset = slot_offset(slot, self._version)
        if slot < 0 or offset + SLOT_SIZE > METADATA_SIZE:
            raise ValueError(f"{self._path} has no slot {slot}")
        return offset


def _ranges(offsets: list[int]) -> Iterator[tuple[int, int]]:
    """(start, end) of what is read at once, for slots at the rising `offsets`: few large pieces,
    no slot in two of them.
    """
    align = files.DIRECT_ALIGN
    start = end = -1
    for offset in offsets:
        upto = -(-(offset + SLOT_SIZE) // align) * align
        if start >= 0 and offset - end <= _GAP and upto - start <= _READ:
            end = max(end, upto)
            continue
        if start >= 0:
            yield start, end
        start, end = offset // align * align, upto
    if start >= 0:
        yield start, end
