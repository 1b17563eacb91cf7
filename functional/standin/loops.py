# SPDX-License-Identifier: GPL-2.0-or-later
"""Loop devices, by their ioctls: attach, grow, detach unless in use, and who has one open.

The numbers are those of include/uapi/linux/loop.h.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

CLR_FD, SET_STATUS64, GET_STATUS64, SET_CAPACITY, CONFIGURE = 0x4C01, 0x4C04, 0x4C05, 0x4C07, 0x4C0A
CTL_GET_FREE: Final = 0x4C82
INFO: Final = struct.Struct("<5Q4I64s64s32s2Q")
CONFIG: Final = struct.Struct("<II")
RESERVED: Final = 64  # bytes at the end of a configuration
SIZE_LIMIT, FLAGS = 4, 8  # indices in INFO
DIRECT_IO, AUTOCLEAR = 16, 4
TRIES: Final = 500


def attach(path: str, offset: int = 0, size: int = 0) -> str:
    """A loop device on a file, with sectors of 512 bytes and direct I/O to the file; on `size`
    bytes of it from `offset` on, 0 for all that follow.
    """
    name = os.fsencode(path)[-63:]
    info = INFO.pack(0, 0, 0, offset, size, 0, 0, 0, DIRECT_IO, name, b"", b"", 0, 0)
    for _ in range(TRIES):
        with opened("/dev/loop-control") as control:
            device = f"/dev/loop{fcntl.ioctl(control, CTL_GET_FREE)}"
        try:
            with opened(path) as backing, opened(device) as loop:
                config = CONFIG.pack(backing, 512) + info + bytes(RESERVED)
                fcntl.ioctl(loop, CONFIGURE, config)
        except OSError as error:
            # Somebody else was quicker, or is just leaving it.
            if error.errno not in (errno.EBUSY, errno.ENXIO):
                raise
            time.sleep(0.005)
        else:
            return device
    raise OSError(errno.EBUSY, "no loop device is free")


def grow(device: str) -> None:
    """The file has another size."""
    with opened(device) as loop:
        fcntl.ioctl(loop, SET_CAPACITY)


def limit(device: str, size: int) -> None:
    """Let it have `size` bytes of its file."""
    with opened(device) as loop:
        values = list(INFO.unpack(fcntl.ioctl(loop, GET_STATUS64, bytes(INFO.size))))
        values[SIZE_LIMIT] = size
        fcntl.ioctl(loop, SET_STATUS64, INFO.pack(*values))


def detach(device: str) -> None:
    """Raises OSError EBUSY when somebody has it open."""
    with opened(device) as loop:
        fcntl.ioctl(loop, CLR_FD)
        try:
            found = fcntl.ioctl(loop, GET_STATUS64, bytes(INFO.size))
        except OSError as error:
            if error.errno == errno.ENXIO:  # it goes with our close
                return
            raise
        # Others have it open, and the kernel made a note to detach it when they leave.
        values = list(INFO.unpack(found))
        values[FLAGS] &= ~AUTOCLEAR
        fcntl.ioctl(loop, SET_STATUS64, INFO.pack(*values))
    raise OSError(errno.EBUSY, f"{device} is in use")


def release(device: str) -> None:
    """It is detached when the last who has it open closes it."""
    with contextlib.suppress(OSError), opened(device) as loop:
        fcntl.ioctl(loop, CLR_FD)


def detach_patiently(device: str, seconds: float) -> None:
    """A program that ends may still hold it for a moment."""
    end = time.monotonic() + seconds
    while True:
        try:
            return detach(device)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise
        time.sleep(0.02)


def users() -> dict[str, list[str]]:
    """Device -> who has it open: "pid name" of processes, mount points."""
    found: dict[str, list[str]] = {}
    for process in os.listdir("/proc"):
        if process.isdigit():
            with contextlib.suppress(OSError):
                directory = f"/proc/{process}/fd"
                for fd in os.listdir(directory):
                    with contextlib.suppress(OSError):
                        target = os.readlink(f"{directory}/{fd}")
                        if target.startswith("/dev/loop"):
                            found.setdefault(target, []).append(f"{process} {_name(process)}")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        major, _, minor = words[2].partition(":")
        if major == "7":
            found.setdefault(f"/dev/loop{minor}", []).append(f"mount {words[4]}")
    return found


def _name(process: str) -> str:
    with open(f"/proc/{process}/comm", encoding="utf-8", errors="replace") as file:
        return file.read().strip()


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def below_dev(directory: str) -> str:
    """A name below /dev for the links of the stand-in in `directory`: only there the agent follows
    a link.
    """
    return f"/dev/standin-{zlib.crc32(directory.encode()):08x}"
