# SPDX-License-Identifier: GPL-2.0-or-later
"""One process at a time in a directory, even after one that cannot die.

A killed process stays as long as one of its threads waits in the kernel for storage that hangs; its
locks and sockets stay with it.  It never runs a line of its own again, so its successor takes over.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """`fd` holds the lock until it is closed.  `after_stuck`: a dying process still has sockets."""

    fd: int
    after_stuck: bool


def take(path: str) -> Turn:
    """Lock the file `path`.  Raises OSError if a living process has it."""
    after_stuck = False
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 20, 0).decode(errors="replace").strip()
            os.close(fd)
            if not _is_dying(holder):
                raise OSError(f"another agent runs here: {path} is locked") from None
            after_stuck = True
            os.unlink(path)
            continue
        if os.fstat(fd).st_nlink == 0:  # somebody took over between open and lock
            os.close(fd)
            continue
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return Turn(fd, after_stuck)


def _is_dying(pid: str) -> bool:
    """Whether the process was killed and only threads in the kernel are left of it."""
    if not pid.isdigit():
        return False
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state in ("Z", "X")
