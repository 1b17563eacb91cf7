# SPDX-License-Identifier: GPL-2.0-or-later
"""Direct reads and writes of one block: what the device says, not the page cache."""

from __future__ import annotations

import mmap
import os

BLOCK = 4096


def read(path: str, offset: int = 0, length: int = BLOCK) -> bytes:
    """OSError if the device refuses it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, length) as buffer:
            os.preadv(fd, [buffer], offset)
            return bytes(buffer)
    finally:
        os.close(fd)


def write(path: str, data: bytes, offset: int = 0) -> None:
    """`data` in whole blocks, durable when this returns."""
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC)
    try:
        with mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            os.pwritev(fd, [buffer], offset)
    finally:
        os.close(fd)
