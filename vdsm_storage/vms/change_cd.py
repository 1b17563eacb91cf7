# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.changeCD, VM.changeFloppy, and VM.updateDevice for disks.

The new medium is made usable before it is put in, the old one let go once it is out.
"""

from __future__ import annotations

import copy
import logging
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from vdsm_storage.errors import (
    ChangeDiskFailed,
    LibvirtTimeout,
    LibvirtUnavailable,
    NoSuchVM,
    UpdateDeviceFailed,
    VMIsDown,
)
from vdsm_storage.host.libvirt_model import VmError, Why
from vdsm_storage.images import metadata as md
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request
from vdsm_storage.vms import disk_xml, records
from vdsm_storage.vms.choose import element, named
from vdsm_storage.vms.disk_xml import Asked, BadDiskError
from vdsm_storage.vms.drives import Drive, VolumePath, volume_of
from vdsm_storage.vms.keeping import BRIEFLY, DiskTools, Keeping
from vdsm_storage.vms.registry import Definition

CHANGE: Final = "vm.change_medium"
FIXED: Final = ("source", "backingStore", "target", "alias", "address", "iotune")
CDROM, FLOPPY = "cdrom", "floppy"

log = logging.getLogger("vms.media")


@dataclass(frozen=True)
class Change:
    """`path` is used when there is no `volume`; neither empties the drive."""

    vm: str
    name: str
    path: str
    volume: VolumePath | None
    pool: str
    old: VolumePath | None

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Change:
        volumes = {
            key: None if params[key] is None else VolumePath(**params[key])
            for key in ("volume", "old")
        }
        return cls(**{**params, **volumes})

    @property
    def record(self) -> dict[str, str] | None:
        if self.volume is None:
            return None
        pool = {"poolID": self.pool} if self.pool else {}
        return {**pool, **disk_xml.record_of(self.volume)}


class Media:
    def __init__(self, tools: DiskTools, keeping: Keeping) -> None:
        self._tools = tools
        self._keeping = keeping

    def kinds(self) -> tuple[Kind, ...]:
        return (Kind(CHANGE, ("prepared", "changed", "released"), self._run, self._recover),)

    # -- what callers ask --------------------------------------------------------------------

    def change(self, vm: str, spec: str | Mapping[str, Any], device: str) -> None:
        """Put a medium into a drive, or take it out.

        `spec` is a path, or {iface, index, path | drive_spec}, or a volume, as schema DriveSpec.
        Raises 1, 6, 59, ChangeDiskFailed (41), CannotPrepareImage (1630).
        """
        definition = self._keeping.running(vm)
        told: Mapping[str, Any] = {"path": spec} if isinstance(spec, str) else spec
        content = told.get("drive_spec") or (told if told.get("volumeID") else {})
        if isinstance(content, str):
            content = {"path": content}
        drive = _drive(vm, definition, told, device)
        volume = records.volume_in(content)
        path = str(content.get("path") or told.get("path") or "")
        if volume is None:
            volume = volume_of(path)
        record = records.records(definition.xml).get(drive.name, {})
        request = Change(
            vm, drive.name, path, volume, str(content.get("poolID") or ""),
            drive.volume or records.volume_in(record),
        )  # fmt: skip
        self._tools.runner.run(
            Request(
                kind=CHANGE,
                params=asdict(request),
                domains=sorted({v.domain for v in (request.volume, request.old) if v}),
                verb="VM.changeCD",
                lane=vm,
                description=f"Change the medium in {drive.name} of VM {vm}",
            )
        )

    def update(self, vm: str, params: Mapping[str, Any]) -> None:
        """Change a disk to other XML: what libvirt can change of a disk that a VM uses.

        Raises 1, 6, 59, UpdateDeviceFailed (56).
        """
        definition = self._keeping.running(vm)
        if not params.get("xml"):
            what = params.get("deviceType") or "what is meant"
            raise UpdateDeviceFailed(vm=vm, reason=f"only disks are changed here, not {what}")
        try:
            root = disk_xml.parse(str(params["xml"]))
            wanted = disk_xml.disk_in(root)
            name, xml = _updated(definition, wanted)
        except BadDiskError as error:
            raise UpdateDeviceFailed(vm=vm, reason=str(error)) from error
        with self._keeping.turn(vm):
            try:
                if xml is not None:
                    self._tools.libvirt.update(vm, xml)
                if wanted.find("iotune") is not None:  # there is another call for that
                    self._tools.throttles.set_limits(vm, name, disk_xml.limits_of(wanted))
            except VmError as error:
                if error.why is Why.NO_VM:
                    raise self._tools.registry.gone(vm, error) from error
                raise UpdateDeviceFailed(vm=vm, reason=error.text) from error
            finally:
                self._tools.registry.changed(vm)

    # -- the operation -----------------------------------------------------------------------

    def _run(self, op: Operation) -> None:
        asked = Change.from_params(op.params)
        with self._keeping.turn(asked.vm, asked.volume):
            definition = self._keeping.running(asked.vm)
            disk = element(definition.xml, asked.name)
            if disk is None:
                raise ChangeDiskFailed(vm=asked.vm, reason=f"it has no drive {asked.name}")
            op.record(begun=True)
            path, fmt = asked.path, md.RAW
            if asked.volume is not None:
                usable = self._keeping.prepare(asked.vm, asked.volume)
                path, fmt = usable.path, usable.format
            op.step("prepared")
            try:
                self._switch(asked, _with_medium(disk, path, fmt))
                op.step("changed", abortable=False)
                self._keeping.record(asked.vm, asked.name, asked.record)
            except VmError as error:
                if error.why is Why.NO_VM:
                    raise self._tools.registry.gone(asked.vm, error) from error
                raise ChangeDiskFailed(vm=asked.vm, reason=error.text) from error
        if asked.old is not None and asked.old != asked.volume:
            self._keeping.release(asked.vm, asked.old)
        op.step("released", abortable=False)

    def _switch(self, asked: Change, disk: str) -> None:
        try:
            self._tools.libvirt.update(asked.vm, disk, force=True)
        except (LibvirtTimeout, LibvirtUnavailable) as error:
            log.warning("VM %s: not known yet what is in %s: %s", asked.vm, asked.name, error)
            if not _is_in(asked, self._keeping.settled(asked.vm)):
                raise ChangeDiskFailed(vm=asked.vm, reason=str(error)) from error
        finally:
            self._tools.registry.changed(asked.vm)

    def _recover(self, op: Operation) -> bool:
        """The drive holds the new medium or the old one; the other is let go."""
        asked = Change.from_params(op.params)
        if not op.facts.get("begun"):
            return False
        changed = False
        with self._keeping.turn(asked.vm):
            try:
                definition = self._keeping.settled(asked.vm, BRIEFLY)
                changed = _is_in(asked, definition)
                if changed:
                    self._keeping.record(asked.vm, asked.name, asked.record)
            except (NoSuchVM, VMIsDown):
                log.info("VM %s has ended", asked.vm)
            except VmError as error:
                raise self._tools.registry.gone(asked.vm, error) from error
            for volume in (asked.volume, asked.old):
                if volume is not None:  # what the VM has stays
                    self._keeping.release(asked.vm, volume)
        return changed


def _drive(vm: str, definition: Definition, told: Mapping[str, Any], device: str) -> Drive:
    """The drive that is meant; the first one if none is named.  Raises ChangeDiskFailed (41)."""
    drives = [drive for drive in definition.drives if drive.device == device]
    if told.get("iface"):
        name = disk_xml.target_name(str(told["iface"]), int(told.get("index") or 0))
        drives = [drive for drive in drives if drive.name == name]
        if not drives:
            raise ChangeDiskFailed(vm=vm, reason=f"it has no {device} drive {name}")
    if not drives:
        raise ChangeDiskFailed(vm=vm, reason=f"it has no {device} drive")
    return drives[0]


def _with_medium(disk: ET.Element, path: str, fmt: str) -> str:
    """The same drive with another medium: nothing of the old one but how it is attached."""
    new = copy.deepcopy(disk)
    for tag in ("source", "backingStore"):
        for found in new.findall(tag):
            new.remove(found)
    driver = new.find("driver")
    if driver is not None:
        driver.set("type", "qcow2" if fmt == md.COW else "raw")
    disk_xml.set_source(new, path)
    return disk_xml.text(new)


def _is_in(asked: Change, definition: Definition) -> bool:
    """Whether the drive holds what was asked for."""
    drive = named(definition.drives, asked.name)
    if drive is None:
        return False
    return drive.volume == asked.volume if asked.volume else drive.path == asked.path


def _updated(definition: Definition, wanted: ET.Element) -> tuple[str, str | None]:
    """The target that is meant, and libvirt's XML of it with those children that were sent in the
    place of its own; None if there are none.

    Neither the medium of a disk nor its place can be changed in this way.  Raises BadDiskError.
    """
    asked = Asked(wanted, {}, None)
    drive = next(
        (
            each
            for each in definition.drives
            if (
                each.name == asked.name if asked.name else asked.alias and each.alias == asked.alias
            )
        ),
        None,
    )
    disk = element(definition.xml, drive.name) if drive is not None else None
    if drive is None or disk is None:
        raise BadDiskError("it has no such disk")
    changes = [child for child in wanted if child.tag not in FIXED]
    for child in changes:
        for old in disk.findall(child.tag):
            disk.remove(old)
        disk.append(child)
    return drive.name, disk_xml.text(disk) if changes else None
