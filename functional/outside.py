# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that nobody may touch, and the kernel's word on whether somebody did."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

SECRET = "not-for-the-agent-4c1f"

_EVENT = struct.Struct("iIII")
_NAMES = {
    0x1: "read", 0x2: "written", 0x4: "attributes", 0x20: "opened", 0x40: "moved",
    0x80: "moved", 0x100: "made", 0x200: "removed", 0x400: "removed", 0x800: "moved",
}  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


class Outside:
    """A directory beside the storage.  `touched()` tells what was done there since the last
    call, as `opened NAME`; looking at it without opening (lstat) does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._watched: dict[int, str] = {}

    def file(self, name: str, data: bytes = SECRET.encode()) -> Path:
        path = self.path / name
        path.write_bytes(data)
        return path

    def directory(self, name: str) -> Path:
        path = self.path / name
        path.mkdir()
        return path

    def watch(self) -> None:
        """From now on, all that stands here."""
        for path in (self.path, *self.path.rglob("*")):
            mask = sum(_NAMES)
            number = _libc.inotify_add_watch(self._fd, os.fsencode(path), mask)
            assert number >= 0, os.strerror(ctypes.get_errno())
            self._watched[number] = path.name
        self.touched()

    def touched(self) -> list[str]:
        found = []
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                return found
            while data:
                number, mask, _cookie, length = _EVENT.unpack_from(data)
                name = data[_EVENT.size : _EVENT.size + length].rstrip(b"\0").decode()
                what = [text for bit, text in _NAMES.items() if mask & bit]
                where = self._watched.get(number, "?")
                found += [f"{text} {where}/{name}".rstrip("/") for text in what]
                data = data[_EVENT.size + length :]

    def close(self) -> None:
        os.close(self._fd)
