# SPDX-License-Identifier: GPL-2.0-or-later
"""Slowing a guest's writes for a while, without losing the limits that its user gave the disk.

The user's limits are kept in a file a disk, in a directory that a boot empties as it ends the
guests, from before the disk is slowed until it has them again: an agent that is killed meanwhile
finds them there.  Who changes limits meanwhile changes those; in force is the lower of both.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

from vdsm_storage.base import files
from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.host.libvirt_disks import LibvirtDisks
from vdsm_storage.host.libvirt_model import VmError, Why

TOTAL: Final = "total_bytes_sec"
WRITE: Final = "write_bytes_sec"
# A burst would go beyond the limit; libvirt refuses one that is below it.
BURSTS: Final = (
    "total_bytes_sec_max", "write_bytes_sec_max",
    "total_bytes_sec_max_length", "write_bytes_sec_max_length",
)  # fmt: skip
_SUFFIX: Final = ".json"

log = logging.getLogger("vms.throttle")

Limits = Mapping[str, int]


class Throttles:
    """`directory` is made if it is missing.  Methods raise VmError and 59, and OSError."""

    def __init__(self, directory: str, libvirt: LibvirtDisks) -> None:
        self._directory = directory
        self._libvirt = libvirt
        self._mutex = threading.Lock()
        self._turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by VM
        os.makedirs(directory, mode=0o755, exist_ok=True)
        self._users: dict[tuple[str, str], Limits] = dict(self._load())
        self._lowered: dict[tuple[str, str], int] = {}

    def lowered(self) -> Sequence[tuple[str, str]]:
        """(VM, target) of all disks that are slowed."""
        with self._mutex:
            return list(self._users)

    def user(self, vm: str, disk: str) -> Limits | None:
        """What the user allows a disk that is slowed; None for one that is not."""
        with self._mutex:
            return self._users.get((vm, disk))

    def of(self, vm: str) -> Mapping[str, Limits]:
        """What the user allows, of all disks of a VM that are slowed."""
        with self._mutex:
            return {disk: limits for (each, disk), limits in self._users.items() if each == vm}

    def lower(self, vm: str, disk: str, rate: int) -> None:
        """Let the guest write `rate` bytes a second at most."""
        with self._turns[vm]:
            limits = self.user(vm, disk)
            if limits is None:
                limits = self._libvirt.io_tune(vm, disk)
                self._keep(vm, disk, limits)
            self._lowered[vm, disk] = rate
            self._libvirt.set_io_tune(vm, disk, slowed(limits, rate))

    def lift(self, vm: str, disk: str) -> None:
        """Give the disk its user's limits back; nothing happens to one that is not slowed."""
        with self._turns[vm]:
            limits = self.user(vm, disk)
            if limits is None:
                return
            try:
                self._libvirt.set_io_tune(vm, disk, restored(limits))
            except VmError as error:
                if error.why is not Why.NO_VM:
                    raise
            self._forget(vm, disk)

    def set_limits(self, vm: str, disk: str, limits: Limits) -> None:
        """The user's limits, whether the disk is slowed or not."""
        with self._turns[vm]:
            before = self.user(vm, disk)
            if before is None:
                self._libvirt.set_io_tune(vm, disk, limits)
                return
            rate = self._lowered.get((vm, disk))
            wanted = {**before, **limits}
            now = slowed(wanted, rate) if rate else restored(wanted)
            self._libvirt.set_io_tune(vm, disk, now)
            self._keep(vm, disk, wanted)

    def forget(self, vm: str) -> None:
        """It has ended."""
        with self._mutex:
            gone = [disk for each, disk in self._users if each == vm]
        for disk in gone:
            self._forget(vm, disk)
        self._turns.pop(vm, None)

    # -- on disk -----------------------------------------------------------------------------

    def _keep(self, vm: str, disk: str, limits: Limits) -> None:
        files.write_volatile(self._path(vm, disk), json.dumps(dict(limits)).encode(), 0o600)
        with self._mutex:
            self._users[vm, disk] = limits

    def _forget(self, vm: str, disk: str) -> None:
        files.unlink_if_there(self._path(vm, disk))
        with self._mutex:
            self._users.pop((vm, disk), None)
            self._lowered.pop((vm, disk), None)

    def _path(self, vm: str, disk: str) -> str:
        if not is_uuid(vm) or not disk.isalnum():
            raise ValueError(f"{vm!r} and {disk!r} cannot name a file")
        return os.path.join(self._directory, f"{vm}.{disk}{_SUFFIX}")

    def _load(self) -> dict[tuple[str, str], Limits]:
        found: dict[tuple[str, str], Limits] = {}
        for name in os.listdir(self._directory):
            vm, _, disk = name.removesuffix(_SUFFIX).partition(".")
            if not name.endswith(_SUFFIX) or not is_uuid(vm):
                continue
            try:
                with open(os.path.join(self._directory, name), "rb") as file:
                    limits = {str(key): int(value) for key, value in json.load(file).items()}
            except (OSError, ValueError, TypeError, AttributeError) as error:
                # Written in one step, so only a broken disk does that.
                log.error("%s cannot be read (%s): the disk gets no limits", name, error)
                limits = {}
            found[vm, disk] = limits
        return found


def slowed(limits: Limits, rate: int) -> dict[str, int]:
    """The limits, with `rate` bytes a second for writes if that is lower.

    libvirt takes no limit of writes beside one of reads and writes together: then that is lowered.
    A limit that is 0 is none.
    """
    key = TOTAL if limits.get(TOTAL) else WRITE
    now = limits.get(key, 0)
    if now and now <= rate:
        return restored(limits)
    return {**restored(limits), **{burst: 0 for burst in BURSTS if limits.get(burst)}, key: rate}


def restored(limits: Limits) -> dict[str, int]:
    """All that must be said: libvirt keeps what is left out of a group of limits as it is, or
    clears it, as others of the group are named or not."""
    found = {
        f"{what}_{unit}_sec": 0 for what in ("total", "read", "write") for unit in ("bytes", "iops")
    }
    return {**found, **limits}
