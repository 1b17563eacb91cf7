# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's XML between two hosts: the places are the destination's, all else is the VM's own."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from vdsm_storage.vms import migrate_xml, start_xml
from vdsm_storage.vms.drives import Drive, drives, parse, volume_of

DOMAIN = "11111111-1111-4111-8111-111111111111"
IMAGE = "22222222-2222-4222-8222-222222222222"
BASE = "33333333-3333-4333-8333-333333333333"
LEAF = "44444444-4444-4444-8444-444444444444"
LEASE = "55555555-5555-4555-8555-555555555555"
VM = "66666666-6666-4666-8666-666666666666"
NS = "http://ovirt.org/vm/1.0"


def path(host: str, volume: str) -> str:
    return f"/{host}/run/storage/{DOMAIN}/{IMAGE}/{volume}"


def vm(host: str, cache: str = "none", shared: str = "") -> str:
    return f"""<domain type='kvm'><name>one</name><uuid>{VM}</uuid>
      <metadata><ovirt-vm:vm xmlns:ovirt-vm="{NS}"><ovirt-vm:device devtype="disk" name="vda">
        <ovirt-vm:domainID>{DOMAIN}</ovirt-vm:domainID><ovirt-vm:imageID>{IMAGE}</ovirt-vm:imageID>
        <ovirt-vm:volumeID>{BASE}</ovirt-vm:volumeID>{shared}
      </ovirt-vm:device></ovirt-vm:vm></metadata>
      <devices>
        <disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='{cache}'/>
          <source file='{path(host, LEAF)}'><encryption format='luks'>
            <secret type='passphrase' uuid='{LEASE}'/></encryption></source>
          <backingStore type='file'><format type='qcow2'/><source file='{path(host, BASE)}'/>
            <backingStore/></backingStore>
          <target dev='vda' bus='virtio'/></disk>
        <disk type='network' device='disk'><driver name='qemu' type='raw' cache='none'/>
          <source protocol='rbd' name='pool/one'/><target dev='vdb' bus='virtio'/></disk>
        <lease><lockspace>{DOMAIN}</lockspace><key>{LEASE}</key>
          <target path='/{host}/xleases' offset='3145728'/></lease>
        <lease><lockspace>{DOMAIN}</lockspace><key>{LEAF}</key>
          <target path='/{host}/leases' offset='1048576'/></lease>
        <graphics type='vnc' passwd='for-the-other-libvirt-only'/>
      </devices></domain>"""


def of(xml: str) -> list[Drive]:
    return drives(parse(xml))


def test_it_is_sent_as_it_is_open_now() -> None:
    """The record may be of the volume that it was started with."""
    sent = parse(migrate_xml.to_send(vm("here"), of(vm("here"))))
    found = sent.findtext(f"./metadata/{{{NS}}}vm/{{{NS}}}device/{{{NS}}}volumeID")
    assert found == LEAF
    order = start_xml.parse_order(VM, {"xml": ET.tostring(sent, encoding="unicode")})
    assert order.volumes == [volume_of(path("x", LEAF))]


def test_places_are_the_destinations() -> None:
    own, answer = vm("here"), vm("there").replace("for-the-other-libvirt-only", "")
    found = parse(migrate_xml.arriving(own, answer))
    text = ET.tostring(found, encoding="unicode")
    assert "/here/" not in text
    top = found.find("./devices/disk/source")
    assert top is not None
    assert top.get("file") == path("there", LEAF)
    assert found.find("./devices/disk/source/encryption/secret") is not None
    below = found.find("./devices/disk/backingStore/source")
    assert below is not None
    assert below.get("file") == path("there", BASE)
    assert [each.get("path") for each in found.iterfind("./devices/lease/target")] == [
        "/there/xleases", "/there/leases",
    ]  # fmt: skip
    # The display's password goes from libvirt to libvirt.
    assert found.find("./devices/graphics[@passwd='for-the-other-libvirt-only']") is not None
    assert found.find("./devices/disk[2]/source[@name='pool/one']") is not None


def test_what_the_answer_leaves_out_stays() -> None:
    """An agent that says nothing of a disk has it in the same place."""
    own = vm("here")
    answer = parse(own)
    devices = answer.find("devices")
    assert devices is not None
    for child in list(devices):
        devices.remove(child)
    found = migrate_xml.arriving(own, ET.tostring(answer, encoding="unicode"))
    assert path("here", LEAF) in found


def test_leases_of_its_volumes_are_found_anew() -> None:
    order = start_xml.parse_order(VM, {"xml": migrate_xml.to_send(vm("here"), of(vm("here")))})
    order = migrate_xml.without_volume_leases(order)
    assert [ref.lease_id for _lease, ref in order.leases] == [LEASE]
    assert LEAF not in [key.text for key in order.root.iterfind("./devices/lease/key")]


def test_what_cannot_move() -> None:
    def why(xml: str) -> str:
        return migrate_xml.why_not(xml, of(xml))

    assert why(vm("here")) == ""
    assert why(vm("here", cache="directsync")) == ""
    assert "cache=writeback" in why(vm("here", cache="writeback"))
    assert "transient" in why(
        vm("here", shared="<ovirt-vm:shared>transient</ovirt-vm:shared>")
    )
    mirror = f"<mirror type='file' job='copy'><source file='{path('x', BASE)}'/></mirror>"
    text = vm("here").replace("<target dev='vda'", f"{mirror}<target dev='vda'")
    assert "being copied" in why(text)


def test_slowed_disks_have_their_users_limits_there() -> None:
    """Whether or not the user gave them any."""
    slow = "<iotune><write_bytes_sec>1048576</write_bytes_sec></iotune><target dev='vd"
    own = vm("here").replace("<target dev='vd", slow)
    limits = {
        "vda": {"total_bytes_sec": 0, "read_iops_sec": 200, "write_bytes_sec": 9 << 30},
        "vdb": {"write_bytes_sec": 0},
    }
    found = parse(migrate_xml.with_limits(own, limits))
    first, second = found.findall("./devices/disk")
    assert {each.tag: each.text for each in first.iterfind("./iotune/*")} == {
        "read_iops_sec": "200", "write_bytes_sec": str(9 << 30),
    }  # fmt: skip
    assert second.find("iotune") is None
    only = parse(migrate_xml.with_limits(own, {"vdb": {}}))
    assert [disk.find("iotune") is not None for disk in only.iterfind("./devices/disk")] == [
        True, False,
    ]  # fmt: skip
    assert migrate_xml.with_limits(own, {}) == own
