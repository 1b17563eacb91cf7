# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes that VMs of this host use: made usable before, let go when no VM has them any more.

What a VM uses is what libvirt's XML of it says.  Beside it stands the VM's own record of its disks
(records.py): a record whose disk is gone names a volume that is still to be let go.  A guest may
give a disk back long after it was asked to, or while no agent looked.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.errors import (
    AgentError,
    CannotPrepareImage,
    CommandError,
    LibvirtFailure,
    NoSuchVM,
    UnsupportedOperation,
    VMIsDown,
)
from vdsm_storage.host.libvirt_disks import LibvirtDisks
from vdsm_storage.host.libvirt_model import VmError, Why
from vdsm_storage.images import layers
from vdsm_storage.images import metadata as md
from vdsm_storage.images.layers import GuestLayer
from vdsm_storage.images.store import Store
from vdsm_storage.jobs.runner import Runner
from vdsm_storage.vms import records
from vdsm_storage.vms.drives import METADATA, Drive, VolumePath, volume_of
from vdsm_storage.vms.holdings import Holdings
from vdsm_storage.vms.records import Record
from vdsm_storage.vms.registry import Definition, Registry
from vdsm_storage.vms.throttle import Throttles
from vdsm_storage.vms.transient import Transients
from vdsm_storage.vms.vm_secrets import VmSecrets

TURN: Final = 60.0  # seconds to wait for another operation on the VM's disks
SETTLE: Final = 60.0  # seconds to wait for libvirt to tell what became of a change
BRIEFLY: Final = 3.0  # the same where it is tried again later
PAUSE: Final = 0.5  # seconds between two attempts
VM_DISKS: Final = "vm_disks"  # name space of locks: one operation on the disks of a VM at a time
NO_KEY: Final = "it is encrypted, wholly or in part, and the disk has no <encryption> with a secret"
IN_USE: Final = "vm_image"  # the same for an image that is prepared or let go

log = logging.getLogger("vms.disks")


@dataclass(frozen=True)
class DiskTools:
    """What operations on disks of VMs work with.

    `prepare(domain, image, volume)` makes a volume with its chain usable here and returns its path;
    `teardown(domain, image, volume)` undoes that.
    """

    libvirt: LibvirtDisks
    registry: Registry
    find_store: Callable[[str], Store]
    prepare: Callable[[str, str, str], str]
    teardown: Callable[[str, str, str], None]
    holdings: Holdings
    secrets: VmSecrets
    transients: Transients
    throttles: Throttles
    locks: Locks
    runner: Runner
    clock: Clock
    coming: Callable[[], Collection[str]] = tuple  # VMs that are on their way here


@dataclass(frozen=True)
class Usable:
    """A volume that a VM may open: its path, its format and role as metadata have them.

    `layers` are the volume and all below it; none of a transient disk.
    """

    path: str
    format: str
    block: bool
    voltype: str
    layers: Sequence[GuestLayer] = ()


class Keeping:
    def __init__(self, tools: DiskTools) -> None:
        self._tools = tools
        self._never = threading.Event()

    @contextlib.contextmanager
    def turn(self, vm: str, *volumes: VolumePath | None) -> Iterator[None]:
        """Alone with the VM's disks; with `volumes`, nobody lets go of their images meanwhile."""
        images = dict.fromkeys(_image_lock(volume) for volume in volumes if volume)
        wanted = [Lock(VM_DISKS, vm), *images]
        with self._tools.locks.held(wanted, TURN):
            yield

    # -- what libvirt says -------------------------------------------------------------------

    def running(self, vm: str) -> Definition:
        """Of a VM that runs, as it is now.  Raises NoSuchVM (1), VMIsDown (6), 59."""
        self._tools.registry.state(vm)
        return self._tools.registry.definition(vm, fresh=True)

    def settled(self, vm: str, patience: float = SETTLE) -> Definition:
        """The same once libvirt has come to the end of what it was told before.

        Raises NoSuchVM (1), VMIsDown (6), 59.
        """
        end = Deadline(self._tools.clock, patience)
        while True:
            try:
                self._wait_turn(vm)
                return self.running(vm)
            except (NoSuchVM, VMIsDown):
                raise
            except AgentError as error:
                if end.passed():
                    raise
                log.info("VM %s: waiting for libvirt: %s", vm, error)
            self._tools.clock.wait(self._never, PAUSE)

    def _wait_turn(self, vm: str) -> None:
        """libvirt changes a VM and asks it about its disks one after the other."""
        self._tools.registry.state(vm)
        try:
            self._tools.libvirt.disk_errors(vm)
        except VmError as error:
            if error.why is not Why.NOT_RUNNING:
                raise self._tools.registry.gone(vm, error) from error
            # It is just ending, or not begun.
            raise LibvirtFailure(call=f"VM {vm}", reason=error.text) from error

    # -- records -----------------------------------------------------------------------------

    def record(self, vm: str, name: str, record: Record | None) -> None:
        """Let the VM's record of a disk be this; None removes it.  Raises VmError, 1, 6, 59."""
        self._set(vm, records.with_record(self.running(vm).xml, name, record))

    def record_replica(self, vm: str, name: str, volume: VolumePath | None) -> None:
        """The same of what a disk is copied to."""
        self._set(vm, records.with_replica(self.running(vm).xml, name, volume))

    def _set(self, vm: str, metadata: str | None) -> None:
        if metadata is None:
            return
        try:
            self._tools.libvirt.set_metadata(vm, metadata, records.PREFIX, METADATA)
        finally:
            self._tools.registry.changed(vm)

    def sweep(self, vm: str, *, keep: str = "") -> None:
        """Let go of what the VM has records of and no disks, except for the target `keep`.

        The caller has the VM's turn.  Raises what record() and let_go() do.
        """
        definition = self.running(vm)
        there = {drive.name for drive in definition.drives}
        replicas = records.replicas(definition.xml)
        for name, record in records.records(definition.xml).items():
            if name in there or name == keep:
                continue
            for volume in (records.volume_in(record), replicas.get(name)):
                if volume is not None:
                    log.info("VM %s: its disk %s is gone; volume %s is let go", vm, name, volume)
                    self.release(vm, volume)
            self.record(vm, name, None)

    def sweep_replicas(self, vm: str) -> None:
        """Let go of what disks were copied to by jobs that failed.

        What became of them stays in the VM's record, for whoever ends the replication.
        """
        if not self.dead_replicas(vm, self._tools.registry.definition(vm)):
            return
        for name, volume in self.dead_replicas(vm, self.settled(vm, BRIEFLY)).items():
            log.warning("VM %s: copying disk %s to %s failed; that is let go", vm, name, volume)
            self.release(vm, volume)

    def dead_replicas(self, vm: str, definition: Definition) -> dict[str, VolumePath]:
        """Volumes held for the VM that its disks are not copied to any more, by target."""
        held = self._tools.holdings.of(vm)
        copied = {drive.replica for drive in definition.drives if drive.replica is not None}
        used = copied | {drive.volume for drive in definition.drives}
        return {
            name: volume
            for name, volume in records.replicas(definition.xml).items()
            if volume in held and volume not in used
        }

    # -- volumes -----------------------------------------------------------------------------

    def prepare(
        self, vm: str, volume: VolumePath, *, transient: bool = False, key: bool = False
    ) -> Usable:
        """For a VM, until release() or the VM's end; `transient`: what it writes is forgotten;
        `key`: the VM has one for encrypted layers.

        libvirt and QEMU open what the headers of a chain name: they are checked before.
        Raises CannotPrepareImage (1630).
        """
        tools = self._tools
        tools.holdings.add(vm, volume)
        try:
            path = tools.prepare(volume.domain, volume.image, volume.volume)
            store = tools.find_store(volume.domain)
            found = layers.guest_layers(store, volume.image, volume.volume)
            if any(layer.encrypted for layer in found) and (transient or not key):
                raise UnsupportedOperation(operation="this", reason=NO_KEY)
            metadata = store.load(volume.image, volume.volume)
            if transient:
                fmt = layers.qemu_format(metadata)
                path = tools.transients.make(vm, volume.volume, path, fmt, metadata.capacity)
                return Usable(path, md.COW, block=False, voltype=md.LEAF)
        except (AgentError, CommandError, OSError) as error:
            raise CannotPrepareImage(
                volume=volume.volume, image=volume.image, reason=error
            ) from error
        return Usable(path, metadata.format, store.is_block, metadata.voltype, found)

    def release(self, vm: str, volume: VolumePath) -> None:
        """A VM has it no more: tear the image down, unless another VM has it, or this one by
        another disk.

        Raises 59 when that cannot be told, and what tearing down does.
        """
        with self._tools.locks.held([_image_lock(volume)], TURN):
            self.release_held(vm, volume)

    def release_held(self, vm: str, volume: VolumePath) -> None:
        """The same for who holds the image's lock, by turn()."""
        users = self.users(volume) + self._awaited(volume, vm)
        if users:
            log.info("Volume %s stays prepared for VM %s", volume.volume, ", ".join(users))
        else:
            self._tools.teardown(volume.domain, volume.image, volume.volume)
        self._tools.transients.remove(vm, volume.volume)
        if vm not in users:
            self._tools.holdings.drop(vm, volume)

    def release_all(self, vm: str) -> None:
        """The VM has ended, or did not start: its images and its secrets are let go.

        Raises what release() does, SecretUnregistrationFailed.
        """
        for volume in self._tools.holdings.of(vm):
            self.release(vm, volume)
        self._tools.secrets.release(vm)

    def has(self, vm: str) -> bool:
        """Whether anything is kept for it."""
        return bool(self._tools.holdings.of(vm) or self._tools.secrets.of(vm))

    def kept(self) -> set[str]:
        """The VMs that something is kept for."""
        return {*self._tools.holdings.vms(), *self._tools.secrets.vms()}

    def _awaited(self, volume: VolumePath, vm: str) -> list[str]:
        """Other VMs that the image was made usable for, and of which libvirt has nothing yet."""
        image = (volume.domain, volume.image)
        return [
            other
            for other in self._tools.coming()
            if other != vm
            and any((v.domain, v.image) == image for v in self._tools.holdings.of(other))
        ]

    def users(self, volume: VolumePath) -> list[str]:
        """The VMs that have the volume's image, or copy a disk to it.  Raises 59."""
        found = []
        for state in self._tools.registry.running():
            try:
                drives = self._tools.registry.definition(state.id, fresh=True).drives
            except (NoSuchVM, VMIsDown):
                continue
            if any(_has_image(drive, volume) for drive in drives):
                found.append(state.id)
        return found


def _has_image(drive: Drive, volume: VolumePath) -> bool:
    found = [volume_of(path) for path in (*drive.chain, drive.replica_path)]
    return any(v and (v.domain, v.image) == (volume.domain, volume.image) for v in found)


def _image_lock(volume: VolumePath) -> Lock:
    return Lock(IN_USE, f"{volume.domain}/{volume.image}")
