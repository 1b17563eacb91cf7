# SPDX-License-Identifier: GPL-2.0-or-later
"""The development authority, made by a process of its own: what that imports is large."""

from __future__ import annotations

import os
import sys

from vdsm_storage.base.run import Command, run

TIMEOUT = 60.0


def make_authority(directory: str) -> None:
    """Keys and certificates below `directory`, unless they are there.  Raises CommandError."""
    if not os.path.exists(os.path.join(directory, "certs", "clientcert.pem")):
        argv = [sys.executable, "-P", "-m", "vdsm_storage.rpc.authority", directory]
        run(Command(argv, TIMEOUT))
