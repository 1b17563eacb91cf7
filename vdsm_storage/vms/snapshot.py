# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.snapshot: disks of a running VM go on in new volumes, all of them from one moment, or none.

The guest is asked to be quiet for that moment (its file systems are frozen), unless the caller has
frozen it and will thaw it, or its memory is kept too: libvirt pauses it while that is saved.  A
guest that cannot be frozen is snapshotted all the same, as after a power cut, and the job's
description says so.  Nothing that hangs holds up the end: a frozen guest is thawed as soon as
libvirt has answered or its time is over, and what libvirt still does then is waited for with the
guest at work.

libvirt's XML of the VM tells what became of a snapshot whose end nobody saw.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vdsm_storage.base.aside import aside
from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.config import Vms as Settings
from vdsm_storage.errors import (
    ActionStopped,
    AgentError,
    LibvirtTimeout,
    LibvirtUnavailable,
    NoSuchVM,
    SnapshotFailed,
    VMIsDown,
)
from vdsm_storage.host.libvirt_model import VmError
from vdsm_storage.host.libvirt_vms import LibvirtVms
from vdsm_storage.images import metadata as md
from vdsm_storage.images.store import Store
from vdsm_storage.jobs.operation import Kind, Operation, StillGoing
from vdsm_storage.vms import frozen, metadata
from vdsm_storage.vms.drives import METADATA, REPLICATED
from vdsm_storage.vms.freeze import Freezing
from vdsm_storage.vms.memory import MemoryVolumes, write_configuration
from vdsm_storage.vms.registry import Registry
from vdsm_storage.vms.snapshot_request import KIND, NewLeaf, SnapshotRequest, snapshot_xml

TURN: Final = 60.0  # seconds to wait for another operation on the VM's disks
LOOK: Final = 0.5  # seconds between two looks at what libvirt does
BRIEF: Final = 2.0  # seconds that questions of others may keep libvirt busy with a VM
PEEK: Final = 0.05  # seconds between two looks at that

log = logging.getLogger("vms.snapshot")


@dataclass(frozen=True)
class Tools:
    """What a snapshot works with.

    `prepare(domain, image, volume)` makes a volume with its chain usable here; returns its path.
    """

    vms: LibvirtVms
    registry: Registry
    freezing: Freezing
    find_store: Callable[[str], Store]
    prepare: Callable[[str, str, str], str]
    clock: Clock


class Snapshots:
    """The kind vm.snapshot.  `settings.snapshot_timeout` bounds what libvirt may take."""

    def __init__(self, tools: Tools, settings: Settings, locks: Locks) -> None:
        self._tools = tools
        self._settings = settings
        self._locks = locks

    def kinds(self) -> tuple[Kind, ...]:
        steps = ("prepared", "frozen", "switched", "thawed")
        return (Kind(KIND, steps, self._run, self._recover),)

    # -- forward -----------------------------------------------------------------------------

    def _run(self, op: Operation) -> None:
        asked = SnapshotRequest.from_params(op.params)
        clock = self._tools.clock
        end = Deadline(clock, asked.timeout)
        until = Deadline(clock, min(asked.freeze_timeout, asked.timeout))
        with self._locks.held([Lock("vm_disks", asked.vm)], min(TURN, asked.timeout)):
            drives = self._check(asked)
            before = self._tools.registry.definition(asked.vm)
            op.record(begun=True, until=clock.time() + asked.timeout)
            paths = self._prepare(op, asked)
            memory = self._prepare_memory(asked)
            op.progress(0.3)
            op.step("prepared")
            xml = snapshot_xml(before.drives, drives, paths, memory)
            thaw = self._freeze(op, asked)
            try:
                op.step("frozen")
                known = True
                if memory is None:
                    known = self._switch(asked, xml, until)
                else:
                    self._save(op, asked, xml, end)
                op.step("switched", abortable=False)
            finally:
                thaw()
            if not known:
                self._settle(asked, end)
            self._release_memory(asked.memory)
            op.step("thawed", abortable=False)
            op.progress(0.9)
            if metadata.with_volumes(before.xml, _names(drives)) is not None:
                self._tell_metadata(asked, drives)

    def _check(self, asked: SnapshotRequest) -> dict[str, NewLeaf]:
        """By target.  Raises NoSuchVM (1), VMIsDown (6), SnapshotFailed (48)."""
        self._tools.registry.must_run(asked.vm)
        there = self._tools.registry.definition(asked.vm, fresh=True).drives
        if asked.frozen and self._tools.freezing.was_thawed_early(asked.vm):
            raise _failed(asked, "the guest was not left frozen for so long; freeze it again")
        found: dict[str, NewLeaf] = {}
        for leaf in asked.drives:
            names = (leaf.domain, leaf.image, leaf.base)
            drive = next((each for each in there if each.is_volume(*names)), None)
            if drive is None:
                raise _failed(asked, f"no disk of it writes to volume {leaf.base}")
            if drive.transient or drive.shared or drive.leased:
                what = "is transient" if drive.transient else "is shared or has a lease"
                raise _failed(asked, f"disk {drive.name} {what}")
            if drive.name in found:
                raise _failed(asked, f"disk {drive.name} is named twice")
            if drive.is_replicated:
                raise _failed(asked, f"disk {drive.name} {REPLICATED}")
            self._check_volume(asked, leaf)
            found[drive.name] = leaf
        return found

    def _check_volume(self, asked: SnapshotRequest, leaf: NewLeaf) -> None:
        meta = self._tools.find_store(leaf.domain).load(leaf.image, leaf.volume)
        if meta.format != md.COW or meta.parent != leaf.base:
            raise _failed(asked, f"volume {leaf.volume} is no snapshot volume of {leaf.base}")

    def _prepare(self, op: Operation, asked: SnapshotRequest) -> dict[str, str]:
        """Paths of the new volumes, by volume; before the freeze, so that this is short."""
        paths = {}
        for number, leaf in enumerate(asked.drives):
            paths[leaf.volume] = self._tools.prepare(leaf.domain, leaf.image, leaf.volume)
            op.progress_of(number, max(1, len(asked.drives)))(0.3)
        return paths

    def _prepare_memory(self, asked: SnapshotRequest) -> str | None:
        """The path that the memory goes to; the VM's configuration is written at once."""
        memory = asked.memory
        if memory is None:
            return None
        tools = self._tools
        store = tools.find_store(memory.domain)
        for where in ((memory.image, memory.volume), (memory.conf_image, memory.conf_volume)):
            if store.load(*where).format == md.LUKS:
                raise _failed(asked, f"volume {where[1]}, for the memory, is encrypted")
        conf = tools.prepare(memory.domain, memory.conf_image, memory.conf_volume)
        try:
            write_configuration(conf, tools.vms.saved_xml(asked.vm))
        except VmError as error:
            raise tools.registry.gone(asked.vm, error) from error
        return tools.prepare(memory.domain, memory.image, memory.volume)

    def _freeze(self, op: Operation, asked: SnapshotRequest) -> Callable[[], None]:
        """Returns what thaws the guest again."""
        if asked.frozen or asked.memory is not None or not asked.drives:
            return _nothing
        freezing = self._tools.freezing
        try:
            if not freezing.is_frozen(asked.vm):
                freezing.freeze(asked.vm, frozen.SNAPSHOT)
        except (NoSuchVM, VMIsDown):
            raise
        except AgentError as error:
            log.warning("VM %s is snapshotted without a freeze: %s", asked.vm, error)
            op.describe(f"Snapshot of VM {asked.vm}, as after a power cut: {error}")

        def thaw() -> None:
            if freezing.was_thawed_early(asked.vm):
                op.describe(f"Snapshot of VM {asked.vm}; the guest was thawed before it was made")
            # The guard goes on where this fails.
            with contextlib.suppress(AgentError):
                if not freezing.thaw(asked.vm):
                    op.describe(f"Snapshot of VM {asked.vm}; the guest had thawed by itself")

        return thaw if freezing.age(asked.vm) is not None else _nothing

    def _switch(self, asked: SnapshotRequest, xml: str, until: Deadline) -> bool:
        """False when libvirt did not say in time what became of it: that is looked at later."""
        if not asked.drives:
            return True
        if until.passed():
            raise _failed(asked, "its time was over before the disks could be switched")
        seconds = max(1.0, min(self._settings.snapshot_timeout, until.left()))
        vms = self._tools.vms
        try:
            vms.snapshot(asked.vm, xml, disks_only=True, timeout=seconds)
        except VmError as error:
            raise _failed(asked, error.text) from error
        except (LibvirtTimeout, LibvirtUnavailable) as error:
            log.warning("VM %s: not known yet whether its disks switched: %s", asked.vm, error)
            return False
        finally:
            self._tools.registry.changed(asked.vm)
        return True

    def _save(self, op: Operation, asked: SnapshotRequest, xml: str, end: Deadline) -> None:
        """With memory.  Stopped when asked to, and when its time is over: ActionStopped (443)."""
        vms, over = self._tools.vms, threading.Event()

        def watch() -> None:
            while not self._tools.clock.wait(over, LOOK):
                with contextlib.suppress(VmError, AgentError):  # it may have ended just now
                    if op.cancel.requested or end.passed():
                        vms.abort_job(asked.vm)
                    elif (fraction := vms.job_fraction(asked.vm)) is not None:
                        op.progress(0.3 + 0.6 * fraction)

        with aside("snapshot with memory", watch):
            try:
                vms.snapshot(asked.vm, xml, disks_only=False, timeout=end.left() + TURN)
            except VmError as error:
                if op.cancel.requested or end.passed():
                    raise ActionStopped() from error
                raise _failed(asked, error.text) from error
            except (LibvirtTimeout, LibvirtUnavailable) as error:
                raise _failed(asked, str(error)) from error
            finally:
                over.set()
                self._tools.registry.changed(asked.vm)

    def _settle(self, asked: SnapshotRequest, end: Deadline) -> None:
        """Wait until it is known what became of it.  Raises SnapshotFailed (48)."""
        waiting = threading.Event()  # never set
        while True:
            try:
                if self._is_switched(asked):
                    return
            except (LibvirtTimeout, LibvirtUnavailable, _StillBusyError) as error:
                if end.passed():
                    raise _failed(asked, f"it is not known yet: {error}") from error
            else:
                raise _failed(asked, "libvirt was interrupted; the disks are as they were")
            self._tools.clock.wait(waiting, LOOK)

    def _is_switched(self, asked: SnapshotRequest) -> bool:
        """Whether every disk writes to its new volume; False when none does.

        Raises _StillBusyError, NoSuchVM (1), VMIsDown (6), 59.
        """
        tools = self._tools
        tools.registry.state(asked.vm)
        try:
            if self._is_at_work(asked.vm):
                raise _StillBusyError("libvirt is still at work on it")
        except VmError as error:
            raise tools.registry.gone(asked.vm, error) from error
        tools.registry.definition(asked.vm, fresh=True)
        used = self._used(asked)
        if used and len(used) < len(asked.drives):
            raise _MixedError("some disks switched, others did not")
        return bool(used)

    def _is_at_work(self, vm: str) -> bool:
        """Whether libvirt does something to the VM that lasts.  Raises VmError, 59."""
        end, never = Deadline(self._tools.clock, BRIEF), threading.Event()
        while self._tools.vms.busy(vm):
            if end.passed():
                return True
            self._tools.clock.wait(never, PEEK)
        return False

    def _used(self, asked: SnapshotRequest) -> dict[str, NewLeaf]:
        """The new volumes that the VM writes to, by target."""
        there = self._tools.registry.definition(asked.vm).drives
        return {
            drive.name: leaf
            for leaf in asked.drives
            for drive in there
            if drive.is_volume(leaf.domain, leaf.image, leaf.volume)
        }

    def _tell_metadata(self, asked: SnapshotRequest, drives: Mapping[str, NewLeaf]) -> None:
        """What engines keep in the VM's metadata: its disks have other volumes now."""
        registry = self._tools.registry
        try:
            now = registry.definition(asked.vm).xml
            changed = metadata.with_volumes(now, _names(drives))
            if changed is None:
                return
            self._tools.vms.set_metadata(asked.vm, changed, metadata.PREFIX, METADATA)
        except (VmError, AgentError) as error:  # the disks themselves tell the truth
            log.warning("VM %s: its metadata still names old volumes: %s", asked.vm, error)
        registry.changed(asked.vm)

    # -- after a failure or a restart --------------------------------------------------------

    def _recover(self, op: Operation) -> bool:
        """The guest is thawed by the guard, which knows from disk that it was frozen."""
        asked = SnapshotRequest.from_params(op.params)
        if not op.facts.get("begun"):
            return False
        used: Mapping[str, NewLeaf] = {}
        with self._locks.held([Lock("vm_disks", asked.vm)], TURN):
            try:
                self._stop_late(op, asked)
                if self._is_switched(asked):
                    self._tell_metadata(asked, self._used(asked))
                    self._release_memory(asked.memory)
                    return True
                used = self._used(asked)
            except (NoSuchVM, VMIsDown):
                log.info("VM %s has ended; its disks are as they were", asked.vm)
            except _MixedError:  # others went on with some of them after a restart
                used = self._used(asked)
            self._release(asked, [leaf for leaf in asked.drives if leaf not in used.values()])
            self._release_memory(asked.memory)
        return False

    def _release(self, asked: SnapshotRequest, unused: Sequence[NewLeaf]) -> None:
        """New volumes that the VM does not write to; QEMU may have one open all the same."""
        stores = {leaf: self._tools.find_store(leaf.domain) for leaf in unused}
        paths = {store.path(leaf.image, leaf.volume) for leaf, store in stores.items()}
        try:
            if paths and (closed := self._tools.vms.close_files(asked.vm, paths)):
                log.info("VM %s had new volumes open as %s", asked.vm, ", ".join(closed))
        except (VmError, AgentError) as error:  # it has ended, or is asked in vain
            log.info("VM %s may have new volumes open: %s", asked.vm, error)
        for leaf, store in stores.items():
            store.release(leaf.image, [leaf.volume])

    def _stop_late(self, op: Operation, asked: SnapshotRequest) -> None:
        """libvirt goes on saving memory when the agent has died; not for longer than allowed."""
        if asked.memory is not None and self._tools.clock.time() > op.facts["until"]:
            with contextlib.suppress(VmError, LibvirtTimeout):
                self._tools.vms.abort_job(asked.vm)

    def _release_memory(self, memory: MemoryVolumes | None) -> None:
        if memory is not None:
            store = self._tools.find_store(memory.domain)
            store.release(memory.image, [memory.volume])
            store.release(memory.conf_image, [memory.conf_volume])


class _StillBusyError(StillGoing):
    """It cannot be told yet what became of a snapshot."""


class _MixedError(_StillBusyError):
    """libvirt switches all disks or none; so it is not the only one that did."""


def _names(drives: Mapping[str, NewLeaf]) -> dict[str, str]:
    """The new volumes, by target."""
    return {name: leaf.volume for name, leaf in drives.items()}


def _failed(asked: SnapshotRequest, reason: str) -> SnapshotFailed:
    return SnapshotFailed(vm=asked.vm, reason=reason)


def _nothing() -> None:
    """There is nothing to thaw."""
