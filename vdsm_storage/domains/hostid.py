# SPDX-License-Identifier: GPL-2.0-or-later
"""A host id for the time of one operation."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Final

from vdsm_storage.base.clock import Deadline, SystemClock
from vdsm_storage.domains.domain import Domain
from vdsm_storage.errors import AgentError

log = logging.getLogger("domain")

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
            leave(domain)


def leave(domain: Domain) -> None:
    """This host has no more to do with the domain.  Raises 662."""

    def close() -> None:
        try:
            domain.close()
        except AgentError as error:
            log.warning("Domain %s stays open: %s", domain.id, error)

    assert domain.lockspace is not None
    domain.lockspace.release(close)
