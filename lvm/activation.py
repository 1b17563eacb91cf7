# SPDX-License-Identifier: GPL-2.0-or-later
"""Logical volumes as devices of this host.

`Activation` is what the domains ask for; `DeviceMapper` is the real one.  What is active is read
from sysfs, without a command: device-mapper names a volume's device `<vg>-<lv>`, a hyphen inside a
name doubled, and its uuid is `LVM-` and the ids of group and volume, 32 characters each.  A host
may have thousands of these, so that volumes whose names are known are looked at by these.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from vdsm_storage.errors import (
    CannotActivateLogicalVolume,
    CannotDeactivateLogicalVolume,
    LogicalVolumeRefreshError,
    LvmCommandError,
)
from vdsm_storage.lvm.command import Lvm
from vdsm_storage.lvm.model import VolumeGroup

SECTOR: Final = 512  # bytes; the unit of sysfs, whatever the device has
UNKNOWN: Final = -1  # open count that cannot be told without a command
_PREFIX: Final = "LVM-"
_ID: Final = 32  # characters of an id without hyphens
_IN_USE: Final = ("in use", "is used by another device")  # lvm2: lib/activate/activate.c


@dataclass(frozen=True, slots=True)
class ActiveLv:
    """`size` in bytes; `open` is how often it is open, -1 when that is not known."""

    size: int
    open: int = UNKNOWN


class GroupView(Protocol):
    """What activating needs of a group (lvm.group.Group)."""

    @property
    def name(self) -> str: ...

    def devices(self) -> Mapping[str, str]: ...

    def read(self) -> VolumeGroup: ...


class Activation(Protocol):
    def path(self, vg: str, lv: str) -> str:
        """Of the volume's device; it exists while the volume is active."""

    def activate(self, group: GroupView, lvs: Sequence[str]) -> None:
        """Make the volumes' devices; fine if they are there.  Raises 558."""

    def deactivate(self, group: GroupView, lvs: Sequence[str]) -> None:
        """Take the devices away; fine if they are gone.  Raises 552 for one that is open."""

    def refresh(self, group: GroupView, lvs: Sequence[str]) -> None:
        """Give those that are active their present size.  Raises 556."""

    def active(self, vg: str, lvs: Sequence[str] = ()) -> Mapping[str, ActiveLv]:
        """The active volumes of a group, by name.  Runs no command and waits for no storage.

        With `lvs` others may be left out, which is quick where all of these are active.
        """


def device_number(path: str) -> int:
    return os.stat(path).st_rdev


class DeviceMapper:
    """`sysfs`, `dev` and `number` are those of the system but in tests."""

    def __init__(
        self,
        lvm: Lvm,
        sysfs: str = "/sys",
        dev: str = "/dev",
        number: Callable[[str], int] = device_number,
    ) -> None:
        self._lvm = lvm
        self._block = os.path.join(sysfs, "block")
        self._numbers = os.path.join(sysfs, "dev", "block")
        self._dev = dev
        self._number = number

    def path(self, vg: str, lv: str) -> str:
        return f"{self._dev}/{vg}/{lv}"

    def activate(self, group: GroupView, lvs: Sequence[str]) -> None:
        def there(lv: str) -> bool:
            return os.path.exists(self.path(group.name, lv))

        wanted = [lv for lv in lvs if not there(lv)]
        reason = self._change(group, ["--activate", "y", "--ignoreactivationskip"], wanted)
        for lv in wanted:
            if not there(lv):
                why = reason or f"{self.path(group.name, lv)} did not appear; is udev at work?"
                raise CannotActivateLogicalVolume(vg=group.name, lv=lv, reason=why)

    def deactivate(self, group: GroupView, lvs: Sequence[str]) -> None:
        active = self.active(group.name, lvs)
        wanted = [lv for lv in lvs if lv in active]
        reason = self._change(group, ["--activate", "n"], wanted)
        if not wanted:
            return
        active = self.active(group.name, wanted)
        left = [lv for lv in wanted if lv in active]
        if left:
            why = reason or "it is still there"
            if any(words in why for words in _IN_USE):
                why = f"it is in use ({why}): stop what has it open"
            raise CannotDeactivateLogicalVolume(vg=group.name, lv=", ".join(left), reason=why)

    def refresh(self, group: GroupView, lvs: Sequence[str]) -> None:
        model = group.read()
        active = self.active(group.name, lvs)
        wanted = [lv for lv in lvs if lv in active and lv in model.lvs]
        reason = self._change(group, ["--refresh"], wanted)
        active = self.active(group.name, wanted) if wanted else {}
        for lv in wanted:
            size = model.size_of(lv)
            if lv in active and active[lv].size < size:
                why = reason or f"it has {active[lv].size} bytes, not {size}"
                raise LogicalVolumeRefreshError(vg=group.name, lv=lv, reason=why)
        if reason:
            raise LogicalVolumeRefreshError(vg=group.name, lv=", ".join(wanted), reason=reason)

    def active(self, vg: str, lvs: Sequence[str] = ()) -> Mapping[str, ActiveLv]:
        if lvs:
            named = self._look(vg, self._named(vg, lvs))
            if named.keys() >= set(lvs):
                return named
        return self._look(vg, self._mapped())

    def _look(self, vg: str, devices: Iterable[str]) -> dict[str, ActiveLv]:
        """Which of the devices, directories of sysfs, are volumes of the group."""
        found: dict[str, ActiveLv] = {}
        for device in devices:
            # A device may go while it is looked at.
            with contextlib.suppress(OSError, ValueError):
                names = split_name(_read(device, "dm/name"), _read(device, "dm/uuid"))
                if names is not None and names[0] == vg:
                    found[names[1]] = ActiveLv(int(_read(device, "size")) * SECTOR)
        return found

    def _mapped(self) -> Iterator[str]:
        names = os.listdir(self._block)
        return (os.path.join(self._block, name) for name in names if name.startswith("dm-"))

    def _named(self, vg: str, lvs: Sequence[str]) -> Iterator[str]:
        for lv in lvs:
            with contextlib.suppress(OSError):
                number = self._number(self.path(vg, lv))
                yield os.path.join(self._numbers, f"{os.major(number)}:{os.minor(number)}")

    def _change(self, group: GroupView, options: Sequence[str], lvs: Sequence[str]) -> str:
        """One command for all; what lvm says when it fails."""
        if not lvs:
            return ""
        names = [f"{group.name}/{lv}" for lv in lvs]
        argv = ["lvchange", "--yes", "--autobackup", "n", *options, *names]
        try:
            self._lvm.run(argv, sorted(group.devices().values()), vg=group.name, driver=True)
        except LvmCommandError as error:
            return str(error.facts["reason"])
        return ""


def _read(device: str, name: str) -> str:
    with open(os.path.join(device, name)) as file:
        return file.read().strip()


def split_name(name: str, uuid: str) -> tuple[str, str] | None:
    """(group, volume) of a device of LVM; None for other devices and for parts of volumes.

    >>> split_name("vg--1-lv--2", "LVM-" + 64 * "x")
    ('vg-1', 'lv-2')
    """
    if not uuid.startswith(_PREFIX) or len(uuid) != len(_PREFIX) + 2 * _ID:
        return None
    at = 0
    while (at := name.find("-", at)) >= 0:
        end = at
        while name.startswith("-", end):
            end += 1
        if (end - at) % 2:  # the one that separates: an odd number of hyphens
            return _single(name[: end - 1]), _single(name[end:])
        at = end
    return None


def _single(name: str) -> str:
    return name.replace("--", "-")
