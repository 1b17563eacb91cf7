# SPDX-License-Identifier: GPL-2.0-or-later
"""What engines keep in a VM's <metadata>: for each disk its volume, by the target's name.

<ovirt-vm:vm xmlns:ovirt-vm="http://ovirt.org/vm/1.0">
  <ovirt-vm:device devtype="disk" name="vda">
    <ovirt-vm:domainID>…</…> <ovirt-vm:imageID>…</…> <ovirt-vm:volumeID>…</ovirt-vm:volumeID>
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Final

from vdsm_storage.vms.drives import METADATA, parse

PREFIX: Final = "ovirt-vm"


def with_volumes(xml: str, volumes: Mapping[str, str]) -> str | None:
    """The element with other volumes for some targets, as libvirt wants it: without its name
    space, which libvirt adds.  None when it need not change."""
    vm = parse(xml).find(f"./metadata/{{{METADATA}}}vm")
    if vm is None:
        return None
    changed = False
    for device in vm.iterfind(f"{{{METADATA}}}device"):
        volume = device.find(f"{{{METADATA}}}volumeID")
        wanted = volumes.get(device.get("name", ""))
        if volume is not None and wanted is not None and volume.text != wanted:
            volume.text = wanted
            changed = True
    if not changed:
        return None
    for element in vm.iter():
        element.tag = element.tag.removeprefix(f"{{{METADATA}}}")
    return ET.tostring(vm, encoding="unicode")
