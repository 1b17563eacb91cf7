# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks, leases and media that VMs are given and that are taken away; limits; sizes.

Most VMs here never run: QEMU does all of this without a guest.  SCSI disks go at once when they are
asked for; a virtio disk is the guest's to give back.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.nbd import NbdServer
from functional.processes import AgentProcess
from functional.vm_disks import (
    CDROM,
    FLOPPY,
    SCSI,
    by_alias,
    element,
    hotplug_xml,
    pdiv,
    plug,
    prepared,
    records,
    source,
    targets,
    unplug,
)
from functional.vm_lab import MIB, SIZE, Machine, VmDisk, VmLab, vm_lab
from functional.world import new_id
from vdsm_storage.rpc.client import Client, RemoteError

UNPLUG = 4.0  # seconds that a guest has here
BOUND = 40.0  # seconds within which everything must have answered


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


def test_network_disk(lab: VmLab, paused: Machine, workdir: Path) -> None:
    """It is taken as it is: what serves it is not this agent's."""
    image = new_id()
    with NbdServer(workdir, MIB) as server:
        xml = (
            "<hotplug><devices><disk type='network' device='disk'>"
            "<driver name='qemu' type='raw' cache='none'/><source protocol='nbd'>"
            f"<host transport='unix' socket='{server.socket}'/></source>"
            f"<target dev='sdb' bus='scsi'/><alias name='ua-{image}'/></disk></devices></hotplug>"
        )
        params = {"vmId": paused.id, "xml": xml}
        lab.call("VM.hotplugDisk", vmID=paused.id, params=params)
        assert paused.guest.domain.blockInfo("sdb")[0] == MIB
        assert "sdb" not in records(paused)
        unplug(lab, paused, VmDisk(image, []))
        assert "sdb" not in targets(paused)
    params["xml"] = xml.replace(str(server.socket), "/nowhere")
    lab.fails(45, "VM.hotplugDisk", vmID=paused.id, params=params)


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


def test_header_that_names_another_file(lab: VmLab, paused: Machine) -> None:
    """QEMU would open it."""
    disk = lab.disk(filled=False)
    domain = f"{lab.world.places[lab.world.main].spec}/{lab.world.main}"
    path = f"{domain}/images/{disk.image}/{disk.leaf}"
    for backing in ("/etc/hostname", "json:{}"):
        argv = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", path]
        subprocess.run(argv, check=True, timeout=60)
        params = {"vmId": paused.id, "xml": hotplug_xml(lab, disk)}
        message = lab.fails(1630, "VM.hotplugDisk", vmID=paused.id, params=params)
        assert backing in message
        assert "sdb" not in targets(paused)


def test_transient_disk(lab: VmLab, paused: Machine) -> None:
    """A snapshot shown to a VM, which may write: to a file of its own, that goes with the disk."""
    disk = lab.disk(filled=False)
    disk.volumes.append(lab.new_leaf(disk))
    base = VmDisk(disk.image, disk.volumes[:1])
    xml = hotplug_xml(lab, base)
    params = {"vmId": paused.id, "xml": xml}
    message = lab.fails(45, "VM.hotplugDisk", vmID=paused.id, params=params)
    assert "read-only" in message
    end = "</ovirt-vm:device>"
    params["xml"] = xml.replace(end, f"<ovirt-vm:shared>transient</ovirt-vm:shared>{end}")
    lab.call("VM.hotplugDisk", vmID=paused.id, params=params)
    own = Path(source(paused, "sdb"))
    assert own.parent == lab.agent.dir / "state" / "transient" / paused.id
    found = element(paused, "sdb")
    assert found is not None
    below = found.find("./backingStore/source")
    assert below is not None
    assert below.get("file", "").endswith(f"/{disk.image}/{base.leaf}")
    lab.fails(45, "VM.hotplugDisk", vmID=paused.id, params=params)
    assert own.exists()
    lab.call(
        "VM.hotunplugDisk", vmID=paused.id,
        params={"vmId": paused.id, "drive": pdiv(lab, base)},
    )  # fmt: skip
    assert not own.parent.exists()


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


def dies(lab: VmLab, call: Callable[[], object], then: str) -> None:
    """The agent is armed and dies in the call; the next one may be armed as well."""
    with pytest.raises((RemoteError, OSError)):
        call()
    lab.world.restart(then)
    lab.wait_libvirt()
    lab.world.settle()


def test_agent_killed_while_a_disk_is_added(lab: VmLab, paused: Machine) -> None:
    disk = lab.disk(filled=False)
    steps = ["prepared", "recorded", "attached"]
    lab.world.restart(f"vm.hotplug_disk:{steps[0]}")
    for step, following in zip(steps, [*steps[1:], ""], strict=True):
        then = f"vm.hotplug_disk:{following}" if following else ""
        dies(lab, lambda: plug(lab, paused, disk), then)
        attached = step == "attached"
        assert ("sdb" in targets(paused)) == attached
        assert ("sdb" in records(paused)) == attached
        assert (disk.image in prepared(lab)) == attached
    unplug(lab, paused, disk)


def test_agent_killed_while_a_disk_is_taken_away(lab: VmLab, paused: Machine) -> None:
    disk = lab.disk(filled=False)
    steps = ["recorded", "detached", "released"]
    plug(lab, paused, disk)
    lab.world.restart(f"vm.hotunplug_disk:{steps[0]}")
    for step, following in zip(steps, [*steps[1:], ""], strict=True):
        then = f"vm.hotunplug_disk:{following}" if following else ""
        dies(lab, lambda: unplug(lab, paused, disk), then)
        there = step == "recorded"  # the guest was not told yet
        assert ("sdb" in targets(paused)) == there
        assert ("sdb" in records(paused)) == there
        assert (disk.image in prepared(lab)) == there
        if following and not there:
            plug(lab, paused, disk)


def test_requests_at_once(lab: VmLab, paused: Machine) -> None:
    """The same disk twice, and another one."""
    disk, other = lab.disk(filled=False), lab.disk(filled=False)
    xmls = [hotplug_xml(lab, disk), hotplug_xml(lab, disk), hotplug_xml(lab, other, "sdc")]
    attempts = [attempt(lab, "VM.hotplugDisk", paused.id, xml) for xml in xmls]
    for thread, _codes in attempts:
        thread.join(BOUND)
    assert sorted(codes[0] for _thread, codes in attempts) == [0, 0, 45]
    assert {disk.image, other.image} <= prepared(lab)
    assert {"sdb", "sdc"} <= set(records(paused))
    unplug(lab, paused, disk)
    unplug(lab, paused, other)


@pytest.mark.parametrize("looking", [True, False])
def test_disk_of_a_vm_that_ends_is_let_go(lab: VmLab, paused: Machine, looking: bool) -> None:
    """Also when no agent looks."""
    disk = lab.disk(filled=False)
    short = lab.machine("short", disks=0, devices=SCSI)
    plug(lab, short, disk)
    assert disk.image in prepared(lab)
    if not looking:
        lab.world.client.close()
        lab.agent.kill()
    short.guest.destroy()
    if not looking:
        lab.world.restart()
    lab.wait(lambda: disk.image not in prepared(lab), "the image to be let go")
    assert list((lab.agent.dir / "run" / "holdings").iterdir()) == []


# -- libvirt that does not answer --------------------------------------------------------------


def attempt(lab: VmLab, verb: str, vm: str, xml: str) -> tuple[threading.Thread, list[int]]:
    """In a thread; the list gets the code of the answer, 0 for success."""
    codes: list[int] = []

    def run() -> None:
        with Client.dev(str(lab.agent.dir)) as client:
            try:
                client.call(verb, {"vmID": vm, "params": {"vmId": vm, "xml": xml}})
                codes.append(0)
            except RemoteError as error:
                codes.append(error.code)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, codes


@pytest.mark.parametrize(
    ("verb", "how"),
    [("hotplugDisk", "stopped"), ("hotunplugDisk", "killed")],
)
def test_libvirt_goes_away_meanwhile(lab: VmLab, paused: Machine, verb: str, how: str) -> None:
    """The answer says what became of it, and what could not be told then is put right."""
    disk = lab.disk(filled=False)
    adding = verb == "hotplugDisk"
    if not adding:
        plug(lab, paused, disk)
    xml = hotplug_xml(lab, disk) if adding else by_alias(disk)
    kind = "vm.hotplug_disk" if adding else "vm.hotunplug_disk"
    lab.world.restart(f"stop {kind}:recorded")  # right before libvirt is told
    agent = lab.agent.process
    assert agent is not None
    thread, codes = attempt(lab, f"VM.{verb}", paused.id, xml)
    state = Path(f"/proc/{agent.pid}/stat")
    lab.wait(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", "the agent to stop")
    lab.libvirtd.signal(signal.SIGSTOP)
    agent.send_signal(signal.SIGCONT)
    time.sleep(3.0)  # its connection is given up meanwhile
    if how == "stopped":
        lab.libvirtd.signal(signal.SIGCONT)
        lab.guests.reconnect()
    else:
        lab.restart_libvirtd()
    thread.join(BOUND)
    assert codes in ([0], [45], [46], [59])
    lab.wait_libvirt()
    lab.wait(
        lambda: ("sdb" in targets(paused)) == (disk.image in prepared(lab)), "recovery", BOUND
    )
    there = "sdb" in targets(paused)
    assert there == ("sdb" in records(paused))
    if codes == [0]:
        assert there == adding
    lab.world.restart()  # it would stop again
    lab.wait_libvirt()
    if there:
        unplug(lab, paused, disk)


def test_qemu_hangs_meanwhile(lab: VmLab, paused: Machine) -> None:
    """Nothing is concluded before it has answered."""
    disk = lab.disk(filled=False)
    qemu = lab.libvirtd.qemu(paused.guest.plan.name)
    os.kill(qemu, signal.SIGSTOP)
    try:
        thread, codes = attempt(lab, "VM.hotplugDisk", paused.id, hotplug_xml(lab, disk))
        time.sleep(7.0)  # longer than a call of libvirt's may take here
        assert not codes
    finally:
        os.kill(qemu, signal.SIGCONT)
    thread.join(BOUND)
    assert codes == [0]
    assert "sdb" in targets(paused)
    assert records(paused)["sdb"] == pdiv(lab, disk)
    unplug(lab, paused, disk)


# -- with a guest ----------------------------------------------------------------------------


def blocks(machine: Machine, name: str) -> int:
    """Bytes of a disk in the guest, 0 when it has none such."""
    return 512 * int(machine.guest.run(f"cat /sys/block/{name}/size 2>/dev/null || echo 0"))


def test_guest_uses_and_gives_back(lab: VmLab, paused: Machine) -> None:
    machine = lab.machine("tiny", disks=1, boots=True)
    machine.guest.wait_ready()
    disk = lab.disk(filled=False)
    plug(lab, machine, disk, "vdb")
    lab.wait(lambda: blocks(machine, "vdb") == SIZE, "the guest to see it")
    machine.guest.run("echo hello >/tmp/x; dd if=/tmp/x of=/dev/vdb bs=512 conv=sync,fsync")
    lab.call(
        "VM.diskSizeExtend", vmID=machine.id, driveSpecs=pdiv(lab, disk), newSize=str(2 * SIZE)
    )
    lab.wait(lambda: blocks(machine, "vdb") == 2 * SIZE, "the guest to see its size")
    unplug(lab, machine, disk)
    assert blocks(machine, "vdb") == 0
    assert disk.image not in prepared(lab)
    plug(lab, machine, disk, "vdb")
    lab.wait(lambda: blocks(machine, "vdb") == 2 * SIZE, "the guest to see it again")
    assert machine.guest.run("head -n 1 /dev/vdb") == "hello"

    # A guest that stands still cannot answer; when it goes on it does.
    machine.guest.domain.suspend()
    message = lab.fails(
        46, "VM.hotunplugDisk", vmID=machine.id, params={"vmId": machine.id, "xml": by_alias(disk)}
    )
    assert "within 4 s" in message
    again = {"vmId": machine.id, "drive": {"name": "vdb"}}
    assert "within 4 s" in lab.fails(46, "VM.hotunplugDisk", vmID=machine.id, params=again)
    assert disk.image in prepared(lab)
    assert records(machine)["vdb"] == pdiv(lab, disk)
    lab.world.restart()  # whoever asked is gone as well
    machine.guest.domain.resume()
    lab.wait(lambda: disk.image not in prepared(lab), "the image to be let go")
    lab.wait(lambda: "vdb" not in records(machine), "the record to go")
    assert "vdb" not in targets(machine)
    machine.guest.destroy()
    lab.call("Image.teardown", **lab.world.ids(machine.disks[0].image, machine.disks[0].leaf))
