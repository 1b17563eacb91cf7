# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes of running VMs grow before their guests are out of space: on LUNs, by a stand-in for
device-mapper."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest

from functional.merge_lab import merge
from functional.replicate_lab import finish, guest, new_place, start, twin
from functional.thin_lab import (
    EXTENT,
    GIB,
    PIECE,
    begin,
    broken_lvm,
    check,
    check_written,
    delete,
    device_size,
    filler,
    grow,
    history,
    limits,
    lv_size,
    new_leaf,
    node,
    sound,
    thin,
    thin_disk,
    wait_armed,
    wait_thin,
    writing,
)
from functional.vm_lab import MIB, Machine, VmLab
from functional.vm_luns import (
    MakeStandIn,
    StartAgent,
    luns_lab,
    managing,
    other_host,
    standin_of,
)
from functional.vm_work import drive, end
from functional.world import COW, RAW, new_id
from vdsm_storage.rpc.client import Client

# The laboratory's image, whose kernel the guest has, may have to be made first.
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def lab(
    workdir: Path, start_agent: StartAgent, make_standin: MakeStandIn,
    make_luns: Callable[..., list[str]],
) -> Iterator[VmLab]:  # fmt: skip
    # So that a disk has never so much free that a guest would not fill it.
    limits = {"thin__headroom_max": str(GIB), "thin__chunk_max": str(GIB)}
    with luns_lab(workdir, start_agent, make_standin, make_luns(2), **limits) as one:
        yield one


@pytest.fixture
def vm(lab: VmLab) -> Iterator[Machine]:
    """One that does not run: QEMU writes for it."""
    machine = lab.machine_of(f"t{new_id()[:8]}", [thin_disk(lab)])
    wait_armed(lab, machine)
    yield machine
    machine.guest.destroy()
    for disk in machine.disks:
        sound(lab, disk)
        lab.call("Image.teardown", **lab.world.ids(disk.image, disk.leaf))
        delete(lab, disk)


def test_a_volume_grows(lab: VmLab, vm: Machine) -> None:
    before = check(lab, vm)
    grow(vm, 0, 400 * MIB)
    found = wait_thin(lab, vm, lambda one: int(one["extends"]) > 0, "the volume to grow")
    found = check(lab, vm)
    assert int(found["size"]) > int(before["size"])
    assert (found["pauses"], found["throttle"]) == ("0", "0")
    words = history(lab, vm)
    assert words.index("event") < words.index("extended") < len(words) - 1 - words[::-1].index(
        "armed"
    )


def test_a_missed_event(lab: VmLab, vm: Machine) -> None:
    """What was written while no agent looked is seen when it comes back."""
    lab.agent.kill()
    grow(vm, 0, 450 * MIB)
    lab.world.restart()
    wait_thin(lab, vm, lambda one: int(one["extends"]) > 0, "the volume to grow")
    check(lab, vm)


def test_an_agent_that_comes_back_finds_disks_armed(lab: VmLab, vm: Machine) -> None:
    before = check(lab, vm)
    lab.world.restart()
    found = check(lab, vm)
    assert found["threshold"] == before["threshold"]
    assert "armed" not in history(lab, vm)[-1:]  # it was looked at, and needed nothing


@pytest.mark.parametrize("step", ["planned", "extended", "resumed", "armed"])
def test_the_agent_is_killed(lab: VmLab, vm: Machine, step: str) -> None:
    """At every step: the volume grows, by what one need explains."""
    lab.world.restart(f"thin:{step}")
    before = lv_size(lab, vm.disks[0].leaf)
    grow(vm, 0, 400 * MIB)
    lab.agent.wait_dead()
    there = lv_size(lab, vm.disks[0].leaf)
    assert (there > before) == (step != "planned")
    lab.world.restart()
    lab.wait(lambda: lv_size(lab, vm.disks[0].leaf) > before, "the volume to grow")
    size = int(check(lab, vm)["size"])
    assert there in (before, size)  # not twice for one need


def test_libvirt_goes_away(lab: VmLab, vm: Machine) -> None:
    lab.restart_libvirtd()
    grow(vm, 0, 400 * MIB)
    lab.wait_libvirt()
    wait_thin(lab, vm, lambda one: int(one["extends"]) > 0, "the volume to grow")
    check(lab, vm)


def test_lvm_fails(lab: VmLab, vm: Machine) -> None:
    """Tried again until it does not, and told meanwhile."""
    with broken_lvm(lab):
        grow(vm, 0, 400 * MIB)
        found = wait_thin(lab, vm, lambda one: "error" in one, "the failure to be told")
        assert found["state"] in ("unarmed", "extending", "throttled")
    wait_thin(lab, vm, lambda one: int(one["extends"]) > 0, "the volume to grow")
    assert "error" not in check(lab, vm)


def test_the_lease_hangs(lab: VmLab, vm: Machine) -> None:
    """sanlock stands still for some seconds: the volume grows as soon as it goes on, and nothing
    else waits for that."""
    sanlock = int((lab.agent.dir / "sanlock" / "sanlock.pid").read_text())
    os.kill(sanlock, signal.SIGSTOP)
    try:
        grow(vm, 0, 400 * MIB)
        began = time.monotonic()
        found = wait_thin(lab, vm, lambda one: int(one["events"]) > 0, "the event")
        assert found["extends"] == "0"
        assert vm.id in lab.call("Host.getVMList", onlyUUID=True)
        assert time.monotonic() - began < 3
    finally:
        os.kill(sanlock, signal.SIGCONT)
    wait_thin(lab, vm, lambda one: int(one["extends"]) > 0, "the volume to grow")
    check(lab, vm)


def test_snapshot_and_merge(lab: VmLab, vm: Machine) -> None:
    """The watch is on the layer that the guest writes to; the base of an active merge grows with
    what is written meanwhile."""
    disk = vm.disks[0]
    leaf, job, before = new_leaf(lab, disk), new_id(), node(vm)
    lab.call("VM.snapshot", vmID=vm.id, snapDrives=[drive(lab, disk, leaf)], jobUUID=job)
    assert end(lab, job)["status"] == "done"
    disk.volumes.append(leaf)
    wait_thin(lab, vm, lambda one: int(one["limit"]) and node(vm) != before, "the new layer")
    check(lab, vm)
    size = lv_size(lab, leaf)
    grow(vm, 0, 300 * MIB)
    lab.wait(lambda: lv_size(lab, leaf) > size, "the new layer to grow", 10)
    check(lab, vm)
    merge(lab, vm, 1)
    assert disk.volumes == disk.volumes[:1]
    found = check(lab, vm)
    size = int(found["size"])
    grow(vm, 1024 * MIB, 1024 * MIB + size)
    lab.wait(lambda: lv_size(lab, disk.leaf) > size, "the base to grow", 10)
    check(lab, vm)


def test_a_disk_that_moves(lab: VmLab) -> None:
    """The replica grows before the disk itself does."""
    here = new_place(lab, lab.world.main, (COW,), 4096 * MIB, initialSize=str(400 * MIB))
    there = twin(lab, here, lab.world.second, initialSize=str(400 * MIB))
    with guest(lab, here) as machine:
        wait_armed(lab, machine)
        start(lab, machine, here, there)
        before = lv_size(lab, there.leaf, lab.world.second)
        size = lv_size(lab, here.leaf)
        while lv_size(lab, here.leaf) == size:
            written = int(thin(lab, machine).get("allocation", 0))
            grow(machine, written, written + 128 * MIB)
        assert lv_size(lab, there.leaf, lab.world.second) > before
        assert device_size(lab, there.leaf, lab.world.second) == lv_size(
            lab, there.leaf, lab.world.second
        )
        finish(lab, machine, here, there)
        machine.disks[0].volumes[:] = there.volumes


def test_what_a_backup_writes_to(lab: VmLab, vm: Machine) -> None:
    """The scratch volume of a backup, which somebody else began, grows with what the guest
    overwrites meanwhile."""
    grow(vm, 0, 700 * MIB)
    check(lab, vm)
    scratch = thin_disk(lab)
    before, path = lv_size(lab, scratch.leaf), lab.prepare(scratch)
    socket = lab.libvirtd.directory / "backup"
    vm.guest.domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>"
        "<disk name='vda' backup='yes' type='block'><driver type='qcow2'/>"
        f"<scratch dev='{path}'/></disk></disks></domainbackup>",
        None, libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL,
    )  # fmt: skip
    try:
        lab.world.restart()  # sooner than the next look
        wait_armed(lab, vm)
        grow(vm, 0, 700 * MIB, step=32 * MIB)
        lab.wait(lambda: lv_size(lab, scratch.leaf) > before, "the scratch volume to grow", 20)
        assert vm.guest.domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE
    finally:
        vm.guest.domain.abortJob()
    assert device_size(lab, scratch.leaf) == lv_size(lab, scratch.leaf)
    check(lab, vm)
    lab.call("Image.teardown", **lab.world.ids(scratch.image, scratch.leaf))
    delete(lab, scratch)


def test_disks_that_do_not_grow_are_not_watched(lab: VmLab) -> None:
    place = new_place(lab, lab.world.main, (RAW,))
    with guest(lab, place) as machine:
        assert thin(lab, machine) == {}
        assert lab.call("VM.getThinHistory", vmID=machine.id) == {}


def test_a_manager_elsewhere_is_asked(
    lab: VmLab, vm: Machine, start_agent: StartAgent, make_standin: MakeStandIn
) -> None:
    log = lab.agent.dir / "agent.log"
    with other_host(lab, start_agent, make_standin) as manager, managing(lab, manager):
        before = len(log.read_text())
        grow(vm, 0, 400 * MIB)
        wait_thin(lab, vm, lambda one: int(one["extends"]) > 0, "the volume to grow")
        check(lab, vm)
        assert "asking the manager" in log.read_text()[before:]


# -- a guest that runs -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def booted(lab: VmLab) -> Iterator[Machine]:
    machine = lab.machine_of("writes", [thin_disk(lab)], boots=True)
    begin(machine)
    yield machine
    machine.guest.destroy()


def test_a_guest_writes_as_fast_as_it_can(lab: VmLab, booted: Machine) -> None:
    pieces = 64
    wait_armed(lab, booted)
    booted.guest.run(writing(0, pieces), timeout=300)
    found = check(lab, booted)
    assert found["pauses"] == "0"
    assert int(found["size"]) > pieces * PIECE
    check_written(lab, booted, 0, pieces)


def test_a_guest_is_slowed_instead_of_stopped(lab: VmLab, booted: Machine) -> None:
    """As long as its volume cannot grow.  Its user's limits are what is told, and come back."""
    before = check(lab, booted)
    first = 400  # elsewhere: what a guest has not written takes no space
    user = {"write_bytes_sec": GIB, "read_bytes_sec": GIB // 2}
    lab.call("VM.setIoTune", vmID=booted.id, tunables=[{"name": "vda", "ioTune": user}])
    with broken_lvm(lab):
        booted.guest.send(writing(first, 80))
        wait_thin(lab, booted, lambda one: int(one["throttle"]) > 0, "the guest to be slowed")
        time.sleep(5)
        found = thin(lab, booted)
        assert (lab.stats(booted.id)["status"], found["pauses"]) == ("Up", before["pauses"])
        assert limits(booted)["write_bytes_sec"] == int(thin(lab, booted)["throttle"]) < GIB
        told = lab.call("VM.getIoTune", vmID=booted.id)[0]["ioTune"]
        assert {key: value for key, value in told.items() if value} == user
        user["write_bytes_sec"] += GIB // 2
        lab.call("VM.setIoTune", vmID=booted.id, tunables=[{"name": "vda", "ioTune": user}])
        assert limits(booted)["write_bytes_sec"] < GIB
        lab.agent.kill()
    lab.world.restart()  # another agent goes on, and gives back what was taken
    assert booted.guest.line(300) == "=0"
    assert check(lab, booted)["throttle"] == "0"
    assert {key: value for key, value in limits(booted).items() if value} == user
    lab.call("VM.setIoTune", vmID=booted.id, tunables=[{"name": "vda", "ioTune": {}}])
    check_written(lab, booted, first, 80)


def test_no_space_at_all(lab: VmLab, booted: Machine) -> None:
    """The guest pauses, is told as such, and goes on when there is space; no byte is lost."""
    full = filler(lab, 2 * EXTENT)
    client = Client.dev(str(lab.agent.dir), timeout=30.0)
    client.subscribe()
    try:
        booted.guest.send(writing(64, 100))
        lab.wait(lambda: lab.stats(booted.id)["pauseCode"] == "ENOSPC", "the guest to pause", 120)
        found = wait_thin(lab, booted, lambda one: one["state"] == "full", "it to be full")
        assert found["timeToFull"] == "0"
        assert "error" in found
        told = [
            params[lab.world.main]
            for method, params in client.events(1.0)
            if method == f"|storage|space_low|{lab.world.main}"
        ]
        assert (told[-1]["level"], told[-1]["free"], told[-1]["waiting"]) == ("full", "0", 1)
    finally:
        client.close()
        delete(lab, full)
    lab.wait(lambda: lab.stats(booted.id)["status"] == "Up", "the guest to go on", 10)
    assert booted.guest.line(300) == "=0"
    found = check(lab, booted)
    assert int(found["pauses"]) >= 1
    check_written(lab, booted, 64, 100)


def test_paused_while_no_agent_looks(lab: VmLab, booted: Machine) -> None:
    lab.agent.kill()
    booted.guest.send(writing(200, 100))
    domain = booted.guest.domain
    lab.wait(lambda: domain.state()[0] == 3, "the guest to pause", 120)
    lab.world.restart()
    assert booted.guest.line(300) == "=0"
    check(lab, booted)
    check_written(lab, booted, 200, 100)


def test_one_that_its_user_paused_stays_so(lab: VmLab, booted: Machine) -> None:
    lab.call("VM.pause", vmID=booted.id)
    grown = int(thin(lab, booted)["extends"])
    allocation = int(thin(lab, booted)["allocation"])
    grow(booted, allocation, allocation + 2048 * MIB)
    wait_thin(lab, booted, lambda one: int(one["extends"]) > grown, "the volume to grow")
    time.sleep(1)
    assert lab.stats(booted.id)["status"] == "Paused"
    lab.call("VM.cont", vmID=booted.id)
    assert standin_of(lab).active(lab.world.main)
