# SPDX-License-Identifier: GPL-2.0-or-later
"""ss(8): closing the sockets of a process that cannot do it any more."""

from __future__ import annotations

import logging

from vdsm_storage.base.run import Command, run
from vdsm_storage.errors import AgentError

log = logging.getLogger("host.sockets")

TIMEOUT = 10.0  # seconds


def close_listeners(port: int) -> None:
    """Close whatever listens on a TCP port, for a process that is dead but cannot go away.

    A kernel that cannot do that leaves it; binding the port then fails as it would have.
    """
    argv = ["ss", "--no-header", "--kill", "--tcp", "--listening", "sport", "=", f":{port}"]
    try:
        run(Command(argv, TIMEOUT))
    except AgentError as error:
        log.warning("Port %d stays with the dead process: %s", port, error)
