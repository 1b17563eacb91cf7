# SPDX-License-Identifier: GPL-2.0-or-later
"""What is read out of a request for a VM, and what is put into its XML."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from vdsm_storage.base.secret import Secret
from vdsm_storage.errors import BadSecretRequest, CannotCreateVM
from vdsm_storage.images.layers import GuestLayer
from vdsm_storage.leases.model import LeaseSpec
from vdsm_storage.vms import records, start_xml
from vdsm_storage.vms.drives import METADATA, VolumePath, drives
from vdsm_storage.vms.keeping import Usable

VM, POOL, DOMAIN, IMAGE, VOLUME, LEASE = (f"{n}" * 8 + "-0000-4000-8000-" + f"{n}" * 12
                                          for n in "123456")  # fmt: skip
HERE = VolumePath(DOMAIN, IMAGE, VOLUME)
PATH = f"/rhev/data-center/{POOL}/{DOMAIN}/images/{IMAGE}/{VOLUME}"
KEY = f"<encryption format='luks'><secret type='passphrase' uuid='{LEASE}'/></encryption>"


def request(devices: str, metadata: str = "", head: str = "<name>v</name>") -> dict[str, Any]:
    told = f"<ovirt-vm:vm xmlns:ovirt-vm='{METADATA}'>{metadata}</ovirt-vm:vm>"
    xml = f"<domain>{head}<metadata>{told}</metadata><devices>{devices}</devices></domain>"
    return {"vmId": VM, "xml": xml}


def disk(source: str = "", target: str = "vda", kind: str = "file", more: str = "") -> str:
    return f"<disk type='{kind}'>{source}<target dev='{target}' bus='virtio'/>{more}</disk>"


def device(target: str = "vda", volume: str = VOLUME) -> str:
    ids = {"poolID": POOL, "domainID": DOMAIN, "imageID": IMAGE, "volumeID": volume}
    text = "".join(f"<ovirt-vm:{key}>{value}</ovirt-vm:{key}>" for key, value in ids.items())
    return f"<ovirt-vm:device devtype='disk' name='{target}'>{text}</ovirt-vm:device>"


@pytest.mark.parametrize(
    ("devices", "metadata"),
    [(disk("<source file='/a/hint'/>"), device()), (disk(f"<source file='{PATH}'/>"), "")],
)
def test_volume_is_found_and_recorded(devices: str, metadata: str) -> None:
    order = start_xml.parse_order(VM, request(devices, metadata))
    assert (order.name, order.volumes, order.paused) == ("v", [HERE], False)
    assert records.volume_in(records.records(order.text)["vda"]) == HERE
    assert order.root.findtext("uuid") == VM


def test_what_the_storage_says() -> None:
    """Of an encrypted chain libvirt is told all layers; what a request says of these is dropped."""
    lower = GuestLayer("/d/base", "qcow2", encrypted=True)
    raw = GuestLayer("/d/raw", "raw", encrypted=False)
    layers = [GuestLayer("/d/top", "qcow2", encrypted=True), lower, raw]
    below = "<backingStore type='file'><source file='/etc/shadow'/></backingStore>"
    given = request(disk(f"<source file='/hint'>{KEY}</source>", more=below), device())
    order = start_xml.parse_order(VM, given)
    start_xml.put_volume(order.disks[0], Usable("/d/top", "COW", False, "LEAF", layers))
    (drive,) = drives(ET.fromstring(order.text))
    assert (drive.chain, drive.format) == (("/d/top", "/d/base", "/d/raw"), "qcow2")
    found = order.root.findall("./devices/disk//encryption/secret")
    assert [each.get("uuid") for each in found] == [LEASE] * 2  # not the raw one's
    assert "/etc/shadow" not in order.text
    assert start_xml.launch_of(order.text) == ""
    start_xml.put_launch(order, "a launch")
    assert start_xml.launch_of(order.text) == "a launch"


def test_leases() -> None:
    lease = f"<lease><lockspace>{DOMAIN}</lockspace><key>{LEASE}</key></lease>"
    other = "<lease><lockspace>mine</lockspace><key>k</key><target path='/p'/></lease>"
    order = start_xml.parse_order(VM, request(disk(f"<source file='{PATH}'/>") + lease + other))
    ((element, ref),) = order.leases
    assert (ref.sd_id, ref.lease_id) == (DOMAIN, LEASE)
    start_xml.put_lease(element, LeaseSpec(DOMAIN, LEASE, "/xleases", 4096))
    start_xml.put_volume_lease(order, HERE, LeaseSpec(DOMAIN, VOLUME, "/leases", 512))
    keys = [each.findtext("key") for each in order.root.iterfind("./devices/lease")]
    assert keys == [LEASE, "k", VOLUME]
    assert 'path="/xleases" offset="4096"' in order.text
    assert 'path="/leases" offset="512"' in order.text


def test_disks_that_are_nobodys() -> None:
    """As they were asked for; a LUN by its GUID, a drive without a medium."""
    guid = device("vdb").partition("<ovirt-vm:poolID>")[0]
    guid += "<ovirt-vm:GUID>3600</ovirt-vm:GUID></ovirt-vm:device>"
    network = "<source protocol='rbd' name='pool/volume'/>"
    order = start_xml.parse_order(
        VM,
        request(
            disk("<source file='/x'/>") + disk(target="vdb", kind="block")
            + disk(network, "vdc", "network")
            + "<disk type='file' device='cdrom'><source file=''/><target dev='sda'/></disk>", guid,
        ),
    )  # fmt: skip
    assert order.volumes == []
    found = drives(order.root)
    assert [each.path for each in found] == ["/x", "/dev/mapper/3600", "pool/volume", ""]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"xml": ""}, "xml is missing"), ({"vmId": POOL}, "vmId"),
        ({"memoryConfVolume": {}, "memoryDumpVolume": {"imageID": IMAGE}}, "saved memory"),
        ({"xml": "<domain"}, "cannot be read"),
        (request("", head=f"<name>v</name><uuid>{POOL}</uuid>"), "vmID"),
        (request("", head=""), "<name>"), (request(disk()), "neither"),
        (request("<disk type='file'><source file='/x'/></disk>"), "target"),
        (request(disk("<source file='/x'/>") * 2), "two of its disks"),
        (request(disk(target="vda") + disk(target="vdb"), device() + device("vdb", LEASE)), "same"),
        (request(disk(), device(volume="../x")), "no UUID"),
        ({"xml": "<!DOCTYPE d []><domain/>"}, "document type"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(CannotCreateVM, match=reason):
        start_xml.parse_order(VM, {**request(disk("<source file='/x'/>")), **change})


def test_secrets() -> None:
    password = Secret(base64.b64encode(b"a value").decode())
    given = {"uuid": LEASE, "usageType": "volume", "password": password}
    order = start_xml.parse_order(VM, {**request(""), "secrets": [given]})
    (entry,) = order.secrets
    assert (entry.usage, entry.value()) == (("volume", f"ovirt/vm/{LEASE}"), b"a value")
    assert "secrets" not in repr(order)
    with pytest.raises(BadSecretRequest, match=r"secrets\[1\]"):
        start_xml.parse_order(VM, {**request(""), "secrets": [given, given]})
