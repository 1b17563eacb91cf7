# SPDX-License-Identifier: GPL-2.0-or-later
"""A host id for the time of one operation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from vdsm_storage.domains.domain import Domain

TEMPORARY: Final = 250  # the host id of operations that come before any pool is connected


@contextlib.contextmanager
def host_id(domain: Domain, number: int, timeout: float) -> Iterator[None]:
    """Hold host id `number` on the domain; what is held already stays.  Raises 661."""
    lockspace = domain.lockspace
    if lockspace is None or lockspace.is_held():
        yield
        return
    domain.check_special_files()
    lockspace.acquire(number, timeout)
    try:
        yield
    finally:
        lockspace.release()
