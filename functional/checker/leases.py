# SPDX-License-Identifier: GPL-2.0-or-later
"""What sanlock and the index of external leases leave on storage, with sectors of 512 bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from functional.checker.group import Group

ALIGN: Final = 1024**2
SECTOR: Final = 512
LEASE: Final = 0x06152010
HOST: Final = 0x12212010
VERSIONS: Final = {LEASE: 6, HOST: 3}  # major
CHECKED: Final = 168  # bytes before the checksum
LEADER: Final = struct.Struct("<4I5Q48s48sQQIHH")
HOSTS: Final = 250

INDEX_MAGIC: Final = 0x12152016
INDEX_HEAD: Final = struct.Struct(">ix4sx48sx10sxc")
RECORDS: Final = 3960
RECORD: Final = 64
FREE: Final = bytes(49) + b"0" * 11 + b"\0--\n"
FIRST: Final = 3  # slots before the first lease


class Leader(NamedTuple):
    space: str
    name: str
    owner: int
    timestamp: int


def crc32c(data: bytes, table: list[int], value: int) -> int:
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value


def make_table() -> list[int]:
    table = []
    for number in range(256):
        value = number
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


class Reader:
    """Reads leaders of one lockspace."""

    def __init__(self, group: Group, space: str) -> None:
        self._group = group
        self._space = space
        self._table = make_table()

    def leader(self, lv: str, offset: int, magic: int = LEASE) -> Leader | str:
        """It, or what is wrong with it."""
        data = self._group.read(lv, offset, SECTOR)
        found, version, _, sector, _, _, owner, _, _, space, name, timestamp, _, checksum, _, _ = (
            LEADER.unpack_from(data)
        )
        if found != magic:
            return f"no lease (magic {found:#x})"
        if crc32c(data[:CHECKED], self._table, 0xFFFFFFFE) != checksum:
            return "the record's checksum is wrong"
        if version >> 16 != VERSIONS[magic]:
            return f"version {version:#x}"
        if sector != SECTOR:
            return f"made for sectors of {sector} bytes"
        return Leader(_text(space), _text(name), owner, timestamp)

    def named(self, lv: str, offset: int, name: str) -> Iterator[str]:
        """That there is a lease of that name, of this lockspace."""
        found = self.leader(lv, offset)
        if isinstance(found, str):
            yield f"lease of {name} at {lv}:{offset}: {found}"
        elif (found.space, found.name) != (self._space, name):
            yield f"lease of {name} at {lv}:{offset} is that of {found.space}/{found.name}"

    def hosts(self) -> Iterator[str]:
        for host in range(1, HOSTS + 1):
            found = self.leader("ids", (host - 1) * SECTOR, HOST)
            if isinstance(found, str):
                yield f"host id {host}: {found}"
            elif found.space != self._space:
                yield f"host id {host} is of the lockspace {found.space}"


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("ascii", "replace")


def external(group: Group, space: str, leases: Reader) -> tuple[dict[str, int], list[str]]:
    """The external leases by their offsets, and what is wrong with them."""
    problems: list[str] = []
    head = group.read("xleases", ALIGN, SECTOR)
    magic, version, owner, _, updating = INDEX_HEAD.unpack_from(head)
    if (magic, version, head[SECTOR - 1 :]) != (INDEX_MAGIC, b"0001", b"\n"):
        return {}, [f"the index of leases has magic {magic:#x}, version {version!r}"]
    if _text(owner) != space:
        problems.append(f"the index of leases is of the lockspace {_text(owner)}")
    if updating != b"-":
        problems.append("the index of leases is being rebuilt, or that did not end")
    found: dict[str, int] = {}
    records = group.read("xleases", ALIGN + SECTOR, RECORDS * RECORD)
    for number in range(RECORDS):
        record = records[number * RECORD : (number + 1) * RECORD]
        if record == FREE:
            continue
        name, flag = _text(record[:48]), record[61:62]
        where = f"record {number} of the index of leases"
        if not name or flag not in (b"-", b"u") or record[62:] != b"-\n":
            problems.append(f"{where} is broken: {record!r}")
            continue
        if flag == b"u":
            problems.append(f"{where}: {name} is half made")
            continue
        if name in found:
            problems.append(f"{where}: {name} is there twice")
        found[name] = (FIRST + number) * ALIGN
        problems += leases.named("xleases", found[name], name)
    return found, problems
