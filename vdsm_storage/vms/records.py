# SPDX-License-Identifier: GPL-2.0-or-later
"""What engines keep in a VM's <metadata>: for each disk the volume that it is.

    <ovirt-vm:vm xmlns:ovirt-vm="http://ovirt.org/vm/1.0">
      <ovirt-vm:device devtype="disk" name="vda">
        <ovirt-vm:poolID>…</…> <ovirt-vm:domainID>…</…> <ovirt-vm:imageID>…</…>
        <ovirt-vm:volumeID>…</ovirt-vm:volumeID>

Here a record is what stands below <device>, by the names of its elements.  libvirt keeps all of it
as long as the VM runs, over restarts of its own.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Final

from vdsm_storage.vms.drives import METADATA, VolumePath, parse

PREFIX: Final = "ovirt-vm"
_DEVICE: Final = "device"

Record = Mapping[str, str]


def volume_in(record: Record) -> VolumePath | None:
    """The volume that a record names."""
    names = [record.get(key, "") for key in ("domainID", "imageID", "volumeID")]
    return VolumePath(*names) if all(names) else None


def records(xml: str) -> dict[str, dict[str, str]]:
    """Of all disks, by target."""
    vm = _element(xml)
    devices = () if vm is None else vm.iterfind(_DEVICE)
    return {
        name: {child.tag: (child.text or "").strip() for child in device}
        for device in devices
        if device.get("devtype") == "disk" and (name := device.get("name"))
    }


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
    device = next(
        (d for d in vm.iterfind(_DEVICE) if (d.get("devtype"), d.get("name")) == ("disk", name)),
        None,
    )
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
