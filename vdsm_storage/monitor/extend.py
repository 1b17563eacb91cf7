# SPDX-License-Identifier: GPL-2.0-or-later
"""Giving a volume more storage: here, under its domain's lock, or by whoever holds that.

Sizes are those that the volume shall have at least, so that asking twice does no harm.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from vdsm_storage.base.units import MIB
from vdsm_storage.domains.block import BlockDomain
from vdsm_storage.domains.registry import Registry
from vdsm_storage.errors import SpmStatusError, UnsupportedOnFileDomain, VolumeExtendingError

log = logging.getLogger("extend")

BRIEF: Final = 2.0  # seconds to wait for hosts that hold a lock for one change, before asking

# ask(domain, volume, size in bytes, timeout in seconds) -> the size that the volume has now
Ask = Callable[[str, str, int, float], int]


class Extender:
    """`ask` is the mailbox of the pool's manager; `lock_timeout` seconds."""

    def __init__(self, registry: Registry, ask: Ask, lock_timeout: float) -> None:
        self._registry = registry
        self._ask = ask
        self._lock_timeout = lock_timeout

    def extend(self, sd_id: str, volume: str, size: int, timeout: float) -> int:
        """Let the volume have `size` bytes; returns the bytes that it has, on this host, too.

        A host that holds the domain's lock for long is the pool's manager: it is asked.  Raises
        504, 206 (no answer, refused), 358.
        """
        try:
            return self.extend_here(sd_id, volume, size, min(BRIEF, timeout))
        except SpmStatusError as error:
            log.info("Volume %s: the pool's manager is asked for %d bytes (%s)",
                     volume, size, error)  # fmt: skip
        self._ask(sd_id, volume, size, timeout)
        store = self._domain(sd_id).store
        now = store.storage_size(volume)
        if now < size:
            reason = f"the pool's manager gave it {now}"
            raise VolumeExtendingError(volume=volume, size=size, reason=reason)
        store.active.refresh([volume])
        return now

    def extend_here(
        self, sd_id: str, volume: str, size: int, timeout: float | None = None
    ) -> int:
        """The same under the domain's lock.  Raises 201, 358, 504, 654."""
        domain = self._domain(sd_id)
        with domain.lock.held(self._lock_timeout if timeout is None else timeout):
            return domain.store.grow(volume, size)

    def serve(self, sd_id: str, volume: str, mib: int) -> int:
        """For the mailbox of a manager: sizes in MiB."""
        return self.extend_here(sd_id, volume, mib * MIB) // MIB

    def _domain(self, sd_id: str) -> BlockDomain:
        domain = self._registry.get(sd_id)
        if not isinstance(domain, BlockDomain):
            raise UnsupportedOnFileDomain(
                what="Extending storage", domain=sd_id, remedy="files grow by themselves"
            )
        return domain
