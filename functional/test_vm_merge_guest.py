# SPDX-License-Identifier: GPL-2.0-or-later
"""Live merges under a guest that writes: its data are checked after each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from functional.vm_lab import Machine, VmDisk, VmLab
from functional.vm_work import Log, check_chain, end, follow, leaves, snapshot
from functional.walk import STEPS
from functional.world import new_id
from vdsm_storage.rpc.client import NoResponse

# The laboratory's image, whose kernel the guests have, may have to be made first.
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def booted(lab: VmLab) -> Machine:
    machine = lab.machine("tiny", disks=2, boots=True)
    machine.guest.wait_ready()
    return machine


@pytest.fixture
def vm(lab: VmLab, booted: Machine) -> Iterator[Machine]:
    """The guest, with data of its own in three layers; all of them are checked after a test."""
    booted.guest.run("rm -f /mnt/vda/layer*; sync")
    for layer in range(3):
        if layer >= len(booted.disks[0].volumes) - 2:
            snapshot(lab, booted, disks=booted.disks[:1])
        size = 6 if layer == 2 else 2
        booted.guest.run(
            f"dd if=/dev/urandom of=/mnt/vda/layer{layer} bs=1M count={size} conv=fsync"
            " 2>/dev/null"
        )
    booted.guest.run("sha256sum /mnt/vda/layer* >/run/layers")
    yield booted
    lab.wait_libvirt()
    booted.guest.run("sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum -c /run/layers")
    for disk in booted.disks:
        follow(lab, booted, disk)
        check_chain(lab, disk)
        assert lab.world.info(disk.image, disk.leaf)["voltype"] == "LEAF"
    assert lab.stats(booted.id)["vmJobs"] == {}


def begin(
    lab: VmLab, machine: Machine, base: str, top: str, *, job: str = "", **more: Any
) -> str:
    """Returns the job."""
    disk, job = machine.disks[0], job or new_id()
    lab.call(
        "VM.merge", vmID=machine.id, drive=pdiv(lab, disk), baseVolUUID=base, topVolUUID=top,
        jobUUID=job, **more,
    )  # fmt: skip
    return job


def pdiv(lab: VmLab, disk: VmDisk) -> dict[str, str]:
    return {
        "device": "disk", "poolID": lab.world.pool, "domainID": lab.world.main,
        "imageID": disk.image, "volumeID": disk.leaf,
    }  # fmt: skip


def wait_gone(lab: VmLab, machine: Machine, job: str) -> dict[str, Any]:
    """As an engine does: until the VM has no such job any more."""
    lab.wait(lambda: job not in lab.stats(machine.id)["vmJobs"], "the merge to end")
    return end(lab, job)


def status(job: dict[str, Any]) -> str:
    """done, aborted, or what was wrong."""
    found: str = job.get("error", {}).get("message", job["status"])
    return found


def merged(lab: VmLab, machine: Machine, base: str, top: str) -> None:
    """What an engine looks at then, and what it does."""
    disk = machine.disks[0]
    xml = lab.call("Host.dumpxmls", vmList=[machine.id])[machine.id]
    assert f"/{top}'" not in xml
    assert f"/{base}'" in xml
    assert lab.world.info(disk.image, top)["legality"] == "ILLEGAL"
    leaf = disk.leaf if disk.leaf != top else base
    chain = lab.call(
        "Image.reconcileVolumeChain", storagepoolID=lab.world.pool,
        storagedomainID=lab.world.main, imageID=disk.image, leafVolID=leaf,
    )  # fmt: skip
    assert chain == [volume for volume in disk.volumes if volume != top]
    where = lab.world.ids(disk.image, top)
    del where["volumeID"]
    delete = {**where, "volumeList": [top], "postZero": "false", "force": "false"}
    assert lab.world.task("Image.deleteVolumes", **delete) == ""
    disk.volumes.remove(top)


def test_layer_in_the_middle(lab: VmLab, vm: Machine) -> None:
    base, top = vm.disks[0].volumes[-3:-1]
    log = Log(vm)
    try:
        log.wait(1)
        job = begin(lab, vm, base, top)
        seen = lab.stats(vm.id)["vmJobs"]
        if seen:  # it may have been quick
            assert seen[job]["imgUUID"] == vm.disks[0].image
            assert (seen[job]["jobType"], seen[job]["blockJobType"]) == ("block", "commit")
        assert status(wait_gone(lab, vm, job)) == "done"
        merged(lab, vm, base, top)
        log.wait(2)
    finally:
        log.stop()


def test_leaf(lab: VmLab, vm: Machine) -> None:
    base, top = vm.disks[0].volumes[-2:]
    log = Log(vm)
    try:
        log.wait(1)
        assert status(wait_gone(lab, vm, begin(lab, vm, base, top))) == "done"
        merged(lab, vm, base, top)
        log.wait(2)
    finally:
        log.stop()
    assert lab.stats(vm.id)["disks"]["vda"]["imageID"] == vm.disks[0].image


def test_what_is_refused(lab: VmLab, vm: Machine) -> None:
    before = leaves(vm)
    first, second, third = vm.disks[0].volumes[-3:]
    one = {"vmID": vm.id, "drive": pdiv(lab, vm.disks[0]), "jobUUID": new_id()}
    for base, top in ((second, first), (first, third), (new_id(), third), (second, new_id())):
        lab.fails(52, "VM.merge", **one, baseVolUUID=base, topVolUUID=top)
    names = {"baseVolUUID": first, "topVolUUID": second}
    lab.fails(1, "VM.merge", **{**one, "vmID": new_id()}, **names)
    for wrong in ({"imageID": new_id()}, {"volumeID": second}):
        lab.fails(13, "VM.merge", **{**one, "drive": {**one["drive"], **wrong}}, **names)
    assert leaves(vm) == before
    assert lab.stats(vm.id)["vmJobs"] == {}


def test_merge_is_slow_and_stopped(lab: VmLab, vm: Machine) -> None:
    """After it all is as before."""
    base, top = vm.disks[0].volumes[-2:]
    job = begin(lab, vm, base, top, bandwidth="1")
    lab.wait(lambda: int(lab.stats(vm.id)["vmJobs"][job]["cur"]) > 0, "the copy to begin")
    lab.fails(69, "VM.merge", vmID=vm.id, drive=pdiv(lab, vm.disks[0]), baseVolUUID=base,
              topVolUUID=top, jobUUID=job)  # fmt: skip
    assert lab.stats(vm.id)["vmJobs"][job]["bandwidth"] == 1
    lab.call("Task.stop", taskID=job)
    assert status(wait_gone(lab, vm, job)) == "aborted"
    assert lab.world.info(vm.disks[0].image, top)["legality"] == "LEGAL"
    assert status(wait_gone(lab, vm, begin(lab, vm, base, top))) == "done"
    merged(lab, vm, base, top)


@pytest.mark.parametrize("step", STEPS["vm.merge"])
def test_agent_is_killed(lab: VmLab, vm: Machine, step: str) -> None:
    """It goes on where it was."""
    base, top = vm.disks[0].volumes[-2:]
    lab.world.restart(f"vm.merge:{step}")
    job = new_id()
    with contextlib.suppress(NoResponse):
        begin(lab, vm, base, top, job=job)
    lab.agent.wait_dead()
    lab.world.restart()
    assert status(wait_gone(lab, vm, job)) == "done"
    merged(lab, vm, base, top)


def test_agent_is_killed_while_the_middle_is_merged(lab: VmLab, vm: Machine) -> None:
    base, top = vm.disks[0].volumes[-3:-1]
    job = begin(lab, vm, base, top, bandwidth="8")
    time.sleep(0.5)
    lab.world.restart()
    assert status(wait_gone(lab, vm, job)) == "done"
    merged(lab, vm, base, top)


def test_libvirtd_is_killed(lab: VmLab, vm: Machine) -> None:
    base, top = vm.disks[0].volumes[-2:]
    job = begin(lab, vm, base, top, bandwidth="2")
    lab.wait(lambda: int(lab.stats(vm.id)["vmJobs"][job]["cur"]) > 0, "the copy to begin")
    for _ in range(2):
        lab.restart_libvirtd()
        lab.wait_libvirt()
    assert status(wait_gone(lab, vm, job)) == "done"
    merged(lab, vm, base, top)
