# SPDX-License-Identifier: GPL-2.0-or-later
"""A block domain's volume group with the metadata of its volumes, read and written together."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from vdsm_storage.domains import block_names as names
from vdsm_storage.domains import block_slots, block_tags
from vdsm_storage.domains.block_names import VolumeIndex, VolumeTags
from vdsm_storage.domains.block_slots import Slots
from vdsm_storage.domains.block_special import Specials
from vdsm_storage.errors import VolumeMetadataReadError, VolumeMetadataWriteError
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.leases.model import ClusterLock
from vdsm_storage.lvm.model import VolumeGroup

log = logging.getLogger("domain.block")

T = TypeVar("T")


class Table:
    """`version` is that of the domain's format, as of the last `read`: the group's own tags tell
    it, because another host may upgrade the domain.  `lock` guards it between hosts.
    """

    def __init__(self, specials: Specials, version: int, lock: ClusterLock) -> None:
        self.version = version
        self._specials = specials
        self._group = specials.group
        self._lock = lock
        self._mutex = threading.Lock()
        self._reserved: set[int] = set()  # slots of volumes that come or go
        self._indexed: tuple[VolumeGroup, VolumeIndex] | None = None

    def read(self) -> tuple[VolumeGroup, VolumeIndex]:
        """The group as it is on the storage now, with its index."""
        group = self._group.read(self._group.unchanged())
        with self._mutex:
            indexed = self._indexed
            if indexed is None or indexed[0] is not group:
                indexed = self._indexed = (group, VolumeIndex(group.lvs))
                self.version = block_tags.version(group.tags) or self.version
            return indexed

    def tags(self, volume: str) -> VolumeTags | None:
        """Of a volume, complete or not; None when there is no such volume."""
        return self.read()[1].tags(volume)

    # -- slots ---------------------------------------------------------------------------------

    def _slots(self) -> Slots:
        self._specials.open()
        return Slots(self._specials.device(names.METADATA), self.version)

    def read_slot(self, volume: str, tags: VolumeTags) -> bytes:
        """Raises VolumeMetadataReadError (207)."""
        slot = slot_of(volume, tags)
        try:
            return self._stable(lambda slots: slots.read(slot))
        except (OSError, ValueError) as error:
            raise VolumeMetadataReadError(volume=volume, reason=error) from error

    def read_slots(self, slots: set[int]) -> dict[int, bytes]:
        """Many in few pieces; what cannot be a slot is left out.  Raises OSError."""
        wanted = {slot for slot in slots if slot <= block_slots.LAST_SLOT}
        return self._stable(lambda found: found.read_all(wanted))

    def _stable(self, read: Callable[[Slots], T]) -> T:
        """What `read` gives; again when the domain was upgraded meanwhile: the slots moved."""
        while True:
            version = self.version
            found = read(self._slots())
            if version < block_slots.MOVED:
                self.read()
            if version == self.version:
                return found

    def write_slot(self, volume: str, tags: VolumeTags, metadata: VolumeMetadata) -> None:
        """Raises VolumeMetadataWriteError (208), 651 when the domain's lock was lost, 756."""
        data = metadata.encode_slot(self.version, volume)
        self._lock.verify()
        try:
            self._slots().write(slot_of(volume, tags), data)
        except (OSError, ValueError) as error:
            raise VolumeMetadataWriteError(volume=volume, reason=error) from error

    def clear_slot(self, volume: str, slot: int) -> None:
        """For a volume that is gone; text that stays in its slot does no harm.

        Raises 651 when the domain's lock was lost: the slot may be another volume's by now.
        """
        self._lock.verify()
        try:
            self._slots().clear(slot)
        except (OSError, ValueError) as error:
            log.warning("The metadata of volume %s could not be cleared: %s", volume, error)

    @contextlib.contextmanager
    def new_slot(self) -> Iterator[int]:
        """The lowest free slot, nobody else's while this is held."""
        _, index = self.read()
        with self._mutex:
            slot = block_slots.lowest_free(
                index.slots | self._reserved, self.version, self._group.name
            )
            self._reserved.add(slot)
        try:
            yield slot
        finally:
            with self._mutex:
                self._reserved.discard(slot)

    @contextlib.contextmanager
    def kept_slot(self, slot: int | None) -> Iterator[None]:
        """Nobody gets the slot for a new volume while this is held."""
        with self._mutex:
            mine = {slot} - self._reserved - {None}
            self._reserved.update(found for found in mine if found is not None)
        try:
            yield
        finally:
            with self._mutex:
                self._reserved.difference_update(mine)


def slot_of(volume: str, tags: VolumeTags) -> int:
    if tags.slot is None:
        raise VolumeMetadataReadError(volume=volume, reason="no tag tells where it is")
    return tags.slot
