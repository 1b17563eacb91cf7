# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.diskReplicateStart and VM.diskReplicateFinish: a disk of a running VM moves to another volume.

QEMU copies, and writes what the guest writes to both, until somebody ends it; whatever becomes of
this agent meanwhile.  The guest leaves its volume at the very end, in one moment, or not at all:

    start:   recorded -> destination prepared -> room for it -> libvirt's block job
    finish:  pivot, or the job given up -> recorded -> the other volume is let go

Whether a disk is copied is what libvirt's XML says (<mirror>); the VM's record says what was
prepared for it, also when the job has failed since: what it was copied to is let go then at once
(keeping.py), and who ends the replication is told.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.base.clock import Deadline
from vdsm_storage.errors import (
    AgentError,
    ImageFileNotFound,
    LibvirtTimeout,
    LibvirtUnavailable,
    NoSuchVM,
    ReplicationNotInProgress,
    ResourceUnavailable,
    VMIsDown,
)
from vdsm_storage.host.libvirt_blockjobs import Copy, LibvirtBlockJobs
from vdsm_storage.host.libvirt_model import VmError, Why
from vdsm_storage.jobs.operation import Kind, Operation, StillGoing
from vdsm_storage.vms import disk_xml, records
from vdsm_storage.vms.choose import describe, named
from vdsm_storage.vms.drives import Drive, VolumePath
from vdsm_storage.vms.keeping import BRIEFLY, SETTLE, DiskTools, Keeping
from vdsm_storage.vms.registry import Definition
from vdsm_storage.vms.replica import Extend, Replica, Target, check_drive, target_xml, volume_in

START: Final = "vm.replicate"
FINISH: Final = "vm.replicate_end"
ANSWER: Final = 60.0  # seconds for libvirt to start a copy, or to pivot
STOP: Final = 30.0  # seconds for a job that was given up to end
LOOK: Final = 0.2  # seconds between two looks at it
READY: Final = "yes"

log = logging.getLogger("vms.replicate")


@dataclass(frozen=True)
class CopyTools:
    """Beside what all operations on disks have.  `merging(vm)` gives the images that merges of the
    VM are about; `bandwidth` is MiB a second, 0 for no limit."""

    jobs: LibvirtBlockJobs
    extend: Extend
    merging: Callable[[str], set[str]]
    bandwidth: int


class Replicating:
    def __init__(self, tools: DiskTools, keeping: Keeping, copying: CopyTools) -> None:
        self._tools = tools
        self._keeping = keeping
        self._copying = copying

    def kinds(self) -> tuple[Kind, ...]:
        begin = ("recorded", "prepared", "extended", "started")
        end = ("begun", "switched", "recorded", "released")
        return (
            Kind(START, begin, self._start, self._recover_start),
            Kind(FINISH, end, self._finish, self._recover_finish),
        )

    # -- what callers ask --------------------------------------------------------------------

    def start(
        self, vm: str, source: Mapping[str, Any], target: Mapping[str, Any], *, extend: bool
    ) -> None:
        """Returns when libvirt copies.

        Raises 1, 6, 59, ImageFileNotFound (13), UnsupportedDriveType (36), ReplicaError (55),
        DestinationVolumeTooSmall (79), CannotPrepareImage (1630), and what extending does.
        """
        volume = volume_in(source)
        drive = _on(self._keeping.running(vm), volume)
        if drive is None:
            raise ImageFileNotFound(vm=vm, disk=describe(source))
        asked = Replica(vm, drive.name, volume, volume_in(target), extend)
        self._tools.runner.run(asked.as_request(START, "VM.diskReplicateStart"))

    def finish(self, vm: str, source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
        """The VM goes on with `target`, which is what it is copied to, or where it is.

        Raises 1, 6, 59, 13, ReplicaError (55): it failed, ReplicationNotInProgress (88),
        ResourceUnavailable (40): ask again, CannotPrepareImage (1630): the target is gone.
        """
        here, there = volume_in(source), volume_in(target)
        definition = self._keeping.running(vm)
        drive = _on(definition, here)
        if drive is None:
            self._finish_late(vm, definition, here, there, describe(source))
            return
        replica = drive.replica or records.replicas(definition.xml).get(drive.name)
        if replica is None:
            raise ReplicationNotInProgress(vm=vm, disk=drive.name)
        asked = Replica(vm, drive.name, here, replica, pivot=here != there)
        if there not in (here, replica):
            raise asked.failed(f"it is copied to {replica}, not to {there}")
        if asked.pivot and drive.is_replicated:
            _check_ready(asked, drive)
        self._tools.runner.run(asked.as_request(FINISH, "VM.diskReplicateFinish"))

    def limit(self, vm: str, source: Mapping[str, Any], bandwidth: int) -> None:
        """MiB a second from now on, 0 for no limit.

        Raises 1, 6, 59, 13, ReplicationNotInProgress (88).
        """
        drive = _on(self._keeping.running(vm), volume_in(source))
        if drive is None:
            raise ImageFileNotFound(vm=vm, disk=describe(source))
        if not drive.is_replicated:
            raise ReplicationNotInProgress(vm=vm, disk=drive.name)
        try:
            self._copying.jobs.set_bandwidth(vm, drive.name, bandwidth)
        except VmError as error:
            if error.why is Why.NO_VM:
                raise self._tools.registry.gone(vm, error) from error
            raise ReplicationNotInProgress(vm=vm, disk=drive.name) from error

    def _finish_late(
        self, vm: str, definition: Definition, here: VolumePath, there: VolumePath, told: str
    ) -> None:
        """The VM has left its volume before: whoever asked may not have heard of it."""
        drive = _on(definition, there)
        if drive is None or here == there:
            raise ImageFileNotFound(vm=vm, disk=told)
        if records.replicas(definition.xml).get(drive.name) == there:
            asked = Replica(vm, drive.name, here, there, pivot=True)
            self._tools.runner.run(asked.as_request(FINISH, "VM.diskReplicateFinish"))

    # -- start -------------------------------------------------------------------------------

    def _start(self, op: Operation) -> None:
        asked = Replica.from_params(op.params)
        with self._keeping.turn(asked.vm, asked.target):
            definition = self._keeping.running(asked.vm)
            drive = named(definition.drives, asked.name)
            if drive is None or drive.volume != asked.source:
                raise ImageFileNotFound(vm=asked.vm, disk=asked.source.volume)
            target = self._check(asked, drive)
            op.record(begun=True)
            dead = self._keeping.dead_replicas(asked.vm, definition).get(asked.name)
            if dead not in (None, asked.target):  # its record is about to go
                self._keeping.release(asked.vm, dead)
            self._record(asked, asked.target)
            op.step("recorded")
            usable = self._keeping.prepare(asked.vm, asked.target, key=bool(drive.secret))
            op.step("prepared")
            if asked.extend:
                source = self._tools.find_store(asked.source.domain)
                target.grow(asked, source, self._copying.extend)
            op.step("extended")
            xml = target_xml(usable.path, usable.format, drive.secret)
            self._copy(asked, Copy(asked.name, xml, target.shallow, self._copying.bandwidth))
            op.step("started", abortable=False)
        log.info("VM %s: disk %s is copied to %s", asked.vm, asked.name, asked.target)

    def _check(self, asked: Replica, drive: Drive) -> Target:
        """Before anything is touched.  Raises what start() does."""
        check_drive(asked, drive)
        if asked.source.image in self._copying.merging(asked.vm):
            raise asked.failed("its volumes are being merged; wait for the end of that")
        try:
            job = self._copying.jobs.job(asked.vm, asked.name)
            needed = self._tools.libvirt.capacity(asked.vm, asked.name)
        except VmError as error:
            raise self._tools.registry.gone(asked.vm, error) from error
        if job is not None:
            raise asked.failed(f"a block job ({job.kind}) is at work on it; wait for its end")
        if users := self._keeping.users(asked.target):
            raise asked.failed(f"the destination's image is in use by VM {', '.join(users)}")
        target = Target.find(asked, self._tools.find_store)
        target.check(asked, drive, needed)
        return target

    def _copy(self, asked: Replica, what: Copy) -> None:
        """Raises ReplicaError (55), 1, 6, 59."""
        try:
            self._copying.jobs.copy(asked.vm, what, ANSWER)
        except VmError as error:
            if error.why is Why.NO_VM:
                raise self._tools.registry.gone(asked.vm, error) from error
            raise asked.failed(error.text) from error
        except (LibvirtTimeout, LibvirtUnavailable) as error:
            log.warning("VM %s: not known yet whether it is copied: %s", asked.vm, error)
            drive = named(self._keeping.settled(asked.vm).drives, asked.name)
            if drive is None or drive.replica != asked.target:
                raise asked.failed(error) from error
        finally:
            self._tools.registry.changed(asked.vm)

    def _recover_start(self, op: Operation) -> bool:
        """What libvirt copies goes on: whoever asked ends it."""
        asked = Replica.from_params(op.params)
        if not op.facts.get("begun"):
            return False
        with self._keeping.turn(asked.vm, asked.target):
            try:
                drive = self._settled(asked, BRIEFLY)
                if drive is not None and drive.replica == asked.target:
                    return True
                self._record(asked, None)
            except (NoSuchVM, VMIsDown):
                log.info("VM %s has ended", asked.vm)
            self._keeping.release_held(asked.vm, asked.target)
        return False

    # -- finish ------------------------------------------------------------------------------

    def _finish(self, op: Operation) -> None:
        asked = Replica.from_params(op.params)
        try:
            self._end(op, asked)
        except StillGoing as going:
            raise _not_yet(asked, str(going)) from going
        where = asked.target if asked.pivot else asked.source
        log.info("VM %s: disk %s goes on with %s", asked.vm, asked.name, where)

    def _end(self, op: Operation, asked: Replica) -> None:
        with self._keeping.turn(asked.vm, asked.source, asked.target):
            drive = named(self._keeping.running(asked.vm).drives, asked.name)
            if drive is None:
                raise ImageFileNotFound(vm=asked.vm, disk=asked.name)
            if asked.pivot and drive.is_replicated:
                _check_ready(asked, drive)
                Target.find(asked, self._tools.find_store).check_whole(asked)
            op.record(begun=True)
            op.step("begun")
            if drive.volume == asked.source:
                if asked.pivot:
                    self._pivot(asked, drive)
                elif drive.is_replicated:
                    self._give_up(asked, STOP)
            op.step("switched", abortable=False)
            self._settle_records(asked)
            op.step("recorded", abortable=False)
            self._keeping.release_held(asked.vm, asked.source if asked.pivot else asked.target)
            op.step("released", abortable=False)

    def _pivot(self, asked: Replica, drive: Drive) -> None:
        """Let the guest leave its volume.  Raises ReplicaError (55), ResourceUnavailable (40)."""
        failure = "its storage failed or has no space left"
        if drive.is_replicated:
            try:
                self._copying.jobs.pivot(asked.vm, asked.name, ANSWER)
            except VmError as error:
                failure = error.text
            except (LibvirtTimeout, LibvirtUnavailable) as error:
                failure = str(error)
        now = self._settled(asked, SETTLE)
        if now is not None and now.volume == asked.target:
            return
        if now is not None and now.is_replicated:
            raise _not_yet(asked, failure)
        raise asked.failed(f"the copy to {asked.target.volume} ended early: {failure}")

    def _give_up(self, asked: Replica, patience: float) -> None:
        """Until there is no job.  Raises StillGoing."""
        end, never = Deadline(self._tools.clock, patience), threading.Event()
        asked_for = False
        while True:
            drive = self._settled(asked, patience)
            if drive is None or not drive.is_replicated:
                return
            if not asked_for and drive.mirror != "abort":
                try:
                    self._copying.jobs.abort(asked.vm, asked.name)
                except VmError as error:  # it may have ended just now
                    log.info("VM %s: %s", asked.vm, error)
                asked_for = True
            if end.passed():
                raise StillGoing("the copy is given up and has not ended yet")
            self._tools.clock.wait(never, LOOK)

    def _recover_finish(self, op: Operation) -> bool:
        """Whichever volume the guest writes to stays; the other one is let go when no job is."""
        asked = Replica.from_params(op.params)
        if not op.facts.get("begun"):
            return False
        with self._keeping.turn(asked.vm, asked.source, asked.target):
            try:
                drive = self._settled(asked, BRIEFLY)
                if drive is not None and drive.volume == asked.target:
                    self._settle_records(asked)
                    self._keeping.release_held(asked.vm, asked.source)
                    return True
                if drive is not None and drive.is_replicated:
                    if asked.pivot:
                        return False  # it is as before; who asked may ask again
                    self._give_up(asked, BRIEFLY)
                self._record(asked, None)
            except (NoSuchVM, VMIsDown):
                log.info("VM %s has ended", asked.vm)
            self._keeping.release_held(asked.vm, asked.target)
        return not asked.pivot

    # -- both --------------------------------------------------------------------------------

    def _settled(self, asked: Replica, patience: float) -> Drive | None:
        """The disk when libvirt is not at work on it any more; None when the VM has none such.

        Raises StillGoing when that takes too long, NoSuchVM (1), VMIsDown (6), 59.
        """
        end, never = Deadline(self._tools.clock, patience), threading.Event()
        while True:
            drive = named(self._keeping.settled(asked.vm, patience).drives, asked.name)
            if drive is None or drive.mirror not in ("pivot", "abort"):
                return drive
            if end.passed():
                raise StillGoing(f"libvirt is at work on it ({drive.mirror})")
            self._tools.clock.wait(never, LOOK)

    def _settle_records(self, asked: Replica) -> None:
        """The VM's record of the disk: where it is, and that it is copied no more.  Raises 1, 6,
        59."""
        self._record(asked, None)
        if asked.pivot:
            try:
                record = disk_xml.record_of(asked.target)
                self._keeping.record(asked.vm, asked.name, record)
            except VmError as error:
                raise self._tools.registry.gone(asked.vm, error) from error

    def _record(self, asked: Replica, replica: VolumePath | None) -> None:
        try:
            self._keeping.record_replica(asked.vm, asked.name, replica)
        except VmError as error:
            raise self._tools.registry.gone(asked.vm, error) from error


def _on(definition: Definition, volume: VolumePath) -> Drive | None:
    """The disk that writes to a volume."""
    return next((drive for drive in definition.drives if drive.volume == volume), None)


def _check_ready(asked: Replica, drive: Drive) -> None:
    """Raises ResourceUnavailable (40)."""
    if drive.mirror != READY:
        doing = {"pivot": "it is just doing that", "abort": "the copy is being given up"}
        raise _not_yet(asked, doing.get(drive.mirror, "not all is copied"))


def _not_yet(asked: Replica, reason: str) -> AgentError:
    return ResourceUnavailable(vm=asked.vm, disk=asked.name, reason=reason)
