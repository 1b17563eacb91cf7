# SPDX-License-Identifier: GPL-2.0-or-later
"""Files in the run directory that tell local clients the port, and whether they need TLS."""

from __future__ import annotations

import contextlib
import os
from typing import Final

from vdsm_storage.base import files

PORT: Final = "port"
PLAIN: Final = "plain"  # there when TLS is off


def announce(run: str, port: int, *, tls: bool) -> None:
    """Raises OSError."""
    files.unlink_if_there(os.path.join(run, PLAIN))
    if not tls:
        files.write_atomic(os.path.join(run, PLAIN), b"")
    files.write_atomic(os.path.join(run, PORT), f"{port}\n".encode())


def withdraw(run: str) -> None:
    for name in (PORT, PLAIN):
        with contextlib.suppress(OSError):
            files.unlink_if_there(os.path.join(run, name))
