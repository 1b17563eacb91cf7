# SPDX-License-Identifier: GPL-2.0-or-later
"""The chain of an image's volumes, as the domain's metadata tells it.

Nothing here opens a volume: parents come from metadata that this agent or another host wrote.
Metadata of a damaged domain may say anything, so a walk ends at a volume it has met before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vdsm_storage.base.uuids import BLANK
from vdsm_storage.errors import (
    ImageIsNotLegalChain,
    VolumeDoesNotExist,
    VolumeIsNotInChain,
    WrongParentVolume,
)
from vdsm_storage.images import metadata as md
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.store import Store


@dataclass(frozen=True)
class Member:
    """A volume of a chain.  `image` is where its chain was walked: a template's volume is also
    part of the images that are based on it."""

    image: str
    volume: str
    metadata: VolumeMetadata

    @property
    def parent(self) -> str | None:
        """None for a base."""
        return None if self.metadata.parent == BLANK else self.metadata.parent

    @property
    def is_cow(self) -> bool:
        return self.metadata.format == md.COW

    @property
    def is_shared(self) -> bool:
        return self.metadata.voltype == md.SHARED


def walk(store: Store, image: str, volume: str) -> list[Member]:
    """The chain that ends with `volume`: base first.

    Raises VolumeDoesNotExist (201) if there is no such volume, ImageIsNotLegalChain (262) if a
    parent is missing or met twice.
    """
    members = [Member(image, volume, store.load(image, volume))]
    met = {volume}
    while (parent := members[-1].parent) is not None:
        if parent in met:
            raise ImageIsNotLegalChain(
                image=image, reason=f"{members[-1].volume} and {parent} are based on each other"
            )
        met.add(parent)
        try:
            metadata = store.load(image, parent)
        except VolumeDoesNotExist as error:
            raise ImageIsNotLegalChain(
                image=image, reason=f"{parent}, the parent of {members[-1].volume}, is missing"
            ) from error
        members.append(Member(image, parent, metadata))
    members.reverse()
    return members


def opened_with(store: Store, image: str, volume: str) -> list[str]:
    """What qemu-img opens together with a volume: it, and all below it.

    Of a chain that is damaged the volume alone: who looks at its header finds out.  Raises 201.
    """
    try:
        return [member.volume for member in walk(store, image, volume)]
    except ImageIsNotLegalChain:
        return [volume]


def children(store: Store, image: str, volume: str) -> list[Member]:
    """The volumes of the image whose parent is `volume`.  A template's are in other images."""
    found = []
    for name in sorted(store.volumes(image)):
        try:
            metadata = store.load(image, name)
        except VolumeDoesNotExist:  # deleted since it was listed
            continue
        if metadata.parent == volume:
            found.append(Member(image, name, metadata))
    return found


def leaves(store: Store, image: str) -> list[Member]:
    """The volumes of the image that no other volume in it is based on."""
    members = {name: store.load(image, name) for name in store.volumes(image)}
    parents = {metadata.parent for metadata in members.values()}
    return [Member(image, name, members[name]) for name in sorted(members) if name not in parents]


@dataclass(frozen=True)
class Subchain:
    """Two neighbours of a chain that are to become one: `top` is merged into `base`.

    `below` are the volumes under base, the lowest first; `child` is based on top, None if top is
    the leaf.
    """

    below: Sequence[Member]
    base: Member
    top: Member
    child: Member | None


def subchain(store: Store, image: str, base: str, top: str) -> Subchain:
    """Raises 201, 262, VolumeIsNotInChain (920), WrongParentVolume (921)."""
    chain = walk(store, image, top)
    names = [member.volume for member in chain]
    if base not in names or base == top:
        store.load(image, base)
        raise VolumeIsNotInChain(volume=base, image=image, chain=", ".join(names))
    if chain[-2].volume != base:
        raise WrongParentVolume(top=top, parent=chain[-2].volume, base=base)
    above = children(store, image, top)
    if len(above) > 1:
        names = [member.volume for member in above]
        raise ImageIsNotLegalChain(image=image, reason=f"{', '.join(names)} share {top}")
    return Subchain(chain[:-2], chain[-2], chain[-1], above[0] if above else None)
