# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables of partitions, made by hand as the formats' descriptions say."""

from __future__ import annotations

import struct

import pytest

from vdsm_storage.images.alignment import SECTOR, partitions

LINUX, EXTENDED, PROTECTIVE = 0x83, 0x05, 0xEE
Entry = tuple[int, int, int]  # type, first sector, sectors


class Disk:
    """Sectors that are written are kept, others are zeros."""

    def __init__(self, size: int = 1_000_000) -> None:
        self.size = size
        self.sectors: dict[int, bytes] = {}

    def mbr(self, at: int, *entries: Entry) -> None:
        table = b"".join(
            struct.pack("<4sB3sII", bytes(4), kind, bytes(3), start, length)
            for kind, start, length in entries
        )
        self.sectors[at] = table.ljust(64, b"\0").rjust(510, b"\0") + b"\x55\xaa"

    def gpt(self, *starts: int, length: int = 128) -> None:
        self.mbr(0, (PROTECTIVE, 1, self.size))
        header = b"EFI PART" + bytes(64) + struct.pack("<QII", 2, 128, length)
        self.sectors[1] = header.ljust(SECTOR, b"\0")
        entries = b"".join(
            (struct.pack("<16s16sQQ", b"t" * 16, b"u" * 16, start, start + 7) if start else b"")
            .ljust(length, b"\0")
            for start in starts
        ).ljust(128 * length, b"\0")  # fmt: skip
        for number in range(len(entries) // SECTOR):
            self.sectors[2 + number] = entries[number * SECTOR :][:SECTOR]

    def read(self, first: int, count: int) -> bytes:
        count = min(count, self.size - first)
        return b"".join(self.sectors.get(n, bytes(SECTOR)) for n in range(first, first + count))

    @property
    def found(self) -> list[tuple[int, int]]:
        return list(partitions(self.read))


def test_primary_partitions() -> None:
    disk = Disk()
    disk.mbr(0, (LINUX, 63, 100), (0, 0, 0), (LINUX, 2048, 9))
    assert disk.found == [(1, 63), (3, 2048)]


def test_logical_partitions() -> None:
    disk = Disk()
    disk.mbr(0, (LINUX, 2048, 100), (EXTENDED, 10000, 90000))
    disk.mbr(10000, (LINUX, 63, 100), (EXTENDED, 500, 600))
    disk.mbr(10500, (LINUX, 1548, 100))
    assert disk.found == [(1, 2048), (2, 10000), (5, 10063), (6, 12048)]


def test_gpt() -> None:
    disk = Disk()
    disk.gpt(2048, 0, 4100)
    assert disk.found == [(1, 2048), (3, 4100)]
    disk.gpt(64, 128, length=256)
    assert disk.found == [(1, 64), (2, 128)]


def test_no_table() -> None:
    assert Disk().found == []
    assert Disk(size=0).found == []


def test_endless_chain_of_logical_partitions() -> None:
    disk = Disk()
    disk.mbr(0, (EXTENDED, 100, 900))
    disk.mbr(100, (LINUX, 1, 1), (EXTENDED, 0, 9))
    assert disk.found == [(1, 100), (5, 101)]
    disk.mbr(100, (LINUX, 1, 1), (EXTENDED, 7, 9))  # leads to zeros
    assert disk.found == [(1, 100), (5, 101)]


@pytest.mark.parametrize("length", [0, 127, 8192])
def test_damaged_gpt(length: int) -> None:
    disk = Disk()
    disk.gpt(2048)
    damaged = bytearray(disk.sectors[1])
    struct.pack_into("<I", damaged, 84, length)
    disk.sectors[1] = bytes(damaged)
    assert disk.found == []
    disk.sectors[1] = bytes(SECTOR)
    assert disk.found == []
    assert Disk(size=1).found == []
