# SPDX-License-Identifier: GPL-2.0-or-later
"""A request for a VM, read and checked as a whole; and what storage says, put into its XML.

Engines send libvirt's <domain>.  Its disks name their volumes in the metadata (see records.py), or
by a path that leads to one; the path itself is a hint.  Others are taken as they are: files, LUNs,
network disks, drives without a medium.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.errors import CannotCreateVM
from vdsm_storage.leases.external import LeaseRef
from vdsm_storage.leases.model import LeaseSpec
from vdsm_storage.secrets import request as secret_request
from vdsm_storage.secrets.model import Entry
from vdsm_storage.vms import disk_xml, records
from vdsm_storage.vms.disk_xml import BadDiskError
from vdsm_storage.vms.drives import METADATA, VolumePath, parse, volume_of
from vdsm_storage.vms.keeping import Usable

# Which start of the VM it is, in the metadata beside the engine's own: tells a VM that was started
# by a request from one with the same UUID that somebody else started.
LAUNCH: Final = "launchId"
REMOVABLE: Final = ("cdrom", "floppy")
# Parts of a request that change what the guest finds, and that are not built.
NOT_BUILT: Final[Mapping[str, str]] = {
    "memoryDumpVolume": "starting from a saved memory",
    "memoryConfVolume": "starting from a saved memory",
    "_X_tpmdata": "giving a TPM its data back",
    "_X_nvramdata": "giving the firmware its variables back",
}
ET.register_namespace("ovirt-vm", METADATA)  # as engines write it
ET.register_namespace("qemu", "http://libvirt.org/schemas/domain/qemu/1.0")


@dataclass(frozen=True)
class DiskOrder:
    """A disk of the request: libvirt's <disk> in it, and what is to be recorded of it."""

    disk: ET.Element
    name: str
    record: Mapping[str, str]
    volume: VolumePath | None

    @property
    def transient(self) -> bool:
        return self.record.get("shared") == "transient"

    @property
    def exclusive(self) -> bool:
        """Whether the VM shall hold the volume's own lease."""
        return self.record.get("shared") == "exclusive"

    @property
    def readonly(self) -> bool:
        return self.disk.find("readonly") is not None

    @property
    def key(self) -> ET.Element | None:
        return disk_xml.key_of(self.disk)


@dataclass(frozen=True)
class Order:
    """A VM that somebody wants; `paused`: its processors stay stopped."""

    vm: str
    name: str
    root: ET.Element
    disks: Sequence[DiskOrder]
    leases: Sequence[tuple[ET.Element, LeaseRef]]
    paused: bool = False
    secrets: Sequence[Entry] = field(default=(), repr=False)

    @property
    def volumes(self) -> list[VolumePath]:
        return list(dict.fromkeys(disk.volume for disk in self.disks if disk.volume is not None))

    @property
    def text(self) -> str:
        return ET.tostring(self.root, encoding="unicode")


def parse_order(vm: str, params: Mapping[str, Any]) -> Order:
    """Raises CannotCreateVM (9), BadSecretRequest (72)."""
    try:
        return _order(vm, params)
    except BadDiskError as error:
        raise CannotCreateVM(vm=vm, reason=str(error)) from error


def _order(vm: str, params: Mapping[str, Any]) -> Order:
    for key, what in NOT_BUILT.items():
        if params.get(key):
            raise BadDiskError(f"vmParams.{key} was given, and {what} is not built")
    if params.get("vmId", vm) != vm:
        raise BadDiskError(f"vmParams.vmId is {params['vmId']}; give the UUID of vmID, or none")
    if not params.get("xml"):
        raise BadDiskError("vmParams.xml is missing; send libvirt's XML of the VM")
    root = disk_xml.parse(params["xml"])
    if root.tag != "domain":
        raise BadDiskError(f"vmParams.xml is a <{root.tag}>, not a <domain>")
    _name_it(root, vm)
    disks = [_disk(root, disk) for disk in root.iterfind("./devices/disk")]
    _refuse_twice(disks)
    for disk in disks:
        if disk.volume is not None:
            put_record(root, disk.name, disk.record)
    return Order(
        vm=vm,
        name=root.findtext("name", "").strip(),
        root=root,
        disks=disks,
        leases=list(_leases(root)),
        paused=bool(params.get("launchPaused")),
        secrets=secret_request.parse_of_vm(params.get("secrets") or ()),
    )


def _name_it(root: ET.Element, vm: str) -> None:
    told = root.findtext("uuid", "").strip()
    if told and told.lower() != vm:
        raise BadDiskError(f"the XML is of VM {told}; its <uuid> must be vmID, or be left out")
    if not told:
        ET.SubElement(root, "uuid").text = vm
    if not root.findtext("name", "").strip():
        raise BadDiskError("the XML has no <name>")
    if root.find("devices") is None:
        raise BadDiskError("the XML has no <devices>")


def _disk(root: ET.Element, disk: ET.Element) -> DiskOrder:
    target = disk.find("target")
    name = target.get("dev", "") if target is not None else ""
    if not name:
        raise BadDiskError("one of its disks has no <target dev=…>")
    told = root.find(f"./metadata/{{{METADATA}}}vm")
    record = {} if told is None else records.of_device(told, name)
    path = disk_xml.path_of(disk)
    volume = records.volume_in(record)
    if volume is not None:
        ids = {"domainID": volume.domain, "imageID": volume.image, "volumeID": volume.volume}
        for key, value in ids.items():
            if not is_uuid(value):
                raise BadDiskError(f"disk {name}: {key} in its metadata is no UUID")
    elif disk.get("type") in ("file", "block", None):
        volume = volume_of(path)
        if volume is not None:
            record.update(disk_xml.record_of(volume))
        elif record.get("GUID") and not path:
            disk_xml.set_source(disk, f"{disk_xml.MAPPER}/{record['GUID']}")
        elif not path and disk.get("device") not in REMOVABLE:
            raise BadDiskError(f"disk {name} has neither a volume nor a LUN nor a path")
        elif not path:
            disk_xml.set_source(disk, "")
    return DiskOrder(disk, name, record, volume)


def _refuse_twice(disks: Iterable[DiskOrder]) -> None:
    names: set[str] = set()
    images: dict[tuple[str, str, bool], str] = {}
    for disk in disks:
        if disk.name in names:
            raise BadDiskError(f"two of its disks have the target {disk.name}")
        names.add(disk.name)
        if disk.volume is None:
            continue
        # A snapshot may stand beside the disk itself.
        image = (disk.volume.domain, disk.volume.image, disk.transient)
        other = images.setdefault(image, disk.name)
        if other != disk.name:
            raise BadDiskError(f"disks {other} and {disk.name} have the same image {image[1]}")


def put_record(root: ET.Element, name: str, record: Mapping[str, str]) -> None:
    """What the VM was given stands in its metadata, whatever the request said there."""
    vm = _own_metadata(root)
    device = next(
        (each for each in vm.iterfind(f"{{{METADATA}}}device")
         if (each.get("devtype"), each.get("name")) == ("disk", name)), None,
    )  # fmt: skip
    if device is None:
        keys = {"devtype": "disk", "name": name}
        device = ET.SubElement(vm, f"{{{METADATA}}}device", keys)
    for key, value in record.items():
        _set(device, key, value)


def _own_metadata(root: ET.Element) -> ET.Element:
    metadata = root.find("metadata")
    if metadata is None:
        metadata = ET.SubElement(root, "metadata")
    vm = metadata.find(f"{{{METADATA}}}vm")
    return ET.SubElement(metadata, f"{{{METADATA}}}vm") if vm is None else vm


def _set(parent: ET.Element, key: str, value: str) -> None:
    child = parent.find(f"{{{METADATA}}}{key}")
    if child is None:
        child = ET.SubElement(parent, f"{{{METADATA}}}{key}")
    child.text = value


def _leases(root: ET.Element) -> Iterable[tuple[ET.Element, LeaseRef]]:
    """Those of storage domains; others are not this agent's."""
    for lease in root.iterfind("./devices/lease"):
        domain, key = lease.findtext("lockspace", ""), lease.findtext("key", "")
        if is_uuid(domain) and is_uuid(key):
            yield lease, LeaseRef(domain, key)


# -- what storage says -------------------------------------------------------------------------


def put_launch(order: Order, launch: str) -> None:
    _set(_own_metadata(order.root), LAUNCH, launch)


def launch_of(xml: str) -> str:
    """Which start a VM that runs comes from; "" when it was started by others."""
    return parse(xml).findtext(f"./metadata/{{{METADATA}}}vm/{{{METADATA}}}{LAUNCH}", "")


def put_volume(disk: DiskOrder, usable: Usable) -> None:
    """Path, format and layers are the storage's; the headers were checked."""
    disk_xml.set_source(disk.disk, usable.path)
    disk_xml.set_format(disk.disk, usable.format, block=usable.block)
    disk_xml.set_below(disk.disk, usable.layers, block=usable.block)


def put_lease(lease: ET.Element, spec: LeaseSpec) -> None:
    target = lease.find("target")
    if target is None:
        target = ET.SubElement(lease, "target")
    target.set("path", spec.path)
    target.set("offset", str(spec.offset))


def put_volume_lease(order: Order, volume: VolumePath, spec: LeaseSpec) -> None:
    devices = order.root.find("devices")
    if devices is None:
        raise ValueError("an order without <devices>")
    lease = ET.SubElement(devices, "lease")
    ET.SubElement(lease, "lockspace").text = volume.domain
    ET.SubElement(lease, "key").text = volume.volume
    put_lease(lease, spec)

