# SPDX-License-Identifier: GPL-2.0-or-later
"""One logical volume in the metadata text, as lvm2 writes it to its metadata areas:

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

A group is mostly thousands of these, and one regular expression recognises them.  What is in any
other form is read by the parser of the language itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from vdsm_storage.lvm.config_tree import TextError, parse_section, to_bytes, to_text
from vdsm_storage.lvm.group_tree import lv_of
from vdsm_storage.lvm.model import LogicalVolume, PhysicalVolume, Segment

NO_PARENT: Final = "PU_00000000-0000-0000-0000-000000000000"  # on most volumes

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
    rb'\s*([a-zA-Z0-9_.+-]+) \{\nid = "([a-zA-Z0-9-]{38})"\nstatus = ' + _STRINGS + rb"\n"
    rb"flags = " + _STRINGS + rb"\n(?:tags = " + _STRINGS + rb"\n)?"
    rb'creation_time = \d+\ncreation_host = "[^"\\\n]*"\nsegment_count = (\d{1,9})\n\n'
    rb"((?:" + _ANY_SEGMENT + rb")+)\}\n"
)
_LINE_END: Final = re.compile(rb"[^\n]*\n")


class LvReader:
    """Makes logical volumes that share the strings that repeat: parents, images, PV names."""

    def __init__(self, pvs: Mapping[str, PhysicalVolume]) -> None:
        self._pvs = pvs
        self._names = {to_bytes(name): name for name in pvs}
        self._tags = {NO_PARENT: NO_PARENT}

    def read(self, text: memoryview, at: int) -> tuple[LogicalVolume, int]:
        """The volume whose text begins at `at`, and where it ends.  Raises TextError."""
        match = _LV.match(text, at)
        if match is None:
            return self._read_any_form(text, at)
        name, uuid, status, _flags, tags, count, segments = match.groups()
        found = tuple(self._segment(*row) for row in _A_SEGMENT.findall(segments))
        if len(found) != int(count):
            raise TextError(f"{name.decode()} has {len(found)} segments, not {int(count)}")
        lv = LogicalVolume(
            name.decode(),
            uuid.decode(),
            tuple(map(self._shared, tags[1:-1].split(b'", "'))) if tags else (),
            found,
            b'"VISIBLE"' in status,
        )
        return lv, match.end()

    def _read_any_form(self, text: memoryview, at: int) -> tuple[LogicalVolume, int]:
        name, section, end = parse_section(text, at)
        line = _LINE_END.match(text, end)
        return lv_of(name, section, self._pvs), line.end() if line else end

    def _shared(self, tag: bytes) -> str:
        text = to_text(tag)
        return self._tags.setdefault(text, text)

    def _segment(self, start: bytes, count: bytes, pv: bytes, pv_start: bytes) -> Segment:
        name = self._names.get(pv)
        if name is None:  # a volume made of volumes
            return Segment(int(start), int(count), "", 0)
        return Segment(int(start), int(count), name, int(pv_start))
