# SPDX-License-Identifier: GPL-2.0-or-later
"""Questions to the kernel's device-mapper, by its own interface: no program is run.

The structures are those of the kernel's include/uapi/linux/dm-ioctl.h, interface version 4.  None
of the questions waits for I/O, so that a device whose storage is dead is answered as fast as any.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import Final

CONTROL: Final = "/dev/mapper/control"
VERSION: Final = (4, 0, 0)

# version[3], data_size, data_start, target_count, open_count, flags, event_nr, padding, dev, name,
# uuid; 7 bytes of padding follow.
_HEADER: Final = struct.Struct("=3I2IIiIIIQ128s129s7x")
# sector_start, length, status, next, target_type; the parameters follow as a string.
_TARGET: Final = struct.Struct("=QQiI16s")

_DEV_STATUS: Final = 7
_TABLE_STATUS: Final = 12
_DATA_SIZE, _DATA_START, _TARGET_COUNT, _OPEN_COUNT, _FLAGS = 3, 4, 5, 6, 7  # fields of a header
_NOFLUSH: Final = 1 << 11
_BUFFER_FULL: Final = 1 << 8
_FIRST_BUFFER: Final = 16 * 1024
_LAST_BUFFER: Final = 16 * 1024 * 1024


@dataclass(frozen=True)
class Target:
    """A part of a device's table; `start` and `length` in sectors of 512 bytes."""

    start: int
    length: int
    type: str
    parameters: str


class DmInterface:
    """`control` is the kernel's control node; a host without it has no devices."""

    def __init__(self, control: str = CONTROL) -> None:
        self._control = control

    def status(self, name: str) -> list[Target]:
        """How each part of a device is; [] when there is no such device.  Raises OSError."""
        answer = self._find(_TABLE_STATUS, name)
        return parse_targets(answer[1], answer[0][_TARGET_COUNT]) if answer else []

    def open_count(self, name: str) -> int:
        """By how many the device is held open; 0 when there is no such device.  Raises OSError."""
        answer = self._find(_DEV_STATUS, name)
        return int(answer[0][_OPEN_COUNT]) if answer else 0

    def _find(self, command: int, name: str) -> tuple[tuple[int, ...], bytes] | None:
        try:
            return self._ask(command, name)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT, errno.ENODEV):
                return None
            raise

    def _ask(self, command: int, name: str) -> tuple[tuple[int, ...], bytes]:
        """The header's fields and the data of one question."""
        size = _FIRST_BUFFER
        fd = os.open(self._control, os.O_RDWR | os.O_CLOEXEC)
        try:
            while True:
                buffer = bytearray(size)
                fields = (*VERSION, size, _HEADER.size, 0, 0, _NOFLUSH, 0, 0, 0)
                _HEADER.pack_into(buffer, 0, *fields, name.encode(), b"")
                fcntl.ioctl(fd, _request(command), buffer, True)
                header = _HEADER.unpack_from(buffer)
                if not header[_FLAGS] & _BUFFER_FULL:
                    return header, bytes(buffer[header[_DATA_START] : header[_DATA_SIZE]])
                if size >= _LAST_BUFFER:
                    raise OSError(errno.EOVERFLOW, "device-mapper tells more than can be read")
                size *= 4
        finally:
            os.close(fd)


def _request(command: int) -> int:
    """_IOWR(0xfd, command, struct dm_ioctl)"""
    return 3 << 30 | _HEADER.size << 16 | 0xFD << 8 | command


def parse_targets(data: bytes, count: int) -> list[Target]:
    """The answer of DM_TABLE_STATUS; `next` counts from the start of the data."""
    found: list[Target] = []
    offset = 0
    for _ in range(count):
        start, length, _, following, kind = _TARGET.unpack_from(data, offset)
        text = offset + _TARGET.size
        end = data.find(b"\0", text)
        parameters = data[text : end if end >= 0 else None].decode(errors="replace")
        found.append(Target(start, length, kind.rstrip(b"\0").decode(), parameters.strip()))
        offset = following
    return found
