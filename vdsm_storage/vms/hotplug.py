# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.hotplugDisk and VM.hotunplugDisk.

To add a disk: its image is made usable, the VM's record of it is written, libvirt attaches it.  To
take one away: the guest is asked for it, and when it is gone the image is let go and the record
removed.  A guest that does not answer keeps the disk; should it give it back later, the record
tells what is to be let go (keeping.py).

After a failure or a restart, libvirt's XML tells whether the VM has the disk.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from vdsm_storage.base.clock import Deadline
from vdsm_storage.errors import (
    HotplugDiskFailed,
    HotunplugDiskFailed,
    LibvirtTimeout,
    LibvirtUnavailable,
    NoSuchVM,
    VMIsDown,
)
from vdsm_storage.host.libvirt_model import VmError, Why
from vdsm_storage.images import metadata as md
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request
from vdsm_storage.vms import disk_xml, records
from vdsm_storage.vms.choose import describe, element, matches, named, shown
from vdsm_storage.vms.disk_xml import Asked, BadDiskError
from vdsm_storage.vms.drives import REPLICATED, Drive, VolumePath
from vdsm_storage.vms.drives import parse as parse_own
from vdsm_storage.vms.keeping import BRIEFLY, DiskTools, Keeping
from vdsm_storage.vms.registry import Definition

PLUG: Final = "vm.hotplug_disk"
UNPLUG: Final = "vm.hotunplug_disk"
PENDING: Final = "in the process of unplug"  # QEMU's error for a disk that was asked for before
LOOK: Final = 0.2  # seconds between two looks at whether the guest gave a disk back

log = logging.getLogger("vms.hotplug")

# The limits that the VM's policy has for a disk: (XML of the VM, target, volume) → limits.
Policy = Callable[[str, str, VolumePath | None], Mapping[str, int]]


@dataclass(frozen=True)
class Plug:
    """A disk of a VM, as the journal keeps it: `xml` is libvirt's <disk>."""

    vm: str
    name: str
    xml: str
    record: Mapping[str, str]
    volume: VolumePath | None

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Plug:
        volume = params["volume"]
        return cls(**{**params, "volume": None if volume is None else VolumePath(**volume)})

    def as_request(self, kind: str, verb: str) -> Request:
        return Request(
            kind=kind,
            params=asdict(self),
            domains=[self.volume.domain] if self.volume else [],
            verb=verb,
            lane=self.vm,
            description=f"{verb} {self.name} of VM {self.vm}",
        )


class HotPlug:
    """`wait` seconds are given to a guest to give a disk back."""

    def __init__(self, tools: DiskTools, keeping: Keeping, policy: Policy, wait: float) -> None:
        self._tools = tools
        self._keeping = keeping
        self._policy = policy
        self._wait = wait

    def kinds(self) -> tuple[Kind, ...]:
        return (
            Kind(PLUG, ("prepared", "recorded", "attached"), self._plug, self._recover_plug),
            Kind(UNPLUG, ("recorded", "detached", "released"), self._unplug, self._recover_unplug),
        )

    # -- what callers ask --------------------------------------------------------------------

    def plug(self, vm: str, xml: str | None, drive: Mapping[str, Any] | None) -> None:
        """Add a disk.  Raises 1, 6, 59, HotplugDiskFailed (45), CannotPrepareImage (1630)."""
        definition = self._keeping.running(vm)
        try:
            if xml:
                asked = disk_xml.asked_by_xml(xml)
            else:
                taken = [each.name for each in definition.drives]
                asked = disk_xml.asked_by_keys(drive or {}, taken)
        except BadDiskError as error:
            raise HotplugDiskFailed(vm=vm, reason=str(error)) from error
        self._tools.runner.run(_plug(vm, asked).as_request(PLUG, "VM.hotplugDisk"))

    def unplug(self, vm: str, xml: str | None, drive: Mapping[str, Any] | None) -> None:
        """Take a disk away.  Raises 1, 6, 59, HotunplugDiskFailed (46)."""
        definition = self._keeping.running(vm)
        try:
            found = _find(definition, xml, drive or {})
            own = _own_xml(definition, found.name)
        except BadDiskError as error:
            raise HotunplugDiskFailed(vm=vm, reason=str(error)) from error
        record = records.records(definition.xml).get(found.name, {})
        volume = shown(found) or records.volume_in(record)
        if volume is not None:  # it may be on another one than at first, or have no record
            record.update(disk_xml.record_of(volume))
        plug = Plug(vm, found.name, own, record, volume)
        self._tools.runner.run(plug.as_request(UNPLUG, "VM.hotunplugDisk"))

    # -- adding ------------------------------------------------------------------------------

    def _plug(self, op: Operation) -> None:
        plug = Plug.from_params(op.params)
        with self._keeping.turn(plug.vm, plug.volume):
            definition = self._keeping.running(plug.vm)
            _check_free(plug, definition)
            op.record(begun=True)
            disk = self._complete(plug, definition)
            op.step("prepared")
            try:
                if plug.record:
                    self._keeping.record(plug.vm, plug.name, plug.record)
                op.step("recorded")
                self._attach(plug, disk)
            except VmError as error:
                if error.why is Why.NO_VM:
                    raise self._tools.registry.gone(plug.vm, error) from error
                raise HotplugDiskFailed(vm=plug.vm, reason=error.text) from error
            op.step("attached", abortable=False)
        log.info("VM %s: disk %s added (%s)", plug.vm, plug.name, plug.volume or "no volume")

    def _complete(self, plug: Plug, definition: Definition) -> str:
        """The XML with what the storage and the VM's policy say.  Raises 1630."""
        disk = parse_own(plug.xml)
        volume = plug.volume
        if volume is not None:
            transient = plug.record.get("shared") == "transient"
            key = disk_xml.key_of(disk) is not None
            usable = self._keeping.prepare(plug.vm, volume, transient=transient, key=key)
            if usable.voltype != md.LEAF and disk.find("readonly") is None:
                reason = f"other volumes are based on {volume.volume}: it must be read-only"
                raise HotplugDiskFailed(vm=plug.vm, reason=reason)
            disk_xml.set_source(disk, usable.path)
            disk_xml.set_format(disk, usable.format, block=usable.block)
            disk_xml.set_below(disk, usable.layers, block=usable.block)
        elif "GUID" in plug.record and not disk_xml.path_of(disk):
            disk_xml.set_source(disk, f"{disk_xml.MAPPER}/{plug.record['GUID']}")
        disk_xml.set_limits(disk, self._policy(definition.xml, plug.name, volume))
        return disk_xml.text(disk)

    def _attach(self, plug: Plug, disk: str) -> None:
        """Raises VmError, HotplugDiskFailed (45), and what settled() does."""
        try:
            self._tools.libvirt.attach(plug.vm, disk)
        except (LibvirtTimeout, LibvirtUnavailable) as error:
            log.warning("VM %s: not known yet whether it has %s: %s", plug.vm, plug.name, error)
            if not _is_there(plug, self._keeping.settled(plug.vm)):
                raise HotplugDiskFailed(vm=plug.vm, reason=str(error)) from error
        finally:
            self._tools.registry.changed(plug.vm)

    def _recover_plug(self, op: Operation) -> bool:
        plug = Plug.from_params(op.params)
        if not op.facts.get("begun"):
            return False
        with self._keeping.turn(plug.vm, plug.volume):
            try:
                attached = _is_there(plug, self._keeping.settled(plug.vm, BRIEFLY))
                if plug.record:
                    self._correct(plug, plug.record if attached else None)
            except (NoSuchVM, VMIsDown):
                attached = False
            if not attached and plug.volume is not None:
                self._keeping.release_held(plug.vm, plug.volume)
        return attached

    # -- taking away -------------------------------------------------------------------------

    def _unplug(self, op: Operation) -> None:
        plug = Plug.from_params(op.params)
        with self._keeping.turn(plug.vm):
            definition = self._keeping.running(plug.vm)
            drive = named(definition.drives, plug.name)
            if drive is None or not _is_there(plug, definition):
                raise HotunplugDiskFailed(vm=plug.vm, reason=f"it has no disk {plug.name}")
            if drive.is_replicated:
                raise HotunplugDiskFailed(vm=plug.vm, reason=f"{plug.name} {REPLICATED}")
            op.record(begun=True)
            try:
                if plug.record:  # should the guest give it back when nobody waits any more
                    self._keeping.record(plug.vm, plug.name, plug.record)
                op.step("recorded")
                self._detach(plug)
                op.step("detached", abortable=False)
                self._forget(plug)
            except VmError as error:
                if error.why is Why.NO_VM:
                    raise self._tools.registry.gone(plug.vm, error) from error
                raise HotunplugDiskFailed(vm=plug.vm, reason=error.text) from error
            op.step("released", abortable=False)
        log.info("VM %s: disk %s taken away", plug.vm, plug.name)

    def _detach(self, plug: Plug) -> None:
        """Returns when the disk is gone.  Raises VmError, HotunplugDiskFailed (46), 59."""
        clock = self._tools.clock
        end = Deadline(clock, self._wait)
        try:
            self._tools.libvirt.detach(plug.vm, plug.xml)
        except (LibvirtTimeout, LibvirtUnavailable) as error:
            log.warning("VM %s: not known yet whether it has %s: %s", plug.vm, plug.name, error)
            self._keeping.settled(plug.vm)
        except VmError as error:
            if PENDING not in error.text:
                raise
        never = threading.Event()
        while _is_there(plug, self._keeping.running(plug.vm)):
            if end.passed():
                reason = (
                    f"its guest did not give back disk {plug.name} within {self._wait:g} s; "
                    "it may still do so, and the image is let go then"
                )
                raise HotunplugDiskFailed(vm=plug.vm, reason=reason)
            clock.wait(never, LOOK)
        self._tools.registry.changed(plug.vm)

    def _recover_unplug(self, op: Operation) -> bool:
        plug = Plug.from_params(op.params)
        if not op.facts.get("begun"):
            return False
        with self._keeping.turn(plug.vm):
            try:
                if _is_there(plug, self._keeping.settled(plug.vm, BRIEFLY)):
                    return False
                self._correct(plug, None)
            except (NoSuchVM, VMIsDown):
                log.info("VM %s has ended", plug.vm)
            if plug.volume is not None:
                self._keeping.release(plug.vm, plug.volume)
        return True

    def _forget(self, plug: Plug) -> None:
        if plug.volume is not None:
            self._keeping.release(plug.vm, plug.volume)
        self._keeping.record(plug.vm, plug.name, None)

    def _correct(self, plug: Plug, record: Mapping[str, str] | None) -> None:
        """record() in recovery.  Raises 1, 6, 59."""
        try:
            self._keeping.record(plug.vm, plug.name, record)
        except VmError as error:
            raise self._tools.registry.gone(plug.vm, error) from error


def _plug(vm: str, asked: Asked) -> Plug:
    return Plug(vm, asked.name, disk_xml.text(asked.disk), dict(asked.record), asked.volume)


def _check_free(plug: Plug, definition: Definition) -> None:
    """Raises HotplugDiskFailed (45) for a disk that the VM has already, or whose place is taken."""
    alias = Asked(parse_own(plug.xml), {}, None).alias
    transient = plug.record.get("shared") == "transient"
    for drive in definition.drives:
        volume = shown(drive)
        if drive.name == plug.name:
            raise HotplugDiskFailed(vm=plug.vm, reason=f"it has a disk {plug.name} already")
        if alias and drive.alias == alias:
            raise HotplugDiskFailed(vm=plug.vm, reason=f"its disk {drive.name} is {alias} already")
        both = drive.transient == transient  # a snapshot may stand beside the disk itself
        if both and plug.volume and volume and plug.volume.image == volume.image:
            reason = f"its disk {drive.name} has image {volume.image} already"
            raise HotplugDiskFailed(vm=plug.vm, reason=reason)


def _is_there(plug: Plug, definition: Definition) -> bool:
    """Whether the VM has this disk, and not another one in its place."""
    drive = named(definition.drives, plug.name)
    if drive is None:
        return False
    volume = shown(drive)
    if plug.volume is None or volume is None:
        return True
    # Its volume may have changed since: a snapshot, or a merge.
    return (volume.domain, volume.image) == (plug.volume.domain, plug.volume.image)


def _find(definition: Definition, xml: str | None, drive: Mapping[str, Any]) -> Drive:
    """The disk that is meant: by its alias or its target, or by what it is on.

    Raises BadDiskError.
    """
    alias = name = ""
    if xml:
        asked = Asked(disk_xml.disk_in(disk_xml.parse(xml)), {}, None)
        alias, name = asked.alias, asked.name
    for each in definition.drives:
        if alias:
            if each.alias == alias:
                return each
        elif name:
            if each.name == name:
                return each
        elif not xml and matches(each, drive):
            return each
    raise BadDiskError(f"it has no such disk ({alias or name or describe(drive)})")


def _own_xml(definition: Definition, name: str) -> str:
    """libvirt's own <disk> of a target.  Raises BadDiskError."""
    disk = element(definition.xml, name)
    if disk is None:
        raise BadDiskError(f"it has no disk {name}")
    return disk_xml.text(disk)
