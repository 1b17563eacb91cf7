# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds domains on the connected storage, and keeps what it has found.

Looking for a domain asks every place at once, each in a lane of its own, so that a dead server
delays nobody who looks for a domain elsewhere.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from vdsm_storage.base.clock import Clock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.domains.domain import Domain
from vdsm_storage.domains.family import DomainLocks, Family, Found
from vdsm_storage.domains.lock import PoolLock
from vdsm_storage.errors import AgentError, StorageDomainDoesNotExist
from vdsm_storage.images.store import Store
from vdsm_storage.leases.model import ClusterLock

log = logging.getLogger("registry")

LOOK_TIMEOUT = 10.0  # seconds to look for a domain in all places

T = TypeVar("T")


class Registry:
    """All domains of this host.  `watch` wires it to the pools."""

    def __init__(self, families: Sequence[Family], lanes: Lanes, clock: Clock) -> None:
        self._families = families
        self._lanes = lanes
        self._clock = clock
        self._mutex = threading.Lock()
        self._domains: dict[str, Domain] = {}
        self._stuck: dict[str, Future[Any]] = {}
        self._own_locks: dict[tuple[str, str], ClusterLock] = {}
        self._master_of: Callable[[str], ClusterLock | None] = lambda sd_id: None
        self._ready: Callable[[str, float], None] = lambda sd_id, timeout: None

    def watch(
        self,
        master_of: Callable[[str], ClusterLock | None],
        ready: Callable[[str, float], None],
    ) -> None:
        """Wiring: which other lock guards the pool of a domain; waiting for its host ids."""
        self._master_of = master_of
        self._ready = ready

    # -- looking up --------------------------------------------------------------------------

    def get(self, sd_id: str) -> Domain:
        """The domain; found domains cost a dictionary look-up.  Raises 358 and what its metadata
        makes impossible (372, 394, 752)."""
        found = self.peek(sd_id)
        if found is not None:
            return found
        if not is_uuid(sd_id):
            raise StorageDomainDoesNotExist(domain=sd_id)
        return self._look(sd_id)

    def find_store(self, sd_id: str) -> Store:
        return self.get(sd_id).store

    def peek(self, sd_id: str) -> Domain | None:
        """The domain if it was found before; never touches storage."""
        with self._mutex:
            return self._domains.get(sd_id)

    def known(self) -> list[str]:
        """UUIDs of the domains found so far."""
        with self._mutex:
            return sorted(self._domains)

    def on_mount(self, mount: str) -> list[Domain]:
        """The domains found on one connection."""
        with self._mutex:
            return [domain for domain in self._domains.values() if domain.mount == mount]

    def scan(self) -> list[str]:
        """Look in every place; UUIDs of all domains that answer in time."""
        futures: dict[str, Future[list[str]]] = self._ask(lambda family, place: family.scan(place))
        wait(futures.values(), LOOK_TIMEOUT)
        self._note_stuck(futures)
        found: set[str] = set()
        for place, future in futures.items():
            if not future.done():
                continue
            if isinstance(error := future.exception(), OSError):
                log.warning("%s cannot be listed: %s", place, error)
            else:
                found.update(future.result())
        return sorted(found)

    def forget(self, sd_id: str) -> None:
        """The next get() looks again."""
        with self._mutex:
            self._domains.pop(sd_id, None)

    def forget_mount(self, mount: str) -> None:
        for domain in self.on_mount(mount):
            self.forget(domain.id)

    def adopt(self, found: Found) -> Domain:
        """A domain that was just made."""
        for family in self._families:
            if found.place in family.places():
                return self._build(family, found)
        raise StorageDomainDoesNotExist(domain=found.metadata.id)

    # -- finding -----------------------------------------------------------------------------

    def _look(self, sd_id: str) -> Domain:
        def look(family: Family, place: str) -> tuple[Family, Found | None]:
            return family, family.find(place, sd_id)

        futures = self._ask(look)
        waiting = set(futures.values())
        deadline = self._clock.monotonic() + LOOK_TIMEOUT
        problem: BaseException | None = None
        while waiting:
            left = max(0.0, deadline - self._clock.monotonic())
            done, waiting = wait(waiting, left, return_when="FIRST_COMPLETED")
            for future in done:
                if (error := future.exception()) is not None:
                    problem = error
                    continue
                family, found = future.result()
                if found is not None:
                    return self._build(family, found)
            if not done:
                self._note_stuck(futures)
                break
        if isinstance(problem, AgentError):
            raise problem
        raise StorageDomainDoesNotExist(domain=sd_id) from problem

    def _ask(self, work: Callable[[Family, str], T]) -> dict[str, Future[T]]:
        """Ask in every place, but in those that still owe an answer."""
        with self._mutex:
            self._stuck = {m: future for m, future in self._stuck.items() if not future.done()}
            skipped = set(self._stuck)
        return {
            place: self._lanes.submit(f"scan {place}", _call(work, family, place), LOOK_TIMEOUT)
            for family in self._families
            for place in family.places()
            if place not in skipped
        }

    def _note_stuck(self, futures: Mapping[str, Future[T]]) -> None:
        for place, future in futures.items():
            if not future.done():
                log.warning("%s does not answer: no domain is looked for there", place)
                with self._mutex:
                    self._stuck[place] = future

    def _build(self, family: Family, found: Found) -> Domain:
        sd_id = found.metadata.id
        key = (sd_id, found.place)
        with self._mutex:
            own = self._own_locks.get(key)
        own = own or family.own_lock(found)
        with self._mutex:
            known = self._domains.get(sd_id)
            if known is not None:  # somebody else was faster
                return known
            own = self._own_locks.setdefault(key, own)
            lock = PoolLock(
                own,
                lambda: self._master_of(sd_id),
                lambda timeout: self._ready(sd_id, timeout),
                self._clock,
            )
            domain = family.build(found, DomainLocks(own, lock))
            self._domains[sd_id] = domain
        log.info("Found domain %s, version %s, on %s", sd_id, domain.version, found.place)
        return domain


def _call(work: Callable[[Family, str], T], family: Family, place: str) -> Callable[[], T]:
    return lambda: work(family, place)
