# SPDX-License-Identifier: GPL-2.0-or-later
"""Images that clients make with a qemu-img of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path

TRIES = 20
COARSE = "accurate CPU usage"  # where clocks are coarse, an encrypted one fails so now and then


def create(path: Path, *options: str, size: str) -> None:
    """`qemu-img create`; raises CalledProcessError."""
    argv = ["qemu-img", "create", "-q", *options, str(path), size]
    for left in reversed(range(TRIES)):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        if left and COARSE in done.stderr:
            path.unlink(missing_ok=True)
            continue
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, argv, done.stdout, done.stderr)
        return
