# SPDX-License-Identifier: GPL-2.0-or-later
"""This process's memory, which holds secrets, is written to no file when it crashes."""

from __future__ import annotations

import ctypes
import os
import resource
from typing import Final

_PR_SET_DUMPABLE: Final = 4  # prctl(2), linux/prctl.h


def never() -> None:
    """No core dump, not to a program that collects them either, and no other process of this user
    may read the memory (root may).  To be called at the very start; OSError.

    The programs that this process starts make no core dumps either.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A collector (core_pattern with a pipe) is given the dump whatever that limit is.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
