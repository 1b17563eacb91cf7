# SPDX-License-Identifier: GPL-2.0-or-later
"""The lvm commands that carry out a plan, one a difference.  Pure.

Removing several volumes is one command and one commit.  A command gets the extents that the plan
chose, so that it does what was planned whatever allocation policy a version of lvm has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vdsm_storage.errors import (
    AgentError,
    CannotCreateLogicalVolume,
    CannotRemoveLogicalVolume,
    LogicalVolumeExtendError,
    LogicalVolumeReplaceTagError,
)
from vdsm_storage.lvm.model import LogicalVolume, Segment, VolumeGroup
from vdsm_storage.lvm.plan import Plan

REMOVED_AT_ONCE: Final = 32  # lvm keeps the whole command line in the group's metadata
NEEDS_FS_OPTION: Final = (2, 3, 17)  # lvreduce asks for --fs from here on


@dataclass(frozen=True)
class Native:
    """One lvm command; `error` is what its failure means, without the reason."""

    argv: Sequence[str]
    error: type[AgentError]
    facts: Mapping[str, object]

    def failed(self, reason: str) -> AgentError:
        return self.error(**self.facts, reason=reason)


def natives(
    plan: Plan, devices: Mapping[str, str], version: Callable[[], tuple[int, ...]]
) -> list[Native]:
    """What makes `plan.after` of `plan.before`; removals go last.

    `devices` by id of the physical volume.
    """
    maker = _Maker(plan.before, devices, version)
    commands: list[Native] = []
    removed: list[str] = []
    for old, new in plan.differences():
        if old is not None and (new is None or new.uuid != old.uuid):
            removed.append(old.name)
            old = None
        if old is None and new is not None:
            if new.name in removed:  # made anew: not before it is gone
                commands.append(maker.remove([removed.pop()]))
            commands.append(maker.create(new))
        elif old is not None and new is not None:
            commands += maker.alter(old, new)
    if plan.retags_group:
        commands.append(maker.retag_group(plan.after.tags))
    steps = range(0, len(removed), REMOVED_AT_ONCE)
    return [*commands, *(maker.remove(removed[at : at + REMOVED_AT_ONCE]) for at in steps)]


@dataclass(frozen=True)
class _Maker:
    group: VolumeGroup
    devices: Mapping[str, str]
    version: Callable[[], tuple[int, ...]]

    def create(self, lv: LogicalVolume) -> Native:
        added = [word for tag in lv.tags for word in ("--addtag", tag)]
        keep = ["--activate", "n", "--zero", "n", "--wipesignatures", "n", "--contiguous", "n"]
        size = self._size(lv.extents)
        argv = [*_begin("lvcreate"), *keep, "--size", size, *added, "--name", lv.name]
        argv += [self.group.name, *self._places(lv.segments)]
        return Native(argv, CannotCreateLogicalVolume, self._facts(lv.name))

    def alter(self, old: LogicalVolume, new: LogicalVolume) -> list[Native]:
        commands = []
        if new.extents > old.extents:
            more = self._places(_added(old, new))
            argv = [*_begin("lvextend"), "--size", self._size(new.extents), self._path(old), *more]
            commands.append(self._resize(argv, new))
        elif new.extents < old.extents:
            files = ["--fs", "ignore"] if self.version() > NEEDS_FS_OPTION else []
            size = ["--force", "--size", self._size(new.extents)]
            commands.append(
                self._resize([*_begin("lvreduce"), *files, *size, self._path(old)], new)
            )
        if set(old.tags) != set(new.tags):
            argv = [*_begin("lvchange"), *_retag(old.tags, new.tags), self._path(old)]
            commands.append(Native(argv, LogicalVolumeReplaceTagError, self._facts(old.name)))
        return commands

    def retag_group(self, tags: Sequence[str]) -> Native:
        argv = [*_begin("vgchange"), *_retag(self.group.tags, tags), self.group.name]
        return Native(argv, LogicalVolumeReplaceTagError, self._facts(""))

    def remove(self, names: Sequence[str]) -> Native:
        argv = [*_begin("lvremove"), "--force", *(f"{self.group.name}/{name}" for name in names)]
        return Native(argv, CannotRemoveLogicalVolume, self._facts(", ".join(names)))

    def _resize(self, argv: list[str], lv: LogicalVolume) -> Native:
        size = lv.extents * self.group.extent_size
        return Native(argv, LogicalVolumeExtendError, {**self._facts(lv.name), "size": size})

    def _facts(self, lv: str) -> dict[str, object]:
        return {"vg": self.group.name, "lv": lv}

    def _path(self, lv: LogicalVolume) -> str:
        return f"{self.group.name}/{lv.name}"

    def _size(self, extents: int) -> str:
        return f"{extents * self.group.extent_size}b"

    def _places(self, segments: Sequence[Segment]) -> list[str]:
        """`DEVICE:FIRST-LAST`, as lvm wants the extents that it may use."""
        return [
            f"{self.devices[self.group.pvs[s.pv].uuid]}:{s.pv_start}-{s.pv_start + s.count - 1}"
            for s in segments
        ]


def _begin(command: str) -> list[str]:
    return [command, "--yes", "--autobackup", "n"]


def _retag(old: Sequence[str], new: Sequence[str]) -> list[str]:
    words = [word for tag in old if tag not in new for word in ("--deltag", tag)]
    return [*words, *(word for tag in new if tag not in old for word in ("--addtag", tag))]


def _added(old: LogicalVolume, new: LogicalVolume) -> list[Segment]:
    """The extents that `new` has behind the end of `old`."""
    size = old.extents
    return [
        Segment(max(s.start, size), s.start + s.count - max(s.start, size), s.pv, _at(s, size))
        for s in new.segments
        if s.start + s.count > size
    ]


def _at(segment: Segment, size: int) -> int:
    return segment.pv_start + max(0, size - segment.start)
