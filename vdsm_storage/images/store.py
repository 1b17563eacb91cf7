# SPDX-License-Identifier: GPL-2.0-or-later
"""What a storage domain offers to the code that works on volumes and images.

File domains fulfil it with directories (domains/file_store.py), block domains with logical
volumes.  All sizes are bytes.  Every method does blocking I/O and runs in the domain's lane.
Methods that make or remove things are idempotent: they may be called again after a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from vdsm_storage.base.uuids import BLANK
from vdsm_storage.images.metadata import Parsed, VolumeMetadata
from vdsm_storage.leases.model import ClusterLock, Geometry, LeaseSpec

# Told the fraction done, 0.0 to 1.0; may raise ActionStopped, the work is then taken back.
Progress = Callable[[float], None]


def no_progress(_fraction: float) -> None:
    """For callers who do not want to know."""


@dataclass(frozen=True)
class Sizes:
    """`apparent`: length of the file or device.  `allocated`: what it takes from the domain."""

    apparent: int
    allocated: int


@dataclass(frozen=True)
class Examined:
    """A volume as StorageDomain.dump shows it, broken ones and those being deleted too.

    `slot` is the number of its metadata on block domains.
    """

    volume: str
    image: str
    parsed: Parsed | None
    sizes: Sizes | None
    removed: bool = False
    slot: int | None = None


@dataclass(frozen=True)
class NewVolume:
    """Storage to be made for a volume; `size` is what to allocate (a file may start smaller).

    `parent` is the volume that it will be based on.
    """

    image: str
    volume: str
    size: int
    preallocated: bool
    raw: bool
    parent: str = BLANK


@dataclass(frozen=True)
class Wipe:
    """What becomes of a deleted volume's data: `zero` overwrites it; `discard` tells the storage
    that it is not needed.  Files are given back zeroed anyway."""

    zero: bool = False
    discard: bool = False


NO_WIPE: Final = Wipe()


class Store(Protocol):
    """One domain, as images/ sees it."""

    @property
    def id(self) -> str: ...

    @property
    def version(self) -> int:
        """Format of the domain: 3, 4 or 5."""

    @property
    def is_block(self) -> bool: ...

    @property
    def geometry(self) -> Geometry: ...

    @property
    def lock(self) -> ClusterLock:
        """Held around every change of the domain's metadata."""

    # -- what is there -----------------------------------------------------------------------

    def images(self) -> list[str]:
        """UUIDs of the images: what has a published volume and is not marked for removal."""

    def volumes(self, image: str) -> list[str]:
        """UUIDs of the image's published volumes, its template included.  [] for no image."""

    def all_volumes(self) -> dict[str, list[str]]:
        """Every published volume of the domain, and the images that have it."""

    def removed_images(self) -> dict[str, list[str]]:
        """Images marked for removal (the image's UUID) and their volumes."""

    def images_of_volume(self, volume: str) -> list[str]:
        """Every image that has the volume: more than one for a template in use."""

    # -- one volume --------------------------------------------------------------------------

    def load(self, image: str, volume: str) -> VolumeMetadata:
        """Raises VolumeDoesNotExist (201), VolumeMetadataReadError (207), MetadataCleared (757)."""

    def examine(self, image: str, volume: str) -> tuple[VolumeMetadata, Sizes]:
        """load() and sizes() in one go.  Raises 201, 207, 757."""

    def parse(self, image: str, volume: str) -> Parsed:
        """A tolerant reading, for what shows broken volumes as well.  Raises 201."""

    def examine_all(self) -> Iterator[Examined]:
        """Every volume of the domain, each once."""

    def save(self, image: str, volume: str, metadata: VolumeMetadata) -> None:
        """Replace the metadata of a published volume, durably."""

    def save_for_guest(self, image: str, volume: str, metadata: VolumeMetadata) -> None:
        """The same without `lock`, for the host whose guest uses the volume, when a manager
        elsewhere keeps the lock; `agree` completes it."""

    def agree(self, image: str) -> None:
        """Under `lock`: complete what save_for_guest could not do."""

    def path(self, image: str, volume: str) -> str:
        """Where the data is, for qemu-img and qemu."""

    def sizes(self, image: str, volume: str) -> Sizes: ...

    def lease(self, image: str, volume: str) -> LeaseSpec | None:
        """The volume's lease; None where the format has none (local directories)."""

    # -- changes, under `lock` ---------------------------------------------------------------

    def make(self, new: NewVolume, progress: Progress = no_progress) -> str:
        """Allocate storage and lease; returns the path.  Nothing is listed before publish()."""

    def publish(self, image: str, volume: str, metadata: VolumeMetadata) -> None:
        """Write the metadata: from here on the volume exists."""

    def unpublish(self, image: str, volume: str) -> None:
        """Remove the metadata: from here on the volume does not exist, its storage is remains."""

    def wipe(self, image: str, volume: str, how: Wipe, progress: Progress = no_progress) -> None:
        """Zero or discard the data of a volume that is not published; nothing on files.

        Takes long, and needs no lock.
        """

    def unmake(self, image: str, volume: str) -> None:
        """Remove whatever there is of a volume, published or not; the image too if it is empty."""

    def has_remains(self, image: str, volume: str) -> bool:
        """Whether there is anything of a volume that is not published, or an empty image."""

    def resize(
        self,
        image: str,
        volume: str,
        size: int,
        preallocate: bool,
        progress: Progress = no_progress,
    ) -> None:
        """Give the volume's storage `size` bytes: grows or (block, tail unused) shrinks it."""

    def share(self, image: str, volume: str, into: str) -> None:
        """Make a template's volume part of the image `into` as well."""

    def mark_removed(self, image: str, zero: bool = False) -> None:
        """Rename or tag an image so that it is no longer listed; `zero`: purge() zeroes it."""

    def purge(
        self, image: str, discard: bool = False, progress: Progress = no_progress
    ) -> None:
        """Remove an image that was marked.  Called without `lock`: zeroing takes long."""

    # -- use on this host --------------------------------------------------------------------

    def activate(self, image: str, volumes: Sequence[str]) -> None:
        """Make the paths usable for an operation of this process (block: device-mapper).

        Counted: each call has its deactivate().
        """

    def deactivate(self, image: str, volumes: Sequence[str]) -> None: ...

    def prepare(self, image: str, volumes: Sequence[str]) -> None:
        """The same for a guest: until release(), restarts of the agent included; not counted."""

    def release(self, image: str, volumes: Sequence[str]) -> None: ...

    def evict(self, image: str, volumes: Sequence[str]) -> None:
        """Take volumes that are to be deleted out of use on this host, prepared or not; those of
        the image itself, not its template.

        Raises CannotRemoveLogicalVolume (551) for one that an operation or a guest has open
        (block; a file can be deleted while it is open).
        """

    def refresh(self, image: str, volume: str) -> None:
        """See the volume's present size on this host, if it is usable here."""
