# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the partitions of a disk begin where its storage can write them in one go.

A partition counts as aligned when it begins at a multiple of 64 KiB, as virt-alignment-scan has it,
and has that program's name: the disk is /dev/sda.  Tables: MBR with logical partitions (IBM PC),
and GPT (UEFI specification, 5.3).  Sectors are 512 bytes, as guests of this kind of disk see them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final

from vdsm_storage.errors import CommandError, ImageIsNotLegalChain
from vdsm_storage.host.qemu_img import Image, QemuImg
from vdsm_storage.images import chain, guard, layers
from vdsm_storage.images.store import Store

SECTOR: Final = 512
ALIGNED: Final = 64 * 1024  # bytes
NAME: Final = "/dev/sda{}"
_MBR_SIGNATURE: Final = b"\x55\xaa"
_GPT_SIGNATURE: Final = b"EFI PART"
_TABLE, _ENTRY = 446, struct.Struct("<8xII")  # of an MBR: first sector, number of sectors
_TYPE: Final = 4  # where an entry has its type
_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
_PROTECTIVE: Final = 0xEE  # the disk has a GPT
_GPT_HEADER: Final = struct.Struct("<8s64xQII")  # table's sector, entries, bytes of an entry
_MOST: Final = 256  # partitions that are looked at

# Reads a number of sectors, from a sector; what lies behind the end of the disk is left out.
Read = Callable[[int, int], bytes]


def scan(store: Store, qemu_img: QemuImg, image: str, volume: str) -> dict[str, bool]:
    """{partition: aligned} of a volume as its guest sees it; {} without a table of partitions.

    Raises 201, 262.
    """
    members = chain.walk(store, image, volume)
    with guard.active(store, image, [member.volume for member in members], prepared=False):
        size = layers.check_header(store, qemu_img, members[-1]).virtual_size // SECTOR
        top = layers.layer(store, members[-1])

        def read(first: int, count: int) -> bytes:
            count = min(count, size - first)
            return _sectors(qemu_img, top, first, count) if count > 0 else b""

        try:
            starts = list(partitions(read))
        except CommandError as error:
            raise ImageIsNotLegalChain(image=image, reason=error) from error
    return {NAME.format(number): start * SECTOR % ALIGNED == 0 for number, start in starts}


def _sectors(qemu_img: QemuImg, image: Image, first: int, count: int) -> bytes:
    return qemu_img.read(image, first * SECTOR, count * SECTOR)


def partitions(read: Read) -> Iterator[tuple[int, int]]:
    """(number, first sector) of every partition."""
    first = read(0, 1)
    if len(first) < SECTOR or first[-2:] != _MBR_SIGNATURE:
        return
    entries = list(_entries(first))
    if any(kind == _PROTECTIVE for kind, _start in entries):
        yield from _gpt(read)
        return
    for number, (kind, start) in enumerate(entries, 1):
        if kind:
            yield number, start
    for kind, start in entries:
        if kind in _EXTENDED:
            yield from _logical(read, start)


def _entries(sector: bytes) -> Iterator[tuple[int, int]]:
    """(type, first sector) of the four entries of an MBR; type 0 for none."""
    for number in range(4):
        entry = sector[_TABLE + 16 * number : _TABLE + 16 * (number + 1)]
        start, length = _ENTRY.unpack(entry)
        yield (entry[_TYPE] if length else 0), start


def _logical(read: Read, extended: int) -> Iterator[tuple[int, int]]:
    """Each sector of the chain has a partition, from that sector on, and the next sector, from the
    beginning of the extended partition on."""
    here, seen = extended, set[int]()
    number = 5
    while here not in seen and number < _MOST:
        seen.add(here)
        sector = read(here, 1)
        if len(sector) < SECTOR or sector[-2:] != _MBR_SIGNATURE:
            return
        (kind, start), (following, offset), *_ = _entries(sector)
        if kind:
            yield number, here + start
            number += 1
        if following not in _EXTENDED:
            return
        here = extended + offset


def _gpt(read: Read) -> Iterator[tuple[int, int]]:
    header = read(1, 1)
    if len(header) < _GPT_HEADER.size:
        return
    signature, table, count, length = _GPT_HEADER.unpack_from(header)
    if signature != _GPT_SIGNATURE or not 128 <= length <= 4096:
        return
    count = min(count, _MOST)
    entries = read(table, -(-count * length // SECTOR))
    for number in range(count):
        entry = entries[number * length : (number + 1) * length]
        if len(entry) == length and any(entry[:16]):  # a type
            yield number + 1, int.from_bytes(entry[32:40], "little")
