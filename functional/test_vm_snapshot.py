# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots of running guests: consistent, all disks or none, and through every failure."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.merge_lab import state_of
from functional.processes import AgentProcess
from functional.snapshot_lab import (
    boot_with_data,
    check_sound,
    consistent,
    restored_from_memory,
)
from functional.vm_lab import Machine, VmLab, vm_lab
from functional.vm_work import (
    Log,
    ask,
    drive,
    end,
    follow,
    leaves,
    memory_volumes,
    path_of,
    read_log,
    snapshot,
)
from functional.walk import STEPS
from functional.world import new_id
from vdsm_storage.rpc.client import NoResponse

ANSWER = 2.0  # seconds for the guest agent
SWITCH = 4.0  # seconds for libvirt
LIMIT = 6.0  # seconds that a guest may stay frozen
PATIENCE = 60.0


# The laboratory's image, whose kernel the guests have, may have to be made first.
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def lab(
    workdir: Path, start_agent: Callable[..., AgentProcess], make_server: Callable[[str], Any]
) -> Iterator[VmLab]:
    limits = {
        "vms__freeze_limit": str(LIMIT), "vms__freeze_timeout": str(ANSWER),
        "vms__snapshot_timeout": str(SWITCH),
    }  # fmt: skip
    with vm_lab(workdir, start_agent, make_server, **limits) as one:
        yield one


@pytest.fixture(scope="module")
def booted(lab: VmLab) -> Machine:
    return boot_with_data(lab)


@pytest.fixture
def vm(lab: VmLab, booted: Machine) -> Iterator[Machine]:
    """The guest that boots.  After every test: not frozen, its data is right, chains are valid."""
    yield booted
    lab.wait_libvirt()
    check_sound(lab, booted)


# -- snapshots and what becomes of them ------------------------------------------------------


def test_snapshots_are_consistent(lab: VmLab, vm: Machine) -> None:
    with consistent(lab, vm, rounds=3):
        assert [len(disk.volumes) for disk in vm.disks] == [4, 4]


def test_freeze_then_snapshot_elsewhere_then_frozen_then_thaw(lab: VmLab, vm: Machine) -> None:
    """An engine whose other disks are on storage with snapshots of its own."""
    log = Log(vm)
    try:
        log.wait(2)
        lab.call("VM.freeze", vmID=vm.id)
        elsewhere = read_log(lab.agent.dir, path_of(lab, vm.disks[0], vm.disks[0].leaf))
        volume = vm.disks[0].leaf
        found = snapshot(lab, vm, frozen=True)
        assert found["description"] == f"Snapshot of VM {vm.id}"
        assert float(lab.stats(vm.id)["freezeAge"]) > 0  # neither frozen nor thawed by it
        lab.call("VM.thaw", vmID=vm.id)
        log.wait(2)
    finally:
        log.stop()
    assert read_log(lab.agent.dir, path_of(lab, vm.disks[0], volume)) == elsewhere


def test_snapshot_of_a_guest_that_its_caller_froze_for_too_long(lab: VmLab, vm: Machine) -> None:
    """The guard thawed it: a snapshot that is called frozen would not be."""
    lab.call("VM.freeze", vmID=vm.id)
    lab.wait(lambda: "freezeAge" not in lab.stats(vm.id), "the guard", 3 * LIMIT)
    before = leaves(vm)
    found = end(lab, ask(lab, vm, frozen=True))
    assert found["error"]["code"] == 48
    assert "frozen" in found["error"]["message"]
    assert leaves(vm) == before
    lab.call("VM.thaw", vmID=vm.id)


def test_all_disks_or_none(lab: VmLab, vm: Machine) -> None:
    before = leaves(vm)
    drives = [drive(lab, disk) for disk in vm.disks]
    for wrong in (
        {"baseVolumeID": new_id()},  # not what the guest writes
        {"volumeID": vm.disks[1].volumes[0]},  # no child of it
        {"volumeID": new_id()},  # not there
    ):
        job = new_id()
        lab.call(
            "VM.snapshot", vmID=vm.id, snapDrives=[drives[0], {**drives[1], **wrong}], jobUUID=job
        )
        found = end(lab, job)
        assert found["status"] == "failed"
        assert found["error"]["code"] in (48, 201), found
        assert leaves(vm) == before


def cannot_open(lab: VmLab, vm: Machine) -> None:
    """No disk switches, and QEMU has neither new file open any more."""
    before = leaves(vm)
    drives = [drive(lab, disk) for disk in vm.disks]
    paths = [
        path_of(lab, disk, one["volumeID"]) for disk, one in zip(vm.disks, drives, strict=True)
    ]
    with open(paths[1], "r+b") as file:
        file.write(bytes(512))  # no qcow2 header
    job = new_id()
    lab.call("VM.snapshot", vmID=vm.id, snapDrives=drives, jobUUID=job)
    assert end(lab, job)["error"]["code"] == 48
    assert leaves(vm) == before
    files = Path(f"/proc/{lab.libvirtd.qemu('tiny')}/fd")
    opened = {os.path.basename(file.readlink()) for file in files.iterdir()}
    assert before <= opened
    assert opened.isdisjoint(one["volumeID"] for one in drives)


def test_new_volume_that_qemu_cannot_open(lab: VmLab, vm: Machine) -> None:
    """Its snapshot leaves nothing, also while somebody asks libvirt something all the time."""
    before = leaves(vm)
    cannot_open(lab, vm)
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            vm.guest.domain.blockInfo("vda")

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(3):
            cannot_open(lab, vm)
    finally:
        over.set()
        asking.join()
    assert leaves(vm) == before


def test_what_is_refused_at_once(lab: VmLab, vm: Machine) -> None:
    drives = [drive(lab, vm.disks[0])]
    lab.fails(1, "VM.snapshot", vmID=new_id(), snapDrives=drives, jobUUID=new_id())
    for wrong in ({"timeout": 0}, {"freeze_timeout": 0}):
        lab.fails(91, "VM.snapshot", vmID=vm.id, snapDrives=drives, jobUUID=new_id(), **wrong)
    job = new_id()
    lab.call("VM.snapshot", vmID=vm.id, snapDrives=drives, jobUUID=job)
    lab.fails(69, "VM.snapshot", vmID=vm.id, snapDrives=drives, jobUUID=job)
    assert end(lab, job)["status"] == "done"
    gone = lab.machine("gone")
    gone.guest.destroy()
    lab.wait(lambda: gone.id not in lab.call("Host.getVMList", onlyUUID=True), "its end")
    lab.fails(6, "VM.snapshot", vmID=gone.id, snapDrives=drives, jobUUID=new_id())


def test_guest_agent_that_hangs(lab: VmLab, vm: Machine) -> None:
    """The snapshot is made as after a power cut, which the job tells; the guest ends up thawed."""
    log = Log(vm)
    try:
        before = log.wait(2)
        volume = vm.disks[0].leaf
        vm.guest.send("kill -STOP $(pidof qemu-ga)")
        started = time.monotonic()
        found = snapshot(lab, vm)
        assert time.monotonic() - started < 30
        assert "as after a power cut" in found["description"]
        vm.guest.send("kill -CONT $(pidof qemu-ga)")
        lab.wait(lambda: "freezeAge" not in lab.stats(vm.id), "the guest to be thawed")
        log.wait(2)
    finally:
        log.stop()
    path = path_of(lab, vm.disks[0], volume)
    with pytest.raises(subprocess.CalledProcessError):
        read_log(lab.agent.dir, path)  # as after a power cut: it wants its journal replayed
    assert read_log(lab.agent.dir, path, clean=False) >= before


def test_vm_that_is_paused(lab: VmLab) -> None:
    machine = lab.machine("still", disks=1)
    found = snapshot(lab, machine)
    assert "as after a power cut" in found["description"]
    machine.guest.destroy()


def test_qemu_that_hangs(lab: VmLab, vm: Machine) -> None:
    """As with storage that does not answer: time-outs hold, nobody else waits, and in the end it
    is told truly what became of it."""
    other = lab.machine("other")
    qemu = lab.libvirtd.qemu("tiny")
    started = time.monotonic()
    lab.call("VM.freeze", vmID=vm.id)
    os.kill(qemu, signal.SIGSTOP)
    try:
        job = ask(lab, vm, frozen=True)
        time.sleep(SWITCH + 1)
        assert lab.call("Host.getJobs", job_ids=[job])[job]["status"] == "running"
        assert {vm.id, other.id} <= {each["vmId"] for each in lab.call("Host.getAllVmStats")}
        assert lab.stats(other.id)["status"] == "Paused"
    finally:
        os.kill(qemu, signal.SIGCONT)
    assert end(lab, job)["status"] == "done"
    for disk in vm.disks:
        follow(lab, vm, disk)
    assert time.monotonic() - started < 40
    other.guest.destroy()
    lab.call("VM.thaw", vmID=vm.id)


def test_statistics_while_a_qemu_hangs(lab: VmLab, vm: Machine) -> None:
    """The one that hangs is told without what only it knows; the others as ever."""
    other = lab.machine("calm")
    qemu = lab.libvirtd.qemu("tiny")
    os.kill(qemu, signal.SIGSTOP)
    try:
        started = time.monotonic()
        found = {each["vmId"]: each for each in lab.call("Host.getAllVmStats")}
        assert time.monotonic() - started < 20
        assert (found[vm.id]["monitorResponse"], found[vm.id]["disks"]) == ("-1", {})
        assert found[other.id]["monitorResponse"] == "0"
        assert set(found[other.id]["disks"]) == {"vda"}
    finally:
        os.kill(qemu, signal.SIGCONT)
    lab.wait(lambda: lab.stats(vm.id)["monitorResponse"] == "0", "it to answer again")
    other.guest.destroy()


def test_two_at_once(lab: VmLab, vm: Machine) -> None:
    """On one disk only one wins; on two disks both do."""
    drives = [drive(lab, vm.disks[0]), drive(lab, vm.disks[0])]
    jobs = [new_id(), new_id()]
    for job, one in zip(jobs, drives, strict=True):
        lab.call("VM.snapshot", vmID=vm.id, snapDrives=[one], jobUUID=job)
    found = [end(lab, job) for job in jobs]
    assert sorted(each["status"] for each in found) == ["done", "failed"], found
    for disk in vm.disks:
        follow(lab, vm, disk)
    jobs = [ask(lab, vm, [disk]) for disk in vm.disks]
    assert [end(lab, job)["status"] for job in jobs] == ["done", "done"]


def test_snapshot_is_stopped(lab: VmLab, vm: Machine) -> None:
    """While the guest agent lets it wait: nothing is changed."""
    before = leaves(vm)
    vm.guest.run("kill -STOP $(pidof qemu-ga)")
    job = ask(lab, vm)
    lab.wait(lambda: list(lab.agent.dir.glob("run/frozen/*.json")), "the freeze to begin")
    lab.call("Task.stop", taskID=job)
    assert end(lab, job)["status"] == "aborted"
    vm.guest.run("kill -CONT $(pidof qemu-ga)")
    assert leaves(vm) == before


# -- the agent and libvirt come and go -------------------------------------------------------


@pytest.mark.parametrize("step", STEPS["vm.snapshot"])
def test_agent_is_killed(lab: VmLab, vm: Machine, step: str) -> None:
    """Done or as before; it can be asked for again; the guest is thawed."""
    lab.world.restart(f"vm.snapshot:{step}")
    job = new_id()
    with contextlib.suppress(NoResponse):  # it may die before it has answered
        ask(lab, vm, job=job)
    lab.agent.wait_dead()
    frozen_since = time.monotonic()
    lab.world.restart()
    found = end(lab, job)
    assert found["status"] == ("done" if step in ("switched", "thawed") else "failed"), found
    lab.wait(lambda: "freezeAge" not in lab.stats(vm.id), "the guest to be thawed")
    assert time.monotonic() - frozen_since < 30
    for disk in vm.disks:
        follow(lab, vm, disk)
    if found["status"] == "failed":
        snapshot(lab, vm)


def test_libvirtd_is_killed_in_the_middle(lab: VmLab, vm: Machine) -> None:
    lab.world.restart("stop vm.snapshot:frozen")
    before = leaves(vm)
    job = ask(lab, vm)
    assert lab.agent.process is not None
    lab.wait(lambda: state_of(lab.agent.process.pid) == "T", "the agent to stop")
    lab.libvirtd.kill_daemon()
    lab.agent.process.send_signal(signal.SIGCONT)
    time.sleep(1)
    lab.libvirtd.start_daemon()
    lab.guests.reconnect()
    found = end(lab, job)
    assert found["error"]["code"] == 48
    assert leaves(vm) == before
    lab.wait(lambda: "freezeAge" not in lab.stats(vm.id), "the guest to be thawed")
    lab.world.restart()  # it would stop again


def test_metadata_of_the_vm_is_kept_right(lab: VmLab) -> None:
    space = "http://ovirt.org/vm/1.0"
    disk = lab.disk(filled=False)
    metadata = (
        f"<ovirt-vm:vm xmlns:ovirt-vm='{space}'><ovirt-vm:device devtype='disk' name='vda'>"
        f"<ovirt-vm:imageID>{disk.image}</ovirt-vm:imageID>"
        f"<ovirt-vm:volumeID>{disk.leaf}</ovirt-vm:volumeID></ovirt-vm:device></ovirt-vm:vm>"
    )
    machine = lab.machine_of("told", [disk], id=str(uuid.uuid4()), metadata=metadata)
    snapshot(lab, machine)
    xml = machine.guest.domain.XMLDesc()
    assert re.search(rf"volumeID>{machine.disks[0].leaf}<", xml)
    assert len(re.findall("volumeID>", xml)) == 2
    machine.guest.destroy()


# -- with memory -----------------------------------------------------------------------------


def test_memory_that_is_named_wrong(lab: VmLab, vm: Machine) -> None:
    before = leaves(vm)
    for wrong in ("x", ",".join([new_id()] * 5)):
        lab.fails(-32602, "VM.snapshot", vmID=vm.id, snapDrives=[], snapMemory=wrong)
    assert leaves(vm) == before


def test_snapshot_with_memory_is_stopped(lab: VmLab, vm: Machine) -> None:
    """Or was too fast for that; in both cases the guest goes on."""
    qemu = lab.libvirtd.qemu("tiny")
    before = leaves(vm)
    os.kill(qemu, signal.SIGSTOP)
    try:
        job = ask(lab, vm, snapMemory=memory_volumes(lab)[0])
        time.sleep(1)
        lab.call("Task.stop", taskID=job)
        time.sleep(1)
    finally:
        os.kill(qemu, signal.SIGCONT)
    found = end(lab, job)
    assert found["status"] in ("aborted", "done"), found
    assert (leaves(vm) == before) == (found["status"] == "aborted")
    lab.wait(lambda: lab.stats(vm.id)["status"] == "Up", "the guest to go on")


def test_agent_is_killed_while_memory_is_saved(lab: VmLab, vm: Machine) -> None:
    """libvirt goes on; the next agent finds out how it ended."""
    before = leaves(vm)
    qemu = lab.libvirtd.qemu("tiny")
    os.kill(qemu, signal.SIGSTOP)
    try:
        job = ask(lab, vm, snapMemory=memory_volumes(lab)[0])
        time.sleep(1)
        lab.agent.kill()
    finally:
        os.kill(qemu, signal.SIGCONT)
    lab.world.restart()
    assert end(lab, job)["status"] == "done"
    assert leaves(vm).isdisjoint(before)
    lab.wait(lambda: lab.stats(vm.id)["status"] == "Up", "the guest to go on")


def test_snapshot_with_memory(lab: VmLab, booted: Machine) -> None:
    """The last test of all: what was written after the snapshot is lost."""
    memory, conf = restored_from_memory(lab, booted, lambda disk: path_of(lab, disk, disk.leaf))
    assert memory.image != conf.image
