# SPDX-License-Identifier: GPL-2.0-or-later
"""What a volume group looks like after several callers' changes.  Pure.

Each caller's changes are a transaction: all of them happen, or none and the caller is told why;
others are not disturbed.  Transactions see the effects of the ones before them.
"""

from __future__ import annotations

import dataclasses
import secrets
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from vdsm_storage.errors import (
    AgentError,
    LogicalVolumeAlreadyExists,
    LogicalVolumeDoesNotExist,
    UnexpectedVolumeGroupMetadata,
    VolumeGroupSizeError,
)
from vdsm_storage.lvm.allocation import Free, free_areas, grown, shrunk
from vdsm_storage.lvm.changes import (
    Change,
    CreateLv,
    ExtendLv,
    ReduceLv,
    RemoveLv,
    RetagLv,
    RetagVg,
    extents,
    invalid,
    retagged,
)
from vdsm_storage.lvm.model import LogicalVolume, VolumeGroup

Transaction = Sequence[Change]

_ID_GROUPS: Final = (6, 4, 4, 4, 4, 4, 6)  # lvm2: lib/uuid/uuid.c


def new_id() -> str:
    """A random id as lvm makes them for volumes."""
    letters = string.ascii_letters + string.digits
    return "-".join("".join(secrets.choice(letters) for _ in range(n)) for n in _ID_GROUPS)


@dataclass(frozen=True)
class Plan:
    """`errors` has one entry a transaction, None where it can be done.

    `touched` are the volumes, by transaction, that it names ("" for the group's own tags).
    """

    before: VolumeGroup
    after: VolumeGroup
    errors: Sequence[AgentError | None]
    touched: Sequence[Sequence[str]]

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return next(self.differences(), None) is not None or self.retags_group

    @property
    def retags_group(self) -> bool:
        return set(self.before.tags) != set(self.after.tags)

    def differences(self) -> Iterator[tuple[LogicalVolume | None, LogicalVolume | None]]:
        """(before, after) of each volume that changes; None where there is none."""
        for name in dict.fromkeys(n for names in self.touched for n in names if n):
            old, new = self.before.lvs.get(name), self.after.lvs.get(name)
            if old != new:
                yield old, new

    def reached(self, group: VolumeGroup, transaction: int) -> bool:
        """Whether `group`, read anew, is as this transaction (and those after it) want it."""
        return all(
            _alike(self.after.lvs.get(name), group.lvs.get(name))
            if name
            else set(self.after.tags) == set(group.tags)
            for name in self.touched[transaction]
        )


def make_plan(
    group: VolumeGroup, transactions: Sequence[Transaction], ids: Callable[[], str] = new_id
) -> Plan:
    state = _State(group, {}, group.tags, free_areas(group), ids)
    errors: list[AgentError | None] = []
    touched: list[Sequence[str]] = []
    for transaction in transactions:
        attempt = dataclasses.replace(state, changed=dict(state.changed))
        try:
            for change in transaction:
                attempt.do(change)
        except AgentError as error:
            errors.append(error)
            touched.append(())
            continue
        state = attempt
        errors.append(None)
        touched.append(["" if isinstance(c, RetagVg) else c.name for c in transaction])
    return Plan(group, state.result(), errors, touched)


@dataclass
class _State:
    """`changed` lies over the group's volumes; None where one is removed."""

    group: VolumeGroup
    changed: dict[str, LogicalVolume | None]
    tags: tuple[str, ...]
    free: Free | None
    ids: Callable[[], str]

    def result(self) -> VolumeGroup:
        lvs = dict(self.group.lvs)
        for name, lv in self.changed.items():
            old = lvs.get(name)
            if lv is None:
                lvs.pop(name, None)
            elif old is not None and old.uuid != lv.uuid:  # made anew: it stands at the end
                del lvs[name]
                lvs[name] = lv
            elif old is not None:
                lvs[name] = dataclasses.replace(lv, tags=_in_order(old.tags, lv.tags))
            else:
                lvs[name] = lv
        tags = _in_order(self.group.tags, self.tags)
        return dataclasses.replace(self.group, lvs=lvs, tags=tags, seqno=self.group.seqno + 1)

    def do(self, change: Change) -> None:
        """Raises what the caller is told."""
        if error := invalid(change, self.group.name):
            raise error
        if isinstance(change, RetagVg):
            self.tags = retagged(self.tags, change)
        elif isinstance(change, CreateLv):
            self._create(change)
        elif isinstance(change, RemoveLv):
            self._remove(change.name)
        else:
            self._alter(change, self._lv(change.name))

    def _find(self, name: str) -> LogicalVolume | None:
        return self.changed[name] if name in self.changed else self.group.lvs.get(name)

    def _lv(self, name: str) -> LogicalVolume:
        lv = self._find(name)
        if lv is None or not lv.visible:
            raise LogicalVolumeDoesNotExist(vg=self.group.name, lv=name)
        return lv

    def _create(self, change: CreateLv) -> None:
        if self._find(change.name) is not None:
            raise LogicalVolumeAlreadyExists(vg=self.group.name, lv=change.name)
        empty = LogicalVolume(change.name, self.ids(), tuple(dict.fromkeys(change.tags)), ())
        self.changed[change.name] = self._larger(empty, extents(change.size, self.group))

    def _remove(self, name: str) -> None:
        lv = self._find(name)
        if lv is not None:
            self._give(lv, 0)
            self.changed[name] = None

    def _alter(self, change: ExtendLv | ReduceLv | RetagLv, lv: LogicalVolume) -> None:
        if isinstance(change, RetagLv):
            tags = retagged(lv.tags, change)
            if set(tags) != set(lv.tags):
                self.changed[lv.name] = dataclasses.replace(lv, tags=tags)
            return
        wanted = extents(change.size, self.group)
        if isinstance(change, ExtendLv) and wanted > lv.extents:
            self.changed[lv.name] = self._larger(lv, wanted)
        elif isinstance(change, ReduceLv) and wanted < lv.extents:
            self.changed[lv.name] = self._give(lv, wanted)

    def _larger(self, lv: LogicalVolume, wanted: int) -> LogicalVolume:
        self._plain(lv)
        if self.free is None:
            raise self._moving()
        found = self.free.take(wanted - lv.extents, lv.segments[-1] if lv.segments else None)
        if found is None:
            size = self.group.extent_size
            raise VolumeGroupSizeError(
                vg=self.group.name,
                free=self.free.extents * size,
                size=(wanted - lv.extents) * size,
            )
        more, self.free = found
        return dataclasses.replace(lv, segments=grown(lv, more))

    def _give(self, lv: LogicalVolume, wanted: int) -> LogicalVolume:
        self._plain(lv)
        kept, cut = shrunk(lv, wanted)
        if self.free is not None:
            self.free = self.free.give(cut)
        return dataclasses.replace(lv, segments=kept)

    def _plain(self, lv: LogicalVolume) -> None:
        if not lv.visible or not all(segment.pv in self.group.pvs for segment in lv.segments):
            raise self._moving(lv.name)

    def _moving(self, lv: str = "") -> AgentError:
        what = f"logical volume {lv} is not a plain one" if lv else "data is being moved"
        reason = f"{what}; end or abort the move of its data first"
        return UnexpectedVolumeGroupMetadata(vg=self.group.name, reason=reason)


def _in_order(old: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
    """Tags that went and came again are no change."""
    return old if set(old) == set(new) else new


def _alike(wanted: LogicalVolume | None, found: LogicalVolume | None) -> bool:
    """Ids and places are lvm's business when its own command made them."""
    if wanted is None or found is None:
        return wanted is found
    return wanted.extents == found.extents and set(wanted.tags) == set(found.tags)
