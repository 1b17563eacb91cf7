# SPDX-License-Identifier: GPL-2.0-or-later
"""udev, which makes the names of devices."""

from __future__ import annotations

from vdsm_storage.base.run import Command, run
from vdsm_storage.errors import AgentError

_MARGIN = 10.0  # seconds that the program itself may need beyond its own time limit


def settle(timeout: float) -> bool:
    """Wait until udev has handled all events, `timeout` seconds at most; False if it has not."""
    argv = ["udevadm", "settle", f"--timeout={max(1, round(timeout))}"]
    try:
        run(Command(argv, timeout=timeout + _MARGIN))
    except AgentError:  # exit code 1: the time is over.  Without udevadm nothing can be waited for.
        return False
    return True
