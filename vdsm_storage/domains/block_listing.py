# SPDX-License-Identifier: GPL-2.0-or-later
"""Which image shows which volume of a block domain.

An image shows its own volumes, and the template that one of them is based on, which belongs to
another image.
"""

from __future__ import annotations

from vdsm_storage.domains.block_names import VolumeIndex


def volumes(index: VolumeIndex, image: str) -> list[str]:
    """The image's own volumes, and the template that one of them is based on."""
    own = index.volumes(image)
    parents = {tags.parent for volume in own if (tags := index.tags(volume)) is not None}
    shared = [parent for parent in parents - set(own) if published(index, parent)]
    return [*own, *sorted(shared)]


def published(index: VolumeIndex, volume: str) -> bool:
    tags = index.tags(volume)
    return tags is not None and not tags.initializing and not tags.removed


def shows(index: VolumeIndex, image: str, volume: str) -> bool:
    """Whether the image has the volume, as its own or as a template."""
    tags = index.tags(volume)
    if tags is None or tags.removed:
        return False
    return tags.image == image or image in users(index, volume)


def users(index: VolumeIndex, volume: str) -> set[str]:
    """The images of the volumes, published or in the making, that are based on this one."""
    found = (index.tags(child) for child in index.children(volume))
    return {tags.image for tags in found if tags is not None and not tags.removed}


def images(index: VolumeIndex, volume: str) -> list[str]:
    """The images that show a published volume, its own first."""
    tags = index.tags(volume)
    if tags is None or not published(index, volume):
        return []
    return [tags.image, *sorted(users(index, volume) - {tags.image})]
