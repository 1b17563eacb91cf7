# SPDX-License-Identifier: GPL-2.0-or-later
"""The volume groups on the devices that this host may use: find, make, grow, remove them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.errors import (
    CommandTimeout,
    CouldNotResizePhysicalVolume,
    LvmCommandError,
    NoSuchPhysicalVolume,
    TooManyPVsInVG,
    VolumeGroupAlreadyExists,
    VolumeGroupCreateError,
    VolumeGroupDoesNotExist,
    VolumeGroupExtendError,
    VolumeGroupReduceError,
    VolumeGroupRemoveError,
)
from vdsm_storage.lvm import moves
from vdsm_storage.lvm.activation import DeviceMapper
from vdsm_storage.lvm.archive import Archive
from vdsm_storage.lvm.cache import CachedGroup
from vdsm_storage.lvm.changes import RemoveLv
from vdsm_storage.lvm.checks import Checks, forbid_metadata_pv, is_domain
from vdsm_storage.lvm.command import Lvm
from vdsm_storage.lvm.devices import same
from vdsm_storage.lvm.group import Group
from vdsm_storage.lvm.model import PhysicalVolume, VolumeGroup
from vdsm_storage.lvm.report import FULL, group_from_full_report
from vdsm_storage.lvm.scan import Ask, Found, Scanner, groups_of

MOST_DEVICES: Final = 10
EXTENT: Final = "128m"
AREAS: Final = ("--metadatasize", "128m", "--metadatacopies", "2", "--metadataignore", "y")

log = logging.getLogger("lvm.groups")


class Groups:
    """`candidates` gives the devices that volume groups are looked for on.

    `ask(key, call, timeout)` runs a read of one device in a lane of its own (Lanes.submit);
    `scan_timeout` seconds are what a device may take to answer.
    """

    def __init__(
        self, lvm: Lvm, candidates: Callable[[], Sequence[str]], ask: Ask, scan_timeout: float
    ) -> None:
        self._lvm = lvm
        self._candidates = candidates
        self._scanner = Scanner(ask, scan_timeout)
        self._archive = Archive(os.path.join(lvm.directory, "archive"))
        self._checks = Checks(lvm, self._scanner, candidates)
        self._mutex = threading.Lock()
        self._groups: dict[str, Group] = {}

    # -- finding -----------------------------------------------------------------------------

    def scan(self, devices: Sequence[str] | None = None) -> Mapping[str, Found]:
        """The groups on `devices` (all candidates by default), by id.

        Two groups may have one name (a copied LUN).  A device that does not answer in time is
        left out, and not asked again while it owes the answer.
        """
        seen = self._scanner.look(self._candidates() if devices is None else devices)
        return {found.uuid: found for found in groups_of(seen)}

    def find(self, name: str) -> Group:
        """The one object of that group in this process.  Raises VolumeGroupDoesNotExist (506),
        UnexpectedVolumeGroupMetadata (616) for a group that is there twice.
        """
        with self._mutex:
            group = self._groups.get(name)
        if group is not None:
            try:
                group.read()
            except VolumeGroupDoesNotExist:
                self._drop(name)
                raise
            return group
        group = self._make(name)
        group.read()
        with self._mutex:
            return self._groups.setdefault(name, group)

    def find_uuid(self, uuid: str) -> Group:
        """By the group's id.  Raises VolumeGroupDoesNotExist (506)."""
        found = self.scan().get(uuid)
        if found is None:
            raise VolumeGroupDoesNotExist(vg=uuid)
        return self.find(found.name)

    def _make(self, name: str) -> Group:
        def report(devices: Sequence[str]) -> VolumeGroup:
            return group_from_full_report(self._lvm.run([*FULL, name], devices, vg=name).stdout)

        return Group(name, CachedGroup(name, self._labelled, report), self._lvm, self._archive)

    def _labelled(self) -> list[str]:
        """The candidates that answer and are physical volumes."""
        seen = self._scanner.look(self._candidates())
        return [device for device, what in seen.items() if what.label is not None]

    def _drop(self, name: str) -> None:
        with self._mutex:
            self._groups.pop(name, None)

    # -- making and removing -----------------------------------------------------------------

    def create(self, name: str, devices: Sequence[str], tags: Sequence[str], force: bool) -> str:
        """Make a group as the format of block domains wants it; gives its id.

        Nothing is changed when a check fails: 389 too many devices, 505 the name is taken, 606
        not there, 607 partitions, 518 sectors of another size, 601 the device is not free.  `force`
        takes devices with file systems, and those of groups that are no storage domains, from
        which they are torn; never one of a group with a tag of storage domains.  What a crash
        leaves is physical volumes of no group, which `create` takes without `force`.
        """
        if len(devices) > MOST_DEVICES:
            raise TooManyPVsInVG(vg=name, count=len(devices), limit=MOST_DEVICES)
        found = [group for group in self.scan().values() if group.name == name]
        if found:
            there = ", ".join(device or "?" for device in found[0].devices.values())
            raise VolumeGroupAlreadyExists(vg=name, devices=there)
        self._checks.usable(devices, force)
        added = [word for tag in tags for word in ("--addtag", tag)]
        options = ["--physicalextentsize", EXTENT, "--setautoactivation", "n", *added]
        try:
            self._make_volumes(name, devices, force)
            self._run(["pvchange", "--metadataignore", "n", devices[0]], devices, name)
            argv = ["vgcreate", "--autobackup", "n", *options, name, *devices]
            self._run(argv, devices, name)
        except (LvmCommandError, CommandTimeout) as error:
            self._unmake_volumes(name, devices)
            listed = ", ".join(devices)
            raise VolumeGroupCreateError(vg=name, devices=listed, reason=_words(error)) from error
        self._drop(name)
        made = [group.uuid for group in self.scan(devices).values() if group.name == name]
        if not made:
            reason = "lvm reports success, but it cannot be found"
            raise VolumeGroupCreateError(vg=name, devices=", ".join(devices), reason=reason)
        return made[0]

    def remove(self, name: str) -> None:
        """Remove a group with its volumes, and make its devices free.

        A group that is no storage domain must be empty, and no volume may be active here.
        Raises VolumeGroupRemoveError (508).
        """
        group = self.find(name)
        with group.exclusive():
            model = group.read()
            if model.lvs and not is_domain(model.tags):
                raise VolumeGroupRemoveError(
                    vg=name, reason="it is no storage domain, and has volumes: remove them first"
                )
            active = DeviceMapper(self._lvm).active(name)
            if active:
                reason = f"volumes are active: {', '.join(sorted(active))}"
                raise VolumeGroupRemoveError(vg=name, reason=reason)
            devices = self._devices(group, model)
            if model.lvs:
                group.apply(*(RemoveLv(lv) for lv in model.lvs))
            text, model = group.metadata.text()
            self._archive.keep(name, model.seqno, text)
            try:
                self._run(["vgremove", "--yes", name], devices, name, group)
            except (LvmCommandError, CommandTimeout) as error:
                if self._is_there(group):
                    raise VolumeGroupRemoveError(vg=name, reason=_words(error)) from error
            self._drop(name)
            self._unmake_volumes(name, devices)

    def extend(self, name: str, devices: Sequence[str], force: bool) -> None:
        """Add devices; their metadata areas stay unused.  Those that it has already are passed
        over.  Checks and errors are those of `create`; VolumeGroupExtendError (503).
        """
        group = self.find(name)
        with group.exclusive():
            model = group.read()
            present = self._devices(group, model)
            new = [d for d in devices if not any(same(d, there) for there in present)]
            if not new:
                return
            count = len(model.pvs) + len(new)
            if count > MOST_DEVICES:
                raise TooManyPVsInVG(vg=name, count=count, limit=MOST_DEVICES)
            self._checks.usable(new, force)
            try:
                self._make_volumes(name, new, force)
                argv = ["vgextend", "--autobackup", "n", name, *new]
                self._run(argv, [*present, *new], name, group)
            except (LvmCommandError, CommandTimeout) as error:
                group.forget()
                if len(group.read().pvs) < count:
                    self._unmake_volumes(name, new)
                    reason = _words(error)
                    listed = ", ".join(new)
                    raise VolumeGroupExtendError(vg=name, devices=listed, reason=reason) from error
            group.forget()

    def reduce(self, name: str, device: str) -> None:
        """Take an empty device out of the group and make it free.

        Raises VolumeGroupReduceError (519); ForbiddenPhysicalVolumeOperation (617) for the device
        that the metadata is on; NoSuchPhysicalVolume (619).
        """
        group = self.find(name)
        with group.exclusive():
            model = group.read()
            pv = self._volume(group, model, device)
            forbid_metadata_pv(model, pv, device)
            if any(s.pv in (pv.name, "") for lv in model.lvs.values() for s in lv.segments):
                raise VolumeGroupReduceError(
                    vg=name, device=device, reason="it has data: move that away first"
                )
            try:
                argv = ["vgreduce", "--autobackup", "n", name, device]
                self._run(argv, self._devices(group, model), name, group)
            except (LvmCommandError, CommandTimeout) as error:
                group.forget()
                if pv.uuid in {volume.uuid for volume in group.read().pvs.values()}:
                    reason = _words(error)
                    raise VolumeGroupReduceError(vg=name, device=device, reason=reason) from error
            group.forget()
            self._unmake_volumes(name, [device])

    def resize(self, name: str, device: str) -> int:
        """Let the group use all of a device that grew; gives the bytes that it has there.

        Raises CouldNotResizePhysicalVolume (615), NoSuchPhysicalVolume (619).
        """
        group = self.find(name)
        with group.exclusive():
            model = group.read()
            uuid = self._volume(group, model, device).uuid
            try:
                self._run(["pvresize", device], self._devices(group, model), name, group)
            except (LvmCommandError, CommandTimeout) as error:
                raise CouldNotResizePhysicalVolume(device=device, reason=_words(error)) from error
            group.forget()
            now = group.read()
            count = next(pv.pe_count for pv in now.pvs.values() if pv.uuid == uuid)
            return count * now.extent_size

    # -- moving data -------------------------------------------------------------------------

    def move(
        self,
        name: str,
        source: str,
        destinations: Sequence[str],
        progress: Callable[[float], None] | None = None,
        cancel: Cancel | None = None,
    ) -> None:
        """Move all data of `source` to `destinations` (to any other device when there are none).

        Needs device-mapper.  What an interrupted move left is aborted first; what it had moved
        stays moved.  `progress` gets percents.  Raises CouldNotMovePVData (618), 617 for the
        device that the metadata is on, 619, 620, 504, ActionStopped when cancelled.
        """
        group = self.find(name)
        with group.exclusive():
            moves.move(
                self._lvm, group, moves.Request(source, destinations, progress or _no), cancel
            )

    def abort_move(self, name: str, source: str) -> bool:
        """End what an interrupted move off `source` left; whether all of it had been moved.

        Raises CouldNotMovePVData (618).
        """
        group = self.find(name)
        with group.exclusive():
            moves.abort(self._lvm, group, source)
            model, devices = group.read(), group.devices()
            volumes = [pv for pv in model.pvs.values() if same(devices.get(pv.uuid, ""), source)]
            return not any(moves.used(model, pv) for pv in volumes)

    def can_create(self, device: str) -> str | None:
        """None when `create` would take the device without `force`, or why it would not."""
        return self.can_create_on([device])[device]

    def can_create_on(self, devices: Sequence[str]) -> Mapping[str, str | None]:
        """`can_create` of many devices, which are looked at together."""
        return self._checks.why_not(devices)

    # -- inside ------------------------------------------------------------------------------

    def _run(
        self, argv: Sequence[str], devices: Sequence[str], vg: str, group: Group | None = None
    ) -> None:
        fence = group.fence if group is not None else None
        self._lvm.run(argv, list(dict.fromkeys(devices)), vg=vg, fence=fence)

    def _make_volumes(self, vg: str, devices: Sequence[str], force: bool) -> None:
        forced = ["--yes", "-ff"] if force else []
        self._run(["pvcreate", *forced, *AREAS, *devices], devices, vg)

    def _unmake_volumes(self, vg: str, devices: Sequence[str]) -> None:
        """Free devices that are in no group; lvm refuses others.  A label that stays does no
        harm: the device is taken as free.
        """
        try:
            self._run(["pvremove", *devices], devices, vg)
        except (LvmCommandError, CommandTimeout) as error:
            log.warning("labels stay on %s: %s", ", ".join(devices), error)

    def _is_there(self, group: Group) -> bool:
        group.forget()
        try:
            group.read()
        except VolumeGroupDoesNotExist:
            return False
        return True

    def _devices(self, group: Group, model: VolumeGroup) -> list[str]:
        return sorted(group.all_devices(model).values())

    def _volume(self, group: Group, model: VolumeGroup, device: str) -> PhysicalVolume:
        """The group's physical volume on a device.  Raises NoSuchPhysicalVolume (619)."""
        devices = group.devices()
        for pv in model.pvs.values():
            if pv.uuid in devices and same(devices[pv.uuid], device):
                return pv
        there = ", ".join(sorted(devices.values()))
        raise NoSuchPhysicalVolume(vg=group.name, device=device, devices=there)


def _words(error: LvmCommandError | CommandTimeout) -> str:
    return str(error.facts["reason"] if isinstance(error, LvmCommandError) else error)


def _no(_: float) -> None:
    return
