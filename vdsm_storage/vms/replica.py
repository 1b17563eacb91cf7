# SPDX-License-Identifier: GPL-2.0-or-later
"""What a replication copies where: whether it can be done, and how libvirt is told."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from vdsm_storage.errors import (
    AgentError,
    CannotPrepareImage,
    DestinationVolumeTooSmall,
    ReplicaError,
    UnsupportedDriveType,
)
from vdsm_storage.images import chain, guard, layers, sizing
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.store import Store
from vdsm_storage.jobs.runner import Request
from vdsm_storage.vms import disk_xml
from vdsm_storage.vms.drives import Drive, VolumePath

EXTEND: Final = 60.0  # seconds for a volume to get more storage

# extend(domain, volume, size, timeout in seconds) -> the bytes that a volume on LUNs has then
Extend = Callable[[str, str, int, float], int]


@dataclass(frozen=True)
class Replica:
    """A disk of a VM (`name` is its target), and what it is copied to.

    `extend`: a thin target on LUNs first gets room for what the source has.  `pivot`, of an end:
    the VM goes on with the target, else with the source.
    """

    vm: str
    name: str
    source: VolumePath
    target: VolumePath
    extend: bool = False
    pivot: bool = False

    def as_request(self, kind: str, verb: str) -> Request:
        what = f"disk {self.name} of VM {self.vm}"
        return Request(
            kind=kind,
            params=asdict(self),
            domains=sorted({self.source.domain, self.target.domain}),
            verb=verb,
            lane=self.vm,
            description=f"{verb}: {what}, volume {self.target.volume}",
        )

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Replica:
        ends = {key: VolumePath(**params[key]) for key in ("source", "target")}
        return cls(**{**params, **ends})

    def failed(self, reason: object) -> ReplicaError:
        return ReplicaError(vm=self.vm, disk=self.name, reason=reason)


def volume_in(spec: Mapping[str, Any]) -> VolumePath:
    """Of a DriveSpecVolume."""
    return VolumePath(str(spec["domainID"]), str(spec["imageID"]), str(spec["volumeID"]))


def check_drive(asked: Replica, drive: Drive) -> None:
    """Whether this disk can be copied at all.  Raises UnsupportedDriveType (36), 55."""
    reason = ""
    if drive.device not in ("disk", "lun") or drive.kind not in ("file", "block"):
        reason = f"it is a {drive.kind} {drive.device}"
    elif drive.transient or drive.readonly or drive.shared:
        reason = "it is transient, shared or read-only"
    elif drive.leased:
        reason = "the VM holds a lease of its volume, and would hold it no more"
    if reason:
        raise UnsupportedDriveType(
            vm=asked.vm, operation="a replication", disk=drive.name, reason=reason
        )
    if drive.is_replicated:
        raise asked.failed(f"it is being copied already, to {drive.replica_path}")
    if (asked.source.domain, asked.source.image) == (asked.target.domain, asked.target.image):
        raise asked.failed("source and destination are the same image")


@dataclass(frozen=True)
class Target:
    """The volume that a disk is copied to.  `members` is its chain, base first."""

    store: Store
    members: Sequence[Member]

    @classmethod
    def find(cls, asked: Replica, find_store: Callable[[str], Store]) -> Target:
        """Raises CannotPrepareImage (1630)."""
        target = asked.target
        try:
            store = find_store(target.domain)
            return cls(store, chain.walk(store, target.image, target.volume))
        except AgentError as error:
            raise CannotPrepareImage(
                volume=target.volume, image=target.image, reason=error
            ) from error

    @property
    def metadata(self) -> VolumeMetadata:
        return self.members[-1].metadata

    @property
    def shallow(self) -> bool:
        """Whether the layers below are somebody else's to copy; without any, the disk's whole
        chain becomes this one volume."""
        return len(self.members) > 1

    def check(self, asked: Replica, drive: Drive, needed: int) -> None:
        """Whether the disk, of which the guest sees `needed` bytes, fits there.

        Raises ReplicaError (55), DestinationVolumeTooSmall (79), 262.
        """
        metadata, volume = self.metadata, asked.target.volume
        if metadata.voltype != md.LEAF or not metadata.is_legal:
            state = f"{metadata.voltype} and {metadata.legality}"
            raise asked.failed(f"volume {volume} is {state}, it must be a leaf and LEGAL")
        if self.shallow and len(drive.chain) < 2:
            raise asked.failed(f"volume {volume} has a parent, the disk's volume has none")
        size = metadata.capacity
        if not self.members[-1].is_cow:
            size = self.store.sizes(asked.target.image, volume).apparent - metadata.overhead
        if size < needed:
            raise DestinationVolumeTooSmall(volume=volume, size=size, needed=needed)
        if metadata.is_raw and size > needed:
            reason = f"volume {volume} has {size} bytes, the disk {needed}"
            raise asked.failed(f"{reason}: QEMU wants them equal; take a COW volume")
        self._check_keys(asked, drive)

    def check_whole(self, asked: Replica) -> None:
        """Before the guest goes on there: a layer whose copy failed, or is not done, is ILLEGAL.

        Raises ReplicaError (55).
        """
        for member in self.members:
            if not member.metadata.is_legal:
                state = f"volume {member.volume} below it is {member.metadata.legality}"
                raise asked.failed(f"{state}: not all of it is copied; the VM stays where it is")

    def _check_keys(self, asked: Replica, drive: Drive) -> None:
        """Nothing that was encrypted is written in the clear; QEMU is given one key, the disk's."""
        names = [member.volume for member in self.members]
        with guard.active(self.store, asked.target.image, names, prepared=False):
            *below, top = (layers.is_encrypted(self.store, member) for member in self.members)
        if drive.encrypted and not top:
            raise asked.failed(f"the disk is encrypted, volume {names[-1]} is not")
        if top and not drive.secret:
            raise asked.failed(f"volume {names[-1]} is encrypted, and the disk has no key")
        if any(below):
            raise asked.failed(
                f"volumes below {names[-1]} are encrypted; copy to a volume without a parent"
            )

    def grow(self, asked: Replica, source: Store, extend: Extend) -> None:
        """Room for what the disk has now and a chunk that its guest may write.  Raises 206, 504."""
        if not self.store.is_block or not self.members[-1].is_cow:
            return
        names = [asked.source.volume]
        if not self.shallow:
            walked = chain.walk(source, asked.source.image, asked.source.volume)
            names = [member.volume for member in walked]
        there = sum(source.sizes(asked.source.image, name).allocated for name in names)
        wanted = sizing.copied_size(there, self.metadata.capacity, leaf=True)
        if wanted > self.store.sizes(asked.target.image, asked.target.volume).apparent:
            extend(asked.target.domain, asked.target.volume, wanted, EXTEND)


def target_xml(path: str, fmt: str, secret: str) -> str:
    """libvirt's <disk> for the copy; an encrypted one is opened with the key of the disk."""
    disk = ET.Element("disk", device="disk")
    disk_xml.set_source(disk, path)
    ET.SubElement(disk, "driver", name="qemu", type="qcow2" if fmt == md.COW else "raw")
    source = disk.find("source")
    if secret and source is not None:
        encryption = ET.SubElement(source, "encryption", format="luks")
        ET.SubElement(encryption, "secret", type="passphrase", uuid=secret)
    return disk_xml.text(disk)
