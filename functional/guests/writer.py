# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest without a system: a boot sector that writes for ever, for where nothing larger boots in
time (emulation within emulation).

It counts from 1.  Each number fills one sector of the first disk, and goes to the serial port when
the BIOS says that the sector is written: QEMU flushes each of these writes, for this guest knows
nothing of caches.  So a number that was told is on the storage.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

SECTOR = 512
TAIL = 64
SLOTS = 2048  # sectors; the numbers go round


def boot_sector(place: int, stride: int = SECTOR) -> bytes:
    """For sector 0 of a disk; `place` is where on it the numbers go, one every `stride`, a power of
    2, in bytes."""
    shift = (stride // SECTOR).bit_length() - 1
    assert stride == SECTOR << shift
    code = b"".join((
        b"\x31\xc0\x8e\xd8\x8e\xc0\x8e\xd0",  # ds = es = ss = 0
        b"\xbc\x00\x7c\xfc",  # sp = 0x7c00; upwards
        b"\x66\x31\xdb",  # ebx = 0
        b"\x66\x43",  # next: ebx += 1
        b"\x66\x89\xd8\xbf\x00\x80\xb9\x80\x00\x66\xf3\xab",  # the sector at 0x8000 is full of it
        b"\x66\x89\xd8\x66\x25" + struct.pack("<I", SLOTS - 1),  # eax = ebx & (SLOTS - 1)
        b"\x66\xc1\xe0" + bytes([shift]),  # eax <<= shift
        b"\x66\x05" + struct.pack("<I", place // SECTOR),  # + the first sector
        b"\x66\xa3\xe8\x7d",  # into the packet
        b"\xbe\xe0\x7d\xb2\x80\xb8\x00\x43",  # again: the packet, the first disk, write
        b"\x66\x53\xcd\x13\x66\x5b",  # int 0x13, ebx as before
        b"\x72\xf0",  # failed: again
        b"\xba\xf8\x03\xb9\x08\x00",  # serial port; eight digits
        b"\x66\xc1\xc3\x04\x88\xd8\x24\x0f",  # digit: the upper four bits of ebx
        b"\x04\x30\x3c\x39\x76\x02\x04\x27",  # '0' to '9', 'a' to 'f'
        b"\xee\xe2\xed",  # out; the next digit
        b"\xb0\x0a\xee",  # the line's end
        b"\xeb\xad",  # next
    ))  # fmt: skip
    # Size of the packet, one sector, from 0:0x8000; its number is filled in.
    packet = struct.pack("<BBHHHQ", 16, 0, 1, 0x8000, 0, 0)
    return code.ljust(0x1E0, b"\0") + packet.ljust(SECTOR - 2 - 0x1E0, b"\0") + b"\x55\xaa"


def serial_xml(path: Path) -> str:
    """The guest's serial port, for the XML of its devices."""
    return f"<serial type='file'><source path='{path}'/></serial>"


def told(path: Path) -> int:
    """The last number that is known to be written."""
    return last(path.read_bytes()[-TAIL:]) if path.exists() else 0


def last(text: bytes) -> int:
    """The same, of the last TAIL bytes that the serial port has written."""
    lines = re.findall(rb"([0-9a-f]{8})\n", text)
    return int(lines[-1], 16) if lines else 0


def check(data: bytes, known: int) -> int:
    """What lies at `place` of the disk, or the sectors that have numbers: each slot has the last
    number that went there, and none is older than `known`.  Returns the last one."""
    numbers: list[int] = []
    for slot in range(SLOTS):
        sector = data[slot * SECTOR : (slot + 1) * SECTOR]
        (number,) = struct.unpack_from("<I", sector)
        assert sector == struct.pack("<I", number) * (SECTOR // 4), f"slot {slot} is torn"
        assert number % SLOTS == slot or number == 0, f"slot {slot} has number {number}"
        numbers.append(number)
    last = max(numbers)
    assert last >= known, f"{known} was told, {last} is there"
    for slot, number in enumerate(numbers):
        expected = last - (last - slot) % SLOTS
        assert number == max(expected, 0), f"slot {slot} has {number}, not {expected}; {last}"
    return last
