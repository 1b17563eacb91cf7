# SPDX-License-Identifier: GPL-2.0-or-later
"""Is a block domain sound?  An independent look at its devices, while nobody changes it.

Nothing here is shared with the agent: labels, LVM's text, tags, slots, leases and qcow2 headers are
read from the devices' bytes by parsers of this package.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from functional.checker import leases, qcow2, slots, tags
from functional.checker.group import EXTENT, Group, Lv, read_group
from functional.checker.text import BadTextError

MIB: Final = 1024**2
BLANK: Final = qcow2.BLANK
# Volumes of the format, their least size, and whether it is the only right one (MiB).
SPECIAL: Final[Mapping[str, tuple[int, bool]]] = {
    "metadata": (128, False), "ids": (128, True), "inbox": (128, True), "outbox": (128, True),
    "leases": (2048, True), "xleases": (1024, False), "master": (1024, False),
}  # fmt: skip
INITIALIZING: Final = "OVIRT_VOL_INITIALIZING"
REMOVED: Final = ("_remove_me_ZERO_", "_remove_me_")
LAST_SLOT: Final = 1947
LEASES_BEFORE: Final = 100  # leases before that of slot 0
# What may be allowed:
HALF_MADE, MARKED = "initializing", "removed"


@dataclass
class Promised:
    """A volume that a caller was told exists; None where any value is right."""

    image: str
    capacity: int = 0  # at least
    size: int = 0  # of the logical volume, at least
    format: str | None = None  # RAW or COW
    parent: str | None = None
    description: str | None = None
    generation: int | None = None


@dataclass
class Expected:
    """What was answered as done.  Volumes in neither mapping are not expected at all.

    `unsure`: changes that were asked for and not answered; such volumes may be there or not.
    `descriptions`: one of them is the domain's; empty for any.
    """

    volumes: Mapping[str, Promised] = field(default_factory=dict)
    unsure: Collection[str] = frozenset()
    leases: Collection[str] = frozenset()
    unsure_leases: Collection[str] = frozenset()
    descriptions: Collection[str] = frozenset()


@dataclass
class Volume:
    name: str
    image: str
    parent: str
    slot: int
    size: int
    marked: bool = False
    values: dict[str, str] = field(default_factory=dict)  # of its metadata, if they are sound


@dataclass
class Findings:
    """What a domain holds, as far as it can be read, and what is wrong with it."""

    problems: list[str] = field(default_factory=list)
    volumes: dict[str, Volume] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)  # external ones, by their offsets


def check(
    devices: Sequence[str],
    sd_id: str,
    expected: Expected | None = None,
    allow: Collection[str] = frozenset(),
) -> list[str]:
    """What is wrong, in words; `allow`ed are HALF_MADE volumes and such that are MARKED."""
    return inspect(devices, sd_id, expected, allow).problems


def inspect(
    devices: Sequence[str],
    sd_id: str,
    expected: Expected | None = None,
    allow: Collection[str] = frozenset(),
) -> Findings:
    """The same, and what is there."""
    found = Findings()
    problems = found.problems
    group = read_group(devices, sd_id, problems)
    if group is None:
        return found
    values = tags.values_of(group, problems)
    problems += tags.check(group, values, sd_id)
    version = int(values["VERSION"]) if re.fullmatch("[2345]", values.get("VERSION", "")) else 5
    try:
        problems += _special(group, version)
        found.volumes = {v.name: v for v in _volumes(group, version, problems, allow)}
        _read_slots(group, version, sd_id, found.volumes, problems)
        problems += _chains(found.volumes)
        reader = leases.Reader(group, sd_id)
        problems += _leases(reader, found.volumes)
        if version >= 4:
            found.leases, wrong = leases.external(group, sd_id, reader)
            problems += wrong
        problems += _headers(group, found.volumes)
    except (BadTextError, KeyError, struct.error) as error:
        problems.append(f"the check could not go on: {error!r}")
        return found
    if expected is not None:
        problems += _lost(expected, found.volumes, found.leases)
        description = values.get("DESCRIPTION", "")
        if expected.descriptions and description not in expected.descriptions:
            problems.append(f"the domain is called {description!r}, not {expected.descriptions}")
    return found


def _special(group: Group, version: int) -> Iterator[str]:
    if group.extent_size != EXTENT:
        yield f"extents of {group.extent_size} bytes"
    for name, (size, exact) in SPECIAL.items():
        if name not in group.lvs:
            if name != "xleases" or version >= 4:
                yield f"there is no volume {name}"
            continue
        found = group.size(name) // MIB
        if found < size or (exact and found != size):
            yield f"{name} has {found} MiB, not {size}"
        if group.lvs[name].tags:
            yield f"{name} has tags: {group.lvs[name].tags}"
    first = group.lvs["metadata"].segments[0]
    if first.pv_start != 0:
        yield f"metadata begins at extent {first.pv_start} of {first.pv}, not at 0"


# -- volumes ---------------------------------------------------------------------------------


def _volumes(
    group: Group, version: int, problems: list[str], allow: Collection[str]
) -> Iterator[Volume]:
    taken: dict[int, str] = {}
    for lv in group.lvs.values():
        if lv.name in SPECIAL:
            continue
        if not re.fullmatch(slots.UUID, lv.name):
            problems.append(f"{lv.name} is no volume of a domain")
            continue
        if sorted(lv.status) != ["READ", "VISIBLE", "WRITE"]:
            problems.append(f"{lv.name} has the status {lv.status}")
        if INITIALIZING in lv.tags:
            if HALF_MADE not in allow:
                problems.append(f"{lv.name} is half made: {lv.tags}")
            continue
        volume = _from_tags(lv, group.size(lv.name), problems)
        if volume is None:
            continue
        if volume.marked and MARKED not in allow:
            problems.append(f"{lv.name} is marked for removal")
        if not slots.first(version) <= volume.slot <= LAST_SLOT:
            problems.append(f"{lv.name} has the slot {volume.slot}")
        elif volume.slot in taken:
            problems.append(f"slot {volume.slot} is that of {taken[volume.slot]} and {lv.name}")
        taken[volume.slot] = lv.name
        yield volume


def _from_tags(lv: Lv, size: int, problems: list[str]) -> Volume | None:
    found: dict[str, list[str]] = {"IU_": [], "PU_": [], "MD_": []}
    for tag in lv.tags:
        if tag[:3] in found:
            found[tag[:3]].append(tag[3:])
        else:
            problems.append(f"{lv.name} has a tag {tag}")
    if any(len(values) != 1 for values in found.values()):
        problems.append(f"{lv.name} has not one image, one parent and one slot: {lv.tags}")
        return None
    image, parent, slot = (values[0] for values in found.values())
    prefix = next((prefix for prefix in REMOVED if image.startswith(prefix)), "")
    image = image.removeprefix(prefix)
    good = re.fullmatch(slots.UUID, image) and re.fullmatch(slots.UUID, parent)
    if not good or not re.fullmatch(slots.NUMBER, slot):
        problems.append(f"{lv.name} has malformed tags: {lv.tags}")
        return None
    return Volume(lv.name, image, parent, int(slot), size, bool(prefix))


def _read_slots(
    group: Group, version: int, sd_id: str, volumes: Mapping[str, Volume], problems: list[str]
) -> None:
    for volume in volumes.values():
        data = group.read("metadata", slots.offset(version, volume.slot), slots.SIZE)
        values, wrong = slots.parse(data, version)
        problems += [f"{volume.name}, slot {volume.slot}: {text}" for text in wrong]
        if wrong:
            continue
        volume.values = values
        problems += [f"{volume.name}, slot {volume.slot}: {t}" for t in _fits(volume, sd_id)]


def _fits(volume: Volume, sd_id: str) -> Iterator[str]:
    """The text and the tags say the same, and the logical volume holds what the text says."""
    values = volume.values
    same = {"DOMAIN": sd_id, "IMAGE": volume.image, "PUUID": volume.parent}
    for key, wanted in same.items():
        if values[key] != wanted:
            yield f"{key}={values[key]}, which should be {wanted}"
    capacity = slots.capacity(values)
    if values["FORMAT"] == "RAW":
        if values["TYPE"] != "PREALLOCATED":
            yield "a raw volume on block storage is sparse"
        if capacity > volume.size:
            yield f"the capacity of {capacity} is more than the volume's {volume.size} bytes"
    if volume.parent == volume.name:
        yield "it is its own parent"


def _chains(volumes: Mapping[str, Volume]) -> Iterator[str]:
    """Parents are there, what has children is no leaf, and nothing runs in a circle."""
    own: dict[str, list[Volume]] = {}  # children in the same image
    for volume in volumes.values():
        if volume.parent == BLANK:
            continue
        parent = volumes.get(volume.parent)
        if parent is None:
            yield f"{volume.name}: its parent {volume.parent} is not there"
            continue
        if parent.image == volume.image:
            own.setdefault(parent.name, []).append(volume)
        yield from _parent(volume, parent)
    for volume in volumes.values():
        kind, children = volume.values.get("VOLTYPE"), own.get(volume.name, [])
        kept = [child for child in children if own.get(child.name) or not _is_illegal(child)]
        if kind == "LEAF" and kept:
            yield f"{volume.name} is a leaf and has the child {kept[0].name}"
        if kind == "INTERNAL" and not children and not _is_illegal(volume):
            yield f"{volume.name} is internal and has no child"
        if len(kept) > 1:
            yield f"{volume.name} has {len(kept)} children in its image"
        if _circle(volume, volumes):
            yield f"{volume.name} is its own ancestor"


def _parent(volume: Volume, parent: Volume) -> Iterator[str]:
    if parent.marked and not volume.marked:
        yield f"{volume.name}: its parent {parent.name} is marked for removal"
    if not parent.values or not volume.values:
        return
    if parent.image != volume.image and parent.values["VOLTYPE"] != "SHARED":
        yield f"{volume.name}: its parent {parent.name} is in image {parent.image}"
    if slots.capacity(volume.values) < slots.capacity(parent.values):
        yield f"{volume.name} has less capacity than its parent {parent.name}"


def _is_illegal(volume: Volume) -> bool:
    """Without children: it was merged into its parent, and waits for its deletion."""
    return volume.values.get("LEGALITY") == "ILLEGAL"


def _circle(volume: Volume, volumes: Mapping[str, Volume]) -> bool:
    seen = set()
    at: Volume | None = volume
    while at is not None and at.name not in seen:
        seen.add(at.name)
        at = volumes.get(at.parent)
    return at is volume


def _leases(reader: leases.Reader, volumes: Mapping[str, Volume]) -> Iterator[str]:
    yield from reader.hosts()
    yield from reader.named("leases", leases.ALIGN, "SDM")
    for volume in volumes.values():
        if volume.slot <= LAST_SLOT:
            place = (LEASES_BEFORE + volume.slot) * leases.ALIGN
            yield from reader.named("leases", place, volume.name)


def _headers(group: Group, volumes: Mapping[str, Volume]) -> Iterator[str]:
    for volume in volumes.values():
        values = volume.values
        if values.get("FORMAT") != "COW" or values["LEGALITY"] != "LEGAL" or volume.marked:
            continue
        parent = volumes.get(volume.parent)
        form = parent.values.get("FORMAT", "") if parent else ""
        wanted = qcow2.Wanted(slots.capacity(values), volume.parent, form)
        for text in qcow2.check(group, volume.name, wanted):
            yield f"{volume.name}: {text}"


# -- what was answered as done ---------------------------------------------------------------


def _lost(
    expected: Expected, volumes: Mapping[str, Volume], found_leases: Collection[str]
) -> Iterator[str]:
    there = {name for name, volume in volumes.items() if not volume.marked}
    for name in sorted(expected.volumes.keys() - there):
        yield f"{name} was answered as made and is lost"
    for name in sorted(there - expected.volumes.keys() - set(expected.unsure)):
        yield f"{name} was answered as deleted, or never made, and is there"
    for name in sorted(expected.volumes.keys() & there):
        for text in _broken(expected.volumes[name], volumes[name]):
            yield f"{name}: {text}"
    for name in sorted(set(expected.leases) - set(found_leases)):
        yield f"lease {name} was answered as made and is lost"
    for name in sorted(set(found_leases) - set(expected.leases) - set(expected.unsure_leases)):
        yield f"lease {name} was answered as deleted, or never made, and is there"


def _broken(promised: Promised, volume: Volume) -> Iterator[str]:
    values = volume.values
    if not values:
        return
    capacity = slots.capacity(values)
    exact = {
        "image": (promised.image, volume.image),
        "parent": (promised.parent, volume.parent),
        "format": (promised.format, values["FORMAT"]),
        "description": (promised.description, values["DESCRIPTION"]),
        "generation": (promised.generation, int(values["GEN"])),
    }
    for what, (wanted, is_) in exact.items():
        if wanted is not None and wanted != is_:
            yield f"its {what} was answered as {wanted!r} and is {is_!r}"
    if capacity < promised.capacity:
        yield f"a capacity of {promised.capacity} was answered, it is {capacity}"
    if volume.size < promised.size:
        yield f"{promised.size} bytes were answered, it has {volume.size}"
