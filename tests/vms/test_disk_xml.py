# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks as callers ask for them."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from vdsm_storage.vms import disk_xml
from vdsm_storage.vms.choose import describe, element, matches, named
from vdsm_storage.vms.disk_xml import BadDiskError
from vdsm_storage.vms.drives import Drive, VolumePath

POOL = "00000000-0000-4000-8000-0000000000f0"
DOMAIN = "00000000-0000-4000-8000-0000000000d0"
IMAGE = "00000000-0000-4000-8000-0000000000e0"
VOLUME = "00000000-0000-4000-8000-0000000000b0"
PATH = f"/rhev/data-center/{POOL}/{DOMAIN}/images/{IMAGE}/{VOLUME}"
HERE = VolumePath(DOMAIN, IMAGE, VOLUME)
RECORD = f"""
    <metadata xmlns:o="http://ovirt.org/vm/1.0"><o:vm>
      <o:device devtype="disk" name="sda"><o:GUID>other</o:GUID></o:device>
      <o:device devtype="disk" name="sdb"><o:poolID>{POOL}</o:poolID>
        <o:domainID>{DOMAIN}</o:domainID><o:imageID> {IMAGE} </o:imageID>
        <o:volumeID>{VOLUME}</o:volumeID>
        <o:deeper><o:x>1</o:x></o:deeper></o:device></o:vm></metadata>"""


def request(disk: str, record: str = "") -> str:
    return f"<hotplug><devices>{disk}</devices>{record}</hotplug>"


def test_disk_and_its_record() -> None:
    disk = (
        "<disk type='file'><target dev='sdb' bus='scsi'/><alias name='ua-1'/>"
        "<source file='/a/hint'/></disk>"
    )
    asked = disk_xml.asked_by_xml('<?xml version="1.0" encoding="UTF-8"?>' + request(disk, RECORD))
    assert (asked.name, asked.alias, asked.volume) == ("sdb", "ua-1", HERE)
    assert asked.record == {
        "poolID": POOL, "domainID": DOMAIN, "imageID": IMAGE, "volumeID": VOLUME,
    }  # fmt: skip


def test_volume_is_known_by_its_path() -> None:
    disk = f"<disk type='file'><target dev='vdb'/><source file='{PATH}'/></disk>"
    asked = disk_xml.asked_by_xml(disk)  # without anything around it
    assert asked.volume == HERE
    assert asked.record == disk_xml.record_of(HERE)
    network = f"<disk type='network'><target dev='vdb'/><source name='x{PATH}'/></disk>"
    assert disk_xml.asked_by_xml(network).volume is None


@pytest.mark.parametrize(
    "xml",
    [
        "", "<hotplug>", "<hotplug/>", request(""), request("<disk/>"),
        request("<disk><target bus='scsi'/></disk>"), request("<disk/><disk/>"),
        "<!DOCTYPE d [<!ENTITY e 'x'>]><disk><target dev='&e;'/></disk>",
        "<interface/>",
    ],
)  # fmt: skip
def test_what_is_no_disk(xml: str) -> None:
    with pytest.raises(BadDiskError):
        disk_xml.asked_by_xml(xml)


def test_disk_by_keys() -> None:
    drive = {
        "poolID": POOL, "domainID": DOMAIN, "imageID": IMAGE, "volumeID": VOLUME, "format": "cow",
        "iface": "scsi", "readonly": True, "shared": "shared", "propagateErrors": "on",
        "bootOrder": 2, "deviceId": IMAGE, "address": {"type": "drive", "unit": 3},
        "specParams": {"ioTune": {"total_iops_sec": 5, "read_iops_sec": 0}},
    }  # fmt: skip
    asked = disk_xml.asked_by_keys(drive, ["sda", "sdb"])
    assert (asked.name, asked.alias, asked.volume) == ("sdc", f"ua-{IMAGE}", HERE)
    assert asked.record["poolID"] == POOL
    text = disk_xml.text(asked.disk)
    for part in (
        'type="qcow2"', 'error_policy="enospace"', "<readonly />", "<shareable />",
        '<boot order="2" />', f"<serial>{IMAGE}</serial>", '<address type="drive" unit="3" />',
        "<iotune><total_iops_sec>5</total_iops_sec></iotune>",
    ):  # fmt: skip
        assert part in text, text


@pytest.mark.parametrize(
    ("drive", "name", "source"),
    [
        ({"path": "/x/y", "index": "1"}, "vdb", "file=/x/y"),
        ({"GUID": "3600", "iface": "scsi", "device": "lun"}, "sda", "dev=/dev/mapper/3600"),
        ({"path": PATH, "name": "vdz"}, "vdz", f"file={PATH}"),
    ],
)
def test_disk_by_keys_is_somewhere(drive: dict[str, Any], name: str, source: str) -> None:
    asked = disk_xml.asked_by_keys(drive, [])
    key, _, path = source.partition("=")
    found = asked.disk.find("source")
    assert found is not None
    assert (asked.name, found.get(key)) == (name, path)
    assert asked.disk.get("type") == ("block" if key == "dev" else "file")


def test_disk_by_keys_is_nowhere() -> None:
    with pytest.raises(BadDiskError):
        disk_xml.asked_by_keys({"iface": "scsi"}, [])


@pytest.mark.parametrize(
    ("bus", "index", "name"),
    [("virtio", 0, "vda"), ("scsi", 25, "sdz"), ("scsi", 26, "sdaa"), ("ide", 2, "hdc"),
     ("virtio", 701, "vdzz"), ("virtio", 702, "vdaaa"), ("fdc", 0, "fda"), ("?", 1, "vdb")],
)  # fmt: skip
def test_target_names(bus: str, index: int, name: str) -> None:
    assert disk_xml.target_name(bus, index) == name


def test_source_is_replaced(tmp_path: Path) -> None:
    disk = ET.fromstring(
        "<disk type='block'><source dev='/dev/old' startupPolicy='optional'>"
        "<seclabel model='dac' type='none'/></source></disk>"
    )
    path = tmp_path / "new"
    disk_xml.set_source(disk, str(path))
    assert disk.get("type") == "file"
    source = disk.find("source")
    assert source is not None
    assert source.attrib == {"file": str(path)}
    assert len(source.findall("seclabel")) == 1
    disk_xml.set_source(disk, "")
    assert disk.find("source") is None
    disk_xml.set_source(disk, "/dev/sd")
    assert disk_xml.path_of(disk) == "/dev/sd"


def test_format_is_the_storages() -> None:
    disk = ET.fromstring("<disk><driver name='qemu' type='raw' io='native'/></disk>")
    disk_xml.set_format(disk, "COW", block=False)
    driver = disk.find("driver")
    assert driver is not None
    assert (driver.get("type"), driver.get("io"), driver.get("cache")) == (
        "qcow2", "native", "none",
    )  # fmt: skip
    bare = ET.fromstring("<disk/>")
    disk_xml.set_format(bare, "RAW", block=True)
    driver = bare.find("driver")
    assert driver is not None
    assert (driver.get("type"), driver.get("io")) == ("raw", "native")


def test_limits_of_the_request_come_first() -> None:
    disk = ET.fromstring("<disk/>")
    disk_xml.set_limits(disk, {"total_bytes_sec": 0})
    assert disk.find("iotune") is None
    disk_xml.set_limits(disk, {"total_bytes_sec": 7})
    disk_xml.set_limits(disk, {"total_bytes_sec": 8})
    assert disk_xml.limits_of(disk)["total_bytes_sec"] == 7


# -- which disk is meant ---------------------------------------------------------------------


def drive(path: str, name: str = "vda") -> Drive:
    return Drive(name=name, device="disk", kind="file", format="raw", path=path, chain=(path,))


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ({"domainID": DOMAIN, "imageID": IMAGE, "volumeID": POOL}, True),
        ({"imageID": IMAGE}, True),
        ({"domainID": POOL, "imageID": IMAGE}, False),
        ({"imageID": POOL}, False),
        ({"path": PATH}, True),
        ({"path": f"/run/vdsm/storage/{DOMAIN}/{IMAGE}/{VOLUME}"}, True),
        ({"path": "/elsewhere"}, False),
        ({"GUID": "3600"}, False),
        ({"name": "vda"}, True),
        ({"name": "vdb"}, False),
        ({"name": ""}, False),
        ({}, False),
    ],
)
def test_which_disk_is_meant(spec: dict[str, str], meant: bool) -> None:
    assert matches(drive(PATH), spec) is meant


def test_other_disks() -> None:
    assert matches(drive("/dev/mapper/3600"), {"GUID": "3600"})
    assert matches(drive("/plain"), {"path": "/plain"})
    assert named([drive("/a"), drive("/b", "vdb")], "vdb") == drive("/b", "vdb")
    assert named([], "vdb") is None
    assert describe({"imageID": IMAGE, "name": "vda"}) == f"imageID {IMAGE}, name vda"
    assert describe({}) == "no name given"
    xml = "<domain><devices><disk/><disk><target dev='a'/></disk></devices></domain>"
    assert element(xml, "a") is not None
    assert element(xml, "b") is None
