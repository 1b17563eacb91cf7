# SPDX-License-Identifier: GPL-2.0-or-later
"""How this process gives memory back.

glibc's allocator grows with use: a large buffer that was freed once makes it keep the next ones in
its heaps, of which there is one for every few threads, and heaps shrink at their end only.  The
metadata of a volume group of ten thousand volumes is four megabytes, read at every change by any of
dozens of threads, and would be kept many times over.  So large buffers always go back at once, and
all threads share few heaps, which costs nothing: they have one interpreter lock anyway.
"""

from __future__ import annotations

import ctypes
from typing import Final

LARGE: Final = 128 * 1024  # bytes; what the wire reads at once is smaller
HEAPS: Final = 2
_TRIM_THRESHOLD: Final = -1  # mallopt(3), malloc.h
_MMAP_THRESHOLD: Final = -3
_ARENA_MAX: Final = -8


def give_back_large_buffers() -> None:
    """To be called before threads start.  Nothing happens with another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, LARGE)
        mallopt(_TRIM_THRESHOLD, LARGE)
        mallopt(_ARENA_MAX, HEAPS)
