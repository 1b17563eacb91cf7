# SPDX-License-Identifier: GPL-2.0-or-later
"""How many guests run at once on this machine, whoever starts them: one a core.

A place is a locked file beside the images, so it is free again when its holder ends, however.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import PurePath
from typing import IO

from functional.lab.errors import BootError
from functional.lab.image import cache

WAIT = 3600.0  # seconds; others may run a suite of their own first


def total() -> int:
    """VDSM_STORAGE_LAB_GUESTS says otherwise."""
    return int(os.environ.get("VDSM_STORAGE_LAB_GUESTS") or max(2, os.cpu_count() or 1))


def needs_guests(path: PurePath) -> bool:
    """Whether a test file does."""
    return "lab_tests" in path.parts or path.name.startswith(("test_cluster", "test_lab"))


@contextlib.contextmanager
def places(count: int, timeout: float = WAIT) -> Iterator[None]:
    """Hold so many places (all of them, if there are not so many)."""
    end = time.monotonic() + timeout
    with contextlib.ExitStack() as held:
        # Only one collects at a time: two that each have a part would wait for each other.
        queue = held.enter_context((cache() / "guests.queue").open("w"))
        while not _lock(queue):
            _wait(end)
        for _ in range(min(count, total())):
            while not (place := _any_free()):
                _wait(end)
            held.enter_context(place)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield


def _any_free() -> IO[str] | None:
    for number in range(total()):
        place = (cache() / f"guests.{number}").open("w")
        if _lock(place):
            return place
        place.close()
    return None


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(end: float) -> None:
    if time.monotonic() > end:
        raise BootError("other guests have run on this machine for too long")
    time.sleep(0.5)
