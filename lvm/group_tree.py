# SPDX-License-Identifier: GPL-2.0-or-later
"""The model of a group from its metadata in LVM's configuration language (config_tree.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from vdsm_storage.lvm.config_tree import Section, TextError
from vdsm_storage.lvm.model import LogicalVolume, PhysicalVolume, Segment, VolumeGroup

SECTOR: Final = 512  # bytes; sizes in the text are sectors
CONTENTS: Final = "Text Format Volume Group"
VERSION: Final = 1


def check_version(tree: Section) -> None:
    """Raises TextError for a text of another version than this."""
    if (tree.get("contents"), tree.get("version")) != (CONTENTS, VERSION):
        raise TextError(f"its contents are {tree.get('contents')} {tree.get('version')}")


def only_group(tree: Section) -> tuple[str, Section]:
    """The name and the content of the group in a text, where other things are values."""
    groups = [(name, value) for name, value in tree.items() if isinstance(value, dict)]
    if len(groups) != 1:
        raise TextError(f"{len(groups)} volume groups where one is expected")
    return groups[0]


def group_of(
    name: str,
    tree: Section,
    pvs: Mapping[str, PhysicalVolume],
    lvs: Mapping[str, LogicalVolume],
    size: int,
) -> VolumeGroup:
    """`size` are the bytes of the text.  Raises TextError."""
    return VolumeGroup(
        name=name,
        uuid=_string(tree, "id"),
        seqno=_number(tree, "seqno"),
        extent_size=_number(tree, "extent_size") * SECTOR,
        tags=_strings(tree, "tags"),
        pvs=pvs,
        lvs=lvs,
        exported="EXPORTED" in _strings(tree, "status"),
        text_size=size,
    )


def pvs_of(tree: Section) -> dict[str, PhysicalVolume]:
    """Raises TextError."""
    return {name: _pv(name, section) for name, section in sections(tree, "physical_volumes")}


def _pv(name: str, tree: Section) -> PhysicalVolume:
    status = _strings(tree, "status")
    return PhysicalVolume(
        name=name,
        uuid=_string(tree, "id"),
        device=_string(tree, "device", ""),
        size=_number(tree, "dev_size", 0) * SECTOR,
        pe_start=_number(tree, "pe_start") * SECTOR,
        pe_count=_number(tree, "pe_count"),
        tags=_strings(tree, "tags"),
        missing="MISSING" in (*status, *_strings(tree, "flags")),
        allocatable="ALLOCATABLE" in status,
    )


def lv_of(name: str, tree: Section, pvs: Mapping[str, PhysicalVolume]) -> LogicalVolume:
    """Raises TextError."""
    segments = tuple(
        _segment(_section(tree, f"segment{number}"), pvs)
        for number in range(1, _number(tree, "segment_count") + 1)
    )
    visible = "VISIBLE" in _strings(tree, "status")
    return LogicalVolume(name, _string(tree, "id"), _strings(tree, "tags"), segments, visible)


def _segment(tree: Section, pvs: Mapping[str, PhysicalVolume]) -> Segment:
    start, count = _number(tree, "start_extent"), _number(tree, "extent_count")
    match _string(tree, "type"), tree.get("stripes"):
        case "striped", [str(pv), int(pv_start)] if pv in pvs:
            return Segment(start, count, pvs[pv].name, pv_start)
        case "snapshot", _:  # the text has volumes for it that lvm shows nobody
            raise TextError("there are snapshots of LVM's own")
    return Segment(start, count, "", 0)


def _number(tree: Section, name: str, default: int | None = None) -> int:
    value = tree.get(name, default)
    if not isinstance(value, int) or value < 0:
        raise TextError(f"{name} is not a number: {value!r}")
    return value


def _string(tree: Section, name: str, default: str | None = None) -> str:
    value = tree.get(name, default)
    if not isinstance(value, str):
        raise TextError(f"{name} is not a string: {value!r}")
    return value


def _strings(tree: Section, name: str) -> tuple[str, ...]:
    value = tree.get(name, [])
    if not isinstance(value, list):
        raise TextError(f"{name} is not a list: {value!r}")
    if not all(isinstance(item, str) for item in value):
        raise TextError(f"{name} is not a list of strings: {value!r}")
    return tuple(str(item) for item in value)


def _section(tree: Section, name: str) -> Section:
    value = tree.get(name)
    if not isinstance(value, dict):
        raise TextError(f"there is no section {name}")
    return value


def sections(tree: Section, name: str) -> Iterator[tuple[str, Section]]:
    """The sections inside a section that may be absent."""
    inside = _section(tree, name) if name in tree else {}
    return ((inner, _section(inside, inner)) for inner in inside)
