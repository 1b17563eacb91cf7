# SPDX-License-Identifier: GPL-2.0-or-later
"""The disks of a VM, read from its libvirt XML; those on managed volumes are known by their path.

A volume's path ends in one of these, whichever tree of links it goes through:

    <domain>/images/<image>/<volume>      the data center's tree, and the storage itself
    storage/<domain>/<image>/<volume>     the links of prepared images
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vdsm_storage.base.uuids import is_uuid

METADATA = "http://ovirt.org/vm/1.0"  # name space of engines in <metadata>
REPLICATED = "is being replicated; VM.diskReplicateFinish comes first"  # why it cannot change


@dataclass(frozen=True)
class VolumePath:
    """A managed volume, by the names in its path."""

    domain: str
    image: str
    volume: str


@dataclass(frozen=True)
class Drive:
    """`name` is the target (vda).  `chain` are the paths from the top down, the first is `path`.

    `path` is empty for a drive without a medium, and the name of the volume for a network disk.
    """

    name: str
    device: str  # disk, cdrom, lun, floppy
    kind: str  # file, block, network, volume
    format: str
    path: str
    chain: Sequence[str] = ()
    serial: str = ""
    alias: str = ""
    readonly: bool = False
    transient: bool = False
    shared: bool = False
    leased: bool = False  # the VM holds a lease on one of its volumes
    secret: str = ""  # the UUID of the one that an encrypted disk is opened with
    # Of a job that copies what the guest writes: "yes" when it waits to be ended, "pivot" or
    # "abort" while libvirt does that.
    mirror: str = ""
    replica_path: str = ""  # where a replication copies it to
    mirrors_qcow2: bool = False  # whether either of these is a qcow2 volume
    commit_path: str = ""  # the base that its top layer is being merged into
    node: str = ""  # libvirt's name of the top layer (vda[1]); "" when it does not say
    encrypted: bool = False  # any layer of it
    nodes: Mapping[str, str] = field(default_factory=dict)  # QEMU's names of managed volumes

    @property
    def volume(self) -> VolumePath | None:
        """The managed volume that the guest writes to."""
        return volume_of(self.path)

    @property
    def volumes(self) -> list[str]:
        """The managed volumes of its chain, from the top down."""
        found = (volume_of(path) for path in self.chain)
        return [each.volume for each in found if each is not None]

    @property
    def is_replicated(self) -> bool:
        """Whether all that it has is being copied to another volume."""
        return bool(self.replica_path)

    @property
    def replica(self) -> VolumePath | None:
        """The managed volume that it is being copied to."""
        return volume_of(self.replica_path)

    @property
    def mirrored(self) -> VolumePath | None:
        """The managed volume that gets, too, what the guest writes: a replica, or the base of an
        active merge."""
        return volume_of(self.replica_path or self.commit_path)

    @property
    def is_thin(self) -> bool:
        """Whether it may have to grow: a qcow2 layer on a block device that a guest writes to."""
        writable = self.device == "disk" and not self.readonly
        return writable and self.kind == "block" and self.format == "qcow2"

    def is_volume(self, domain: str, image: str, volume: str) -> bool:
        return self.volume == VolumePath(domain, image, volume)


def volume_of(path: str) -> VolumePath | None:
    parts = path.rsplit("/", 4)
    if len(parts) == 5 and parts[2] == "images":
        names = (parts[1], parts[3], parts[4])
    elif len(parts) == 5 and parts[1] == "storage":
        names = (parts[2], parts[3], parts[4])
    else:
        return None
    return VolumePath(*names) if all(is_uuid(name) for name in names) else None


def parse(xml: str) -> ET.Element:
    """libvirt's XML.  It comes from libvirt alone, which parsed what others gave it."""
    return ET.fromstring(xml)  # noqa: S314


def drives(root: ET.Element) -> list[Drive]:
    transient = _transient(root)
    leases = {key.text for key in root.iterfind("./devices/lease/key") if key.text}
    return [_drive(disk, transient, leases) for disk in root.iterfind("./devices/disk")]


def _drive(disk: ET.Element, transient: set[str], leases: set[str]) -> Drive:
    target = disk.find("target")
    name = target.get("dev", "") if target is not None else ""
    driver = disk.find("driver")
    alias = disk.find("alias")
    chain = list(_chain(disk))
    volumes = {path.rpartition("/")[2] for path in chain}
    mirror = disk.find("mirror")
    return Drive(
        name=name,
        device=disk.get("device", "disk"),
        kind=disk.get("type", ""),
        format=driver.get("type", "") if driver is not None else "",
        path=chain[0] if chain else "",
        chain=tuple(chain),
        serial=disk.findtext("serial", ""),
        alias=alias.get("name", "") if alias is not None else "",
        readonly=disk.find("readonly") is not None,
        transient=disk.find("transient") is not None or name in transient,
        shared=disk.find("shareable") is not None,
        nodes=dict(_nodes(disk)),
        mirror=mirror.get("ready", "") if mirror is not None else "",
        replica_path=_mirror(mirror, "copy"),
        commit_path=_mirror(mirror, "active-commit"),
        mirrors_qcow2=mirror is not None and mirror.find("format[@type='qcow2']") is not None,
        node=_node(disk, name),
        encrypted=any(True for _ in _encryptions(disk)),
        leased=not leases.isdisjoint(volumes),
        secret=_secret(disk),
    )


def _secret(disk: ET.Element) -> str:
    """Of the top layer.  libvirt shows it inside of <source>, and takes it beside, too."""
    for where in ("./source/encryption/secret", "./encryption/secret"):
        found = disk.find(where)
        if found is not None:
            return found.get("uuid", "")
    return ""


def _encryptions(layer: ET.Element) -> Iterator[ET.Element]:
    """Of the layers of a disk, not of what it is copied to."""
    yield from layer.iterfind("./source/encryption")
    yield from layer.iterfind("./encryption")
    for below in layer.iterfind("./backingStore"):
        yield from _encryptions(below)


def _node(disk: ET.Element, target: str) -> str:
    source = disk.find("source")
    index = source.get("index") if source is not None else None
    return f"{target}[{index}]" if index else ""


def _mirror(mirror: ET.Element | None, job: str) -> str:
    """<mirror type='file' job='copy' ready='yes'><source file='…'/>; job='active-commit'."""
    if mirror is None or mirror.get("job") != job:
        return ""
    source = mirror.find("source")
    if source is None:
        return ""
    return source.get("file") or source.get("dev") or source.get("name") or ""


def _chain(disk: ET.Element) -> list[str]:
    """Paths of <source>, then of each <backingStore> inside the other."""
    found = []
    layer: ET.Element | None = disk
    while layer is not None:
        source = layer.find("source")
        if source is not None:
            where = source.get("file") or source.get("dev") or source.get("name")
            if where:
                found.append(where)
        layer = layer.find("backingStore")
    return found


def _nodes(disk: ET.Element) -> Iterator[tuple[str, str]]:
    """libvirt makes QEMU's names from the numbers in <source index='1'> of the disk and
    <backingStore index='2'> below it."""
    source = disk.find("source")
    index = source.get("index") if source is not None else None
    layer: ET.Element | None = disk
    while layer is not None:
        source = layer.find("source")
        if source is not None and index:
            volume = volume_of(source.get("file") or source.get("dev") or "")
            if volume is not None:
                yield volume.volume, f"libvirt-{index}-format"
        layer = layer.find("backingStore")
        index = layer.get("index") if layer is not None else None


def _transient(root: ET.Element) -> set[str]:
    """Targets that the engine calls transient: <device devtype="disk" name="sda">, <shared>."""
    devices = root.iterfind(f"./metadata/{{{METADATA}}}vm/{{{METADATA}}}device")
    return {
        device.get("name", "")
        for device in devices
        if device.findtext(f"{{{METADATA}}}shared") == "transient"
    }


def agent_channel(root: ET.Element) -> str | None:
    """State of the guest agent's channel, "" when libvirt does not say; None without one."""
    for target in root.iterfind("./devices/channel/target"):
        if target.get("name") == "org.qemu.guest_agent.0":
            return target.get("state", "")
    return None
