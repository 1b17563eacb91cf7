# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes of a block domain through several hosts at once, and a book of what was answered.

A worker changes the disks of the book through one host; any worker may change any disk, one at a
time.  What is answered as done is a promise that the checker holds the domain to; what was not
answered may have happened or not: such a disk is left alone until somebody has looked.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final

from functional.block_hosts import (
    BLANK,
    COW,
    EXTENT,
    MIB,
    PREALLOCATED,
    RAW,
    SPARSE,
    Cluster,
    Host,
    new_id,
)
from functional.checker.check import Expected, Findings, Promised, Volume
from vdsm_storage.rpc.client import NoResponse, RemoteError

FULL: Final = 250  # disks from which on more are deleted than made
# Another host, or other work here, has what is needed: nothing was done.
BUSY: Final = frozenset({654, 851})
# The host lost its lease, or ends: whoever was answered so does not know.
LOST: Final = frozenset({443, 651, 661, 3001})


class Outcome(Enum):
    DONE = "done"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass
class Disk:
    """An image; `volumes` from the base to the leaf."""

    image: str
    volumes: dict[str, Promised] = field(default_factory=dict)

    @property
    def leaf(self) -> str:
        return list(self.volumes)[-1]


class Book:
    """Disks, leases and the domain's description, as far as they were answered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[str, Disk] = {}
        self._doubtful: dict[str, Disk] = {}
        self._unsure: set[str] = set()  # volumes
        self._leases: set[str] = set()
        self._unsure_leases: set[str] = set()
        self.describing = threading.Lock()
        self.descriptions: set[str] = {"stress"}  # what the domain's may be
        self.answers: Counter[tuple[int, str, int]] = Counter()  # host, verb, code
        self.problems: list[str] = []

    @contextmanager
    def borrowed(self, chance: random.Random) -> Iterator[Disk | None]:
        """A disk that nobody else changes meanwhile; it comes back unless it is in doubt."""
        with self._lock:
            disk = self._free.pop(chance.choice(list(self._free))) if self._free else None
        try:
            yield disk
        finally:
            if disk is not None:
                self.put(disk)

    def put(self, disk: Disk) -> None:
        with self._lock:
            if disk.image not in self._doubtful and disk.volumes:
                self._free[disk.image] = disk

    def doubt(self, disk: Disk, *volumes: str) -> None:
        """Whether these volumes are there has not been answered."""
        with self._lock:
            self._doubtful[disk.image] = disk
            self._unsure.update(volumes)

    def lease(self, name: str, there: bool, sure: bool) -> None:
        with self._lock:
            self._leases.discard(name)
            self._unsure_leases.discard(name)
            if not sure:
                self._unsure_leases.add(name)
            elif there:
                self._leases.add(name)

    def take_lease(self, chance: random.Random) -> str | None:
        with self._lock:
            if not self._leases:
                return None
            name = chance.choice(sorted(self._leases))
            self._leases.remove(name)
            return name

    @property
    def disks(self) -> int:
        return len(self._free)

    def counted(self, host: int, verb: str, code: int) -> None:
        with self._lock:
            self.answers[host, verb, code] += 1

    def done(self) -> Counter[str]:
        """Changes that were answered as done, by their verbs."""
        found: Counter[str] = Counter()
        for (_, verb, code), count in self.answers.items():
            if code == 0:
                found[verb] += count
        return found

    def by_host(self) -> dict[int, Counter[int]]:
        """Hosts, and how often they answered what."""
        found: dict[int, Counter[int]] = {}
        for (host, _, code), count in sorted(self.answers.items()):
            found.setdefault(host, Counter())[code] += count
        return found

    def expected(self) -> Expected:
        """While nobody changes anything."""
        promised: dict[str, Promised] = {}
        for disk in (*self._free.values(), *self._doubtful.values()):
            promised.update({v: p for v, p in disk.volumes.items() if v not in self._unsure})
        return Expected(
            promised, set(self._unsure), set(self._leases), set(self._unsure_leases),
            set(self.descriptions),
        )  # fmt: skip

    def resolve(self, found: Findings) -> list[str]:
        """Somebody has looked: nothing is in doubt any more.  Returns disks of which only a part is
        gone."""
        broken = []
        for disk in self._doubtful.values():
            asked = self._unsure & disk.volumes.keys()
            kept = asked & found.volumes.keys()
            if kept and kept != asked:
                broken.append(f"of {sorted(asked)} only {sorted(kept)} are there")
            disk.volumes = {
                name: as_found(promised, found.volumes[name])
                for name, promised in disk.volumes.items()
                if name in found.volumes
            }
        back, self._doubtful = list(self._doubtful.values()), {}
        self._unsure.clear()
        for disk in back:
            self.put(disk)
        self._leases |= self._unsure_leases & found.leases.keys()
        self._unsure_leases.clear()
        return broken


def as_found(promised: Promised, volume: Volume) -> Promised:
    """It may have been extended, or described anew."""
    values = volume.values
    if not values:
        return promised
    return replace(promised, capacity=int(values["CAP"]), description=values["DESCRIPTION"])


class Worker:
    """Makes changes through one host until it is told to stop."""

    def __init__(self, cluster: Cluster, host: Host, book: Book, seed: int) -> None:
        self._cluster = cluster
        self._host = host
        self._book = book
        self._chance = random.Random(seed)
        self.stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"worker {seed}")

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout: float) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self.stop.is_set():
                if self._host.up.wait(0.2):
                    self._change()()
        except Exception as error:
            self._book.problems.append(f"{self._thread.name}: {error!r}")
            raise

    def _change(self) -> Callable[[], None]:
        many = self._book.disks > FULL
        choices: dict[Callable[[], None], int] = {
            self.create: 6 if many else 12,
            self.snapshot: 7,
            self.extend: 8,
            self.describe: 5,
            self.delete_leaf: 6,
            self.delete_disk: 10 if many else 5,
            self.create_lease: 3,
            self.delete_lease: 3,
            self.describe_domain: 1,
        }
        return self._chance.choices(list(choices), list(choices.values()))[0]

    def _attempt(self, verb: str, is_task: bool = True, **params: Any) -> Outcome:
        message = ""
        try:
            if is_task:
                code = self._host.task(verb, **params)
            else:
                self._host.call(verb, **params)
                code = 0
        except NoResponse:
            self._book.counted(self._host.id, verb, -1)
            self._host.up.clear()  # until somebody has looked after it
            return Outcome.UNKNOWN
        except RemoteError as error:
            code, message = error.code, error.message
        self._book.counted(self._host.id, verb, code)
        if code == 0:
            return Outcome.DONE
        if code in BUSY:
            return Outcome.REFUSED
        if code not in LOST:
            self._book.problems.append(f"{verb} answered {code} {message}: {params}")
        return Outcome.UNKNOWN

    # -- disks -------------------------------------------------------------------------------

    def create(self) -> None:
        disk, volume = Disk(new_id()), new_id()
        raw = self._chance.random() < 0.5
        extents = self._chance.randint(1, 4)
        size = extents * EXTENT - self._chance.choice((0, 4096, 100 * MIB))
        description = f"made by {self._host.id} y" + "x" * self._chance.randrange(150)
        if raw:  # it gets all of its extents as its capacity
            least = extents * EXTENT
            promised = Promised(disk.image, least, least, "RAW", BLANK, description, 0)
        else:
            promised = Promised(disk.image, size, EXTENT, "COW", BLANK, description, 0)
        self._make(disk, volume, promised, size)
        self._book.put(disk)

    def snapshot(self) -> None:
        with self._book.borrowed(self._chance) as disk:
            if disk is not None and len(disk.volumes) < 5:
                parent = disk.volumes[disk.leaf]
                promised = replace(
                    parent, size=MIB, format="COW", parent=disk.leaf, description="snap",
                    generation=0,
                )  # fmt: skip
                self._make(disk, new_id(), promised, promised.capacity)

    def _make(self, disk: Disk, volume: str, promised: Promised, size: int) -> None:
        child, form = bool(disk.volumes), RAW if promised.format == "RAW" else COW
        params = {
            **self._cluster.ids(disk.image, volume), "size": str(size),
            "volFormat": form, "preallocate": PREALLOCATED if form == RAW else SPARSE,
            "diskType": "DATA", "desc": promised.description,
            "srcImgUUID": disk.image if child else BLANK,
            "srcVolUUID": disk.leaf if child else BLANK,
        }  # fmt: skip
        if form == COW and self._chance.random() < 0.5:
            params["initialSize"] = str(size // 2)
        outcome = self._attempt("Volume.create", **params)
        if outcome is not Outcome.REFUSED:
            disk.volumes[volume] = promised
        if outcome is Outcome.UNKNOWN:
            self._book.doubt(disk, volume)

    def extend(self) -> None:
        with self._book.borrowed(self._chance) as disk:
            if disk is None:
                return
            volume, old = disk.leaf, disk.volumes[disk.leaf]
            size = old.capacity + self._chance.randint(1, 3) * EXTENT
            outcome = self._attempt(
                "Volume.extendSize", **self._cluster.ids(disk.image, volume), newSize=str(size)
            )
            if outcome is Outcome.DONE:
                least = max(old.size, size) if old.format == "RAW" else old.size
                disk.volumes[volume] = replace(old, capacity=size, size=least)
            elif outcome is Outcome.UNKNOWN:
                self._book.doubt(disk)

    def describe(self) -> None:
        with self._book.borrowed(self._chance) as disk:
            if disk is None:
                return
            volume = self._chance.choice(list(disk.volumes))
            text = f"by {self._host.id}, {self._chance.randrange(9**9)}: ä" + "ö" * self._host.id
            outcome = self._attempt(
                "Volume.setDescription", is_task=False, description=text,
                **self._cluster.ids(disk.image, volume),
            )  # fmt: skip
            if outcome is Outcome.DONE:
                disk.volumes[volume] = replace(disk.volumes[volume], description=text)
            elif outcome is Outcome.UNKNOWN:
                disk.volumes[volume] = replace(disk.volumes[volume], description=None)
                self._book.doubt(disk)

    def delete_leaf(self) -> None:
        with self._book.borrowed(self._chance) as disk:
            if disk is None or len(disk.volumes) < 2:
                return
            volume = disk.leaf
            outcome = self._attempt(
                "Volume.delete", **self._cluster.ids(disk.image, volume), postZero="false",
                force="false", discard=self._chance.random() < 0.2,
            )  # fmt: skip
            if outcome is Outcome.DONE:
                del disk.volumes[volume]
            elif outcome is Outcome.UNKNOWN:
                self._book.doubt(disk, volume)

    def delete_disk(self) -> None:
        with self._book.borrowed(self._chance) as disk:
            if disk is None:
                return
            ids = self._cluster.ids(disk.image, "")
            del ids["volumeID"]
            outcome = self._attempt("Image.delete", **ids, postZero="false", force="false")
            if outcome is Outcome.DONE:
                disk.volumes.clear()
            elif outcome is Outcome.UNKNOWN:
                self._book.doubt(disk, *disk.volumes)

    # -- others ------------------------------------------------------------------------------

    def create_lease(self) -> None:
        name = new_id()
        lease = {"sd_id": self._cluster.domain, "lease_id": name}
        outcome = self._attempt("Lease.create", lease=lease, metadata=None)
        if outcome is not Outcome.REFUSED:
            self._book.lease(name, there=True, sure=outcome is Outcome.DONE)

    def delete_lease(self) -> None:
        name = self._book.take_lease(self._chance)
        if name is None:
            return
        lease = {"sd_id": self._cluster.domain, "lease_id": name}
        outcome = self._attempt("Lease.delete", lease=lease)
        refused = outcome is Outcome.REFUSED
        self._book.lease(name, there=refused, sure=outcome is not Outcome.UNKNOWN)

    def describe_domain(self) -> None:
        """A change of the group's tags."""
        with self._book.describing:
            text = f"by {self._host.id} {self._chance.randrange(10**6)} & so on"
            outcome = self._attempt(
                "StorageDomain.setDescription", is_task=False,
                storagedomainID=self._cluster.domain, description=text,
            )  # fmt: skip
            if outcome is Outcome.DONE:
                self._book.descriptions = {text}
            elif outcome is Outcome.UNKNOWN:
                self._book.descriptions |= {text}
