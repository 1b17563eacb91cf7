# SPDX-License-Identifier: GPL-2.0-or-later
"""A volume group's text metadata with a plan's changes in it, for vgcfgrestore.  Pure.

Only what changes is written anew; every other byte stays, so that what this program does not
understand survives.  What is to be changed must look exactly as lvm writes a linear volume, else
NotEditable: the caller then uses lvm's single commands.

lvm writes (lib/format_text/export.c; no indentation on disk, "\\n" alone between parts)

    <vg> {
    id = "..."
    seqno = 17
    ...
    flags = ["NOAUTOACTIVATE"]
    tags = ["A", "B"]                                   only when there are tags
    ...
    physical_volumes { ... }
    logical_volumes {                                   only when there are volumes

    <lv> {
    id = "..."
    status = ["READ", "WRITE", "VISIBLE"]
    flags = []
    tags = ["X"]                                        only when there are tags
    creation_time = 1795766811
    creation_host = "vm"
    segment_count = 1

    segment1 {
    start_extent = 0
    extent_count = 8

    type = "striped"
    stripe_count = 1

    stripes = [
    "pv0", 0
    ]
    }
    }
    }
    }
    contents = "Text Format Volume Group"
    version = 1
    ...
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vdsm_storage.lvm.model import LogicalVolume, Segment
from vdsm_storage.lvm.plan import Plan

_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|#[^\n]*|[{}]', re.DOTALL)
_SEGMENT: Final = re.compile(
    rb"\s*segment\d+ \{\s+start_extent = (\d+)\s+extent_count = (\d+)\s+"
    rb'type = "striped"\s+stripe_count = 1\s+stripes = \[\s+"([\w.+-]+)", (\d+)\s+\]\s+\}'
)
# What stands before the segments: no sections, no strings with brackets in them.
_HEAD: Final = re.compile(rb"[^{}]*?\nsegment_count = (\d+)\n")
_TAGS: Final = re.compile(rb"\ntags = \[[^\]{}]*\]\n")
_FLAGS: Final = re.compile(rb"\n(?:flags|status) = \[[^\]{}]*\]\n(?!flags = )")
_HEADER: Final = re.compile(rb'^contents = "Text Format Volume Group"$', re.MULTILINE)
_BEGIN: Final = re.compile(rb'\n([^\s{}"]+) \{\nid = "([^"\n]*)"\n')
_SECTION: Final = b"\nlogical_volumes {\n"


class NotEditable(Exception):  # noqa: N818 - not an error, the other way is taken
    """The text does not look as expected; nothing is wrong with the group."""


@dataclass(frozen=True)
class Stamp:
    """Who makes new volumes, and when (seconds since the epoch)."""

    host: str
    time: int


@dataclass(frozen=True)
class _Edit:
    start: int
    end: int
    text: bytes


def edit(text: bytes, plan: Plan, stamp: Stamp) -> bytes:
    """`text` (as on the storage, of `plan.before`) after the plan.  Raises NotEditable."""
    text = text.rstrip(b"\0")
    if not _HEADER.search(text):
        raise NotEditable("no header")
    edits = [*_group_tags(text, plan), *_volumes(text, plan, stamp)]
    pieces: list[bytes] = []
    done = 0
    for change in sorted(edits, key=lambda change: change.start):
        pieces += (text[done : change.start], change.text)
        done = change.end
    return b"".join((*pieces, text[done:]))


def _group_tags(text: bytes, plan: Plan) -> list[_Edit]:
    if not plan.retags_group:
        return []
    start = text.find(f"{plan.before.name} {{\n".encode())
    end = text.find(b"{", text.find(b"{", start) + 1)
    if start < 0 or end < 0 or (start > 0 and text[start - 1 : start] != b"\n"):
        raise NotEditable("the group's begin is not found")
    return [_retag(text, start, end, plan.after.tags)]


def _volumes(text: bytes, plan: Plan, stamp: Stamp) -> list[_Edit]:
    edits: list[_Edit] = []
    created: list[bytes] = []
    section = text.find(_SECTION)
    changes = list(plan.differences())
    named = [old for old, _ in changes if old is not None]
    if plan.before.lvs:
        named.append(_last(plan))
    places = _places(text, section, named)
    for old, new in changes:
        if old is not None and new is not None and old.uuid == new.uuid:
            edits += _altered(text, places, old, new)
            continue
        if old is not None:
            edits.append(_Edit(*_block(text, places, old), b""))
        if new is not None:
            created.append(_lv_text(new, stamp))
    if not plan.after.lvs and section >= 0:  # lvm writes no section without volumes
        return [_Edit(section, _closing(text, section) + 2, b"")]
    if created:
        at = _end_of_volumes(text, section, places, plan)
        new_text = b"".join(created)
        edits.append(_Edit(at, at, new_text if section >= 0 else b"%s%s}\n" % (_SECTION, new_text)))
    return edits


def _places(text: bytes, section: int, lvs: Iterable[LogicalVolume]) -> dict[str, int]:
    """Where those volumes begin, by their ids, at the line end before the name.

    No other section has an id and stands behind the section's begin.
    """
    wanted = {(lv.name.encode(), lv.uuid.encode()): lv.uuid for lv in lvs}
    found: dict[str, int] = {}
    if section >= 0:
        for match in _BEGIN.finditer(text, section + len(_SECTION) - 1):
            uuid = wanted.get((match[1], match[2]))
            if uuid in found:
                raise NotEditable(f"two volumes have the id {uuid}")
            if uuid is not None:
                found[uuid] = match.start()
    return found


def _last(plan: Plan) -> LogicalVolume:
    *_, last = plan.before.lvs.values()
    return last


def _altered(
    text: bytes, places: Mapping[str, int], old: LogicalVolume, new: LogicalVolume
) -> list[_Edit]:
    start, end = _block(text, places, old)
    head = _HEAD.match(text, text.index(b"{", start) + 1, end)
    if head is None:
        raise NotEditable(f"volume {old.name} has no plain head")
    edits: list[_Edit] = []
    if old.segments != new.segments:
        _check_plain(text, head.end(), end, old)
        at = head.start(1)
        segments = b"%d\n\n%s}\n" % (len(new.segments), _segments_text(new.segments))
        edits.append(_Edit(at, end, segments))
    if old.tags != new.tags:
        edits.append(_retag(text, start + 1, head.start(1), new.tags))
    return edits


def _check_plain(text: bytes, start: int, end: int, lv: LogicalVolume) -> None:
    """The segments in the text are linear, and those that the model knows."""
    found: list[Segment] = []
    for _ in lv.segments:
        match = _SEGMENT.match(text, start, end)
        if match is None:
            raise NotEditable(f"volume {lv.name} is not linear")
        first, count, pv, at = match.groups()
        found.append(Segment(int(first), int(count), pv.decode(), int(at)))
        start = match.end()
    if tuple(found) != lv.segments or text[start:end].strip() != b"}":
        raise NotEditable(f"volume {lv.name} is not as it was read")


def _retag(text: bytes, start: int, end: int, tags: Sequence[str]) -> _Edit:
    """In the head between `start` and `end`, which has no sections."""
    new = b"tags = [%s]\n" % b", ".join(b'"%s"' % tag.encode() for tag in tags) if tags else b""
    old = _TAGS.search(text, start, end)
    if old is not None:
        return _Edit(old.start() + 1, old.end(), new)
    before = _FLAGS.search(text, start, end)
    if before is None:
        raise NotEditable("there is no place for tags")
    return _Edit(before.end(), before.end(), new)


def _block(text: bytes, places: Mapping[str, int], lv: LogicalVolume) -> tuple[int, int]:
    """Where a volume stands in the text, from the empty line before it to its last line end."""
    start = places.get(lv.uuid)
    if start is None:
        raise NotEditable(f"volume {lv.name} is not found")
    end = _closing(text, start) + 2
    if text[end - 2 : end] != b"}\n":
        raise NotEditable(f"volume {lv.name} has no plain end")
    return start, end


def _end_of_volumes(text: bytes, section: int, places: Mapping[str, int], plan: Plan) -> int:
    """Behind the last volume, or where the section of volumes is to stand."""
    if section >= 0:
        return _block(text, places, _last(plan))[1]
    pvs = text.find(b"\nphysical_volumes {\n")
    at = _closing(text, pvs) + 2 if pvs >= 0 else -1
    if at < 0 or text[at - 2 : at] != b"}\n":
        raise NotEditable("the physical volumes are not found")
    return at


def _closing(text: bytes, start: int) -> int:
    """Where the first section at or behind `start` ends: its closing bracket."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        mark = token.group()
        if mark == b"{":
            depth += 1
        elif mark == b"}":
            depth -= 1
            if depth == 0:
                return token.start()
    raise NotEditable("a section does not end")


def _lv_text(lv: LogicalVolume, stamp: Stamp) -> bytes:
    tags = ", ".join(f'"{tag}"' for tag in lv.tags)
    lines = [
        "",
        f"{lv.name} {{",
        f'id = "{lv.uuid}"',
        'status = ["READ", "WRITE", "VISIBLE"]',
        "flags = []",
        *([f"tags = [{tags}]"] if tags else []),
        f"creation_time = {stamp.time}",
        f'creation_host = "{stamp.host}"',
        f"segment_count = {len(lv.segments)}",
    ]
    return "\n".join(lines).encode() + b"\n\n" + _segments_text(lv.segments) + b"}\n"


def _segments_text(segments: Sequence[Segment]) -> bytes:
    return "".join(
        f"segment{number} {{\nstart_extent = {s.start}\nextent_count = {s.count}\n"
        f'\ntype = "striped"\nstripe_count = 1\n\nstripes = [\n"{s.pv}", {s.pv_start}\n]\n}}\n'
        for number, s in enumerate(segments, 1)
    ).encode()
