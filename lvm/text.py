# SPDX-License-Identifier: GPL-2.0-or-later
"""The metadata text of a volume group, as the model (model.py).

Texts of some megabytes are read at each change of a group, and a change is small.  So volumes are
remembered in blocks of some dozens, each with a hash of its text; a block whose text is there
again is taken as a whole, and only in the others is looked at each volume.  What is before the
volumes mostly differs by the number of the commit alone, and is not parsed again then.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from vdsm_storage.lvm.config_tree import Section, TextError, parse_config, to_bytes
from vdsm_storage.lvm.group_tree import (
    CONTENTS,
    VERSION,
    check_version,
    group_of,
    lv_of,
    only_group,
    pvs_of,
    sections,
)
from vdsm_storage.lvm.lv_text import LvReader
from vdsm_storage.lvm.model import LogicalVolume, PhysicalVolume, VolumeGroup

__all__ = ["IncrementalParser", "TextError", "name_and_id", "parse_config", "parse_group"]

BLOCK: Final = 32  # volumes; larger ones save little, smaller ones cost memory

_LVS_BEGIN: Final = re.compile(rb"\nlogical_volumes \{\n")
_NEXT: Final = re.compile(rb'\s*(?:(\})|([^\s{}"=]+) \{)\n')
_LV_END: Final = re.compile(rb"\n\}\n\}\n")
_SEQNO: Final = re.compile(rb"\n\s*seqno = (\d{1,18})\n")
_NAME_AND_ID: Final = re.compile(rb'([^\s{}"]+) \{\s*id = "([^"\n]*)"')
# As lvm writes them, and nothing else that might mean the same.
_START: Final = re.compile(rb'[a-zA-Z0-9+_.-]+ \{\n\s*id = "[^"\\\n]*"\n\s*seqno = (\d{1,18})\n')
_END: Final = re.compile(
    rb"\s*\}\n(?:#[^\n]*\n)?\s*"
    + f'contents = "{CONTENTS}"\nversion = {VERSION}\n'.encode()
    + rb'\s*description = "(?:[^"\\\n]|\\.)*"\n\s*creation_host = "[^"\\\n]*"(?:\t#[^\n]*)?\n'
    rb"\s*creation_time = \d{1,18}(?:\t#[^\n]*)?\s*\0*"
)

log = logging.getLogger("lvm.text")


def parse_group(text: bytes) -> VolumeGroup:
    """Raises TextError for anything that is not understood."""
    return IncrementalParser().parse(text)


def name_and_id(start: bytes | memoryview) -> tuple[str, str] | None:
    """The group's name and id from the first bytes of its text; None if it is something else."""
    match = _NAME_AND_ID.match(start)
    return (match[1].decode("latin-1"), match[2].decode("latin-1")) if match else None


def seqno_of(text: bytes | memoryview) -> int:
    """The number of the commit that wrote the text; -1 if it has none."""
    match = _SEQNO.search(text)
    return int(match[1]) if match else -1


class IncrementalParser:
    """Parses the text of one group again and again; what did not change stays the same object.

    It keeps hashes and the last model, no text.  For one thread at a time.
    """

    def __init__(self) -> None:
        self._head: _Head | None = None
        self._blocks: Sequence[_Block] = ()
        self._pvs: Collection[str] = ()

    def parse(self, text: bytes | memoryview) -> VolumeGroup:
        """Raises TextError for anything that is not understood."""
        view = memoryview(text)
        begin = _LVS_BEGIN.search(view)
        if begin is not None:
            try:
                return self._parse_fast(view, begin.end())
            except TextError as error:
                log.info("a text is read the slow way: %s", error)
        whole = parse_config(bytes(view))
        check_version(whole)
        name, tree = only_group(whole)
        pvs = pvs_of(tree)
        lvs = {lv: lv_of(lv, section, pvs) for lv, section in sections(tree, "logical_volumes")}
        return group_of(name, tree, pvs, lvs, len(view))

    def _parse_fast(self, text: memoryview, begin: int) -> VolumeGroup:
        head = _read_head(bytes(text[:begin]), self._head)
        # Their names decide what a stripe's name means.
        known = self._blocks if head.pvs.keys() == self._pvs else ()
        blocks, end = _known_and_new(text, begin, known, LvReader(head.pvs))
        if not _END.fullmatch(text, end):
            check_version(parse_config(b"rest {" + bytes(text[end:])))
        lvs = {lv.name: lv for block in blocks for lv in block.lvs}
        if len(lvs) != sum(len(block.lvs) for block in blocks):
            raise TextError("two logical volumes have one name")
        group = group_of(head.name, head.tree, head.pvs, lvs, len(text))
        self._head, self._blocks, self._pvs = head, blocks, frozenset(head.pvs)
        return group


@dataclass(frozen=True, slots=True)
class _Head:
    """What is before the volumes; `rest` is its text without the number of the commit."""

    rest: tuple[bytes, bytes]
    name: str
    tree: Section
    pvs: Mapping[str, PhysicalVolume]


def _read_head(text: bytes, known: _Head | None) -> _Head:
    """Raises TextError."""
    start = _START.match(text)
    rest = (text[: start.start(1)], text[start.end(1) :]) if start else (b"", text)
    if start and known is not None and known.rest == rest:
        return replace(known, tree={**known.tree, "seqno": int(start[1])})
    name, tree = only_group(parse_config(text + b"}}"))
    return _Head(rest, name, tree, pvs_of(tree))


@dataclass(slots=True)
class _Block:
    """Volumes that follow each other; `key` is the hash of their text of `size` bytes.

    `keys` are the hashes of each one's text.
    """

    lvs: list[LogicalVolume] = field(default_factory=list)
    keys: array[int] = field(default_factory=lambda: array("q"))
    key: int = 0
    size: int = 0


class _Blocks:
    """Collects the blocks of one text; `end` is where the last one ends in it."""

    def __init__(self, text: memoryview, begin: int) -> None:
        self._text = text
        self._begin = begin  # of the open block
        self._open = _Block()
        self._closed: list[_Block] = []
        self.end = begin

    def hash(self, end: int) -> int:
        """Of the text that comes next, up to `end`."""
        return hash(self._text[self.end : end])

    def take(self, block: _Block) -> None:
        """The next text is that of a known block.  Small ones are joined."""
        if len(self._open.lvs) + len(block.lvs) > BLOCK:
            self._close()
        if not self._open.lvs and len(block.lvs) > BLOCK // 2:
            self._closed.append(block)
            self._begin = self.end + block.size
        else:
            self._open.lvs += block.lvs
            self._open.keys += block.keys
        self.end += block.size

    def add(self, lv: LogicalVolume, key: int, end: int) -> None:
        """The next text up to `end` is that of a volume."""
        if len(self._open.lvs) == BLOCK:
            self._close()
        self._open.lvs.append(lv)
        self._open.keys.append(key)
        self.end = end

    def all(self) -> list[_Block]:
        self._close()
        return self._closed

    def _close(self) -> None:
        block = self._open
        if block.lvs:
            block.size = self.end - self._begin
            block.key = hash(self._text[self._begin : self.end])
            self._closed.append(block)
        self._open, self._begin = _Block(), self.end


def _known_and_new(
    text: memoryview, begin: int, known: Sequence[_Block], reader: LvReader
) -> tuple[list[_Block], int]:
    """The blocks of the volumes whose text starts at `begin`, known ones where it is the same.

    Also where the section of the volumes ends.
    """
    starts = {to_bytes(block.lvs[0].name): block for block in known}
    single: dict[int, LogicalVolume] | None = None
    found = _Blocks(text, begin)
    while (ahead := _NEXT.match(text, found.end)) is not None:
        if ahead[1]:
            return found.all(), ahead.end()
        block = starts.get(ahead[2])
        if block is not None and found.hash(found.end + block.size) == block.key:
            found.take(block)
            continue
        if single is None:  # by the hash of its text
            single = {
                key: lv for block in known for key, lv in zip(block.keys, block.lvs, strict=True)
            }
        stop = _LV_END.search(text, found.end)
        end = stop.end() if stop else len(text)
        key = found.hash(end)
        lv = single.get(key)
        if lv is None:
            lv, end = reader.read(text, found.end)
            key = found.hash(end)
        found.add(lv, key, end)
    raise TextError("a logical volume is expected")
