# SPDX-License-Identifier: GPL-2.0-or-later
"""Deleting volumes and images.

A volume is gone when its metadata is: that is removed first, and from there on a crash is
followed by the removal of the rest.  An image is gone when it is marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vdsm_storage.base.uuids import BLANK
from vdsm_storage.errors import (
    CannotDeleteSharedVolume,
    ImageDoesNotExistInSD,
    MetadataCleared,
    VolumeDoesNotExist,
    VolumeImageHasChildren,
    VolumeMetadataReadError,
)
from vdsm_storage.images import metadata as md
from vdsm_storage.images import roles
from vdsm_storage.images.store import Store, Wipe
from vdsm_storage.images.workshop import Workshop
from vdsm_storage.jobs.operation import Kind, Operation

RECORDED, UNPUBLISHED, WIPED, REMOVED = "recorded", "unpublished", "wiped", "removed"
MARKED, PURGED = "marked", "purged"


def parents_of(store: Store, image: str, volumes: Iterable[str]) -> dict[str, str]:
    """The parent of each volume; BLANK for one whose metadata is damaged.  Raises 201."""
    parents = {}
    for volume in volumes:
        try:
            parents[volume] = store.load(image, volume).parent
        except (MetadataCleared, VolumeMetadataReadError):
            parents[volume] = BLANK
    return parents


def check_volumes(store: Store, image: str, volumes: Sequence[str], *, force: bool) -> None:
    """Whether the volumes can go together.  Raises 201, 204, 223; `force` ignores children."""
    there = store.volumes(image)
    for volume in volumes:
        if volume not in there:
            raise VolumeDoesNotExist(volume=volume, image=image, domain=store.id)
        check_not_used(store, image, volume)
    if force:
        return
    for volume, parent in parents_of(store, image, there).items():
        if parent in volumes and volume not in volumes:
            raise VolumeImageHasChildren(volume=parent, children=volume)


def check_not_used(store: Store, image: str, volume: str) -> None:
    """Raises CannotDeleteSharedVolume (223) for a template, in its own image, that is in use."""
    try:
        metadata = store.load(image, volume)
    except (MetadataCleared, VolumeMetadataReadError):
        return
    if metadata.voltype == md.SHARED and metadata.image == image:
        users = [user for user in store.images_of_volume(volume) if user != image]
        if users:
            raise CannotDeleteSharedVolume(volume=volume, images=", ".join(users))


def children_first(parents: Mapping[str, str]) -> list[str]:
    """The volumes ordered so that each comes before its parent; loops end where they began."""
    ordered: list[str] = []
    for volume in parents:
        path = []
        while volume in parents and volume not in ordered and volume not in path:
            path.append(volume)
            volume = parents[volume]
        ordered.extend(reversed(path))
    ordered.reverse()
    return ordered


class DeleteVolumes:
    """The operation `volume.delete`: params domain, image, volumes (a list), force, zero, discard.

    The domain's lock is not held while data is zeroed or discarded: the volumes are unpublished
    before, and nobody else touches them.
    """

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop

    def kind(self) -> Kind:
        steps = (RECORDED, UNPUBLISHED, WIPED, REMOVED)
        return Kind("volume.delete", steps, self._run, self._recover)

    def _run(self, op: Operation) -> None:
        image, volumes = op.params["image"], op.params["volumes"]
        with self._shop.images(op.params["domain"], image) as store:
            with self._shop.domain(store):
                check_volumes(store, image, volumes, force=op.params.get("force", False))
                store.agree(image)  # a live merge on another host may have ended
                store.evict(image, volumes)
                op.record(parents=parents_of(store, image, volumes))
                op.step(RECORDED)
                self._delete(op, store)
            self._wipe_and_remove(op, store)

    def _delete(self, op: Operation, store: Store) -> None:
        """Each is gone for its caller after this; removed, too, where nothing is to be wiped."""
        image = op.params["image"]
        parents: dict[str, str] = op.facts["parents"]
        for volume in children_first(parents):
            store.unpublish(image, volume)
            op.step(UNPUBLISHED, abortable=False)
            roles.restore_leaf(store, image, parents[volume])
            if not _wipes(op):
                store.unmake(image, volume)
                op.step(REMOVED, abortable=False)

    def _wipe_and_remove(self, op: Operation, store: Store) -> None:
        """Nothing is left to do where nothing is to be wiped."""
        image, volumes = op.params["image"], children_first(op.facts["parents"])
        how = Wipe(bool(op.params.get("zero")), bool(op.params.get("discard")))
        for number, volume in enumerate(volumes):
            store.wipe(image, volume, how, op.progress_of(number, len(volumes)))
        op.step(WIPED, abortable=False)
        if not _wipes(op):
            return
        with self._shop.domain(store):
            for volume in volumes:
                store.unmake(image, volume)
                op.step(REMOVED, abortable=False)

    def _recover(self, op: Operation) -> bool:
        """Once one volume is unpublished the others follow; before that nothing is touched."""
        if "parents" not in op.facts:
            return False
        image, parents = op.params["image"], op.facts["parents"]
        with self._shop.images(op.params["domain"], image) as store:
            with self._shop.domain(store):
                if set(parents) <= set(store.volumes(image)):
                    return False
                self._delete(op, store)
            self._wipe_and_remove(op, store)
        return True


def _wipes(op: Operation) -> bool:
    return bool(op.params.get("zero") or op.params.get("discard"))


class DeleteImage:
    """The operation `image.delete`: params domain, image, zero, discard."""

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop

    def kind(self) -> Kind:
        return Kind("image.delete", (MARKED, PURGED), self._run, self._recover)

    def _run(self, op: Operation) -> None:
        domain, image = op.params["domain"], op.params["image"]
        with self._shop.changing(domain, image) as store:
            check_image(store, image)
            store.evict(image, store.volumes(image))
            store.mark_removed(image, bool(op.params.get("zero")))
            op.step(MARKED, abortable=False)
        store.purge(image, bool(op.params.get("discard")), op.progress)
        op.step(PURGED, abortable=False)

    def _recover(self, op: Operation) -> bool:
        """An image that was marked is purged; one that was not is left as it is."""
        store = self._shop.find_store(op.params["domain"])
        image = op.params["image"]
        if image not in store.removed_images():
            return image not in store.images()
        store.purge(image, bool(op.params.get("discard")), op.progress)
        return True


def check_image(store: Store, image: str) -> None:
    """Whether an image may be deleted.  Raises 268, 223."""
    volumes = store.volumes(image)
    if not volumes:
        raise ImageDoesNotExistInSD(image=image, domain=store.id)
    for volume in volumes:
        check_not_used(store, image, volume)
