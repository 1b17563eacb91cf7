# SPDX-License-Identifier: GPL-2.0-or-later
"""The metadata text of a volume group, as the model (model.py).

One logical volume of it, as lvm2 writes it to its metadata areas:

    8f2ee9f8-2c3f-4d59-9c46-0d6a3fbc0f7a {
    id = "la4gCw-mwoe-nZCp-XB57-MXuE-souj-GzjOVY"
    status = ["READ", "WRITE", "VISIBLE"]
    flags = []
    tags = ["PU_00000000-0000-0000-0000-000000000000", "MD_1"]
    creation_time = 1795766984
    creation_host = "host"
    segment_count = 1

    segment1 {
    start_extent = 0
    extent_count = 1

    type = "striped"
    stripe_count = 1

    stripes = [
    "pv0", 0
    ]
    }
    }

A group is mostly thousands of these, so they are recognised by one regular expression each, and
only where their bytes changed.  Everything else is read by the parser of the language itself.
"""

from __future__ import annotations

import logging
import mmap
import re
from array import array
from collections.abc import Collection, Iterator, Mapping
from typing import Final

from vdsm_storage.lvm.config_tree import Section, TextError, parse_config, parse_section
from vdsm_storage.lvm.model import LogicalVolume, PhysicalVolume, Segment, VolumeGroup

__all__ = ["IncrementalParser", "TextError", "parse_config", "parse_group"]

SECTOR: Final = 512  # bytes; sizes in the text are sectors
NO_PARENT: Final = "PU_00000000-0000-0000-0000-000000000000"  # on every volume that has no parent

_STRINGS: Final = rb'\[((?:"[^"\\\n]*"(?:, "[^"\\\n]*")*)?)\]'
_SEGMENT: Final = (
    rb'segment\d{1,9} \{\nstart_extent = %s\nextent_count = %s\n\ntype = "striped"\n'
    rb'stripe_count = 1\n\nstripes = \[\n"%s", %s\n\]\n\}\n'
)
_NUMBER: Final = rb"\d{1,18}"
_PV: Final = rb'[^"\\\n]+'
_ANY_SEGMENT: Final = _SEGMENT % (_NUMBER, _NUMBER, _PV, _NUMBER)
_A_SEGMENT: Final = re.compile(
    _SEGMENT % tuple(b"(" + part + b")" for part in (_NUMBER, _NUMBER, _PV, _NUMBER))
)
_LV: Final = re.compile(
    rb'([a-zA-Z0-9_.+-]+) \{\nid = "([a-zA-Z0-9-]{38})"\nstatus = ' + _STRINGS + rb"\n"
    rb"flags = " + _STRINGS + rb"\n(?:tags = " + _STRINGS + rb"\n)?"
    rb'creation_time = \d+\ncreation_host = "[^"\\\n]*"\nsegment_count = (\d{1,9})\n\n'
    rb"((?:" + _ANY_SEGMENT + rb")+)\}\n"
)
_LVS_BEGIN: Final = b"\nlogical_volumes {\n"
_LV_END: Final = b"\n}\n}\n"
_SEQNO: Final = re.compile(rb"\n\s*seqno = (\d{1,18})\n")
_NAME_AND_ID: Final = re.compile(rb'([^\s{}"]+) \{\s*id = "([^"\n]*)"')

log = logging.getLogger("lvm.text")


def parse_group(text: bytes) -> VolumeGroup:
    """Raises TextError for anything that is not understood."""
    return IncrementalParser().parse(text)


def name_and_id(start: bytes) -> tuple[str, str] | None:
    """The group's name and id from the first bytes of its text; None if it is something else."""
    match = _NAME_AND_ID.match(start)
    return (match[1].decode("latin-1"), match[2].decode("latin-1")) if match else None


def seqno_of(text: bytes) -> int:
    """The number of the commit that wrote the text; -1 if it has none."""
    match = _SEQNO.search(text)
    return int(match[1]) if match else -1


class IncrementalParser:
    """Parses the text of one group again and again; what did not change stays the same object.

    It keeps a hash of each volume's text and the last model, no text.  For one thread at a time.
    """

    def __init__(self) -> None:
        self._hashes: array[int] = array("q")  # of the volumes in the order of _lvs
        self._lvs: Mapping[str, LogicalVolume] = {}
        self._pvs: Collection[str] = ()

    def parse(self, text: bytes | mmap.mmap) -> VolumeGroup:
        """Raises TextError for anything that is not understood."""
        begin = text.find(_LVS_BEGIN)
        if begin >= 0:
            try:
                return self._parse_fast(text, begin + len(_LVS_BEGIN))
            except TextError as error:
                log.info("a text is read the slow way: %s", error)
        return _parse_slowly(text[:])

    def _parse_fast(self, text: bytes | mmap.mmap, begin: int) -> VolumeGroup:
        name, tree = _only_group(parse_config(text[:begin] + b"}}"))
        pvs = _pvs(tree)
        known: dict[int, LogicalVolume] = {}
        if pvs.keys() == self._pvs:  # they decide what a stripe's name means
            known = dict(zip(self._hashes, self._lvs.values(), strict=True))
        maker = _LvMaker(pvs)
        lvs: dict[str, LogicalVolume] = {}
        hashes = array("q")
        at = begin
        while (start := text[at : at + 2]) != b"}\n":
            if start[:1] == b"\n":
                at += 1
                continue
            end = text.find(_LV_END, at) + len(_LV_END)
            key = hash(text[at:end])
            lv = known.get(key)
            if lv is None:
                lv, end = maker.next_lv(text, at)
                key = hash(text[at:end])
            lvs[lv.name] = lv
            hashes.append(key)
            at = end
        if len(lvs) != len(hashes):
            raise TextError("two logical volumes have one name")
        self._hashes, self._lvs, self._pvs = hashes, lvs, frozenset(pvs)
        return _group(name, tree, pvs, lvs, len(text))


def _parse_slowly(text: bytes) -> VolumeGroup:
    name, tree = _only_group(parse_config(text))
    pvs = _pvs(tree)
    lvs = {lv: _lv(lv, section, pvs) for lv, section in _sections(tree, "logical_volumes")}
    return _group(name, tree, pvs, lvs, len(text))


class _LvMaker:
    """Makes logical volumes that share the strings that repeat."""

    def __init__(self, pvs: Mapping[str, PhysicalVolume]) -> None:
        self._pvs = pvs
        self._shared = {name.encode(): name for name in (*pvs, NO_PARENT)}

    def next_lv(self, text: bytes | mmap.mmap, at: int) -> tuple[LogicalVolume, int]:
        """The volume whose text begins at `at`, and where it ends.  Raises TextError."""
        match = _LV.match(text, at)
        if match is None:
            name, section, end = parse_section(text, at)
            return _lv(name, section, self._pvs), text.find(b"\n", end) + 1 or len(text)
        name_, uuid, status, _flags, tags, count, segments = match.groups()
        found = tuple(self._segment(*row) for row in _A_SEGMENT.findall(segments))
        if len(found) != int(count):
            raise TextError(f"{name_!r} has {len(found)} segments, not {int(count)}")
        lv = LogicalVolume(
            name_.decode("ascii"),
            uuid.decode("ascii"),
            tuple(map(self._share, tags[1:-1].split(b'", "'))) if tags else (),
            found,
            b'"VISIBLE"' in status,
        )
        return lv, match.end()

    def _share(self, text: bytes) -> str:
        found = self._shared.get(text)
        if found is None:
            found = self._shared[text] = text.decode("utf-8", "surrogateescape")
        return found

    def _segment(self, start: bytes, count: bytes, pv: bytes, pv_start: bytes) -> Segment:
        name = self._share(pv)
        if name not in self._pvs:  # a volume made of volumes
            return Segment(int(start), int(count), "", 0)
        return Segment(int(start), int(count), name, int(pv_start))


# -- from the parsed language ----------------------------------------------------------------


def _only_group(tree: Section) -> tuple[str, Section]:
    groups = [(name, value) for name, value in tree.items() if isinstance(value, dict)]
    if len(groups) != 1:
        raise TextError(f"{len(groups)} volume groups where one is expected")
    return groups[0]


def _group(
    name: str,
    tree: Section,
    pvs: Mapping[str, PhysicalVolume],
    lvs: Mapping[str, LogicalVolume],
    size: int,
) -> VolumeGroup:
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


def _pvs(tree: Section) -> dict[str, PhysicalVolume]:
    return {name: _pv(name, section) for name, section in _sections(tree, "physical_volumes")}


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


def _lv(name: str, tree: Section, pvs: Mapping[str, PhysicalVolume]) -> LogicalVolume:
    segments = tuple(
        _segment(_section(tree, f"segment{number}"), pvs)
        for number in range(1, _number(tree, "segment_count") + 1)
    )
    visible = "VISIBLE" in _strings(tree, "status")
    return LogicalVolume(name, _string(tree, "id"), _strings(tree, "tags"), segments, visible)


def _segment(tree: Section, pvs: Mapping[str, PhysicalVolume]) -> Segment:
    start, count = _number(tree, "start_extent"), _number(tree, "extent_count")
    stripes = tree.get("stripes")
    if _string(tree, "type") == "striped" and isinstance(stripes, list):
        match stripes:
            case [str(pv), int(pv_start)] if pv in pvs:
                return Segment(start, count, pvs[pv].name, pv_start)
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


def _sections(tree: Section, name: str) -> Iterator[tuple[str, Section]]:
    """The sections inside a section that may be absent."""
    inside = _section(tree, name) if name in tree else {}
    return ((inner, _section(inside, inner)) for inner in inside)
