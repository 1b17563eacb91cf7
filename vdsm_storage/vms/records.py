# SPDX-License-Identifier: GPL-2.0-or-later
"""What engines keep in a VM's <metadata>: for each disk the volume that it is.

    <ovirt-vm:vm xmlns:ovirt-vm="http://ovirt.org/vm/1.0">
      <ovirt-vm:device devtype="disk" name="vda">
        <ovirt-vm:poolID>…</…> <ovirt-vm:domainID>…</…> <ovirt-vm:imageID>…</…>
        <ovirt-vm:volumeID>…</ovirt-vm:volumeID>

Here a record is what stands below <device>, by the names of its elements.  libvirt keeps all of it
as long as the VM runs, over restarts of its own.  What a disk is being copied to stands there, too:

        <ovirt-vm:replica> <ovirt-vm:domainID>…</…> … </ovirt-vm:replica>
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Final

from vdsm_storage.vms.drives import METADATA, VolumePath, parse

PREFIX: Final = "ovirt-vm"
_DEVICE: Final = "device"
_REPLICA: Final = "replica"
_IDS: Final = ("domainID", "imageID", "volumeID")

Record = Mapping[str, str]


def volume_in(record: Record) -> VolumePath | None:
    """The volume that a record names."""
    names = [record.get(key, "") for key in _IDS]
    return VolumePath(*names) if all(names) else None


def records(xml: str) -> dict[str, dict[str, str]]:
    """Of all disks, by target."""
    vm = _element(xml)
    devices = () if vm is None else vm.iterfind(_DEVICE)
    return {
        name: {child.tag: (child.text or "").strip() for child in device if not len(child)}
        for device in devices
        if device.get("devtype") == "disk" and (name := device.get("name"))
    }


def replicas(xml: str) -> dict[str, VolumePath]:
    """What disks are, or were, copied to, by target."""
    vm = _element(xml)
    found = {}
    for device in () if vm is None else vm.iterfind(f"{_DEVICE}[@devtype='disk']"):
        replica = device.find(_REPLICA)
        if replica is not None:
            names = {child.tag: (child.text or "").strip() for child in replica}
            volume = volume_in(names)
            if volume is not None:
                found[device.get("name", "")] = volume
    return found


def of_device(element: ET.Element, name: str) -> dict[str, str]:
    """The record of a target in an element <ovirt-vm:vm> that an engine sent; {} for none."""
    for device in element.iterfind(f"{{{METADATA}}}{_DEVICE}"):
        if device.get("devtype") == "disk" and device.get("name") == name:
            return {
                child.tag.rpartition("}")[2]: (child.text or "").strip()
                for child in device
                if not len(child)
            }
    return {}


def with_record(xml: str, name: str, record: Record | None) -> str | None:
    """The element with another record for a target, or with none; None if it need not change.

    What else stands below <device> stays.
    """
    vm = _element(xml)
    if vm is None:
        vm = ET.Element("vm")
    before = ET.tostring(vm)
    device = _device(vm, name)
    if record is None:
        if device is not None:
            vm.remove(device)
    else:
        if device is None:
            device = ET.SubElement(vm, _DEVICE, {"devtype": "disk", "name": name})
        for key, value in record.items():
            child = device.find(key)
            if child is None:
                child = ET.SubElement(device, key)
            child.text = value
    return None if ET.tostring(vm) == before else ET.tostring(vm, encoding="unicode")


def with_replica(xml: str, name: str, volume: VolumePath | None) -> str | None:
    """The element with what a target is copied to, or without; None if it need not change."""
    vm = _element(xml)
    if vm is None:
        vm = ET.Element("vm")
    before = ET.tostring(vm)
    device = _device(vm, name)
    if device is None and volume is not None:
        device = ET.SubElement(vm, _DEVICE, {"devtype": "disk", "name": name})
    if device is not None:
        replica = device.find(_REPLICA)
        if replica is not None:
            device.remove(replica)
        if volume is not None:
            replica = ET.SubElement(device, _REPLICA)
            names = (volume.domain, volume.image, volume.volume)
            for key, value in zip(_IDS, names, strict=True):
                ET.SubElement(replica, key).text = value
        elif not len(device):
            vm.remove(device)  # there was nothing else to say
    return None if ET.tostring(vm) == before else ET.tostring(vm, encoding="unicode")


def _device(vm: ET.Element, name: str) -> ET.Element | None:
    return next(
        (d for d in vm.iterfind(_DEVICE) if (d.get("devtype"), d.get("name")) == ("disk", name)),
        None,
    )


def _element(xml: str) -> ET.Element | None:
    """<ovirt-vm:vm> without its name space, as libvirt wants it back."""
    vm = parse(xml).find(f"./metadata/{{{METADATA}}}vm")
    return None if vm is None else bare(vm)


def bare(element: ET.Element) -> ET.Element:
    """The element without name spaces, all below it too."""
    for each in element.iter():
        each.tag = each.tag.rpartition("}")[2]
    element.tail = None
    return element
