# SPDX-License-Identifier: GPL-2.0-or-later
"""What LVM keeps on a physical volume, read by direct I/O and without its tools.

A *label* in one of the first four sectors names the volume and its metadata *areas*.  An area
begins with a *header* of 512 bytes, which says where in the area the present *text* lies; the
rest is a ring in which each commit writes a new text behind the last one, and then the header.
So a header that has not changed proves that the group has not changed.

All numbers are little-endian.  The layout is that of lvm2's format "lvm2" (lib/format_text/layout.h
and lib/label/label.h there); tests hold it against what the tools report.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

SECTOR: Final = 512  # bytes; LVM's own unit, whatever the device has
PAGE: Final = 4096  # bytes; direct I/O of this size and place suits sectors of 512 and of 4096
LABEL_SECTORS: Final = 4
HEADER_SIZE: Final = 512  # of an area; the ring begins behind it
HUGE: Final = 2 * 1024 * 1024  # bytes; of this size on, a buffer is worth huge pages
TEXT_LIMIT: Final = 128 * 1024 * 1024  # bytes; twice what areas of 128 MiB can hold

_LABEL: Final = struct.Struct("<8sQII8s")  # id, sector, CRC, offset of the volume's header, type
_VOLUME: Final = struct.Struct("<32sQ")  # uuid without dashes, size of the device
_EXTENT: Final = struct.Struct("<QQ")  # offset, size; a list of them ends with zeros
_HEADER: Final = struct.Struct("<I16sIQQ")  # CRC, magic, version, offset and size of the area
_SLOT: Final = struct.Struct("<QQII")  # offset in the area, size, CRC, flags
_LABEL_ID: Final = b"LABELONE"
_LABEL_TYPE: Final = b"LVM2 001"
_MAGIC: Final = b" LVM2 x[5A%r0N*>"
_IGNORED: Final = 1
_CRC_START: Final = 0xF597A6CF ^ 0xFFFFFFFF
_UUID_PARTS: Final = (6, 4, 4, 4, 4, 4, 6)

log = logging.getLogger("lvm.labels")


class DamageError(Exception):
    """What is on the storage is not what LVM writes; the message says what and where."""


class LabelDamaged(DamageError):  # noqa: N818 (it says what is so)
    pass


class HeaderDamaged(DamageError):  # noqa: N818 (it says what is so)
    pass


class TextDamaged(DamageError):  # noqa: N818 (it says what is so)
    pass


@dataclass(frozen=True, slots=True)
class Area:
    """A metadata area: `size` bytes at byte `offset` of the device."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Label:
    """A physical volume: `size` of its device in bytes when it was made or resized."""

    device: str
    pv_uuid: str
    size: int
    areas: tuple[Area, ...]


@dataclass(frozen=True, slots=True)
class Location:
    """Where the text is: `offset` is inside the area."""

    offset: int
    size: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Header:
    """`ignored`: the area is not in use.  `location` is None before the first commit.

    `raw` are the 512 bytes: equal bytes, unchanged group.
    """

    ignored: bool
    location: Location | None
    raw: bytes


def checksum(data: bytes | memoryview, start: int = _CRC_START) -> int:
    """LVM's CRC-32 of `data`."""
    return zlib.crc32(data, start) ^ 0xFFFFFFFF


def read_label(device: str) -> Label | None:
    """The label, or None where there is none that is whole.  Raises OSError."""
    try:
        return find_label(device)
    except LabelDamaged as error:
        log.warning("%s", error)
        return None


def find_label(device: str) -> Label | None:
    """The label, or None where there is none.  Raises OSError, LabelDamaged."""
    start = bytes(_read(device, [(0, PAGE)])[0])
    for number in range(LABEL_SECTORS):
        sector = start[number * SECTOR : (number + 1) * SECTOR]
        if sector.startswith(_LABEL_ID):
            return _label(device, number, sector)
    return None


def read_header(device: str, area: Area) -> Header:
    """The header of an area.  Raises OSError, HeaderDamaged."""
    return parse_header(HeaderReader(device, [area]).read()[0], area, device)


class HeaderReader:
    """Reads the raw headers of one device again and again, with a buffer of its own.

    The device is open for the moment of a read only: a LUN that is in use cannot be taken away.
    For one thread at a time.
    """

    def __init__(self, device: str, areas: Sequence[Area]) -> None:
        self.device = device
        self._places = [area.offset for area in areas]
        self._buffer = mmap.mmap(-1, PAGE)

    def read(self) -> list[bytes]:
        """The 512 bytes of each header; fewer where the device ends.  Raises OSError."""
        buffer = self._buffer
        fd = os.open(self.device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            return [
                buffer[: min(HEADER_SIZE, os.preadv(fd, (buffer,), place))]
                for place in self._places
            ]
        finally:
            os.close(fd)


def parse_header(raw: bytes, area: Area, device: str) -> Header:
    """Raises HeaderDamaged.  A text that is prepared and not yet committed is not looked at."""
    where = f"the metadata header at byte {area.offset} of {device}"
    if len(raw) < HEADER_SIZE:
        raise HeaderDamaged(f"{where} is beyond the end of the device")
    crc, magic, version, start, size = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != 1:
        raise HeaderDamaged(f"{where} is not there")
    if checksum(raw[4:]) != crc:
        raise HeaderDamaged(f"{where} has a wrong checksum")
    if (start, size) != (area.offset, area.size):
        raise HeaderDamaged(f"{where} belongs to another area ({size} bytes at {start})")
    offset, length, text_crc, flags = _SLOT.unpack_from(raw, _HEADER.size)
    location = None
    if offset:
        if not (HEADER_SIZE <= offset < size and 0 < length <= min(size - HEADER_SIZE, TEXT_LIMIT)):
            raise HeaderDamaged(f"{where} names {length} bytes at {offset}, outside of its area")
        location = Location(offset, length, text_crc)
    return Header(bool(flags & _IGNORED), location, raw)


def read_text(device: str, area: Area, location: Location) -> bytes:
    """The text of an area, a NUL at its end.  Raises OSError, TextDamaged.

    A text may be overwritten while it is read, if the group is changed again and again: damage
    counts when the header is still the same after it.
    """
    return bytes(view_text(device, area, location))


def view_text(device: str, area: Area, location: Location) -> memoryview:
    """As `read_text`, in memory that goes back to the system with the view, for large texts."""
    first, *more = _pieces(area, location, location.size)
    text = _read(device, [first])[0]
    if more:
        text = memoryview(b"".join((text, *_read(device, more))))
    if len(text) != location.size or checksum(text) != location.checksum:
        raise TextDamaged(
            f"the metadata text at byte {area.offset} + {location.offset} of {device} "
            f"({location.size} bytes) has a wrong checksum"
        )
    return text


def read_text_start(device: str, area: Area, location: Location, length: int) -> bytes:
    """The first `length` bytes of a text, unchecked.  Raises OSError."""
    return b"".join(_read(device, _pieces(area, location, min(length, location.size))))


def _pieces(area: Area, location: Location, length: int) -> list[tuple[int, int]]:
    """The text's places on the device: it goes on behind the header when the area ends."""
    first = min(length, area.size - location.offset)
    pieces = [(area.offset + location.offset, first)]
    if length > first:
        pieces.append((area.offset + HEADER_SIZE, length - first))
    return pieces


def _label(device: str, number: int, sector: bytes) -> Label | None:
    _, place, crc, offset, kind = _LABEL.unpack_from(sector)
    if kind != _LABEL_TYPE:
        return None
    if checksum(sector[20:]) != crc or place != number:
        raise LabelDamaged(f"the LVM label in sector {number} of {device} has a wrong checksum")
    try:
        uuid, size = _VOLUME.unpack_from(sector, offset)
        _, after = _extents(sector, offset + _VOLUME.size)  # where the data is
        areas, _ = _extents(sector, after)
        return Label(device, _dashed(uuid.decode("ascii")), size, tuple(areas))
    except (struct.error, UnicodeDecodeError) as error:
        raise LabelDamaged(f"the LVM label in sector {number} of {device}: {error}") from error


def _extents(sector: bytes, at: int) -> tuple[list[Area], int]:
    """A list of places that zeros end, and where it ends."""
    found: list[Area] = []
    while True:
        offset, size = _EXTENT.unpack_from(sector, at)
        at += _EXTENT.size
        if not offset:
            return found, at
        found.append(Area(offset, size))


def _dashed(uuid: str) -> str:
    parts, at = [], 0
    for length in _UUID_PARTS:
        parts.append(uuid[at : at + length])
        at += length
    return "-".join(parts)


def _read(device: str, places: Sequence[tuple[int, int]]) -> list[memoryview]:
    """The bytes of each place (offset, length); fewer where the device ends."""
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        return [_read_place(fd, offset, length) for offset, length in places]
    finally:
        os.close(fd)


def _read_place(fd: int, offset: int, length: int) -> memoryview:
    """Reads the whole pages around a place."""
    skip = offset % PAGE
    size = -(-(skip + length) // PAGE) * PAGE
    view = memoryview(_buffer(size))
    done = 0
    while done < skip + length:
        with view[done:] as rest:
            count = os.preadv(fd, [rest], offset - skip + done)
        done += count
        if not count or count % SECTOR:
            break
    return view[skip : max(skip, min(done, skip + length))].toreadonly()


def _buffer(size: int) -> mmap.mmap:
    """Memory for direct I/O, which must not be shared with a child that is forked meanwhile."""
    buffer = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_DONTFORK)
    if size >= HUGE:
        with contextlib.suppress(OSError):  # not every kernel has them; it only saves time
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def free_bytes(size: int, text: int) -> int:
    """What lvm calls free of a metadata area of `size` bytes that holds a text of `text` bytes.

    A new text is written beside the old one, so that half of the ring can be used; lvm keeps one
    sector of it and counts whole sectors.
    """
    return max(0, ((size - HEADER_SIZE) // 2 - SECTOR - text) // SECTOR * SECTOR)


def text_bytes(size: int, free: int) -> int:
    """The reverse: the most that a text may have when lvm says that `free` bytes are free."""
    return max(0, (size - HEADER_SIZE) // 2 - SECTOR - free)
