# SPDX-License-Identifier: GPL-2.0-or-later
"""Zeroing and discarding block devices, by blkdiscard of util-linux."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.run import Command, run
from vdsm_storage.base.units import MIB
from vdsm_storage.errors import AgentError, VolumesZeroingError

STEP: Final = 1024 * MIB  # bytes of one command: progress is told, and a stop obeyed, after each
# Seconds for one step: zeros at 4 MiB/s, which only sick storage is slower than.
TIMEOUT: Final = 300.0


def size(device: str) -> int:
    """Bytes.  Raises OSError."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def zero(device: str, progress: Callable[[float], None], cancel: Cancel | None = None) -> None:
    """Overwrite all of it with zeros (offloaded where the storage can).  Raises 374."""
    _steps(device, ["--zeroout"], progress, cancel)


def discard(device: str, progress: Callable[[float], None], cancel: Cancel | None = None) -> None:
    """Tell the storage that the data is not needed.  Raises 374, where it cannot, too."""
    _steps(device, [], progress, cancel)


def _steps(
    device: str, options: list[str], progress: Callable[[float], None], cancel: Cancel | None
) -> None:
    try:
        end = size(device)
        for start in range(0, end, STEP):
            length = min(STEP, end - start)
            argv = ["blkdiscard", *options, "-f", "-o", str(start), "-l", str(length), device]
            run(Command(argv, TIMEOUT, cancel=cancel))
            progress((start + length) / end)
    except (AgentError, OSError) as error:
        if isinstance(error, AgentError) and error.code == 443:
            raise
        raise VolumesZeroingError(device=device, reason=error) from error
