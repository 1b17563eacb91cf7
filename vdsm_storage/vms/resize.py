# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.diskSizeExtend and VM.refresh_disk: a running VM sees what its volume has become.

The volume comes first.  A raw one was given its storage by Volume.extendSize; of a qcow2 one that
a guest has open only QEMU can change the size, so its metadata are written before QEMU is told, and
corrected when it refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

from vdsm_storage.base.units import round_up
from vdsm_storage.errors import (
    AgentError,
    BadDiskResizeParameter,
    CannotRefreshDisk,
    DiskRefreshNotSupported,
    ImageFileNotFound,
    LibvirtTimeout,
    LibvirtUnavailable,
    NoSuchVM,
    UnsupportedDriveType,
    VMIsDown,
)
from vdsm_storage.host.libvirt_model import VmError, Why
from vdsm_storage.images import metadata as md
from vdsm_storage.images.create import CAPACITY_STEP
from vdsm_storage.images.guard import VolumeRef
from vdsm_storage.images.store import Store
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request
from vdsm_storage.vms.choose import describe, matches, named
from vdsm_storage.vms.drives import REPLICATED, Drive, VolumePath
from vdsm_storage.vms.keeping import BRIEFLY, DiskTools, Keeping

EXTEND: Final = "vm.extend_disk"
OFFLINE: Final = "volume.extend"  # images/extend.py

log = logging.getLogger("vms.resize")


class Writing(Protocol):
    """The part of images.guard.Guard that is used here."""

    def writing(self, target: VolumeRef) -> AbstractContextManager[Store]:
        """Hold a volume with its lease; gives its store."""


@dataclass(frozen=True)
class Looking:
    """`rescan(guid)` lets this host see the present size of a LUN; `virtual_size(domain, image,
    volume)` is what the header of a qcow2 volume says."""

    rescan: Callable[[str], None]
    virtual_size: Callable[[str, str, str], int]


@dataclass(frozen=True)
class Extend:
    """A qcow2 volume of a VM, and its new capacity in bytes; `name` is the target."""

    vm: str
    name: str
    volume: VolumePath
    size: int

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Extend:
        return cls(**{**params, "volume": VolumePath(**params["volume"])})

    @property
    def ref(self) -> VolumeRef:
        return VolumeRef(self.volume.domain, self.volume.image, self.volume.volume)


class Resizing:
    def __init__(
        self, tools: DiskTools, keeping: Keeping, guard: Writing, looking: Looking,
        coming: Callable[[str], bool] = lambda _vm: False,
    ) -> None:  # fmt: skip
        """`coming(vm)`: it is on its way from another host."""
        self._tools = tools
        self._keeping = keeping
        self._guard = guard
        self._looking = looking
        self._coming = coming

    def kinds(self) -> tuple[Kind, ...]:
        return (Kind(EXTEND, ("recorded", "resized"), self._extend_cow, self._recover),)

    # -- what callers ask --------------------------------------------------------------------

    def extend(self, vm: str, spec: str | Mapping[str, Any], size: int) -> int:
        """Returns the bytes that the guest sees.

        Raises 1, 6, 13, 59, UnsupportedDriveType (36), BadDiskResizeParameter (58), and what
        looking at the volume does.
        """
        told = {"path": spec} if isinstance(spec, str) else spec
        drive = self._find(vm, told)
        if drive.device != "disk" and drive.device != "lun":
            raise UnsupportedDriveType(
                vm=vm, disk=drive.name, operation="resizing", reason=f"it is a {drive.device}"
            )
        if drive.is_replicated:
            raise _bad(vm, drive, size, f"it {REPLICATED}")
        volume = drive.volume
        if volume is None:
            return self._extend_device(vm, drive, size)
        store = self._tools.find_store(volume.domain)
        metadata = store.load(volume.image, volume.volume)
        if metadata.format == md.COW:
            request = Extend(vm, drive.name, volume, round_up(size, CAPACITY_STEP))
            self._tools.runner.run(
                Request(
                    kind=EXTEND,
                    params=asdict(request),
                    domains=[volume.domain],
                    verb="VM.diskSizeExtend",
                    lane=vm,
                    description=f"Extend disk {drive.name} of VM {vm} to {size} bytes",
                )
            )
            return self._capacity(vm, drive.name)
        with self._keeping.turn(vm):
            store.refresh(volume.image, volume.volume)
            there = store.sizes(volume.image, volume.volume).apparent - metadata.overhead
            if there < size:
                reason = f"its volume has {there} bytes; Volume.extendSize comes first"
                raise _bad(vm, drive, size, reason)
            # A raw file is as long as its volume's capacity; the guest gets all of it.
            self._tell(vm, drive.name, max(size, metadata.capacity if store.is_block else there))
        return self._capacity(vm, drive.name)

    def extend_offline(self, spec: Mapping[str, Any], size: int) -> int:
        """Of a volume that no VM has.  Raises 58, and what Volume.extendSize does."""
        if not spec.get("volumeID"):
            raise BadDiskResizeParameter(
                disk=describe(spec), vm="(none)", size=size, reason="name a volume"
            )
        volume = VolumePath(str(spec["domainID"]), str(spec["imageID"]), str(spec["volumeID"]))
        store = self._tools.find_store(volume.domain)
        if store.load(volume.image, volume.volume).capacity > size:
            raise BadDiskResizeParameter(
                disk=volume.volume, vm="(none)", size=size, reason="it is larger already"
            )
        self._tools.runner.run(
            Request(
                kind=OFFLINE,
                params={**asdict(volume), "size": size},
                domains=[volume.domain],
                verb="VM.diskSizeExtend",
                lane=volume.domain,
                description=f"Extend volume {volume.volume} to {size} bytes",
            )
        )
        return store.load(volume.image, volume.volume).capacity

    def refresh(self, vm: str, spec: Mapping[str, Any]) -> dict[str, str]:
        """This host sees the volume's present size; {apparentsize, truesize}, bytes.

        Of a VM that is on its way here, too: the host that it comes from asks for it when it gave
        the volume more storage.

        Raises 1, 6, 13, 59, CannotRefreshDisk (1650), DiskRefreshNotSupported (1651).
        """
        name, volume = self._volume(vm, spec)
        if volume is None:
            reason = "it is on no volume of a storage domain"
            raise DiskRefreshNotSupported(vm=vm, disk=name, reason=reason)
        try:
            store = self._tools.find_store(volume.domain)
            store.refresh(volume.image, volume.volume)
            sizes = store.sizes(volume.image, volume.volume)
        except AgentError as error:
            raise CannotRefreshDisk(vm=vm, disk=name, reason=error) from error
        return {"apparentsize": str(sizes.apparent), "truesize": str(sizes.allocated)}

    def _volume(self, vm: str, spec: Mapping[str, Any]) -> tuple[str, VolumePath | None]:
        """The target and the volume of a disk; of a VM that is not here yet its volume twice."""
        if self._coming(vm):
            names = (spec.get("domainID"), spec.get("imageID"), spec.get("volumeID"))
            for volume in self._tools.holdings.of(vm):
                if (volume.domain, volume.image, volume.volume) == names:
                    return volume.volume, volume
        drive = self._find(vm, spec)
        return drive.name, drive.volume

    def _find(self, vm: str, spec: Mapping[str, Any]) -> Drive:
        for drive in self._keeping.running(vm).drives:
            if matches(drive, spec):
                volume = drive.volume
                if spec.get("volumeID") and volume and volume.volume != spec["volumeID"]:
                    continue
                return drive
        raise ImageFileNotFound(vm=vm, disk=describe(spec))

    # -- raw, and what is not managed --------------------------------------------------------

    def _extend_device(self, vm: str, drive: Drive, size: int) -> int:
        """A LUN, or a network disk: its size is its storage's affair."""
        if drive.path.startswith("/dev/mapper/"):
            self._looking.rescan(drive.path.rpartition("/")[2])
        with self._keeping.turn(vm):
            self._tell(vm, drive.name, size)
        return self._capacity(vm, drive.name)

    def _tell(self, vm: str, name: str, size: int) -> None:
        """QEMU gives the guest `size` bytes, or more if a device has more."""
        now = self._capacity(vm, name)
        if size < now:
            reason = f"it has {now} bytes already"
            raise BadDiskResizeParameter(disk=name, vm=vm, size=size, reason=reason)
        try:
            self._tools.libvirt.resize(vm, name, size)
        except VmError as error:
            raise self._error(vm, name, size, error) from error
        except (LibvirtTimeout, LibvirtUnavailable):
            self._keeping.settled(vm)
            if self._capacity(vm, name) < size:
                raise

    def _capacity(self, vm: str, name: str) -> int:
        try:
            return self._tools.libvirt.capacity(vm, name)
        except VmError as error:
            raise self._tools.registry.gone(vm, error) from error

    def _error(self, vm: str, name: str, size: int, error: VmError) -> Exception:
        if error.why is Why.NO_VM:
            return self._tools.registry.gone(vm, error)
        return BadDiskResizeParameter(disk=name, vm=vm, size=size, reason=error.text)

    # -- qcow2 -------------------------------------------------------------------------------

    def _extend_cow(self, op: Operation) -> None:
        asked = Extend.from_params(op.params)
        with self._keeping.turn(asked.vm):
            now = self._capacity(asked.vm, asked.name)
            if asked.size < now:
                reason = f"it has {now} bytes already"
                raise BadDiskResizeParameter(
                    disk=asked.name, vm=asked.vm, size=asked.size, reason=reason
                )
            op.record(before=now)
            self._save(asked, asked.size)
            op.step("recorded")
            self._tell(asked.vm, asked.name, asked.size)
            op.step("resized", abortable=False)

    def _save(self, asked: Extend, capacity: int) -> None:
        """Let the volume's metadata say this; under its lease, as other hosts read it too."""
        with self._guard.writing(asked.ref) as store:
            found = store.load(asked.volume.image, asked.volume.volume)
            if found.capacity != capacity:
                store.save(asked.volume.image, asked.volume.volume, found.with_(capacity=capacity))

    def _recover(self, op: Operation) -> bool:
        """The metadata say what the guest sees; a VM that ended is looked at as a volume."""
        asked = Extend.from_params(op.params)
        if "before" not in op.facts:
            return False
        with self._keeping.turn(asked.vm):
            try:
                drive = named(self._keeping.settled(asked.vm, BRIEFLY).drives, asked.name)
                if drive is None or drive.volume != asked.volume:
                    raise VMIsDown(vm=asked.vm)
                actual = self._capacity(asked.vm, asked.name)
            except (NoSuchVM, VMIsDown):
                volume = asked.volume
                actual = self._looking.virtual_size(volume.domain, volume.image, volume.volume)
            self._save(asked, actual)
        return actual >= asked.size


def _bad(vm: str, drive: Drive, size: int, reason: str) -> BadDiskResizeParameter:
    return BadDiskResizeParameter(disk=drive.name, vm=vm, size=size, reason=reason)
