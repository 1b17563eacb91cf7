# SPDX-License-Identifier: GPL-2.0-or-later
"""Live merges: every layer, what callers see of them, and a guest at work."""

from __future__ import annotations

import subprocess
from typing import Any

import libvirt
import pytest

from functional.merge_lab import (
    ACTIVE,
    INNER,
    PIECE,
    SIZE,
    above,
    ask,
    begin,
    chain,
    check_chain,
    check_data,
    finish,
    guest,
    jobs,
    merge,
    outcome,
    path_of,
    qemu_io,
    reads,
    slow,
    tower,
)
from functional.vm_lab import MIB, Machine, VmLab
from functional.world import COW, RAW, new_id
from vdsm_storage.rpc.client import RemoteError

# -- every layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("base", [RAW, COW])
def test_all_layers(lab: VmLab, base: int) -> None:
    """An inner one, the one above the base, and at last the guest's own."""
    with guest(lab, tower(lab, 4, base)) as machine:
        for top in (2, 1, 1):
            merge(lab, machine, top)
            check_data(machine, 4)
        assert len(chain(machine)) == 1
        qemu_io(machine, f"write -P 77 0 {PIECE}")
        assert reads(machine, 77, 0)


@pytest.mark.parametrize("base", [RAW, COW])
def test_disk_that_was_extended_since(lab: VmLab, base: int) -> None:
    """The base gets the capacity of the snapshot, whether it has a layer above or is the leaf."""
    disk = tower(lab, 1, base)
    for size in (SIZE + 2 * MIB, SIZE + 4 * MIB):
        disk.volumes.append(above(lab, disk, size))
    with guest(lab, disk) as machine:
        merge(lab, machine, 1)
        assert lab.world.info(disk.image, disk.volumes[0])["capacity"] == str(SIZE + 2 * MIB)
        qemu_io(machine, f"write -P 9 {SIZE + 3 * MIB} {PIECE}")
        merge(lab, machine, 1)
        assert lab.world.info(disk.image, disk.leaf)["capacity"] == str(SIZE + 4 * MIB)
        assert reads(machine, 9, SIZE + 3 * MIB)


# -- what callers see ------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1, 2])
def test_job_is_told_until_the_chain_is_right(lab: VmLab, top: int) -> None:
    with slow(lab) as machine:
        disk = machine.disks[0]
        job = ask(lab, machine, top, bandwidth=1)
        told = jobs(lab, machine)[job]
        assert (told["jobType"], told["blockJobType"]) == ("block", "commit")
        assert (told["imgUUID"], told["bandwidth"]) == (disk.image, 1)
        lab.wait(lambda: int(jobs(lab, machine)[job]["cur"]) > 0, "progress")
        assert int(jobs(lab, machine)[job]["end"]) > 0
        assert lab.call("Host.getJobs", job_type="virt")[job]["status"] == "running"
        assert lab.call("Host.getJobs", job_type="storage") == {}
        assert job in {k for vm in lab.call("Host.getAllVmStats") for k in vm["vmJobs"]}
        check_chain(lab, machine, disk.volumes)
        while jobs(lab, machine):
            assert chain(machine) == disk.volumes or top not in disk.volumes
        assert disk.volumes[top] not in chain(machine)
        assert outcome(lab, job)["progress"] == 100.0
        finish(lab, machine, top)
        check_data(machine, 3)


def test_refusals(lab: VmLab) -> None:
    with guest(lab, tower(lab, 3)) as machine:
        disk = machine.disks[0]
        base, mid, leaf = disk.volumes
        drive = {"device": "disk", "poolID": lab.world.pool, "domainID": lab.world.main,
                 "imageID": disk.image, "volumeID": leaf}  # fmt: skip

        def fails(code: int, **changes: Any) -> str:
            asked = {"vmID": machine.id, "drive": drive, "baseVolUUID": base, "topVolUUID": mid}
            return lab.fails(code, "VM.merge", **{**asked, "jobUUID": new_id(), **changes})

        fails(1, vmID=new_id())
        fails(13, drive={**drive, "imageID": new_id()})
        fails(13, drive={**drive, "volumeID": mid})
        fails(52, topVolUUID=leaf)  # not right above base
        fails(52, topVolUUID=base, baseVolUUID=mid)
        fails(52, topVolUUID=new_id())
        fails(52, baseVolUUID=base, topVolUUID=base)
        lab.call("Volume.setLegality", **lab.world.ids(disk.image, base), legality="ILLEGAL")
        assert "ILLEGAL" in fails(52)
        lab.call("Volume.setLegality", **lab.world.ids(disk.image, base), legality="LEGAL")
        assert jobs(lab, machine) == {}
        check_chain(lab, machine, disk.volumes)
    fails(6)


def test_one_at_a_time_on_a_disk(lab: VmLab) -> None:
    with slow(lab) as machine:
        job = ask(lab, machine, 2, bandwidth=1)
        with pytest.raises(RemoteError) as caught:
            ask(lab, machine, 1)
        assert caught.value.code == 52
        with pytest.raises(RemoteError) as caught:
            ask(lab, machine, 2, job=job)
        assert caught.value.code == 69
        lab.wait(lambda: not jobs(lab, machine), "the job to end")
        finish(lab, machine, 2)


def test_block_job_of_somebody_else(lab: VmLab) -> None:
    with slow(lab) as machine:
        domain = machine.guest.domain
        domain.blockCommit("vda", None, None, 1, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
        job = ask(lab, machine, 1)
        found = outcome(lab, job)
        assert (found["status"], found["error"]["code"]) == ("failed", 52)
        assert domain.blockJobInfo("vda") is not None  # it is left alone
        domain.blockJobAbort("vda")
        merge(lab, machine, 1)


@pytest.mark.parametrize("top", [1, 2])
def test_abort(lab: VmLab, top: int) -> None:
    with slow(lab) as machine:
        job = ask(lab, machine, top, bandwidth=1)
        lab.wait(lambda: int(jobs(lab, machine)[job]["cur"]) > 0, "the job to begin")
        lab.call("Task.stop", taskID=job)
        assert outcome(lab, job)["status"] == "aborted"
        assert jobs(lab, machine) == {}
        assert not machine.guest.domain.blockJobInfo("vda")
        check_chain(lab, machine, machine.disks[0].volumes)
        check_data(machine, 3)
        merge(lab, machine, top)
        check_data(machine, 3)


# -- other operations ------------------------------------------------------------------------


def test_snapshot_during_a_merge(lab: VmLab) -> None:
    """libvirt refuses it on the same disk; both the merge and the disk come to no harm."""
    with slow(lab) as machine:
        disk = machine.disks[0]
        new = above(lab, disk)
        with pytest.raises(RemoteError) as caught:  # the leaf has a volume on it that waits
            ask(lab, machine, ACTIVE)
        assert caught.value.code == 52
        job = ask(lab, machine, INNER, bandwidth=1)
        snapshot = new_id()
        drives = [{"domainID": lab.world.main, "imageID": disk.image, "baseVolumeID": disk.leaf,
                   "volumeID": new}]  # fmt: skip
        lab.wait(lambda: int(jobs(lab, machine)[job]["cur"]) > 0, "the job to begin")
        lab.call("VM.snapshot", vmID=machine.id, snapDrives=drives, jobUUID=snapshot)
        assert outcome(lab, snapshot)["error"]["code"] == 48
        assert job in jobs(lab, machine)
        lab.wait(lambda: not jobs(lab, machine), "the merge")
        assert outcome(lab, job)["status"] == "done"
        gone = disk.volumes.pop(INNER)
        assert gone not in chain(machine)
        snapshot = new_id()
        lab.call("VM.snapshot", vmID=machine.id, snapDrives=drives, jobUUID=snapshot)
        assert outcome(lab, snapshot)["status"] == "done"
        disk.volumes.append(new)
        check_chain(lab, machine, disk.volumes)
        check_data(machine, 3)


def test_two_disks_at_once(lab: VmLab) -> None:
    disks = [tower(lab, 3, bulk=4 * MIB) for _ in range(2)]
    machine = lab.machine_of("both", disks)
    try:
        asked = [ask(lab, machine, top, n, bandwidth=1) for n, top in enumerate((INNER, ACTIVE))]
        assert set(jobs(lab, machine)) == set(asked)
        lab.wait(lambda: not jobs(lab, machine), "the merges")
        assert [outcome(lab, job)["status"] for job in asked] == ["done", "done"]
        finish(lab, machine, INNER, 0)
        finish(lab, machine, ACTIVE, 1)
    finally:
        machine.guest.destroy()


# -- a guest at work -------------------------------------------------------------------------


def snapshot(lab: VmLab, machine: Machine) -> None:
    (disk,) = machine.disks
    new = lab.new_leaf(disk)
    drives = [{"domainID": lab.world.main, "imageID": disk.image, "baseVolumeID": disk.leaf,
               "volumeID": new}]  # fmt: skip
    job = new_id()
    lab.call("VM.snapshot", vmID=machine.id, snapDrives=drives, jobUUID=job)
    assert outcome(lab, job)["status"] == "done"
    disk.volumes.append(new)


def remember(machine: Machine, name: str) -> None:
    """A file of random bytes, and its checksum where no disk is."""
    path = f"/mnt/vda/{name}"
    machine.guest.run(f"dd if=/dev/urandom of={path} bs=64k count=24 2>/dev/null; sync")
    machine.guest.run(f"sha256sum {path} >>/run/sums")


def test_guest_that_writes_all_the_time(lab: VmLab) -> None:
    """An engine takes three snapshots and removes them, through deaths of agent and libvirtd."""
    lab.world.restart()
    machine = lab.machine("writer", boots=True)
    machine.guest.wait_ready()
    remember(machine, "before")
    for number in range(3):
        snapshot(lab, machine)
        remember(machine, f"snapshot-{number}")
    machine.guest.send(
        "(while :; do dd if=/dev/urandom of=/mnt/vda/busy bs=16k count=16 conv=fsync 2>/dev/null;"
        " done) & writer=$!; echo writes"
    )
    while machine.guest.line() != "=0":
        pass
    for turn, top in enumerate((2, 1, 1)):
        if turn == 1:
            lab.world.restart("vm.merge:copied")
        job = new_id()
        begin(lab, machine, top, job)
        if turn == 1:
            lab.agent.wait_dead()
            lab.world.restart()
        if turn == 2:
            lab.restart_libvirtd()
            lab.wait_libvirt()
        assert outcome(lab, job)["status"] == "done", outcome(lab, job)
        finish(lab, machine, top)
        remember(machine, f"merge-{turn}")
    machine.guest.run("kill $writer; sync; echo 3 >/proc/sys/vm/drop_caches")
    machine.guest.run("sha256sum -c /run/sums")
    assert len(chain(machine)) == 1
    machine.guest.destroy()
    path = path_of(lab, machine.disks[0], machine.disks[0].leaf)
    subprocess.run(["qemu-img", "check", "-q", path], check=True, timeout=60)
