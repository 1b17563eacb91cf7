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
from vdsm_storage.images.store import Store
from vdsm_storage.images.workshop import Workshop
from vdsm_storage.jobs.operation import Kind, Operation

RECORDED, UNPUBLISHED, REMOVED = "recorded", "unpublished", "removed"
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
    """The operation `volume.delete`: params domain, image, volumes (a list), force."""

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop

    def kind(self) -> Kind:
        return Kind("volume.delete", (RECORDED, UNPUBLISHED, REMOVED), self._run, self._recover)

    def _run(self, op: Operation) -> None:
        image, volumes = op.params["image"], op.params["volumes"]
        with self._shop.changing(op.params["domain"], image) as store:
            check_volumes(store, image, volumes, force=op.params.get("force", False))
            op.record(parents=parents_of(store, image, volumes))
            op.step(RECORDED)
            self._delete(op, store)

    def _delete(self, op: Operation, store: Store) -> None:
        image = op.params["image"]
        parents: dict[str, str] = op.facts["parents"]
        for volume in children_first(parents):
            store.unpublish(image, volume)
            op.step(UNPUBLISHED, abortable=False)
            roles.restore_leaf(store, image, parents[volume])
            store.unmake(image, volume)
            op.step(REMOVED, abortable=False)

    def _recover(self, op: Operation) -> bool:
        """Once one volume is unpublished the others follow; before that nothing is touched."""
        if "parents" not in op.facts:
            return False
        image, parents = op.params["image"], op.facts["parents"]
        with self._shop.changing(op.params["domain"], image) as store:
            if set(parents) <= set(store.volumes(image)):
                return False
            self._delete(op, store)
        return True


class DeleteImage:
    """The operation `image.delete`: params domain, image."""

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop

    def kind(self) -> Kind:
        return Kind("image.delete", (MARKED, PURGED), self._run, self._recover)

    def _run(self, op: Operation) -> None:
        domain, image = op.params["domain"], op.params["image"]
        with self._shop.changing(domain, image) as store:
            check_image(store, image)
            store.mark_removed(image)
            op.step(MARKED, abortable=False)
        store.purge(image)
        op.step(PURGED, abortable=False)

    def _recover(self, op: Operation) -> bool:
        """An image that was marked is purged; one that was not is left as it is."""
        store = self._shop.find_store(op.params["domain"])
        image = op.params["image"]
        if image not in store.removed_images():
            return image not in store.images()
        store.purge(image)
        return True


def check_image(store: Store, image: str) -> None:
    """Whether an image may be deleted.  Raises 268, 223."""
    volumes = store.volumes(image)
    if not volumes:
        raise ImageDoesNotExistInSD(image=image, domain=store.id)
    for volume in volumes:
        check_not_used(store, image, volume)
