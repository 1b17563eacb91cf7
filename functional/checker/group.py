# SPDX-License-Identifier: GPL-2.0-or-later
"""A volume group as it lies on its devices: labels, metadata areas, the text, and the extents.

Written from the on-disk format alone: it shares nothing with what it checks.
"""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from functional.checker.text import BadTextError, parse

SECTOR: Final = 512
EXTENT: Final = 128 * 1024**2
LABEL: Final = struct.Struct("<8sQII8s")  # id, sector, crc, offset of the content, type
AREA: Final = struct.Struct("<QQ")
HEADER: Final = struct.Struct("<I16sIQQ")  # crc, magic, version, start, size
LOCATION: Final = struct.Struct("<QQII")  # offset, size, crc, flags
MAGIC: Final = b" LVM2 x[5A%r0N*>"
IGNORED: Final = 1
CRC_START: Final = 0xF597A6CF


def crc(data: bytes) -> int:
    """LVM's CRC32: the usual polynomial, another start, no inversion."""
    return zlib.crc32(data, CRC_START ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def read(path: str, offset: int, length: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(fd, length, offset)
    finally:
        os.close(fd)
    if len(data) != length:
        raise BadTextError(f"{path} ends before {offset + length}")
    return data


def size_of(path: str) -> int:
    """Of the device: the label of one that grew (pvresize) says less."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


@dataclass
class Area:
    """A metadata area; `text` is None when it is not used."""

    start: int
    size: int
    text: bytes | None = None


@dataclass
class Label:
    uuid: str  # without the dashes
    device_size: int
    areas: list[Area] = field(default_factory=list)


@dataclass
class Segment:
    start: int
    count: int
    pv: str
    pv_start: int


@dataclass
class Lv:
    name: str
    uuid: str
    tags: list[str]
    segments: list[Segment]
    status: list[str]

    @property
    def extents(self) -> int:
        return sum(segment.count for segment in self.segments)


@dataclass
class Pv:
    name: str
    uuid: str
    pe_start: int  # bytes
    pe_count: int
    device: str = ""


@dataclass
class Group:
    name: str
    uuid: str
    seqno: int
    extent_size: int  # bytes
    tags: list[str]
    pvs: dict[str, Pv]
    lvs: dict[str, Lv]

    def size(self, lv: str) -> int:
        return self.lvs[lv].extents * self.extent_size

    def read(self, lv: str, offset: int, length: int) -> bytes:
        """Bytes of a volume, through its segments."""
        parts, at = [], offset
        while at < offset + length:
            extent, inside = divmod(at, self.extent_size)
            for segment in self.lvs[lv].segments:
                if segment.start <= extent < segment.start + segment.count:
                    break
            else:
                raise BadTextError(f"{lv} has no byte {at}")
            pv = self.pvs[segment.pv]
            last = (segment.start + segment.count) * self.extent_size
            count = min(offset + length, last) - at
            place = (segment.pv_start + extent - segment.start) * self.extent_size + inside
            parts.append(read(pv.device, pv.pe_start + place, count))
            at += count
        return b"".join(parts)


# -- labels and areas ------------------------------------------------------------------------


def read_label(device: str) -> Label:
    """Raises BadTextError when it is none, or broken."""
    start = read(device, 0, 4 * SECTOR)
    for sector in range(4):
        data = start[sector * SECTOR : (sector + 1) * SECTOR]
        mark, number, checksum, offset, kind = LABEL.unpack_from(data)
        if mark == b"LABELONE" and kind == b"LVM2 001":
            break
    else:
        raise BadTextError(f"{device} has no LVM label")
    if number != sector or crc(data[20:]) != checksum:
        raise BadTextError(f"{device}: the label's checksum or place is wrong")
    content = data[offset:]
    label = Label(content[:32].decode("ascii"), *struct.unpack_from("<Q", content, 32))
    lists = _lists(content, 40)
    next(lists)  # of data areas
    label.areas = [read_area(device, place, size) for place, size in next(lists)]
    return label


def _lists(content: bytes, at: int) -> Iterator[list[tuple[int, int]]]:
    while True:
        found = []
        while (pair := AREA.unpack_from(content, at)) != (0, 0):
            found.append(pair)
            at += AREA.size
        at += AREA.size
        yield found


def read_area(device: str, start: int, size: int) -> Area:
    header = read(device, start, SECTOR)
    checksum, magic, version, place, length = HEADER.unpack_from(header)
    if magic != MAGIC or version != 1 or crc(header[4:]) != checksum:
        raise BadTextError(f"{device}: the metadata area at {start} has a broken header")
    if (place, length) != (start, size):
        raise BadTextError(f"{device}: the metadata area at {start} is not where its header says")
    offset, count, checksum, flags = LOCATION.unpack_from(header, HEADER.size)
    if flags & IGNORED or not count:
        return Area(start, size)
    if not SECTOR <= offset < size or count > size - SECTOR:
        raise BadTextError(f"{device}: the area at {start} has {count} bytes of text at {offset}")
    if offset + count <= size:
        text = read(device, start + offset, count)
    else:  # the ring goes on behind the header
        first = size - offset
        text = read(device, start + offset, first) + read(device, start + SECTOR, count - first)
    if crc(text) != checksum:
        raise BadTextError(f"{device}: the text at {start} has a wrong checksum")
    return Area(start, size, text)


# -- the group -------------------------------------------------------------------------------


def make_group(text: bytes, devices: dict[str, str]) -> Group:
    """`devices` by the UUIDs of physical volumes, without dashes."""
    tree = parse(text.rstrip(b"\0").decode("utf-8"))
    found = [(name, value) for name, value in tree.items() if isinstance(value, dict)]
    if len(found) != 1:
        raise BadTextError(f"{len(found)} volume groups in one text")
    name, vg = found[0]
    pvs = {}
    for pv, row in vg.get("physical_volumes", {}).items():
        device = devices.get(row["id"].replace("-", ""), "")
        pvs[pv] = Pv(pv, row["id"], row["pe_start"] * SECTOR, row["pe_count"], device)
    lvs = {lv: _lv(lv, row) for lv, row in vg.get("logical_volumes", {}).items()}
    tags = vg.get("tags", [])
    return Group(name, vg["id"], vg["seqno"], vg["extent_size"] * SECTOR, tags, pvs, lvs)


def _lv(name: str, row: dict[str, Any]) -> Lv:
    count = row["segment_count"]
    names = [f"segment{number + 1}" for number in range(count)]
    sections = [key for key, value in row.items() if isinstance(value, dict)]
    if sections != names:
        raise BadTextError(f"{name}: segment_count is {count}, there are {sections}")
    segments = [_segment(name, row[key]) for key in names]
    return Lv(name, row["id"], row.get("tags", []), segments, row["status"])


def _segment(lv: str, row: dict[str, Any]) -> Segment:
    if (row["type"], row["stripe_count"]) != ("striped", 1):
        raise BadTextError(f"{lv}: a segment is not linear")
    pv, start = row["stripes"]
    return Segment(row["start_extent"], row["extent_count"], pv, start)


def read_group(devices: Sequence[str], name: str, problems: list[str]) -> Group | None:
    """The group `name` and what is wrong with the devices; None when it cannot be read."""
    labels: dict[str, Label] = {}
    for device in devices:
        try:
            labels[device] = read_label(device)
        except (BadTextError, UnicodeDecodeError, struct.error) as error:
            problems.append(str(error))
    texts = {
        f"{device} at {area.start}": area.text
        for device, label in labels.items()
        for area in label.areas
        if area.text is not None
    }
    groups = {}
    uuids = {label.uuid: device for device, label in labels.items()}
    for place, text in texts.items():
        try:
            groups[place] = make_group(text, uuids)
        except (BadTextError, KeyError, ValueError, TypeError) as error:
            problems.append(f"{place}: the text cannot be read: {error!r}")
    ours = {place: group for place, group in groups.items() if group.name == name}
    if not ours:
        problems.append(f"volume group {name} is on none of the devices")
        return None
    if len({texts[place] for place in ours}) != 1:
        seen = {place: group.seqno for place, group in ours.items()}
        problems.append(f"the copies of the metadata differ (place: seqno): {seen}")
    group = max(ours.values(), key=lambda one: one.seqno)
    problems += _areas(group, labels)
    problems += _segments(group)
    problems += _overlaps(group)
    return group


def _areas(group: Group, labels: dict[str, Label]) -> Iterator[str]:
    """Two metadata areas a device, those of one device in use; the data lie between them."""
    used = []
    for pv in group.pvs.values():
        if not pv.device:
            yield f"{pv.name} {pv.uuid} is on none of the devices"
            continue
        label = labels[pv.device]
        end = pv.pe_start + pv.pe_count * group.extent_size
        if len(label.areas) != 2:
            yield f"{pv.device} has {len(label.areas)} metadata areas, not 2"
        for area in label.areas:
            if area.start < end and pv.pe_start < area.start + area.size:
                yield f"{pv.device}: the metadata area at {area.start} lies in the data"
        if (size := size_of(pv.device)) < end:
            yield f"{pv.device}: its {size} bytes end before the last extent"
        copies = sum(area.text is not None for area in label.areas)
        used += [pv.name] * copies
    if len(used) != 2 or len(set(used)) != 1:
        yield f"metadata areas in use are on {used}, not two on one device"


def _segments(group: Group) -> Iterator[str]:
    """No extent outside its device; volumes without gaps."""
    for lv in group.lvs.values():
        at = 0
        for segment in lv.segments:
            if segment.start != at or segment.count < 1:
                yield f"{lv.name}: a segment begins at {segment.start}, not at {at}"
            at = segment.start + segment.count
            end = segment.pv_start + segment.count
            if segment.pv not in group.pvs:
                yield f"{lv.name}: a segment is on {segment.pv}, which is not in the group"
            elif segment.pv_start < 0 or end > group.pvs[segment.pv].pe_count:
                yield f"{lv.name}: extents up to {end} are beyond the end of {segment.pv}"
        if not lv.segments:
            yield f"{lv.name} has no extent"


def _overlaps(group: Group) -> Iterator[str]:
    """No extent in two volumes, or twice in one."""
    taken: dict[str, list[tuple[int, int, str]]] = {}
    for lv in group.lvs.values():
        for segment in lv.segments:
            piece = (segment.pv_start, segment.pv_start + segment.count, lv.name)
            taken.setdefault(segment.pv, []).append(piece)
    for pv, pieces in taken.items():
        last, owner = 0, ""
        for start, end, name in sorted(pieces):
            if start < last:
                yield f"extent {start} of {pv} is in {owner} and in {name}"
            if end > last:
                last, owner = end, name
    for one, two in itertools.pairwise(sorted(group.lvs.values(), key=lambda lv: lv.uuid)):
        if one.uuid == two.uuid:
            yield f"{one.name} and {two.name} have the same UUID"
