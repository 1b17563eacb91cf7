# SPDX-License-Identifier: GPL-2.0-or-later
"""A host id for the time of one operation."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Final

from vdsm_storage.base.clock import Deadline, SystemClock
from vdsm_storage.domains.domain import Domain
from vdsm_storage.errors import AgentError

log = logging.getLogger("domain")

PATIENCE: Final = 10.0  # seconds in which a host id can be given back
PAUSE: Final = 0.5  # seconds between two attempts
TEMPORARY: Final = 250  # the host id of operations that come before any pool is connected


@contextlib.contextmanager
def host_id(domain: Domain, number: int, timeout: float) -> Iterator[None]:
    """Hold host id `number` on the domain; what is held already stays.  Raises 661."""
    lockspace = domain.lockspace
    if lockspace is None:
        yield
        return
    deadline = Deadline(SystemClock(), timeout)
    acquired = False
    # A pool that was disconnected just now may give it back between the two.
    while not lockspace.begin_use():
        domain.check_special_files()
        lockspace.acquire(number, deadline.left())
        acquired = True
    try:
        yield
    finally:
        lockspace.end_use()
        if acquired or lockspace.unwanted:
            _leave_soon(domain)


def _leave_soon(domain: Domain) -> None:
    """The operation is done, whatever becomes of the host id.  The daemon refuses to let it go
    while anybody here has a lease under it: a monitor may, for a moment."""
    clock = SystemClock()
    deadline = Deadline(clock, PATIENCE)
    while not deadline.passed():
        try:
            leave(domain)
            return
        except AgentError as error:
            log.warning("Domain %s keeps its host id for now: %s", domain.id, error)
        clock.wait(threading.Event(), PAUSE)


def leave(domain: Domain) -> None:
    """This host has no more to do with the domain.  Raises 662."""

    def close() -> None:
        try:
            domain.close()
        except AgentError as error:
            log.warning("Domain %s stays open: %s", domain.id, error)

    assert domain.lockspace is not None
    domain.lockspace.release(close)
