# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt's <disk> as callers ask for it: as XML, or by the keys of old engines.

A request by XML is a disk and what shall be recorded of it:

    <hotplug>
      <devices><disk type='file' device='disk'>…<target dev='vdb' bus='virtio'/></disk></devices>
      <metadata><ovirt-vm:vm xmlns:ovirt-vm='http://ovirt.org/vm/1.0'>
        <ovirt-vm:device devtype='disk' name='vdb'>…</ovirt-vm:device>
      </ovirt-vm:vm></metadata>
    </hotplug>

Where the data is and in which format is not the caller's to say: for a managed volume both are what
the storage says.
"""

from __future__ import annotations

import os
import stat
import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.host.qemu_img import QCOW2
from vdsm_storage.images import metadata as md
from vdsm_storage.images.layers import GuestLayer
from vdsm_storage.vms import records
from vdsm_storage.vms.drives import METADATA, VolumePath, volume_of

MAPPER: Final = "/dev/mapper"
LIMITS: Final = (
    "total_bytes_sec", "read_bytes_sec", "write_bytes_sec",
    "total_iops_sec", "read_iops_sec", "write_iops_sec",
)  # fmt: skip
_PREFIXES: Final = {"virtio": "vd", "scsi": "sd", "sata": "sd", "usb": "sd", "ide": "hd",
                    "fdc": "fd"}  # fmt: skip
_IDS: Final = ("poolID", "domainID", "imageID", "volumeID")


class BadDiskError(Exception):
    """What is wrong with a request; says nothing but that."""


@dataclass(frozen=True)
class Asked:
    """A disk that somebody wants: its XML, its record, its volume if it is on a managed one."""

    disk: ET.Element
    record: Mapping[str, str]
    volume: VolumePath | None

    @property
    def name(self) -> str:
        """The target."""
        target = self.disk.find("target")
        return target.get("dev", "") if target is not None else ""

    @property
    def alias(self) -> str:
        alias = self.disk.find("alias")
        return alias.get("name", "") if alias is not None else ""


def parse(xml: str) -> ET.Element:
    """XML of a caller.  Raises BadDiskError; what could declare entities is refused unread."""
    if "<!DOCTYPE" in xml:
        raise BadDiskError("the XML declares a document type")
    try:
        return ET.fromstring(xml)  # noqa: S314 - no entities, nothing to abuse
    except ET.ParseError as error:
        raise BadDiskError(f"the XML cannot be read: {error}") from error


def disk_in(root: ET.Element) -> ET.Element:
    """The one disk of a request, which may be the request itself."""
    found = [root] if root.tag == "disk" else root.findall("./devices/disk")
    if len(found) != 1:
        raise BadDiskError(f"one disk is expected, there are {len(found)}")
    return found[0]


def asked_by_xml(xml: str) -> Asked:
    """Raises BadDiskError."""
    root = parse(xml)
    disk = disk_in(root)
    target = disk.find("target")
    if target is None or not target.get("dev"):
        raise BadDiskError("the disk has no target")
    record: dict[str, str] = {}
    told = root.find(f"./metadata/{{{METADATA}}}vm")
    if told is not None:
        record = records.of_device(told, target.get("dev", ""))
    volume = records.volume_in(record)
    if volume is None and disk.get("type") != "network":
        volume = volume_of(path_of(disk))
        if volume is not None:
            record.update(record_of(volume))
    return Asked(disk, record, volume)


def record_of(volume: VolumePath) -> dict[str, str]:
    return {"domainID": volume.domain, "imageID": volume.image, "volumeID": volume.volume}


def path_of(disk: ET.Element) -> str:
    source = disk.find("source")
    if source is None:
        return ""
    return source.get("file") or source.get("dev") or source.get("name") or ""


def key_of(disk: ET.Element) -> ET.Element | None:
    """<encryption>, which names the secret that opens it."""
    for where in ("./source/encryption", "./encryption"):
        found = disk.find(where)
        if found is not None:
            return found
    return None


def asked_by_keys(drive: Mapping[str, Any], taken: Collection[str]) -> Asked:
    """From a drive as in VmDiskDevice; `taken` are the targets that the VM has.

    Raises BadDiskError.
    """
    bus = drive.get("iface") or "virtio"
    name = drive.get("name") or _target(bus, drive.get("index"), taken)
    record = {key: str(drive[key]) for key in _IDS if drive.get(key)}
    if drive.get("shared") == "transient":
        record["shared"] = "transient"
    volume = records.volume_in(record)
    path = drive.get("path") or ""
    if drive.get("GUID"):
        record["GUID"] = str(drive["GUID"])
        path = f"{MAPPER}/{drive['GUID']}"
    if volume is None and path:
        volume = volume_of(path)
        record.update({} if volume is None else record_of(volume))
    if volume is None and not path:
        raise BadDiskError("the disk has neither a volume nor a path nor a LUN")
    disk = ET.Element("disk", type="file", device=drive.get("device") or "disk", snapshot="no")
    fmt = "qcow2" if drive.get("format") == "cow" else "raw"
    policy = "enospace" if _is_true(drive.get("propagateErrors")) else "stop"
    ET.SubElement(disk, "driver", name="qemu", type=fmt, cache="none", error_policy=policy)
    set_source(disk, path)
    ET.SubElement(disk, "target", dev=name, bus=bus)
    _add_flags(disk, drive)
    if drive.get("imageID"):
        ET.SubElement(disk, "serial").text = str(drive["imageID"])
    limits = (drive.get("specParams") or {}).get("ioTune") or {}
    set_limits(disk, limits)
    return Asked(disk, record, volume)


def _add_flags(disk: ET.Element, drive: Mapping[str, Any]) -> None:
    if _is_true(drive.get("readonly")):
        ET.SubElement(disk, "readonly")
    if drive.get("shared") in ("shared", True, "true"):
        ET.SubElement(disk, "shareable")
    if drive.get("bootOrder"):
        ET.SubElement(disk, "boot", order=str(drive["bootOrder"]))
    if drive.get("deviceId"):
        ET.SubElement(disk, "alias", name=f"ua-{drive['deviceId']}")
    address = drive.get("address")
    if isinstance(address, Mapping) and address.get("type"):
        ET.SubElement(disk, "address", {key: str(value) for key, value in address.items()})


def _is_true(value: Any) -> bool:
    return value in (True, "true", "on")


def target_name(bus: str, index: int) -> str:
    """vda is virtio's 0, sdb SCSI's 1."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return _PREFIXES.get(bus, "vd") + letters


def _target(bus: str, index: Any, taken: Collection[str]) -> str:
    if index not in (None, ""):
        return target_name(bus, int(index))
    return next(name for number in range(1000) if (name := target_name(bus, number)) not in taken)


# -- filling in --------------------------------------------------------------------------------


def set_source(disk: ET.Element, path: str) -> None:
    """Let the disk be the file or device at `path`; an empty path leaves it without a medium."""
    source = disk.find("source")
    if not path:
        if source is not None:
            disk.remove(source)
        return
    if source is None:
        source = ET.SubElement(disk, "source")
    block = path.startswith("/dev/") or _is_device(path)
    disk.set("type", "block" if block else "file")
    for key in ("file", "dev", "name", "pool", "volume", "startupPolicy"):
        source.attrib.pop(key, None)
    source.set("dev" if block else "file", path)
    if source.find("seclabel") is None:
        # It has its owner already.
        ET.SubElement(source, "seclabel", model="dac", relabel="no")


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def set_below(disk: ET.Element, layers: Sequence[GuestLayer], *, block: bool) -> None:
    """What lies below the first of the disk's layers; without any, libvirt looks at the headers.

    It must be told which are encrypted (their key is the disk's), and which are not: it would take
    a raw volume on which a guest made a LUKS header for encrypted, and not start the VM.
    """
    for below in disk.findall("backingStore"):
        disk.remove(below)
    if layers:
        disk.append(_below(layers[1:], key_of(disk), block=block))


def _below(layers: Sequence[GuestLayer], key: ET.Element | None, *, block: bool) -> ET.Element:
    """<backingStore> of the first of these and of all below."""
    made = ET.Element("backingStore")
    if not layers:
        return made
    layer = layers[0]
    made.set("type", "block" if block else "file")
    # For libvirt, a LUKS container is a raw image with a key.
    ET.SubElement(made, "format", type=QCOW2 if layer.format == QCOW2 else "raw")
    source = ET.SubElement(made, "source", {"dev" if block else "file": layer.path})
    if layer.encrypted and key is not None:
        source.append(key)
    made.append(_below(layers[1:], key, block=block))
    return made


def set_format(disk: ET.Element, fmt: str, *, block: bool) -> None:
    """The format that the volume has; how it is read and written if the caller did not say."""
    driver = disk.find("driver")
    if driver is None:
        driver = ET.SubElement(disk, "driver", name="qemu", error_policy="stop")
    driver.set("type", "qcow2" if fmt == md.COW else "raw")
    if driver.get("cache") is None:
        driver.set("cache", "none")
    if driver.get("io") is None:
        driver.set("io", "native" if block else "threads")


def set_limits(disk: ET.Element, limits: Mapping[str, int]) -> None:
    """<iotune>, unless the disk has one; 0 is no limit."""
    wanted = {key: int(limits[key]) for key in LIMITS if limits.get(key)}
    if disk.find("iotune") is not None or not wanted:
        return
    tune = ET.SubElement(disk, "iotune")
    for key, value in wanted.items():
        ET.SubElement(tune, key).text = str(value)


def limits_of(disk: ET.Element) -> dict[str, int]:
    """All limits of libvirt's <disk>, 0 where there is none."""
    return {key: int(disk.findtext(f"./iotune/{key}", "0")) for key in LIMITS}


def text(disk: ET.Element) -> str:
    return ET.tostring(disk, encoding="unicode")
