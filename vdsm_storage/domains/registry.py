# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds domains below the connected storage, and keeps what it has found.

Looking for a domain asks every connection at once, each in a lane of its own, so that a dead
server delays nobody who looks for a domain elsewhere.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from vdsm_storage.base.clock import Clock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.owner import Owner
from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.domains import layout
from vdsm_storage.domains.connection import Connections
from vdsm_storage.domains.domain import SUPPORTED_VERSIONS
from vdsm_storage.domains.file import (
    FileDomain,
    Parts,
    check_special_files,
    read_metadata,
)
from vdsm_storage.domains.file_store import FileStore
from vdsm_storage.domains.lock import CheckedLock, PoolLock
from vdsm_storage.domains.metadata import DomainMetadata
from vdsm_storage.domains.posix import FILE_TYPES
from vdsm_storage.domains.tree import Tree
from vdsm_storage.errors import (
    AgentError,
    StorageDomainDoesNotExist,
    StorageDomainTypeError,
    UnsupportedDomainVersion,
)
from vdsm_storage.images.store import Store
from vdsm_storage.leases.lockspace import Lockspace
from vdsm_storage.leases.model import ClusterLock, Geometry, LeaseSpec

log = logging.getLogger("registry")

LOOK_TIMEOUT = 10.0  # seconds to look for a domain on all connections

T = TypeVar("T")


class Leasing(Protocol):
    """What domains need of the leases floor (domains/leasing.py)."""

    def lockspace(self, sd_id: str, path: str, geometry: Geometry) -> Lockspace: ...

    def cluster_lock(self, spec: LeaseSpec) -> ClusterLock: ...

    def file_lock(self, sd_id: str, path: str) -> ClusterLock: ...

    def write_lockspace(self, lockspace: str, path: str, geometry: Geometry) -> None: ...

    def write(self, spec: LeaseSpec) -> None: ...

    def format_xleases(self, path: str, lockspace: str, geometry: Geometry) -> None: ...


@dataclass(frozen=True)
class _Found:
    mount: str
    metadata: DomainMetadata


class Registry:
    """All domains of this host.  `watch` wires it to the pools."""

    def __init__(
        self,
        connections: Connections,
        leasing: Leasing,
        owner: Owner,
        lanes: Lanes,
        clock: Clock,
    ) -> None:
        self._connections = connections
        self._leasing = leasing
        self._owner = owner
        self._lanes = lanes
        self._clock = clock
        self._mutex = threading.Lock()
        self._domains: dict[str, FileDomain] = {}
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

    def get(self, sd_id: str) -> FileDomain:
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

    def peek(self, sd_id: str) -> FileDomain | None:
        """The domain if it was found before; never touches storage."""
        with self._mutex:
            return self._domains.get(sd_id)

    def known(self) -> list[str]:
        """UUIDs of the domains found so far."""
        with self._mutex:
            return sorted(self._domains)

    def on_mount(self, mount: str) -> list[FileDomain]:
        """The domains found on one connection."""
        with self._mutex:
            return [domain for domain in self._domains.values() if domain.mount == mount]

    def scan(self) -> list[str]:
        """Look on every connection; UUIDs of all domains that answer in time."""
        futures: dict[str, Future[list[str]]] = self._ask(_scan)
        wait(futures.values(), LOOK_TIMEOUT)
        self._note_stuck(futures)
        found: set[str] = set()
        for mount, future in futures.items():
            if not future.done():
                continue
            if isinstance(error := future.exception(), OSError):
                log.warning("%s cannot be listed: %s", mount, error)
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

    def adopt(self, mount: str, sd_id: str) -> FileDomain:
        """A domain that was just made."""
        return self._build(_Found(mount, read_metadata(os.path.join(mount, sd_id), sd_id)))

    # -- finding -----------------------------------------------------------------------------

    def _look(self, sd_id: str) -> FileDomain:
        futures: dict[str, Future[_Found | None]] = self._ask(lambda mount: _find(mount, sd_id))
        waiting = set(futures.values())
        deadline = self._clock.monotonic() + LOOK_TIMEOUT
        problem: BaseException | None = None
        while waiting:
            left = max(0.0, deadline - self._clock.monotonic())
            done, waiting = wait(waiting, left, return_when="FIRST_COMPLETED")
            for future in done:
                if (error := future.exception()) is not None:
                    problem = error
                elif (found := future.result()) is not None:
                    return self._build(found)
            if not done:
                self._note_stuck(futures)
                break
        if isinstance(problem, AgentError):
            raise problem
        raise StorageDomainDoesNotExist(domain=sd_id) from problem

    def _ask(self, work: Callable[[str], Callable[[], T]]) -> dict[str, Future[T]]:
        """Ask every connection, but those that still owe an answer."""
        with self._mutex:
            self._stuck = {m: future for m, future in self._stuck.items() if not future.done()}
            skipped = set(self._stuck)
        return {
            mount: self._lanes.submit(f"scan {mount}", work(mount), LOOK_TIMEOUT)
            for mount in self._connections.mounts()
            if mount not in skipped
        }

    def _note_stuck(self, futures: Mapping[str, Future[T]]) -> None:
        for mount, future in futures.items():
            if not future.done():
                log.warning("%s does not answer: no domain is looked for there", mount)
                with self._mutex:
                    self._stuck[mount] = future

    def _build(self, found: _Found) -> FileDomain:
        metadata = found.metadata
        sd_id, root = metadata.id, os.path.join(found.mount, metadata.id)
        kind = FILE_TYPES.get(metadata.type)
        if kind is None:
            raise StorageDomainTypeError(type=metadata.type, reason=f"domain {sd_id} is one")
        if metadata.version not in SUPPORTED_VERSIONS:
            raise UnsupportedDomainVersion(version=metadata.version, supported="3, 4, 5")
        geometry = Geometry(metadata.block_size, metadata.alignment)
        tree = Tree(root, self._owner)
        check_special_files(tree, sd_id)
        ids = os.path.join(root, layout.DOM_MD, layout.IDS)
        lockspace = None
        if kind.leases:
            lockspace = self._leasing.lockspace(sd_id, ids, geometry)
        with self._mutex:
            known = self._domains.get(sd_id)
            if known is not None:  # somebody else was faster
                return known
            own = self._own_locks.get((sd_id, root))
            if own is None:
                own = CheckedLock(
                    self._leasing.cluster_lock(layout.sdm_lease(sd_id, root, geometry))
                    if kind.leases
                    else self._leasing.file_lock(sd_id, ids),
                    lambda: check_special_files(tree, sd_id),
                )
                self._own_locks[sd_id, root] = own
            lock = PoolLock(
                own,
                lambda: self._master_of(sd_id),
                lambda timeout: self._ready(sd_id, timeout),
                self._clock,
            )
            store = FileStore(
                root,
                sd_id,
                metadata.version,
                geometry,
                lock,
                self._leasing if kind.leases else None,
                self._owner,
            )
            parts = Parts(store, lock, own, lockspace)
            domain = FileDomain(found.mount, kind, metadata, self._owner, parts)
            self._domains[sd_id] = domain
        log.info("Found domain %s, version %s, on %s", sd_id, domain.version, found.mount)
        return domain


def _find(mount: str, sd_id: str) -> Callable[[], _Found | None]:
    def find() -> _Found | None:
        try:
            return _Found(mount, read_metadata(os.path.join(mount, sd_id), sd_id))
        except StorageDomainDoesNotExist:
            return None

    return find


def _scan(mount: str) -> Callable[[], list[str]]:
    return lambda: layout.domains_in(mount)
