# SPDX-License-Identifier: GPL-2.0-or-later
"""Which of the devices of this host belong to a volume group, found by reading their labels."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vdsm_storage.errors import (
    InaccessiblePhysDev,
    UnexpectedVolumeGroupMetadata,
    VolumeGroupDoesNotExist,
    VolumeGroupScanError,
)
from vdsm_storage.lvm.labels import (
    DamageError,
    HeaderDamaged,
    Label,
    LabelDamaged,
    find_label,
    read_header,
    read_text_start,
)
from vdsm_storage.lvm.text import name_and_id

START: Final = 512  # bytes of a text that are sure to hold the group's name and id
GONE: Final = (errno.ENOENT, errno.ENXIO, errno.ENODEV)

log = logging.getLogger("lvm.places")


@dataclass(frozen=True)
class Places:
    """Where things are now.

    `labels` has every physical volume that was seen, of whatever group; `holders` are those
    whose metadata areas name the group.
    """

    labels: Mapping[str, Sequence[Label]]
    holders: Sequence[Label]

    def devices(self, uuids: Iterable[str]) -> dict[str, str]:
        """PV uuid -> device, without those that were not seen."""
        return {uuid: self.labels[uuid][0].device for uuid in uuids if uuid in self.labels}

    def doubles(self, uuids: Iterable[str]) -> list[str]:
        """All devices that say to be one same volume of `uuids`."""
        rows = (self.labels.get(uuid, ()) for uuid in uuids)
        return [label.device for row in rows if len(row) > 1 for label in row]


def locate(vg: str, devices: Sequence[str]) -> Places:
    """Look at all `devices` for the group.

    Raises VolumeGroupDoesNotExist when none of them has it, and if some of them could not be
    looked at, rather the error that tells which.
    """
    search = _Search(vg)
    for device in _distinct(devices, search):
        search.look(device)
    search.check()
    return Places(search.labels, search.holders)


def _distinct(devices: Sequence[str], search: _Search) -> list[str]:
    """One name a device; several names may be links to one."""
    found: dict[tuple[int, int], str] = {}
    for device in devices:
        try:
            status = os.stat(device)
        except OSError as error:
            search.unreadable(device, error)
            continue
        key = (0, status.st_rdev) if status.st_rdev else (status.st_dev, status.st_ino)
        found.setdefault(key, device)
    return list(found.values())


@dataclass
class _Search:
    vg: str
    labels: dict[str, list[Label]] = field(default_factory=dict)
    holders: list[Label] = field(default_factory=list)
    ids: dict[str, list[str]] = field(default_factory=dict)  # id of the group -> devices
    errors: dict[str, OSError] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)

    def look(self, device: str) -> None:
        try:
            label = find_label(device)
            if label is not None:
                self.labels.setdefault(label.pv_uuid, []).append(label)
                self._look_at_areas(label)
        except OSError as error:
            self.unreadable(device, error)
        except LabelDamaged as error:
            self._damaged(error)

    def unreadable(self, device: str, error: OSError) -> None:
        log.warning("%s cannot be read: %s", device, error.strerror)
        self.errors[device] = error

    def _damaged(self, error: DamageError) -> None:
        log.warning("%s", error)
        self.damage.append(str(error))

    def _look_at_areas(self, label: Label) -> None:
        held = False
        for area in label.areas:
            try:
                header = read_header(label.device, area)
            except HeaderDamaged as error:
                self._damaged(error)
                continue
            if header.ignored or header.location is None:
                continue
            named = name_and_id(read_text_start(label.device, area, header.location, START))
            if named is None:
                self._damaged(DamageError(f"the metadata text of {label.device} has no beginning"))
            elif named[0] == self.vg:
                self.ids.setdefault(named[1], []).append(label.device)
                held = True
        if held:
            self.holders.append(label)

    def check(self) -> None:
        if len(self.ids) > 1:
            devices = sorted({device for row in self.ids.values() for device in row})
            raise UnexpectedVolumeGroupMetadata(
                vg=self.vg, reason=f"different groups have that name, on {', '.join(devices)}"
            )
        if self.holders:
            return
        if self.damage:
            raise UnexpectedVolumeGroupMetadata(
                vg=self.vg, reason=f"it was not found, but {'; '.join(self.damage)}"
            )
        gone = [device for device, error in self.errors.items() if error.errno in GONE]
        for device, error in self.errors.items():
            if device not in gone:
                raise VolumeGroupScanError(device=device, reason=error.strerror) from error
        if gone:
            raise InaccessiblePhysDev(devices=", ".join(gone))
        raise VolumeGroupDoesNotExist(vg=self.vg)
