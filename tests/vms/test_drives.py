# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest

from vdsm_storage.vms import drives
from vdsm_storage.vms.drives import VolumePath, volume_of
from vdsm_storage.vms.metadata import with_volumes

SD = "11111111-1111-4111-8111-111111111111"
IMG = "22222222-2222-4222-8222-222222222222"
VOL = "33333333-3333-4333-8333-333333333333"
BASE = "44444444-4444-4444-8444-444444444444"
POOL = "55555555-5555-4555-8555-555555555555"

XML = f"""
<domain type='qemu'>
  <metadata>
    <ovirt-vm:vm xmlns:ovirt-vm="http://ovirt.org/vm/1.0">
      <ovirt-vm:device devtype="disk" name="vda"><ovirt-vm:volumeID>{VOL}</ovirt-vm:volumeID>
      </ovirt-vm:device>
      <ovirt-vm:device devtype="disk" name="sdb"><ovirt-vm:shared>transient</ovirt-vm:shared>
      </ovirt-vm:device>
    </ovirt-vm:vm>
  </metadata>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/rhev/data-center/mnt/srv:_x/{SD}/images/{IMG}/{VOL}' index='1'/>
      <backingStore type='file' index='2'>
        <format type='raw'/>
        <source file='/rhev/data-center/mnt/srv:_x/{SD}/images/{IMG}/{BASE}'/>
        <backingStore/>
      </backingStore>
      <target dev='vda' bus='virtio'/><serial>{IMG}</serial><alias name='ua-{IMG}'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/><source dev='/dev/mapper/3600a'/><target dev='sdb'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sdc'/><readonly/></disk>
    <disk type='network' device='disk'>
      <source protocol='rbd' name='pool/volume'/><target dev='vdd'/>
    </disk>
    <lease><lockspace>x</lockspace><key>{BASE}</key><target path='/a'/></lease>
    <channel type='unix'>
      <target type='virtio' name='org.qemu.guest_agent.0' state='disconnected'/>
    </channel>
  </devices>
</domain>"""


@pytest.mark.parametrize(
    "path",
    [
        f"/rhev/data-center/{POOL}/{SD}/images/{IMG}/{VOL}",
        f"/rhev/data-center/mnt/blockSD/{SD}/images/{IMG}/{VOL}",
        f"/srv/storage/{SD}/images/{IMG}/{VOL}",
        f"/run/vdsm/storage/{SD}/{IMG}/{VOL}",
    ],
)
def test_a_managed_volume_is_known_by_its_path(path: str) -> None:
    assert volume_of(path) == VolumePath(SD, IMG, VOL)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "pool/volume",
        f"/dev/{SD}/{VOL}",
        f"/{SD}/images/{IMG}/{VOL}/",
        f"/a/{SD}/images/{IMG}/{VOL}.meta",
        f"/a/{SD.upper()}/images/{IMG}/disk.qcow2",
        f"/a/{SD}/pictures/{IMG}/{VOL}",
    ],
)
def test_other_paths_are_not(path: str) -> None:
    assert volume_of(path) is None


def test_drives_of_a_vm() -> None:
    vda, sdb, cdrom, rbd = drives.drives(drives.parse(XML))
    assert (vda.name, vda.format, vda.serial, vda.alias) == ("vda", "qcow2", IMG, f"ua-{IMG}")
    assert vda.is_volume(SD, IMG, VOL)
    assert [volume_of(path) for path in vda.chain] == [
        VolumePath(SD, IMG, VOL), VolumePath(SD, IMG, BASE),
    ]  # fmt: skip
    assert vda.leased
    assert (sdb.path, sdb.volume, sdb.transient) == ("/dev/mapper/3600a", None, True)
    assert (cdrom.device, cdrom.path, cdrom.readonly) == ("cdrom", "", True)
    assert (rbd.kind, rbd.path, rbd.volume) == ("network", "pool/volume", None)


def test_channel_of_the_guest_agent() -> None:
    assert drives.agent_channel(drives.parse(XML)) == "disconnected"
    assert drives.agent_channel(drives.parse("<domain/>")) is None


def test_metadata_with_other_volumes() -> None:
    """As libvirt wants it: it adds the name space itself."""
    changed = with_volumes(XML, {"vda": BASE, "sdb": VOL})
    assert changed is not None
    assert changed.startswith("<vm>")
    assert f"<volumeID>{BASE}</volumeID>" in changed
    assert "ovirt.org" not in changed


@pytest.mark.parametrize("volumes", [{}, {"vda": VOL}, {"vdz": BASE}])
def test_metadata_that_need_not_change(volumes: dict[str, str]) -> None:
    assert with_volumes(XML, volumes) is None


def test_a_vm_that_no_engine_made_has_no_metadata() -> None:
    assert with_volumes("<domain><metadata/></domain>", {"vda": BASE}) is None


@pytest.mark.parametrize("inside", [True, False])
def test_the_secret_of_an_encrypted_disk(inside: bool) -> None:
    """Not that of a layer below."""
    key = "<encryption format='luks'><secret type='passphrase' uuid='{}'/></encryption>"
    top, below = key.format("of-the-top"), key.format("of-what-is-below")
    source = f"<source file='/top'>{top if inside else ''}</source>{'' if inside else top}"
    root = drives.parse(
        f"<domain><devices><disk type='file'>{source}<backingStore type='file'>"
        f"<source file='/below'>{below}</source></backingStore></disk>"
        f"<disk type='file'><source file='/clear'/><backingStore type='file'>"
        f"<source file='/below'>{below}</source></backingStore></disk></devices></domain>"
    )
    assert [drive.secret for drive in drives.drives(root)] == ["of-the-top", ""]


MIRRORS = """
<domain><devices>
  <disk type='file' device='disk'>
    <source file='/c'/><backingStore type='file'><source file='/b'/></backingStore>
    <mirror type='file' file='/b' format='qcow2' job='active-commit' ready='yes'>
      <format type='qcow2'/><source file='/b'/>
    </mirror>
    <target dev='vda' bus='virtio'/>
  </disk>
  <disk type='file' device='disk'>
    <source file='/x'/><mirror type='file' job='active-commit'/><target dev='vdb' bus='virtio'/>
  </disk>
  <disk type='file' device='disk'><source file='/y'/><target dev='vdc' bus='virtio'/></disk>
  <disk device='cdrom'/>
</devices></domain>"""


def test_how_far_a_mirror_is() -> None:
    found = {drive.name: drive.mirror for drive in drives.drives(drives.parse(MIRRORS))}
    assert found == {"vda": "yes", "vdb": "", "vdc": "", "": ""}


def test_volumes_from_the_top_down() -> None:
    found = {drive.name: drive.volumes for drive in drives.drives(drives.parse(XML))}
    assert found["vda"] == [VOL, BASE]


def test_what_a_disk_is_copied_to() -> None:
    """A copy, not the base that a commit goes to; with what is encrypted above and below."""
    path = f"/run/vdsm/storage/{SD}/{VOL}/{IMG}"
    mirror = (
        f"<mirror type='file' file='{path}' job='copy' ready='yes'><format type='qcow2'/>"
        f"<source file='{path}'><encryption format='luks'/></source></mirror>"
    )
    with_mirror = XML.replace("<target dev='vda'", f"{mirror}<target dev='vda'")
    vda = drives.drives(drives.parse(with_mirror))[0]
    assert vda.is_replicated
    assert vda.mirror == "yes"
    assert vda.replica == VolumePath(SD, VOL, IMG)
    assert vda.volume == VolumePath(SD, IMG, VOL)
    assert not vda.encrypted  # the disk itself
    commit = with_mirror.replace("job='copy'", "job='active-commit'")
    assert not drives.drives(drives.parse(commit))[0].is_replicated
    below = XML.replace(f"{BASE}'/>", f"{BASE}'><encryption format='luks'/></source>", 1)
    vda = drives.drives(drives.parse(below))[0]
    assert vda.encrypted
    assert vda.secret == ""
