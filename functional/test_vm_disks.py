# SPDX-License-Identifier: GPL-2.0-or-later
"""Media in the drives of VMs, limits of their disks, and disks that grow under them."""

from __future__ import annotations

import struct
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from functional.vm_disks import (
    CDROM,
    FLOPPY,
    SCSI,
    pdiv,
    plug,
    prepared,
    records,
    source,
    unplug,
)
from functional.vm_lab import MIB, SIZE, Machine, VmDisk, VmLab
from functional.world import RAW, new_id
from vdsm_storage.rpc.client import RemoteError

NO_VM = "00000000-0000-0000-0000-000000000000"
IDE = {"iface": "ide", "index": "2"}
NONE = dict.fromkeys(
    ("total_bytes_sec", "read_bytes_sec", "write_bytes_sec",
     "total_iops_sec", "read_iops_sec", "write_iops_sec"), 0,
)  # fmt: skip


@pytest.fixture(scope="module")
def paused(lab: VmLab) -> Machine:
    return lab.machine("paused", disks=2, devices=SCSI + CDROM + FLOPPY)


def volume(lab: VmLab, **more: Any) -> VmDisk:
    """A raw volume: a disc, or a disk."""
    image = new_id()
    return VmDisk(image, [lab.world.create(image, volFormat=RAW, size=str(SIZE), **more)])


# -- media -----------------------------------------------------------------------------------


def change(lab: VmLab, machine: Machine, spec: Any, verb: str = "VM.changeCD") -> None:
    answer = lab.call(verb, vmID=machine.id, driveSpec=spec)
    assert answer["status"] == "Paused"


def test_discs_by_volume(lab: VmLab, paused: Machine) -> None:
    """As engines send them; what is taken out is let go."""
    first, second = volume(lab), volume(lab)
    change(lab, paused, {**IDE, "drive_spec": pdiv(lab, first)})
    assert source(paused, "hdc").endswith(f"/{first.image}/{first.leaf}")
    assert records(paused)["hdc"] == pdiv(lab, first)
    assert first.image in prepared(lab)
    change(lab, paused, {**IDE, "drive_spec": pdiv(lab, first)})  # it stays in
    assert first.image in prepared(lab)
    change(lab, paused, {**IDE, "drive_spec": pdiv(lab, second)})
    assert prepared(lab) & {first.image, second.image} == {second.image}
    assert records(paused)["hdc"]["volumeID"] == second.leaf
    change(lab, paused, {**IDE, "drive_spec": ""})
    assert source(paused, "hdc") == ""
    assert "hdc" not in records(paused)
    assert second.image not in prepared(lab)


def test_discs_by_path(lab: VmLab, paused: Machine, workdir: Path) -> None:
    disc = workdir / "disc.iso"
    disc.write_bytes(b"\0" * MIB)
    change(lab, paused, str(disc))
    assert source(paused, "hdc") == str(disc)
    change(lab, paused, {**IDE, "path": ""})
    assert source(paused, "hdc") == ""
    change(lab, paused, {"path": str(disc), "device": "floppy"}, "VM.changeFloppy")
    assert source(paused, "fda") == str(disc)
    change(lab, paused, "", "VM.changeFloppy")
    assert source(paused, "fda") == ""


def test_discs_that_cannot_be_put_in(lab: VmLab, paused: Machine, workdir: Path) -> None:
    disc = volume(lab)
    change(lab, paused, {**IDE, "drive_spec": pdiv(lab, disc)})

    def fails(code: int, spec: Any, vm: str = paused.id) -> None:
        lab.fails(code, "VM.changeCD", vmID=vm, driveSpec=spec)

    fails(41, str(workdir / "missing.iso"))
    fails(1630, {**IDE, "drive_spec": {**pdiv(lab, disc), "volumeID": new_id()}})
    fails(41, {"iface": "ide", "index": "3", "path": ""})
    fails(1, "", new_id())
    assert source(paused, "hdc").endswith(f"/{disc.image}/{disc.leaf}")
    assert disc.image in prepared(lab)
    change(lab, paused, "")


# -- limits ----------------------------------------------------------------------------------


def limits(machine: Machine, target: str) -> dict[str, int]:
    """As libvirt has them."""
    found = machine.guest.domain.blockIoTune(target)
    return {key: found[key] for key in NONE}


def test_limits(lab: VmLab, paused: Machine) -> None:
    path = source(paused, "vdb")
    answer = lab.call(
        "VM.setIoTune", vmID=paused.id,
        tunables=[
            {"name": "vda", "ioTune": {"read_bytes_sec": MIB, "write_iops_sec": 300}},
            {"path": path, "ioTune": {"total_iops_sec": 100}},
        ],
    )  # fmt: skip
    assert answer["code"] == 0
    assert limits(paused, "vda") == {**NONE, "read_bytes_sec": MIB, "write_iops_sec": 300}
    found = {each["name"]: each for each in lab.call("VM.getIoTune", vmID=paused.id)}
    assert found["vdb"] == {
        "name": "vdb", "path": path, "ioTune": {**NONE, "total_iops_sec": 100},
    }  # fmt: skip
    for wrong in ({"name": "vdb", "ioTune": {"total_bytes_sec": 1, "read_bytes_sec": 1}},
                  {"name": "vdz", "ioTune": {}}):  # fmt: skip
        lab.fails(
            64, "VM.setIoTune", vmID=paused.id,
            tunables=[{"name": "vda", "ioTune": {"total_bytes_sec": MIB}}, wrong],
        )  # fmt: skip
        assert limits(paused, "vda")["read_bytes_sec"] == MIB  # all of them or none
    lab.fails(1, "VM.getIoTune", vmID=new_id())
    everything = [{"name": name, "ioTune": {}} for name in ("vda", "vdb")]
    lab.call("VM.setIoTune", vmID=paused.id, tunables=everything)
    assert limits(paused, "vda") == NONE


def test_policy_is_in_force_and_kept(lab: VmLab, paused: Machine) -> None:
    """In the VM's metadata: over restarts of libvirt and of the agent."""
    disk = paused.disks[0]
    most, least = {**NONE, "total_bytes_sec": 4 * MIB}, {**NONE, "total_iops_sec": 50}
    entry = {**pdiv(lab, disk), "maximum": most, "guaranteed": least}
    lab.call("VM.updateVmPolicy", vmID=paused.id, params={"vcpuLimit": 50, "ioTune": [entry]})
    assert limits(paused, "vda") == most
    lab.restart_libvirtd()
    lab.world.restart()
    lab.wait_libvirt()
    (found,) = lab.call("VM.getIoTunePolicy", vmID=paused.id)
    assert found == {
        "name": "vda", "path": source(paused, "vda"), "maximum": most, "guaranteed": least,
    }  # fmt: skip
    every = lab.call("Host.getAllVmIoTunePolicies")[paused.id]
    assert every["policy"] == [found]
    assert every["current_values"][0]["ioTune"] == most == limits(paused, "vda")
    tune = ET.fromstring(paused.guest.domain.metadata(2, "http://ovirt.org/vm/tune/1.0"))
    assert tune.findtext("vcpuLimit") == "50"
    wrong = {**entry, "maximum": {"total_bytes_sec": 1, "write_bytes_sec": 1}}
    for params in ({"ioTune": [wrong]}, {"ioTune": [{**entry, "imageID": new_id()}]}):
        lab.fails(63, "VM.updateVmPolicy", vmID=paused.id, params=params)
    assert lab.call("VM.getIoTunePolicy", vmID=paused.id) == [found]
    entry = {"name": "vda", "maximum": {}, "guaranteed": {}}
    lab.call("VM.updateVmPolicy", vmID=paused.id, params={"ioTune": [entry]})
    assert limits(paused, "vda") == NONE


def test_policy_is_kept_over_hot_plug(lab: VmLab, paused: Machine) -> None:
    disk = lab.disk(filled=False)
    own = "<iotune><total_iops_sec>77</total_iops_sec></iotune>"
    plug(lab, paused, disk, more=own)
    assert limits(paused, "sdb")["total_iops_sec"] == 77  # the request's own
    entry = {**pdiv(lab, disk), "maximum": {"write_bytes_sec": MIB}, "guaranteed": {}}
    lab.call("VM.updateVmPolicy", vmID=paused.id, params={"ioTune": [entry]})
    unplug(lab, paused, disk)
    plug(lab, paused, disk, "sdc")  # the policy is the image's
    assert limits(paused, "sdc") == {**NONE, "write_bytes_sec": MIB}
    unplug(lab, paused, disk)
    plug(lab, paused, disk, more=own)
    assert limits(paused, "sdb") == {**NONE, "total_iops_sec": 77}
    unplug(lab, paused, disk)


def test_devices_are_updated(lab: VmLab, paused: Machine) -> None:
    disk = lab.disk(filled=False)
    plug(lab, paused, disk)
    xml = "<disk><target dev='sdb'/><iotune><read_iops_sec>9</read_iops_sec></iotune></disk>"
    answer = lab.call("VM.updateDevice", vmID=paused.id, params={"xml": xml})
    assert answer["vmId"] == paused.id
    assert limits(paused, "sdb") == {**NONE, "read_iops_sec": 9}
    for params in ({"xml": "<disk><target dev='sdz'/></disk>"}, {"xml": "<disk>"},
                   {"deviceType": "interface", "alias": "net0", "linkActive": "false"},
                   {"xml": "<disk><target dev='sdb'/><readonly/></disk>"}):  # fmt: skip
        lab.fails(56, "VM.updateDevice", vmID=paused.id, params=params)
    unplug(lab, paused, disk)


# -- sizes -----------------------------------------------------------------------------------


def seen(machine: Machine, target: str) -> int:
    """Bytes that the guest has."""
    size: int = machine.guest.domain.blockInfo(target)[0]
    return size


def extend(lab: VmLab, machine: Machine, disk: VmDisk, size: int) -> Any:
    return lab.call(
        "VM.diskSizeExtend", vmID=machine.id, driveSpecs=pdiv(lab, disk), newSize=str(size)
    )


def capacity(lab: VmLab, disk: VmDisk) -> int:
    return int(lab.world.info(disk.image, disk.leaf)["capacity"])


@pytest.mark.parametrize("extended", [True, False])
def test_qcow2_disk_grows(lab: VmLab, paused: Machine, extended: bool) -> None:
    """Volume.extendSize leaves a volume that a guest has open to us, or is not ours."""
    disk = paused.disks[1]
    size = capacity(lab, disk) + 8 * MIB
    if extended:
        ids = lab.world.ids(disk.image, disk.leaf)
        assert lab.world.task("Volume.extendSize", **ids, newSize=str(size)) == ""
    assert extend(lab, paused, disk, size) == str(size)
    assert seen(paused, "vdb") == capacity(lab, disk) == size
    info = lab.call("Volume.getQemuImageInfo", **lab.world.ids(disk.image, disk.leaf))
    assert info["virtualsize"] == size
    assert extend(lab, paused, disk, size) == str(size)  # again: it is so


def test_raw_disk_grows(lab: VmLab, paused: Machine) -> None:
    disk = volume(lab)
    plug(lab, paused, disk)
    size = SIZE + 16 * MIB
    message = lab.fails(
        58, "VM.diskSizeExtend", vmID=paused.id, driveSpecs=pdiv(lab, disk), newSize=str(size)
    )
    assert "Volume.extendSize" in message
    ids = lab.world.ids(disk.image, disk.leaf)
    assert lab.world.task("Volume.extendSize", **ids, newSize=str(size)) == ""
    assert seen(paused, "sdb") in (SIZE, size)
    assert extend(lab, paused, disk, size) == str(size)
    assert seen(paused, "sdb") == size
    unplug(lab, paused, disk)


def test_what_cannot_grow(lab: VmLab, paused: Machine, workdir: Path) -> None:
    def fails(code: int, spec: Any, size: int, vm: str = paused.id) -> None:
        lab.fails(code, "VM.diskSizeExtend", vmID=vm, driveSpecs=spec, newSize=str(size))

    disk = paused.disks[1]
    before = capacity(lab, disk)
    fails(58, pdiv(lab, disk), MIB)
    fails(13, {**pdiv(lab, disk), "imageID": new_id()}, SIZE)
    fails(13, {"GUID": "3600140508c"}, SIZE)
    fails(1, pdiv(lab, disk), SIZE, new_id())
    disc = workdir / "small.iso"
    disc.write_bytes(b"\0" * MIB)
    change(lab, paused, str(disc))
    fails(36, str(disc), SIZE)
    change(lab, paused, "")
    assert capacity(lab, disk) == seen(paused, "vdb") == before


def test_disk_of_no_vm_grows(lab: VmLab) -> None:
    disk = lab.disk(filled=False)
    size = SIZE + MIB
    params: dict[str, Any] = {"vmID": NO_VM, "driveSpecs": pdiv(lab, disk)}
    assert lab.call("VM.diskSizeExtend", **params, newSize=str(size)) == str(size)
    assert capacity(lab, disk) == size
    lab.fails(58, "VM.diskSizeExtend", **params, newSize=str(MIB))


def test_refresh(lab: VmLab, paused: Machine) -> None:
    disk = paused.disks[0]
    found = lab.call("VM.refresh_disk", vmID=paused.id, drive=pdiv(lab, disk))
    size = lab.call("Volume.getSize", **lab.world.ids(disk.image, disk.leaf))
    assert found == size
    missing = {**pdiv(lab, disk), "imageID": new_id()}
    lab.fails(13, "VM.refresh_disk", vmID=paused.id, drive=missing)


def test_alignment(lab: VmLab, paused: Machine) -> None:
    """Through qcow2: the table is where the guest has it."""
    disk, none = lab.disk(filled=False), paused.disks[0]
    entry = "<4sB3sII"
    table = b"".join(
        struct.pack(entry, bytes(4), 0x83, bytes(3), start, 8) for start in (63, 2048)
    )
    raw = lab.agent.dir / "table"
    raw.write_bytes(table.ljust(64, b"\0").rjust(510, b"\0") + b"\x55\xaa" + bytes(4 * MIB))
    path = lab.prepare(disk)
    fill = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", str(raw), path]
    subprocess.run(fill, check=True, timeout=60)
    lab.call("Image.teardown", **lab.world.ids(disk.image, disk.leaf))
    verb = "VM.getDiskAlignment"
    found = lab.call(verb, vmID=NO_VM, disk=pdiv(lab, disk))
    assert found == {"/dev/sda1": False, "/dev/sda2": True}
    assert lab.call(verb, vmID=paused.id, disk=pdiv(lab, none)) == {}
    lab.fails(1, verb, vmID=new_id(), disk=pdiv(lab, disk))
    lab.fails(201, verb, vmID=NO_VM, disk={**pdiv(lab, disk), "volumeID": new_id()})


# -- kill -9 ---------------------------------------------------------------------------------


def dies(lab: VmLab, call: Callable[[], object], then: str) -> None:
    """The agent is armed and dies in the call; the next one may be armed as well."""
    with pytest.raises((RemoteError, OSError)):
        call()
    lab.world.restart(then)
    lab.wait_libvirt()
    lab.world.settle()


def test_agent_killed_on_the_way(lab: VmLab, paused: Machine) -> None:
    """A drive holds one disc or the other; metadata say what the guest sees."""
    discs = [volume(lab), volume(lab)]
    both = {disc.image for disc in discs}
    change(lab, paused, {**IDE, "drive_spec": pdiv(lab, discs[0])})
    lab.world.restart("vm.change_medium:prepared")
    following = {0: "vm.change_medium:changed", 1: "vm.extend_disk:recorded"}
    for there, then in following.items():
        dies(lab, lambda: change(lab, paused, {**IDE, "drive_spec": pdiv(lab, discs[1])}), then)
        assert prepared(lab) & both == {discs[there].image}
        assert source(paused, "hdc").endswith(f"/{discs[there].image}/{discs[there].leaf}")
        assert records(paused)["hdc"]["volumeID"] == discs[there].leaf

    disk = paused.disks[1]
    before = capacity(lab, disk)
    for size, then in ((before, "vm.extend_disk:resized"),
                       (before + MIB, "vm.extend_disk:recorded")):  # fmt: skip
        dies(lab, lambda: extend(lab, paused, disk, before + MIB), then)
        assert capacity(lab, disk) == seen(paused, "vdb") == size

    short = lab.machine("short")
    with pytest.raises((RemoteError, OSError)):
        extend(lab, short, short.disks[0], SIZE + MIB)
    short.guest.destroy()
    lab.world.restart()
    lab.world.settle()
    assert capacity(lab, short.disks[0]) == SIZE
    change(lab, paused, "")
