# SPDX-License-Identifier: GPL-2.0-or-later
"""What the logical volumes of a block domain are called and tagged.

Seven special volumes hold what a file domain keeps in dom_md.  Every other one is a volume, named
by its uuid, with tags: IU_<image>, PU_<parent>, MD_<slot of its metadata>.  While a volume is made
it also has OVIRT_VOL_INITIALIZING, and a tag of ours that names the host which makes it; when its
image is deleted the image's tag is marked first: IU__remove_me_<image>, or
IU__remove_me_ZERO_<image> when the data has to be zeroed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from vdsm_storage.base.units import KIB, MIB
from vdsm_storage.base.uuids import BLANK, is_uuid
from vdsm_storage.errors import MissingTagOnLogicalVolume
from vdsm_storage.lvm.model import LogicalVolume

# -- special volumes -------------------------------------------------------------------------

METADATA: Final = "metadata"
IDS: Final = "ids"
INBOX: Final = "inbox"
OUTBOX: Final = "outbox"
LEASES: Final = "leases"
XLEASES: Final = "xleases"
MASTER: Final = "master"
XLEASES_VERSION: Final = 4  # the first format that has xleases


@dataclass(frozen=True)
class SpecialVolume:
    """`size` in bytes as it is asked of LVM, which rounds up to extents; the first `zeroed` bytes
    are zeroed when the domain is made.
    """

    name: str
    size: int
    zeroed: int = 0


def special_volumes(version: int, alignment: int) -> tuple[SpecialVolume, ...]:
    """All of a domain of `version`, in the order in which they are made and take their extents."""
    volumes = (
        SpecialVolume(METADATA, 128 * MIB, 17 * MIB),
        SpecialVolume(IDS, 8 * MIB),
        SpecialVolume(INBOX, 16 * MIB, 250 * 4 * KIB),
        SpecialVolume(OUTBOX, 16 * MIB, 250 * 4 * KIB),
        SpecialVolume(LEASES, 2048 * alignment),
        SpecialVolume(XLEASES, 1024 * alignment),
        SpecialVolume(MASTER, 1024 * MIB),
    )
    return tuple(v for v in volumes if v.name != XLEASES or version >= XLEASES_VERSION)


SPECIAL: Final = frozenset(volume.name for volume in special_volumes(5, MIB))

# -- tags of volumes -------------------------------------------------------------------------

IMAGE: Final = "IU_"
PARENT: Final = "PU_"
SLOT: Final = "MD_"
INITIALIZING: Final = "OVIRT_VOL_INITIALIZING"
OWNER: Final = "VDSM_STORAGE_HOST_"  # beside INITIALIZING: the id of the host that makes it
REMOVED: Final = "_remove_me_"  # before an image's uuid
ZERO: Final = "ZERO_"  # after that: the data has to be zeroed first


@dataclass(frozen=True, slots=True)
class VolumeTags:
    """`slot` is None where no tag names one.  `removed`: its image is being deleted; `zero`:
    after its data was zeroed.
    """

    image: str
    parent: str = BLANK
    slot: int | None = None
    initializing: bool = False
    removed: bool = False
    zero: bool = False

    def encode(self) -> tuple[str, ...]:
        tags = [
            image_tag(self.image, removed=self.removed, zero=self.zero),
            PARENT + self.parent,
        ]
        if self.slot is not None:
            tags.append(slot_tag(self.slot))
        if self.initializing:
            tags.append(INITIALIZING)
        return tuple(tags)


def image_tag(image: str, *, removed: bool = False, zero: bool = False) -> str:
    return IMAGE + (REMOVED if removed else "") + (ZERO if removed and zero else "") + image


def parent_tag(parent: str) -> str:
    return PARENT + parent


def slot_tag(slot: int) -> str:
    return f"{SLOT}{slot}"


def owner_tags(lv: LogicalVolume) -> tuple[str, ...]:
    return tuple(tag for tag in lv.tags if tag.startswith(OWNER))


def owner(lv: LogicalVolume) -> int | None:
    """The host that makes or removes a half-made volume; None where no tag tells."""
    digits = "".join(owner_tags(lv)).removeprefix(OWNER)
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 10 else None


def parse(lv: LogicalVolume, vg: str = "?") -> VolumeTags:
    """The tags of a volume.  Raises MissingTagOnLogicalVolume (609) without one for its image."""
    tags = find(lv)
    if tags is None:
        raise MissingTagOnLogicalVolume(vg=vg, lv=lv.name, tag=IMAGE + "<image>")
    return tags


def find(lv: LogicalVolume) -> VolumeTags | None:
    """The same; None for what is no volume."""
    image, parent, slot, initializing = "", BLANK, None, False
    for tag in lv.tags:
        kind = tag[:3]
        if kind == IMAGE:
            image = tag[3:]
        elif kind == PARENT:
            parent = tag[3:]
        elif kind == SLOT:
            slot = _slot(tag)
        elif tag == INITIALIZING:
            initializing = True
    if not image:
        return None
    removed = image.startswith(REMOVED)
    zero = removed and image.startswith(ZERO, len(REMOVED))
    if removed:
        image = image[len(REMOVED) + (len(ZERO) if zero else 0) :]
    return VolumeTags(image, parent, slot, initializing, removed, zero)


def _slot(tag: str) -> int | None:
    digits = tag[len(SLOT) :]
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 10 else None


def is_volume(lv: LogicalVolume) -> bool:
    """Whether a logical volume is a domain's volume, complete or not, by its name and tags."""
    return is_uuid(lv.name) and any(tag.startswith(IMAGE) for tag in lv.tags)


# -- all volumes of a domain -----------------------------------------------------------------

_Names = str | tuple[str, ...]  # most images have one volume: a tuple for each would cost memory


@dataclass(frozen=True, slots=True)
class _Maps:
    """By the tags that name images and parents."""

    images: dict[str, _Names]
    removed: dict[str, _Names]
    children: dict[str, _Names]
    slots: frozenset[int]
    initializing: tuple[str, ...]


class VolumeIndex:
    """The volumes of one VolumeGroup: by image, by parent, and the slots that are taken.

    It keeps names only, and shares their texts with the logical volumes: some 100 bytes a volume.
    What is half made (`initializing`) or deleted (`removed`) is in no image, but keeps its slot.
    A group changes often and is mostly asked for one volume: all of it is gone through when
    somebody asks for more.
    """

    __slots__ = ("_lvs", "_made")

    def __init__(self, lvs: Mapping[str, LogicalVolume]) -> None:
        self._lvs = lvs
        self._made: _Maps | None = None

    @property
    def _maps(self) -> _Maps:
        """Threads that come at once may each make them; they are alike."""
        made = self._made
        if made is None:
            made = self._made = _maps_of(self._lvs)
        return made

    @property
    def slots(self) -> frozenset[int]:
        return self._maps.slots

    @property
    def initializing(self) -> tuple[str, ...]:
        return self._maps.initializing

    def images(self) -> Iterator[str]:
        """The images that are there, without those being deleted."""
        return (tag[len(IMAGE) :] for tag in self._maps.images)

    def volumes(self, image: str) -> tuple[str, ...]:
        """Names of the image's volumes; () when there is no such image."""
        return _names(self._maps.images.get(IMAGE + image))

    def all_volumes(self) -> Iterator[str]:
        """Names of the volumes of all images."""
        for found in self._maps.images.values():
            yield from _names(found)

    def removed(self) -> dict[str, tuple[str, ...]]:
        """{image: volumes} of the images that are being deleted."""
        found: dict[str, tuple[str, ...]] = {}
        for tag, names in self._maps.removed.items():
            image = tag[len(IMAGE) + len(REMOVED) :].removeprefix(ZERO)
            found[image] = found.get(image, ()) + _names(names)
        return found

    def children(self, volume: str) -> tuple[str, ...]:
        """Names of the volumes whose parent `volume` is, in any image, half made or being deleted
        too."""
        return _names(self._maps.children.get(PARENT + volume))

    def by_slot(self) -> dict[int, str]:
        """{slot: volume}, with those half made and those being deleted."""
        found = ((find(lv), name) for name, lv in self._lvs.items())
        return {
            tags.slot: name for tags, name in found if tags is not None and tags.slot is not None
        }

    def tags(self, volume: str) -> VolumeTags | None:
        """None when there is no such volume."""
        lv = self._lvs.get(volume)
        return find(lv) if lv is not None else None


def _maps_of(lvs: Mapping[str, LogicalVolume]) -> _Maps:
    images: dict[str, _Names] = {}
    removed_ones: dict[str, _Names] = {}
    children: dict[str, _Names] = {}
    slots: set[int] = set()
    initializing: list[str] = []
    removed = IMAGE + REMOVED
    blank = PARENT + BLANK
    for name, lv in lvs.items():
        image = parent = ""
        half_made = False
        for tag in lv.tags:
            kind = tag[:3]
            if kind == IMAGE:
                image = tag
            elif kind == PARENT:
                parent = tag
            elif kind == SLOT:
                if (slot := _slot(tag)) is not None:
                    slots.add(slot)
            elif tag == INITIALIZING:
                half_made = True
        if not image:
            continue
        if parent and parent != blank:
            _append(children, parent, name)
        if half_made:
            initializing.append(name)
            continue
        into = removed_ones if image.startswith(removed) else images
        _append(into, image, name)
    return _Maps(images, removed_ones, children, frozenset(slots), tuple(initializing))


def _append(index: dict[str, _Names], key: str, name: str) -> None:
    before = index.get(key)
    index[key] = name if before is None else (*_names(before), name)


def _names(found: _Names | None) -> tuple[str, ...]:
    if found is None:
        return ()
    return (found,) if isinstance(found, str) else found
