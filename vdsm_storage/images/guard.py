# SPDX-License-Identifier: GPL-2.0-or-later
"""What a job on a volume's data holds, and how the volume tells afterwards what became of it.

A job holds, in this order: the domains and images inside this process, then the volume's lease
between hosts.  Then it runs by the generation protocol, which lets anyone find out from the
volume alone how a lost job ended: same generation, it did not; the next one, it did.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.errors import GenerationMismatch, ResourceTimeout
from vdsm_storage.images import metadata as md
from vdsm_storage.images.metadata import GENERATIONS, VolumeMetadata
from vdsm_storage.images.store import Store
from vdsm_storage.leases.model import LeaseSpec

DOMAINS = "00_storage"
PATIENCE = 24 * 3600.0  # seconds that a job waits for another one on the same image
SLICE = 1.0  # seconds between two looks at whether the waiting job was stopped


@dataclass(frozen=True)
class VolumeRef:
    """A volume by its names."""

    domain: str
    image: str
    volume: str

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> VolumeRef:
        """From an operation's params: {"domain": .., "image": .., "volume": ..}."""
        return cls(params["domain"], params["image"], params["volume"])

    def as_params(self) -> dict[str, Any]:
        return asdict(self)


class VolumeLeases(Protocol):
    """The part of leases.lease.Leases that jobs use."""

    def held(self, spec: LeaseSpec, timeout: float) -> AbstractContextManager[None]:
        """Hold a lease; raises AcquireLockFailure (651)."""


def image_lock(domain: str, image: str, *, exclusive: bool) -> Lock:
    return Lock(f"01_img_{domain}", image, exclusive)


class Guard:
    """`timeout` seconds are waited for a lease that another host holds, and by recovery for a lock
    that another operation of this process holds; a running job waits for that one patiently.
    """

    def __init__(
        self,
        find_store: Callable[[str], Store],
        locks: Locks,
        leases: VolumeLeases,
        timeout: float,
    ) -> None:
        self._find_store = find_store
        self._locks = locks
        self._leases = leases
        self._timeout = timeout

    def store(self, domain: str) -> Store:
        """Raises StorageDomainDoesNotExist (358)."""
        return self._find_store(domain)

    @contextlib.contextmanager
    def writing(
        self,
        target: VolumeRef,
        *reads: VolumeRef,
        lease: bool = True,
        cancel: Cancel | None = None,
    ) -> Iterator[Store]:
        """Hold the target's image exclusively with its lease, and the images that are read.

        Gives the target's store.  `lease=False` for what runs under the domain's lock instead.
        A job gives its `cancel`; it then waits for other jobs of this process up to PATIENCE.
        Raises ResourceTimeout (851), AcquireLockFailure (651), 358, 201.
        """
        wanted = [
            Lock(DOMAINS, target.domain, exclusive=False),
            image_lock(target.domain, target.image, exclusive=True),
        ]
        for read in reads:
            wanted.append(Lock(DOMAINS, read.domain, exclusive=False))
            wanted.append(image_lock(read.domain, read.image, exclusive=False))
        with self._held(wanted, cancel):
            store = self.store(target.domain)
            store.load(target.image, target.volume)
            spec = store.lease(target.image, target.volume) if lease else None
            with contextlib.ExitStack() as stack:
                if spec is not None:
                    stack.enter_context(self._leases.held(spec, self._timeout))
                yield store

    @contextlib.contextmanager
    def reading(self, read: VolumeRef, cancel: Cancel | None = None) -> Iterator[Store]:
        """Hold an image against changes; gives its store.  Raises 851, 358."""
        wanted = [
            Lock(DOMAINS, read.domain, exclusive=False),
            image_lock(read.domain, read.image, exclusive=False),
        ]
        with self._held(wanted, cancel):
            yield self.store(read.domain)

    @contextlib.contextmanager
    def _held(self, wanted: Sequence[Lock], cancel: Cancel | None) -> Iterator[None]:
        rounds = 1 if cancel is None else int(PATIENCE / SLICE)
        slice_ = self._timeout if cancel is None else SLICE
        with contextlib.ExitStack() as stack:
            for left in reversed(range(rounds)):
                try:
                    stack.enter_context(self._locks.held(wanted, slice_))
                    break
                except ResourceTimeout:
                    if left == 0:
                        raise
                if cancel is not None:
                    cancel.check()
            yield


def check_generation(volume: str, actual: int, requested: int | None) -> None:
    """Raises GenerationMismatch (911).  None asks for nothing."""
    if requested is not None and actual != requested:
        raise GenerationMismatch(volume=volume, actual=actual, requested=requested)


def following(generation: int) -> int:
    """The generation that a job leaves when it has succeeded."""
    return (generation + 1) % GENERATIONS


@contextlib.contextmanager
def generation(
    store: Store, target: VolumeRef, requested: int | None, *, illegal: bool
) -> Iterator[VolumeMetadata]:
    """The generation protocol around a job's work; gives the metadata that it found.

    The volume must have the `requested` generation (None: any).  With `illegal` it is ILLEGAL
    while the work goes on, and stays so if the work fails; without, its legality is not touched.
    """
    found = store.load(target.image, target.volume)
    check_generation(target.volume, found.generation, requested)
    if illegal and found.legality != md.ILLEGAL:
        store.save(target.image, target.volume, found.with_(legality=md.ILLEGAL))
    yield found
    now = store.load(target.image, target.volume)
    check_generation(target.volume, now.generation, found.generation)  # fenced meanwhile
    if illegal:
        now = now.with_(legality=md.LEGAL)
    store.save(target.image, target.volume, now.next_generation())


@contextlib.contextmanager
def active(store: Store, image: str, volumes: Sequence[str], *, prepared: bool) -> Iterator[None]:
    """The volumes usable on this host; `prepared` ones are the caller's to keep."""
    if prepared:
        yield
        return
    store.activate(image, volumes)
    try:
        yield
    finally:
        store.deactivate(image, volumes)
