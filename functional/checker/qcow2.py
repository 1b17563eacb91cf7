# SPDX-License-Identifier: GPL-2.0-or-later
"""The header and the tables of a qcow2 image, read through a volume's segments."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from functional.checker.group import Group

HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQ")
MAGIC: Final = b"QFI\xfb"
BACKING_FORMAT: Final = 0xE2792ACA
ADDRESS: Final = 0x00FFFFFFFFFFFE00
BLANK: Final = "00000000-0000-0000-0000-000000000000"


@dataclass
class Wanted:
    """What a volume's metadata say of it."""

    capacity: int
    parent: str
    parent_format: str  # RAW, LUKS or COW, "" when not known


def check(group: Group, lv: str, wanted: Wanted) -> Iterator[str]:
    size = group.size(lv)
    data = group.read(lv, 0, 64 * 1024)
    (magic, version, name_at, name_length, bits, virtual, _, l1_count, l1_at, table_at,
     table_clusters, _, _) = HEADER.unpack_from(data)  # fmt: skip
    if magic != MAGIC or version not in (2, 3) or not 9 <= bits <= 21:
        yield f"no qcow2 header: {data[:16]!r}"
        return
    if virtual != wanted.capacity:
        yield f"qcow2 has a virtual size of {virtual}, the metadata {wanted.capacity}"
    cluster = 1 << bits
    parts = [("L1 table", l1_at, l1_count * 8), ("refcounts", table_at, table_clusters * cluster)]
    for what, start, length in parts:
        if start % cluster or not start or start + length > size:
            yield f"qcow2's {what} at {start} with {length} bytes is not in the volume"
            return
    for what, start, length in parts:
        entries = struct.unpack(f">{length // 8}Q", group.read(lv, start, length))
        for entry in entries:
            place = entry & ADDRESS
            if place % cluster or place + cluster > size:
                yield f"qcow2's {what} leads to {place}, outside the volume"
    yield from _backing(data, version, (name_at, name_length), wanted)


def _backing(data: bytes, version: int, name: tuple[int, int], wanted: Wanted) -> Iterator[str]:
    start, length = name
    backing = data[start : start + length].decode("utf-8", "replace") if start else ""
    parent = "" if wanted.parent == BLANK else wanted.parent
    if os.path.basename(backing) != parent:
        yield f"qcow2 names {backing!r} as its backing file, the metadata {parent!r}"
    header_length = struct.unpack_from(">I", data, 100)[0] if version == 3 else 72
    at, found = header_length, ""
    while at + 8 <= len(data):
        kind, count = struct.unpack_from(">II", data, at)
        if kind == 0:
            break
        if kind == BACKING_FORMAT:
            found = data[at + 8 : at + 8 + count].decode("ascii", "replace")
        at += 8 + -(-count // 8) * 8
    formats = {"RAW": "raw", "COW": "qcow2", "LUKS": "luks"}
    if parent and wanted.parent_format and found != formats[wanted.parent_format]:
        yield f"qcow2 names {found!r} as its parent's format, which is {wanted.parent_format}"
