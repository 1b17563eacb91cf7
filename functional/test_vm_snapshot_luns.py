# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots of a running guest whose disks are volumes on LUNs, by a stand-in for device-mapper.

What is the same on every storage is in test_vm_snapshot.py.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from functional.snapshot_lab import (
    boot_with_data,
    check_sound,
    consistent,
    restored_from_memory,
)
from functional.vm_lab import SIZE, Machine, VmDisk, VmLab
from functional.vm_luns import (
    MakeStandIn,
    StartAgent,
    active,
    luns_lab,
    managing,
    other_host,
    standin_of,
    task,
)
from functional.vm_work import (
    Log,
    ask,
    drive,
    end,
    follow,
    leaves,
    path_of,
    read_log,
    snapshot,
)
from functional.walk import STEPS
from functional.world import COW, SPARSE, new_id
from vdsm_storage.rpc.client import Client, NoResponse

SWITCH = 4.0  # seconds for libvirt
LIMIT = 6.0  # seconds that a guest may stay frozen

# The laboratory's image, whose kernel the guest has, may have to be made first.
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def lab(
    workdir: Path, start_agent: StartAgent, make_standin: MakeStandIn,
    make_luns: Callable[..., list[str]],
) -> Iterator[VmLab]:  # fmt: skip
    limits = {"vms__freeze_limit": str(LIMIT), "vms__snapshot_timeout": str(SWITCH)}
    with luns_lab(workdir, start_agent, make_standin, make_luns(2), **limits) as one:
        yield one


@pytest.fixture(scope="module")
def booted(lab: VmLab) -> Machine:
    return boot_with_data(lab)


@pytest.fixture
def vm(lab: VmLab, booted: Machine) -> Iterator[Machine]:
    """After every test: the guest is not frozen and has its data, chains are valid, and those
    volumes are active that it uses, and no others."""
    yield booted
    check_sound(lab, booted)
    assert active(lab) == used(booted)


def used(machine: Machine) -> set[str]:
    return {volume for disk in machine.disks for volume in disk.volumes}


def test_snapshots_are_consistent(lab: VmLab, vm: Machine) -> None:
    with consistent(lab, vm, rounds=2):
        assert active(lab) == used(vm)
        assert [len(disk.volumes) for disk in vm.disks] == [3, 3]


def test_what_is_refused_activates_nothing(lab: VmLab, vm: Machine) -> None:
    before = active(lab)
    job = new_id()
    drives = [drive(lab, vm.disks[0]), {**drive(lab, vm.disks[1]), "baseVolumeID": new_id()}]
    lab.call("VM.snapshot", vmID=vm.id, snapDrives=drives, jobUUID=job)
    assert end(lab, job)["error"]["code"] == 48
    assert active(lab) == before


def test_new_volume_fails(lab: VmLab, vm: Machine) -> None:
    """QEMU cannot open one of two: neither disk switches, both volumes are let go."""
    standin, before = standin_of(lab), leaves(vm)
    drives = [drive(lab, disk) for disk in vm.disks]
    target = f"{lab.world.main}/{drives[1]['volumeID']}"
    lab.prepare(VmDisk(vm.disks[1].image, [drives[1]["volumeID"]]))
    standin.fail(target, "read")
    job = new_id()
    try:
        lab.call("VM.snapshot", vmID=vm.id, snapDrives=drives, jobUUID=job)
        found = end(lab, job)
    finally:
        standin.resume(target)
    assert found["error"]["code"] == 48
    assert leaves(vm) == before
    assert active(lab) == used(vm)
    snapshot(lab, vm)


def test_new_volume_hangs(lab: VmLab, vm: Machine) -> None:
    """The guest may stand still for so long, but the agent does not; the job's end tells the
    truth."""
    standin = standin_of(lab)
    log = Log(vm)
    try:
        before = log.wait(2)
        base, leaf = vm.disks[0].leaf, lab.new_leaf(vm.disks[0])
        made = drive(lab, vm.disks[0], leaf)
        lab.prepare(VmDisk(vm.disks[0].image, [leaf]))
        standin.hang(f"{lab.world.main}/{leaf}", "read")
        job = new_id()
        try:
            lab.call("VM.snapshot", vmID=vm.id, snapDrives=[made], jobUUID=job)
            time.sleep(SWITCH + 2)
            assert standin.held() > 0
            assert lab.call("Host.getJobs", job_ids=[job])[job]["status"] == "running"
            started = time.monotonic()
            assert vm.id in lab.call("Host.getVMList", onlyUUID=True)
            assert lab.world.info(vm.disks[1].image, vm.disks[1].leaf)["legality"] == "LEGAL"
            assert time.monotonic() - started < 2
        finally:
            standin.resume(f"{lab.world.main}/{leaf}")
        assert end(lab, job)["status"] == "done"
        log.wait(2)
    finally:
        log.stop()
    assert leaf in leaves(vm)
    assert read_log(lab.agent.dir, path_of(lab, vm.disks[0], base), clean=False) >= before


def test_agent_is_killed(lab: VmLab, vm: Machine) -> None:
    """At every step: done or as before, and what the guest does not use is let go."""
    steps = STEPS["vm.snapshot"]
    lab.world.restart(f"vm.snapshot:{steps[0]}")
    for step, following in zip(steps, [*steps[1:], ""], strict=True):
        job = new_id()
        with contextlib.suppress(NoResponse):  # it may die before it has answered
            ask(lab, vm, job=job)
        lab.agent.wait_dead()
        lab.world.restart(f"vm.snapshot:{following}" if following else "")
        found = end(lab, job)
        expected = "done" if step in ("switched", "thawed") else "failed"
        assert found["status"] == expected, (step, found)
        lab.wait(lambda: "freezeAge" not in lab.stats(vm.id), "the guest to be thawed")
        for disk in vm.disks:
            follow(lab, vm, disk)
        assert active(lab) == used(vm), step


@pytest.fixture
def manager(lab: VmLab, start_agent: StartAgent, make_standin: MakeStandIn) -> Iterator[Client]:
    with other_host(lab, start_agent, make_standin) as client:
        yield client


def test_manager_makes_the_volume(lab: VmLab, vm: Machine, manager: Client) -> None:
    """As engines have it: another host keeps the domain's lock all the time."""
    disk, leaf = vm.disks[0], new_id()
    new = lab.world.new_volume(
        disk.image, leaf, volFormat=COW, preallocate=SPARSE, size=str(SIZE),
        srcImgUUID=disk.image, srcVolUUID=disk.leaf, sequence=9,
    )  # fmt: skip
    with managing(lab, manager):
        assert task(manager, "Volume.create", **new) == 0
        job = new_id()
        lab.call("VM.snapshot", vmID=vm.id, snapDrives=[drive(lab, disk, leaf)], jobUUID=job)
        assert end(lab, job)["status"] == "done"
    assert leaf in leaves(vm)


def test_snapshot_with_memory(lab: VmLab, booted: Machine) -> None:
    """Into volumes on LUNs, which are let go; the guest is restored from them.

    The last test: what was written after the snapshot is lost.
    """

    def prepared(disk: VmDisk) -> str:
        now = active(lab)
        assert disk.leaf not in now
        assert used(booted) <= now
        return lab.prepare(disk)

    made = restored_from_memory(lab, booted, prepared)
    for disk in (*booted.disks, *made):
        lab.call("Image.teardown", **lab.world.ids(disk.image, disk.leaf))
    assert active(lab) == set()
