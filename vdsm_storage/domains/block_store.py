# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes as logical volumes of a domain's volume group.

A volume's LV bears its UUID and three tags: its image, its parent, and the slot of its metadata
(its lease lies at the place that follows from the slot).  While it is made it has a fourth one,
and is not listed; removing that tag publishes it.  An image is deleted by changing its tag.  A
template in use has no second name: the image of a volume that is based on it shows it too.

Everything that changes the group happens under the domain's lock; what is read needs none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vdsm_storage.base.aside import aside
from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.domains import block_listing as listing
from vdsm_storage.domains import block_names as names
from vdsm_storage.domains import block_slots
from vdsm_storage.domains.block_active import ActiveVolumes
from vdsm_storage.domains.block_names import VolumeTags
from vdsm_storage.domains.block_special import Specials
from vdsm_storage.domains.block_table import Table, slot_of
from vdsm_storage.errors import (
    AgentError,
    CannotShareVolume,
    ImageDoesNotExistInSD,
    InvalidParameter,
    VolumeAlreadyExists,
    VolumeDoesNotExist,
)
from vdsm_storage.images import metadata as md
from vdsm_storage.images.metadata import Parsed, VolumeMetadata
from vdsm_storage.images.store import Examined, NewVolume, Progress, Sizes, Wipe, no_progress
from vdsm_storage.leases.model import ClusterLock, Geometry, LeaseSpec
from vdsm_storage.lvm.changes import CreateLv, ExtendLv, ReduceLv, RemoveLv, RetagLv
from vdsm_storage.lvm.model import VolumeGroup

log = logging.getLogger("domain.block")

LOCK_TIMEOUT: Final = 120.0  # seconds to wait for the domain's lock when an image is purged


@dataclass(frozen=True)
class Needs:
    """What a store is built upon; `write_lease` writes a free lease; `host_id` is this host's on
    the domain."""

    specials: Specials
    lock: ClusterLock
    write_lease: Callable[[LeaseSpec], None]
    host_id: Callable[[], int | None] = lambda: None


class BlockStore:
    """Fulfils images.store.Store in the volume group of the domain `sd_id`."""

    is_block = True

    def __init__(
        self, sd_id: str, version: int, geometry: Geometry, needs: Needs, active: ActiveVolumes
    ) -> None:
        self.id = sd_id
        self.geometry = geometry
        self.lock = needs.lock
        self.active = active
        self._specials = needs.specials
        self._group = needs.specials.group
        self._write_lease = needs.write_lease
        self._host_id = needs.host_id
        self._table = Table(needs.specials, version, needs.lock)

    @property
    def version(self) -> int:
        self._table.read()
        return self._table.version

    def _find(self, image: str, volume: str) -> tuple[VolumeGroup, VolumeTags]:
        """A published volume that the image has, its own or its template.  Raises 201."""
        _check(image), _check(volume)
        group, index = self._table.read()
        tags = index.tags(volume)
        if not listing.published(index, volume) or not listing.shows(index, image, volume):
            raise self._missing(image, volume)
        assert tags is not None
        return group, tags

    # -- what is there -------------------------------------------------------------------------

    def images(self) -> list[str]:
        return list(self._table.read()[1].images())

    def volumes(self, image: str) -> list[str]:
        return listing.volumes(self._table.read()[1], image)

    def all_volumes(self) -> dict[str, list[str]]:
        _, index = self._table.read()
        return {volume: listing.images(index, volume) for volume in index.all_volumes()}

    def removed_images(self) -> dict[str, list[str]]:
        return {image: list(volumes) for image, volumes in self._table.read()[1].removed().items()}

    def images_of_volume(self, volume: str) -> list[str]:
        return listing.images(self._table.read()[1], _check(volume))

    # -- one volume ----------------------------------------------------------------------------

    def load(self, image: str, volume: str) -> VolumeMetadata:
        return md.decode(self._text(image, volume), volume)

    def parse(self, image: str, volume: str) -> Parsed:
        return md.parse(self._text(image, volume))

    def examine(self, image: str, volume: str) -> tuple[VolumeMetadata, Sizes]:
        group, tags = self._find(image, volume)
        data = self._table.read_slot(volume, tags)
        return md.decode(data, volume), _sizes(group, volume)

    def _text(self, image: str, volume: str) -> bytes:
        _, tags = self._find(image, volume)
        return self._table.read_slot(volume, tags)

    def examine_all(self) -> Iterator[Examined]:
        """All metadata is read in few pieces."""
        group, index = self._table.read()
        removed = [volume for volumes in index.removed().values() for volume in volumes]
        tagged = [(v, index.tags(v)) for v in (*index.all_volumes(), *removed)]
        slots = {tags.slot for _, tags in tagged if tags is not None and tags.slot is not None}
        texts = self._table.read_slots(slots)
        for volume, tags in tagged:
            assert tags is not None
            parsed = md.parse(texts[tags.slot]) if tags.slot in texts else None
            sizes = _sizes(group, volume)
            yield Examined(volume, tags.image, parsed, sizes, tags.removed, tags.slot)

    def save(self, image: str, volume: str, metadata: VolumeMetadata) -> None:
        _, tags = self._find(image, volume)
        self._table.write_slot(volume, tags, metadata)
        if tags.parent != metadata.parent:
            self._group.apply(_new_parent(volume, tags.parent, metadata.parent))

    def save_for_guest(self, image: str, volume: str, metadata: VolumeMetadata) -> None:
        """The slot; the tag that repeats the parent's name waits for `agree`."""
        _, tags = self._find(image, volume)
        self._table.write_slot(volume, tags, metadata)

    def agree(self, image: str) -> None:
        for volume in self.volumes(image):
            tags = self._table.tags(volume)
            if tags is None or tags.image != image:
                continue  # a template of another image
            parsed = self.parse(image, volume)
            parent = parsed.fields.get("parent")
            if not parsed.errors and isinstance(parent, str) and parent != tags.parent:
                self._group.apply(_new_parent(volume, tags.parent, parent))

    def path(self, image: str, volume: str) -> str:
        return f"{self._specials.directory(_check(image))}/{_check(volume)}"

    def sizes(self, image: str, volume: str) -> Sizes:
        """Also of a volume that is not published yet."""
        group, index = self._table.read()
        tags = index.tags(_check(volume))
        made = tags is not None and tags.initializing and tags.image == image
        if not made and not listing.shows(index, _check(image), volume):
            raise self._missing(image, volume)
        return _sizes(group, volume)

    def lease(self, image: str, volume: str) -> LeaseSpec | None:
        _, tags = self._find(image, volume)
        return self._lease(volume, slot_of(volume, tags))

    def leases(self) -> list[LeaseSpec]:
        """Of all volumes, by their places."""
        return [self._lease(volume, slot) for slot, volume in sorted(self.by_slot().items())]

    def _lease(self, volume: str, slot: int) -> LeaseSpec:
        offset = block_slots.lease_offset(slot, self.geometry.alignment)
        path = self._specials.device(names.LEASES)
        return LeaseSpec(self.id, volume, path, offset, self.geometry)

    # -- changes -------------------------------------------------------------------------------

    def make(self, new: NewVolume, progress: Progress = no_progress) -> str:
        """As the protocol says; the storage holds whatever was there before.

        Raises VolumeAlreadyExists (212), VolumeGroupSizeError (504), TooManyVolumes.
        """
        _check(new.image), _check(new.volume)
        if new.volume in self._table.read()[0].lvs:
            self._remove_half_made(new.image, new.volume)
        with self._table.new_slot() as slot:
            self._specials.open()
            tags = VolumeTags(new.image, new.parent, slot).encode()
            lease = self._lease(new.volume, slot)
            self.lock.verify()
            # The slot is nobody's: its lease can be written while lvm is at work.
            with aside("new lease", lambda: self._write_lease(lease)):
                self._group.apply(CreateLv(new.volume, new.size, (*tags, *self._half_made())))
        return self.path(new.image, new.volume)

    def _remove_half_made(self, image: str, volume: str) -> None:
        tags = self._table.read()[1].tags(volume)
        if tags is None or not tags.initializing or tags.image != image:
            where = tags.image if tags is not None else "?"
            raise VolumeAlreadyExists(volume=volume, image=where, domain=self.id)
        self.unmake(image, volume)

    def _half_made(self) -> tuple[str, ...]:
        """The tags of a volume that is no longer, or not yet, to be listed."""
        host = self._host_id()
        owner = () if host is None else (f"{names.OWNER}{host}",)
        return names.INITIALIZING, *owner

    def abandoned(self, dead: Callable[[int], bool]) -> list[str]:
        """Half-made volumes of hosts that are `dead`; their agents will never take them back."""
        group, index = self._table.read()
        owners = {volume: names.owner(group.lvs[volume]) for volume in index.initializing}
        return [v for v, host in owners.items() if host is not None and dead(host)]

    def collect(self, volumes: Sequence[str]) -> None:
        """Remove half-made volumes; the caller holds `lock`."""
        for volume in volumes:
            tags = self._table.tags(volume)
            if tags is not None and tags.initializing:
                self.unmake(tags.image, volume)

    def publish(self, image: str, volume: str, metadata: VolumeMetadata) -> None:
        group, index = self._table.read()
        tags = index.tags(volume)
        if tags is None or tags.image != image:
            raise self._missing(image, volume)
        self._table.write_slot(volume, tags, metadata)
        add = (names.parent_tag(metadata.parent),)
        marks = (names.INITIALIZING, *names.owner_tags(group.lvs[volume]))
        self._group.apply(RetagLv(volume, add, marks))

    def unpublish(self, image: str, volume: str) -> None:
        tags = self._table.tags(_check(volume))
        if tags is not None and tags.image == image and not tags.initializing:
            self._group.apply(RetagLv(volume, self._half_made()))

    def wipe(self, image: str, volume: str, how: Wipe, progress: Progress = no_progress) -> None:
        tags = self._table.tags(_check(volume))
        if tags is not None and tags.image == image and (how.zero or how.discard):
            self.active.wipe(volume, how, progress)

    def unmake(self, image: str, volume: str) -> None:
        """As the protocol says; a template is left alone when `image` is not its own."""
        tags = self._table.tags(_check(volume))
        if tags is None or tags.image != image:
            return
        self.active.drop([volume])
        self._specials.unlink(image, [volume])
        with self._table.kept_slot(tags.slot):
            self._group.apply(RemoveLv(volume))
            if tags.slot is not None:
                self._table.clear_slot(volume, tags.slot)

    def has_remains(self, image: str, volume: str) -> bool:
        tags = self._table.tags(_check(volume))
        return tags is not None and tags.image == image and tags.initializing

    def resize(
        self,
        image: str,
        volume: str,
        size: int,
        preallocate: bool,
        progress: Progress = no_progress,
    ) -> None:
        now = self.sizes(image, volume).apparent
        change = ExtendLv(volume, size) if size > now else ReduceLv(volume, size)
        self._group.apply(change)
        self.active.refresh([volume])

    def storage_size(self, volume: str) -> int:
        """Bytes of a published volume, whatever image it is in.  Raises 201."""
        group, index = self._table.read()
        if not listing.published(index, volume):
            raise self._missing("?", volume)
        return group.size_of(volume)

    def grow(self, volume: str, size: int) -> int:
        """Let a published volume have `size` bytes at least; returns the bytes that it has.

        Raises 201, VolumeGroupSizeError (504).
        """
        (grown,) = self.grow_many({volume: size}).values()
        if isinstance(grown, AgentError):
            raise grown
        return grown

    def grow_many(self, wanted: Mapping[str, int]) -> dict[str, int | AgentError]:
        """The same for several volumes in one commit: the bytes that each has then, or why it
        could not grow.  Raises what keeps all of them from it."""
        group, index = self._table.read()
        found: dict[str, int | AgentError] = {
            volume: group.size_of(volume)
            if listing.published(index, _check(volume))
            else self._missing("?", volume)
            for volume in wanted
        }
        small = [v for v, now in found.items() if isinstance(now, int) and now < wanted[v]]
        if small:
            changes = [[ExtendLv(volume, wanted[volume])] for volume in small]
            results = self._group.apply_each(changes)
            for volume, result in zip(small, results, strict=True):
                found[volume] = (
                    result if isinstance(result, AgentError) else result.size_of(volume)
                )
        self.active.grow([v for v, now in found.items() if isinstance(now, int)])
        return found

    def share(self, image: str, volume: str, into: str) -> None:
        """Nothing to do: the parent's tag of a volume in `into` makes the template part of it."""
        _check(into)
        try:
            self._find(image, volume)
        except VolumeDoesNotExist as error:
            raise CannotShareVolume(volume=volume, image=into, reason=error) from error

    def mark_removed(self, image: str, zero: bool = False) -> None:
        """As the protocol says.  Raises ImageDoesNotExistInSD (268)."""
        _, index = self._table.read()
        own = index.volumes(_check(image))
        if not own:
            if image in index.removed():
                return
            raise ImageDoesNotExistInSD(image=image, domain=self.id)
        old, new = names.image_tag(image), names.image_tag(image, removed=True, zero=zero)
        self._group.apply(*(RetagLv(volume, (new,), (old,)) for volume in own))

    def purge(
        self, image: str, discard: bool = False, progress: Progress = no_progress
    ) -> None:
        """As the protocol says; takes the domain's lock for its end."""
        _, index = self._table.read()
        volumes = index.removed().get(_check(image), ())
        for volume in volumes:
            tags = index.tags(volume)
            how = Wipe(zero=tags is not None and tags.zero, discard=discard)
            if how.zero or how.discard:
                self.active.wipe(volume, how, progress)
        self.active.drop(volumes)
        self._specials.unlink(image, volumes)
        if volumes:
            with self.lock.held(LOCK_TIMEOUT):
                self._group.apply(*(RemoveLv(volume) for volume in volumes))

    # -- use on this host ------------------------------------------------------------------------

    def activate(self, image: str, volumes: Sequence[str]) -> None:
        self.active.activate(_check(image), volumes)

    def deactivate(self, image: str, volumes: Sequence[str]) -> None:
        self.active.deactivate(_check(image), volumes)

    def prepare(self, image: str, volumes: Sequence[str]) -> None:
        self.active.prepare(_check(image), volumes)

    def release(self, image: str, volumes: Sequence[str]) -> None:
        self.active.release(_check(image), volumes)

    def evict(self, image: str, volumes: Sequence[str]) -> None:
        _, index = self._table.read()
        tagged = ((volume, index.tags(volume)) for volume in volumes)
        self.active.drop([v for v, tags in tagged if tags is not None and tags.image == image])

    def refresh(self, image: str, volume: str) -> None:
        self.active.refresh([volume])

    # -- inside ----------------------------------------------------------------------------------

    def by_slot(self) -> Mapping[int, str]:
        """Every slot that a volume has, half made and deleted ones too."""
        return self._table.read()[1].by_slot()

    def _missing(self, image: str, volume: str) -> VolumeDoesNotExist:
        return VolumeDoesNotExist(volume=volume, image=image, domain=self.id)


def _sizes(group: VolumeGroup, volume: str) -> Sizes:
    size = group.size_of(volume)
    return Sizes(size, size)


def _new_parent(volume: str, old: str, new: str) -> RetagLv:
    return RetagLv(volume, (names.parent_tag(new),), (names.parent_tag(old),))


def _check(name: str) -> str:
    if not is_uuid(name):
        raise InvalidParameter(parameter="UUID", value=repr(name), reason="not a lower-case UUID")
    return name
