# SPDX-License-Identifier: GPL-2.0-or-later
"""Giving a volume more storage: here, under its domain's lock, or by whoever holds that.

Sizes are those that the volume shall have at least, so that asking twice does no harm.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.base.units import MIB
from vdsm_storage.domains.block import BlockDomain
from vdsm_storage.domains.registry import Registry
from vdsm_storage.errors import (
    AgentError,
    ExtendNotAnswered,
    NoConnectionToPeer,
    SpmStatusError,
    UnsupportedOnFileDomain,
    VolumeExtendingError,
)
from vdsm_storage.leases.model import LeaseState

log = logging.getLogger("extend")

BRIEF: Final = 2.0  # seconds to wait for hosts that hold a lock for one change, before asking
PATIENCE: Final = 5.0  # seconds for the manager's answer until the lock is looked at again

AT_ONCE: Final = 32  # questions to a manager that wait for their answers

Outcomes = Mapping[str, int | AgentError]  # by volume: its bytes, or why it has no more
# ask(domain, volume, size in bytes, timeout in seconds) -> the size that the volume has now
Ask = Callable[[str, str, int, float], int]
NOBODY: Final[Mapping[int, Ask]] = {}


class Extender:
    """`ask` is the mailbox of the pool's manager, `direct` the agents of hosts whose address is
    known, by host id; `lock_timeout` seconds."""

    def __init__(
        self, registry: Registry, ask: Ask, lock_timeout: float, clock: Clock,
        direct: Mapping[int, Ask] = NOBODY,
    ) -> None:  # fmt: skip
        self._registry = registry
        self._ask = ask
        self._direct = direct
        self._lock_timeout = lock_timeout
        self._clock = clock
        # By domain: who had the lock all the time while we waited for it, and so is a manager.
        self._managers: dict[str, LeaseState] = {}

    def extend(self, sd_id: str, volume: str, size: int, timeout: float) -> int:
        """Let the volume have `size` bytes; returns the bytes that it has, on this host, too.

        Takes about `timeout` seconds at most.  Raises 504, 206 (no answer, refused), 358.
        """
        (found,) = self.extend_many(sd_id, {volume: size}, timeout).values()
        if isinstance(found, AgentError):
            raise found
        return found

    def extend_many(self, sd_id: str, wanted: Mapping[str, int], timeout: float) -> Outcomes:
        """The same for several volumes of a domain at once: for each the bytes that it has then,
        or why it could not get more.

        A host that holds the domain's lock for long is the pool's manager: it is asked.  Who it is
        may change meanwhile, so both are tried in turn.  Raises 358, and what keeps all of them
        from growing.
        """
        deadline = Deadline(self._clock, timeout)
        domain = self._domain(sd_id)
        brief = BRIEF
        while True:
            known = self._managers.get(sd_id)
            if known is None or self._holder(domain) != known:
                self._managers.pop(sd_id, None)
                try:
                    return self._try_here(domain, wanted, min(brief, deadline.left()))
                except SpmStatusError as error:
                    log.info("%s: asking the manager: %s", domain.id, error)
            answers = self._ask_all(domain, wanted, deadline)
            silent = [a for a in answers.values() if isinstance(a, ExtendNotAnswered)]
            if silent:
                # None, but hosts whose storage is slow, one after the other: it takes patience to
                # be one of them.
                self._managers.pop(sd_id, None)
                brief *= 2
            if not silent or deadline.passed():
                return answers

    def _try_here(
        self, domain: BlockDomain, wanted: Mapping[str, int], brief: float
    ) -> Outcomes:
        """Raises SpmStatusError; who kept us from it for `brief` seconds is the manager."""
        try:
            with domain.lock.held(0.0):
                return domain.store.grow_many(wanted)
        except SpmStatusError:
            holder = self._holder(domain)
        try:
            with domain.lock.held(brief):
                return domain.store.grow_many(wanted)
        except SpmStatusError:
            if holder is not None and self._holder(domain) == holder:
                self._managers[domain.id] = holder
            raise

    def _ask_all(
        self, domain: BlockDomain, wanted: Mapping[str, int], deadline: Deadline
    ) -> Outcomes:
        """By its address if that is known, else by the mailbox, which carries many at once."""
        manager = self._managers.get(domain.id)
        direct = self._direct.get(manager.owners[0]) if manager is not None else None

        def ask(volume: str) -> int | AgentError:
            size, timeout = wanted[volume], min(PATIENCE, deadline.left())
            try:
                try:
                    (direct or self._ask)(domain.id, volume, size, timeout)
                except NoConnectionToPeer as error:
                    log.warning("%s; by the mailbox", error)
                    self._ask(domain.id, volume, size, timeout)
                return self._seen_here(domain, volume, size)
            except AgentError as error:
                return error

        with ThreadPoolExecutor(min(AT_ONCE, len(wanted)), "ask manager") as pool:
            return dict(zip(wanted, pool.map(ask, wanted), strict=True))

    @staticmethod
    def _holder(domain: BlockDomain) -> LeaseState | None:
        """Who keeps this host from writing now."""
        if domain.lock.is_held():
            return None
        try:
            state = domain.lock.inquire()
        except AgentError as error:
            log.warning("%s", error)
            return None
        return state if state.owners else None

    @staticmethod
    def _seen_here(domain: BlockDomain, volume: str, size: int) -> int:
        """Make this host see what the manager did."""
        now = domain.store.storage_size(volume)
        if now < size:
            reason = f"the pool's manager gave it {now}"
            raise VolumeExtendingError(volume=volume, size=size, reason=reason)
        domain.store.active.refresh([volume])
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
