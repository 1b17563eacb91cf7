# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks of VMs as engines ask for them, and what libvirt and the host say of them."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

from functional.vm_lab import Machine, VmDisk, VmLab

SCSI = "<controller type='scsi' index='0' model='virtio-scsi'/>"
CDROM = (
    "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>"
    "<target dev='hdc' bus='ide'/><readonly/></disk>"
)
FLOPPY = "<disk type='file' device='floppy'><target dev='fda' bus='fdc'/></disk>"
ENGINE = "http://ovirt.org/vm/1.0"


def prepared(lab: VmLab) -> set[str]:
    """Images with a link on this host."""
    return {link.name for link in (lab.agent.dir / "run" / "storage").glob("*/*")}


def root(machine: Machine) -> ET.Element:
    return ET.fromstring(machine.guest.domain.XMLDesc(0))


def element(machine: Machine, target: str) -> ET.Element | None:
    return next(
        (disk for disk in root(machine).iterfind("./devices/disk")
         if disk.find(f"./target[@dev='{target}']") is not None), None,
    )  # fmt: skip


def targets(machine: Machine) -> list[str]:
    return [each.get("dev", "") for each in root(machine).iterfind("./devices/disk/target")]


def records(machine: Machine) -> dict[str, dict[str, str]]:
    found = {}
    for device in root(machine).iterfind(f"./metadata/{{{ENGINE}}}vm/{{{ENGINE}}}device"):
        found[device.get("name", "")] = {e.tag.rpartition("}")[2]: e.text or "" for e in device}
    return found


def source(machine: Machine, target: str) -> str:
    disk = element(machine, target)
    assert disk is not None
    where = disk.find("source")
    return "" if where is None else where.get("file", "") or where.get("dev", "")


def hotplug_xml(lab: VmLab, disk: VmDisk, target: str = "sdb", more: str = "") -> str:
    """As an engine sends it: the path is a hint, the volume is in the metadata."""
    world = lab.world
    path = f"{world.pool}/{world.main}/images/{disk.image}/{disk.leaf}"
    bus = "scsi" if target.startswith("sd") else "virtio"
    return f"""<?xml version="1.0" encoding="UTF-8"?><hotplug><devices>
        <disk type="file" device="disk" snapshot="no">
          <target dev="{target}" bus="{bus}"/>
          <source file="/rhev/data-center/{path}">
            <seclabel model="dac" type="none" relabel="no"/></source>
          <driver name="qemu" io="threads" type="raw" cache="none" error_policy="stop"/>
          <alias name="ua-{disk.image}"/><serial>{disk.image}</serial>{more}
        </disk></devices>
        <metadata xmlns:ovirt-vm="{ENGINE}"><ovirt-vm:vm>
          <ovirt-vm:device devtype="disk" name="{target}">
            <ovirt-vm:poolID>{world.pool}</ovirt-vm:poolID>
            <ovirt-vm:domainID>{world.main}</ovirt-vm:domainID>
            <ovirt-vm:imageID>{disk.image}</ovirt-vm:imageID>
            <ovirt-vm:volumeID>{disk.leaf}</ovirt-vm:volumeID>
          </ovirt-vm:device></ovirt-vm:vm></metadata></hotplug>"""


def by_alias(disk: VmDisk) -> str:
    return (
        "<hotunplug><devices><disk type='file'>"
        f"<alias name='ua-{disk.image}'/></disk></devices></hotunplug>"
    )


def pdiv(lab: VmLab, disk: VmDisk) -> dict[str, str]:
    return {
        "poolID": lab.world.pool, "domainID": lab.world.main, "imageID": disk.image,
        "volumeID": disk.leaf,
    }  # fmt: skip


def plug(lab: VmLab, machine: Machine, disk: VmDisk, target: str = "sdb", more: str = "") -> Any:
    params = {"vmId": machine.id, "xml": hotplug_xml(lab, disk, target, more)}
    return lab.call("VM.hotplugDisk", vmID=machine.id, params=params)


def unplug(lab: VmLab, machine: Machine, disk: VmDisk) -> Any:
    params = {"vmId": machine.id, "xml": by_alias(disk)}
    return lab.call("VM.hotunplugDisk", vmID=machine.id, params=params)
