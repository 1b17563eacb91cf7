# SPDX-License-Identifier: GPL-2.0-or-later
"""What became of thin drives: a file of points a drive, for pictures and for questions afterwards.

    <directory>/<vm>/<drive>.points     records of 32 bytes, in the order of their writing

A record is four numbers of 64 bits, little-endian: microseconds since the epoch, bytes allocated,
bytes of the volume, the threshold in bytes with the kind of the point in its uppermost 8 bits.
(QEMU's offsets have 63 bits, its images at most 2^56 bytes: that threshold has room.)  The number
of a kind is never given to another one; 0 is none, so that zeroes are no record.

Nothing is kept in memory, and nothing is read when a point is noted: it is appended by one write.
No record lies across two pages of memory, so that a kill of the agent leaves whole ones; should
there be a part of one all the same (no space), readers ignore it and the next writer cuts it off.
A file that has grown to 5/4 of what is kept is replaced by its newer part, in one step.  The
directory is one that a boot of the host empties; a file takes 160 KiB there at the most.
"""

from __future__ import annotations

import logging
import os
import re
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vdsm_storage.base import files
from vdsm_storage.base.uuids import is_uuid

EVENT: Final = "event"  # the guest wrote past the threshold
EXTENDED: Final = "extended"  # the volume is larger, and QEMU knows
ARMED: Final = "armed"
PAUSED: Final = "paused"  # by ENOSPC
RESUMED: Final = "resumed"
THROTTLED: Final = "throttled"  # its writes are slowed
RELEASED: Final = "released"  # and are not any more
FULL: Final = "full"  # the volume group has no space for it
LOOKED: Final = "looked"  # by the scan that finds what events missed
KINDS: Final[Mapping[str, int]] = {
    EVENT: 1, EXTENDED: 2, ARMED: 3, PAUSED: 4, RESUMED: 5,
    THROTTLED: 6, RELEASED: 7, FULL: 8, LOOKED: 9,
}  # fmt: skip
NAMES: Final[Mapping[int, str]] = {number: name for name, number in KINDS.items()}

RECORD: Final = struct.Struct("<QQQQ")
KIND_SHIFT: Final = 56
LARGEST: Final = (1 << KIND_SHIFT) - 1  # of a threshold
SUFFIX: Final = ".points"
_DRIVE: Final = re.compile(r"[a-z][A-Za-z0-9_]{0,31}")

log = logging.getLogger("monitor.history")


@dataclass(frozen=True)
class Point:
    """`when` in seconds since the epoch; bytes: allocated by the guest (the highest offset that it
    wrote to), the volume's size, the threshold that is armed (0 for none)."""

    when: float
    allocation: int
    size: int
    threshold: int
    what: str


class History:
    """The last `keep` points of each drive, at least; for threads."""

    def __init__(self, directory: str, keep: int = 4096) -> None:
        if keep < 1:
            raise ValueError(f"{keep} points cannot be kept")
        self._directory = directory
        self._keep = keep
        self._limit = RECORD.size * (keep + max(1, keep // 4))
        self._lock = threading.Lock()  # of writers; readers see whole files
        self._failing = False

    def note(self, vm: str, drive: str, point: Point) -> None:
        """ValueError for names or numbers that cannot be; a file system that fails is logged."""
        path, record = self._path(vm, drive), _packed(point)
        with self._lock:
            try:
                self._append(path, record)
            except OSError as error:
                if not self._failing:  # once, not for each of thousands of points
                    log.error("The history of VM %s drive %s is not kept: %s", vm, drive, error)
                self._failing = True
            else:
                self._failing = False

    def points(self, vm: str, drive: str, since: float = 0.0) -> list[Point]:
        """The last ones, as they were noted, none of them older than `since` (seconds since the
        epoch); none when there is no such drive or it cannot be read."""
        path = self._path(vm, drive)
        try:
            data = self._read(path)
        except FileNotFoundError:
            return []
        except OSError as error:
            log.error("The history of VM %s drive %s cannot be read: %s", vm, drive, error)
            return []
        found = (_point(*values) for values in RECORD.iter_unpack(data))
        return [point for point in found if point is not None and point.when >= since]

    def drives(self, vm: str) -> list[str]:
        """Those of a VM that have a history, by name."""
        names = _listed(self._directory_of(vm))
        found = (name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX))
        return sorted(name for name in found if _DRIVE.fullmatch(name))

    def vms(self) -> list[str]:
        """Those that have a history: some may have ended while no agent looked."""
        return sorted(name for name in _listed(self._directory) if is_uuid(name))

    def forget(self, vm: str) -> None:
        """All of a VM, which has ended.  A file system that fails is logged."""
        directory = self._directory_of(vm)
        with self._lock:
            try:
                for name in _listed(directory):
                    files.unlink_if_there(os.path.join(directory, name))
                os.rmdir(directory)
            except FileNotFoundError:
                pass
            except OSError as error:
                log.error("The history of VM %s cannot be removed: %s", vm, error)

    # -- files -------------------------------------------------------------------------------

    def _directory_of(self, vm: str) -> str:
        if not is_uuid(vm):
            raise ValueError(f"{vm!r} is no UUID and cannot name a directory")
        return os.path.join(self._directory, vm)

    def _path(self, vm: str, drive: str) -> str:
        if not _DRIVE.fullmatch(drive):
            raise ValueError(f"{drive!r} is no name of a drive and cannot name a file")
        return os.path.join(self._directory_of(vm), drive + SUFFIX)

    def _append(self, path: str, record: bytes) -> None:
        fd = _open_to_append(path)
        try:
            length = os.fstat(fd).st_size
            torn = length % RECORD.size
            if torn:
                os.ftruncate(fd, length - torn)
            written = os.write(fd, record)
        finally:
            os.close(fd)
        if written < len(record):
            raise OSError(f"{path}: no space for a point")
        if length - torn + written >= self._limit:
            files.write_volatile(path, self._read(path), 0o600)

    def _read(self, path: str) -> bytes:
        """The last records that are kept, whole ones only."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            length = os.fstat(fd).st_size
            length -= length % RECORD.size
            kept = min(length, self._keep * RECORD.size)
            data = os.pread(fd, kept, length - kept)
        finally:
            os.close(fd)
        return data[: len(data) - len(data) % RECORD.size]


def _open_to_append(path: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        return os.open(path, flags, 0o600)


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:  # not there, mostly; who writes into it is told anything else
        return []


def _packed(point: Point) -> bytes:
    if point.threshold > LARGEST:
        raise ValueError(f"a threshold of {point.threshold} bytes; at most {LARGEST} can be noted")
    try:
        kind = KINDS[point.what]
        micros = round(point.when * 1e6)
        return RECORD.pack(
            micros, point.allocation, point.size, point.threshold | kind << KIND_SHIFT
        )
    except (KeyError, struct.error) as error:
        raise ValueError(f"{point} cannot be noted: {error}") from error


def _point(micros: int, allocation: int, size: int, last: int) -> Point | None:
    """None for what is no record of ours."""
    what = NAMES.get(last >> KIND_SHIFT)
    if what is None:
        return None
    return Point(micros / 1e6, allocation, size, last & LARGEST, what)
