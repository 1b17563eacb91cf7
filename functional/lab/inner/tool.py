# SPDX-License-Identifier: GPL-2.0-or-later
"""How these helpers run programs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

TIMEOUT = 60.0  # seconds


def run(*argv: str, timeout: float = TIMEOUT) -> str:
    """Its standard output; a failure carries what it said."""
    done = subprocess.run(
        argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout
    )
    assert done.returncode == 0, f"{' '.join(argv)} ended with {done.returncode}: {done.stderr}"
    return done.stdout


def succeeds(*argv: str, timeout: float = TIMEOUT) -> bool:
    done = subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout)
    return done.returncode == 0


def wait_for(what: str, condition: Callable[[], object], timeout: float = TIMEOUT) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"still not after {timeout:g} s: {what}"
        time.sleep(0.2)
