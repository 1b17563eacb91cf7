# SPDX-License-Identifier: GPL-2.0-or-later
"""What can be asked of a volume group.

Sizes are bytes; they are rounded up to extents when they are carried out.  Every change but
CreateLv says what shall be, not what to do, so that it may be repeated: one that has its effect
already does nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vdsm_storage.errors import (
    AgentError,
    CannotCreateLogicalVolume,
    LogicalVolumeExtendError,
    LogicalVolumeReplaceTagError,
)
from vdsm_storage.lvm.model import VolumeGroup

# lvm2: lib/misc/lvm-string.c (validate_name, validate_tag) and the man page lvm(8).
_NAME: Final = re.compile(r"[a-zA-Z0-9_+.][a-zA-Z0-9_+.\-]{0,126}")
_RESERVED: Final = re.compile(
    r"\.{1,2}$|snapshot|pvmove"
    r"|.*(_cdata|_cmeta|_corig|_cpool|_cvol|_imag|_mimage|_mlog|_pmspare|_rimage|_rmeta"
    r"|_tdata|_tmeta|_vdata|_vorigin|_wcorig)"
)
_TAG: Final = re.compile(r"[a-zA-Z0-9_+.][a-zA-Z0-9_+.\-/=!:&#]{0,1022}")


@dataclass(frozen=True, slots=True)
class CreateLv:
    """A linear volume, inactive; nothing is written into it.  LogicalVolumeAlreadyExists (604)
    if there is one of that name.
    """

    name: str
    size: int
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExtendLv:
    """`size` is the whole size, at least."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class ReduceLv:
    """`size` is the whole size, at most (rounded up to extents)."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class RemoveLv:
    name: str


@dataclass(frozen=True, slots=True)
class RetagLv:
    """`remove` goes first: a tag in both is there afterwards."""

    name: str
    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RetagVg:
    """`remove` goes first: a tag in both is there afterwards."""

    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()


Change = CreateLv | ExtendLv | ReduceLv | RemoveLv | RetagLv | RetagVg


def invalid(change: Change, vg: str) -> AgentError | None:
    """What lvm would refuse whatever the group is like."""
    if isinstance(change, CreateLv):
        reason = _bad_name(change.name) or _bad_tags(change.tags) or _bad_size(change.size)
        if reason:
            return CannotCreateLogicalVolume(vg=vg, lv=change.name, reason=reason)
    elif isinstance(change, ExtendLv | ReduceLv):
        if reason := _bad_size(change.size):
            facts = {"vg": vg, "lv": change.name, "size": change.size}
            return LogicalVolumeExtendError(**facts, reason=reason)
    elif isinstance(change, RetagLv | RetagVg) and (reason := _bad_tags(change.add)):
        lv = change.name if isinstance(change, RetagLv) else ""
        return LogicalVolumeReplaceTagError(vg=vg, lv=lv, reason=reason)
    return None


def retagged(tags: Sequence[str], change: RetagLv | RetagVg) -> tuple[str, ...]:
    """The tags afterwards, in lvm's order: new ones last."""
    kept = [tag for tag in tags if tag not in change.remove or tag in change.add]
    return (*kept, *dict.fromkeys(tag for tag in change.add if tag not in kept))


def extents(size: int, group: VolumeGroup) -> int:
    """`size` bytes in extents, rounded up."""
    return -(-size // group.extent_size)


def _bad_name(name: str) -> str:
    if not _NAME.fullmatch(name) or _RESERVED.match(name):
        return f"lvm knows no such name as {name!r}"
    return ""


def _bad_tags(tags: Sequence[str]) -> str:
    bad = [tag for tag in tags if not _TAG.fullmatch(tag)]
    return f"lvm knows no such tag as {bad[0]!r}" if bad else ""


def _bad_size(size: int) -> str:
    return "" if size > 0 else f"a size of {size} bytes"
