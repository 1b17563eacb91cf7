# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks, leases and media that VMs are given and that are taken away; limits; sizes.

Most VMs here never run: QEMU does all of this without a guest.  SCSI disks go at once when they are
asked for; a virtio disk is the guest's to give back.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.processes import AgentProcess
from functional.vm_lab import MIB, Machine, VmDisk, VmLab, vm_lab
from functional.world import new_id
from vdsm_storage.rpc.client import RemoteError

SCSI = "<controller type='scsi' index='0' model='virtio-scsi'/>"
CDROM = (
    "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>"
    "<target dev='hdc' bus='ide'/><readonly/></disk>"
)
FLOPPY = "<disk type='file' device='floppy'><target dev='fda' bus='fdc'/></disk>"
ENGINE = "http://ovirt.org/vm/1.0"
UNPLUG = 4.0  # seconds that a guest has here


@pytest.fixture(scope="module")
def lab(
    workdir: Path, start_agent: Callable[..., AgentProcess], make_server: Callable[[str], Any]
) -> Iterator[VmLab]:
    with vm_lab(workdir, start_agent, make_server, vms__unplug_timeout=str(UNPLUG)) as one:
        yield one


@pytest.fixture(scope="module")
def paused(lab: VmLab) -> Machine:
    return lab.machine("paused", disks=1, devices=SCSI + CDROM + FLOPPY)


@pytest.fixture(autouse=True)
def nothing_left(lab: VmLab, paused: Machine) -> Iterator[None]:
    """After every test: what is prepared is what VMs have, and their records are their disks."""
    before = prepared(lab)
    yield
    lab.wait_libvirt()
    lab.world.settle()
    assert prepared(lab) == before
    assert set(records(paused)) <= set(targets(paused))


# -- what there is ---------------------------------------------------------------------------


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


# -- disks -----------------------------------------------------------------------------------


def test_disk_by_xml(lab: VmLab, paused: Machine) -> None:
    disk = lab.disk(filled=False)
    answer = plug(lab, paused, disk)
    assert (answer["vmId"], answer["status"]) == (paused.id, "Paused")
    found = element(paused, "sdb")
    assert found is not None
    driver = found.find("driver")
    assert driver is not None
    assert driver.get("type") == "qcow2"  # as the storage says, not the request
    assert source(paused, "sdb").endswith(f"/{disk.image}/{disk.leaf}")
    assert records(paused)["sdb"] == pdiv(lab, disk)
    assert disk.image in prepared(lab)
    assert lab.stats(paused.id)["disks"]["sdb"]["imageID"] == disk.image
    params = {"vmId": paused.id, "xml": hotplug_xml(lab, disk, "sdc")}
    message = lab.fails(45, "VM.hotplugDisk", vmID=paused.id, params=params)
    assert "already" in message
    assert disk.image in prepared(lab)  # a refused request takes nothing from the VM
    unplug(lab, paused, disk)
    assert "sdb" not in targets(paused)
    assert "sdb" not in records(paused)


def test_disk_by_keys(lab: VmLab, paused: Machine) -> None:
    disk = lab.disk(filled=False)
    drive = {
        **pdiv(lab, disk), "device": "disk", "iface": "scsi", "index": "3", "format": "cow",
        "deviceId": disk.image, "shared": "false", "optional": "false", "readonly": "false",
        "specParams": {"ioTune": {"total_iops_sec": 500}},
    }  # fmt: skip
    lab.call("VM.hotplugDisk", vmID=paused.id, params={"vmId": paused.id, "drive": drive})
    found = element(paused, "sdd")
    assert found is not None
    assert found.findtext("./iotune/total_iops_sec") == "500"
    lab.call(
        "VM.hotunplugDisk", vmID=paused.id,
        params={"vmId": paused.id, "drive": pdiv(lab, disk)},
    )  # fmt: skip
    assert element(paused, "sdd") is None


def test_disk_by_path(lab: VmLab, paused: Machine, workdir: Path) -> None:
    """A path on a managed volume is looked after as one; another one is taken as it is."""
    disk, plain = lab.disk(filled=False), workdir / "plain.img"
    plain.write_bytes(b"\0" * MIB)
    path = f"{lab.agent.dir}/run/storage/{lab.world.main}/{disk.image}/{disk.leaf}"
    for each, image in ((path, disk.image), (str(plain), "")):
        drive = {"path": each, "device": "disk", "iface": "scsi", "name": "sdb", "format": "raw"}
        lab.call("VM.hotplugDisk", vmID=paused.id, params={"vmId": paused.id, "drive": drive})
        assert records(paused).get("sdb", {}).get("imageID", "") == image
        assert (disk.image in prepared(lab)) == bool(image)
        named = {"vmId": paused.id, "drive": {"name": "sdb"}}
        lab.call("VM.hotunplugDisk", vmID=paused.id, params=named)


def test_what_cannot_be_added(lab: VmLab, paused: Machine) -> None:
    disk = lab.disk(filled=False)

    def fails(code: int, xml: str, vm: str = paused.id) -> str:
        return lab.fails(code, "VM.hotplugDisk", vmID=vm, params={"vmId": vm, "xml": xml})

    good = hotplug_xml(lab, disk)
    fails(45, good.replace("</hotplug>", ""))
    assert "document type" in fails(45, "<!DOCTYPE x><hotplug/>")
    fails(45, "<hotplug><devices/></hotplug>")
    fails(45, good.replace('dev="sdb"', 'dev="vda"').replace('name="sdb"', 'name="vda"'))
    fails(1630, good.replace(disk.leaf, new_id()))
    fails(45, good.replace("</disk>", "<address type='drive' controller='9' bus='7'/></disk>"))
    fails(1, good, new_id())
    xml = by_alias(disk)
    lab.fails(46, "VM.hotunplugDisk", vmID=paused.id, params={"vmId": paused.id, "xml": xml})
    assert sorted(targets(paused)) == ["fda", "hdc", "vda"]


def test_image_of_two_vms_stays_for_the_other(lab: VmLab, paused: Machine) -> None:
    disk = lab.disk(filled=False)
    other = lab.machine("other", disks=0, devices=SCSI)
    try:
        for machine in (paused, other):
            plug(lab, machine, disk, more="<shareable/><readonly/>")
        unplug(lab, paused, disk)
        assert disk.image in prepared(lab)
        unplug(lab, other, disk)
        assert disk.image not in prepared(lab)
    finally:
        other.guest.destroy()


@pytest.mark.parametrize(
    ("step", "attached"), [("prepared", False), ("recorded", False), ("attached", True)]
)
def test_agent_killed_while_a_disk_is_added(
    lab: VmLab, paused: Machine, step: str, attached: bool
) -> None:
    disk = lab.disk(filled=False)
    lab.world.restart(f"vm.hotplug_disk:{step}")
    with pytest.raises((RemoteError, OSError)):
        plug(lab, paused, disk)
    lab.world.restart()
    lab.wait(lambda: (disk.image in prepared(lab)) == attached, "recovery")
    assert ("sdb" in targets(paused)) == attached
    lab.wait(lambda: ("sdb" in records(paused)) == attached, "the record")
    if attached:
        unplug(lab, paused, disk)


@pytest.mark.parametrize("step", ["asked", "detached", "released"])
def test_agent_killed_while_a_disk_is_taken_away(
    lab: VmLab, paused: Machine, step: str
) -> None:
    disk = lab.disk(filled=False)
    plug(lab, paused, disk)
    lab.world.restart(f"vm.hotunplug_disk:{step}")
    with pytest.raises((RemoteError, OSError)):
        unplug(lab, paused, disk)
    lab.world.restart()
    lab.world.settle()
    if step == "asked":
        assert "sdb" in targets(paused)
        unplug(lab, paused, disk)
    lab.wait(lambda: disk.image not in prepared(lab), "the image to be let go")
