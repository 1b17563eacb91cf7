# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's XML on its way to another host.

The source sends what the VM is (without passwords), the destination answers with where its disks
and leases are there.  What libvirt is given is the VM's own XML with these places: passwords of
displays go from one libvirt to the other, and past the agents.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from vdsm_storage.vms import disk_xml, start_xml
from vdsm_storage.vms.drives import Drive, parse
from vdsm_storage.vms.records import records
from vdsm_storage.vms.start_xml import Order

SAFE_CACHES: Final = ("none", "directsync")
_LOCAL: Final = ("file", "block")


def to_send(xml: str, drives: Sequence[Drive]) -> str:
    """What the destination is told: its disks are named by what the VM has open now."""
    root = parse(xml)
    for drive in drives:
        if drive.volume is not None:
            start_xml.put_record(root, drive.name, disk_xml.record_of(drive.volume))
    return ET.tostring(root, encoding="unicode")


def why_not(xml: str, drives: Sequence[Drive]) -> str:
    """Why a VM cannot move, "" when nothing is known."""
    told = records(xml)
    for drive in drives:
        if drive.transient or told.get(drive.name, {}).get("shared") == "transient":
            return f"disk {drive.name} is transient: what the guest wrote is on this host only"
        if drive.is_replicated:
            return f"disk {drive.name} is being copied; VM.diskReplicateFinish ends that"
    for disk in parse(xml).iterfind("./devices/disk"):
        driver = disk.find("driver")
        cache = driver.get("cache", "") if driver is not None else ""
        if disk.find("readonly") is None and cache not in SAFE_CACHES:
            return (
                f"disk {_name(disk)} is cached by this host (cache={cache or 'default'}), and the "
                "other one would read old data; it needs cache=none"
            )
    return ""


def without_volume_leases(order: Order) -> Order:
    """Leases of its own volumes are found again by whoever prepares these."""
    ids = {volume.volume for volume in order.volumes}
    devices = order.root.find("devices")
    for lease in () if devices is None else devices.findall("lease"):
        if lease.findtext("key", "") in ids and devices is not None:
            devices.remove(lease)
    return replace(order, leases=[one for one in order.leases if one[1].lease_id not in ids])


def arriving(own: str, answer: str) -> str:
    """The VM's own XML, with the places that the destination answered.  Raises BadDiskError."""
    root, there = parse(own), disk_xml.parse(answer)
    disks = _by(there.iterfind("./devices/disk"), _name)
    for disk in root.iterfind("./devices/disk"):
        found = disks.get(_name(disk))
        if found is not None and disk.get("type") in _LOCAL:
            _take(disk, found)
    leases = _by(there.iterfind("./devices/lease"), _key)
    for lease in root.iterfind("./devices/lease"):
        found = leases.get(_key(lease))
        target = None if found is None else found.find("target")
        old = lease.find("target")
        if target is not None:
            if old is not None:
                lease.remove(old)
            lease.append(target)
    return ET.tostring(root, encoding="unicode")


def with_limits(xml: str, limits: Mapping[str, Mapping[str, int]]) -> str:
    """With these limits for disks that are slowed here, by libvirt's names: nobody there knows that
    they are."""
    if not limits:
        return xml
    root = parse(xml)
    for disk in root.iterfind("./devices/disk"):
        if (wanted := limits.get(_name(disk))) is None:
            continue
        for old in disk.findall("iotune"):
            disk.remove(old)
        if any(wanted.values()):
            tune = ET.SubElement(disk, "iotune")
            for key, value in wanted.items():
                if value:
                    ET.SubElement(tune, key).text = str(value)
    return ET.tostring(root, encoding="unicode")


def _take(disk: ET.Element, found: ET.Element) -> None:
    disk.set("type", found.get("type", "file"))
    for tag in ("source", "backingStore"):
        for old in disk.findall(tag):
            disk.remove(old)
        for new in found.findall(tag):
            disk.append(new)


def _by(elements: Iterable[ET.Element], key: object) -> Mapping[str, ET.Element]:
    assert callable(key)
    return {key(each): each for each in elements}


def _name(disk: ET.Element) -> str:
    target = disk.find("target")
    return target.get("dev", "") if target is not None else ""


def _key(lease: ET.Element) -> str:
    return f"{lease.findtext('lockspace', '')}/{lease.findtext('key', '')}"
