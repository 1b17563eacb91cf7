# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks of running VMs that move between two domains of files: to the end, back, and through
everything that may come in between."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.merge_lab import continued, qemu_io, reads, state_of
from functional.processes import AgentProcess
from functional.replicate_lab import (
    Pair,
    Place,
    check_on,
    finish,
    guest,
    held,
    is_ready,
    mirror,
    new_place,
    replicas,
    spec,
    start,
)
from functional.vm_disks import prepared, records
from functional.vm_lab import MIB, Machine, VmLab, vm_lab
from functional.vm_work import end
from functional.walk import STEPS
from functional.world import COW, RAW, new_id
from vdsm_storage.rpc.client import Client, NoResponse, RemoteError

SPEED = 8  # MiB a second
BULK = 32  # MiB that take four seconds then
SMALL = 16 * MIB
STARTED, ENDED = "vm.replicate", "vm.replicate_end"


@pytest.fixture(scope="module")
def lab(
    workdir: Path, start_agent: Callable[..., AgentProcess], make_server: Callable[[str], Any]
) -> Iterator[VmLab]:
    limits = dict.fromkeys(("replicate", "merge", "copy"), str(SPEED))
    settings = {f"bandwidth__{work}": limit for work, limit in limits.items()}
    with vm_lab(workdir, start_agent, make_server, **settings) as one:
        yield one


@contextlib.contextmanager
def pair_of(lab: VmLab, bulk: int = 0) -> Iterator[Pair]:
    """Two layers each: what the guest wrote is copied, and no more."""
    domains = (lab.world.main, lab.world.second)
    here, there = (new_place(lab, domain, (COW, COW)) for domain in domains)
    with guest(lab, here) as machine:
        pair = Pair(lab, machine, here, there)
        pair.write(1)
        if bulk:
            pair.write(8, bulk)
        yield pair


@pytest.fixture(scope="module")
def pair(lab: VmLab) -> Iterator[Pair]:
    """With little to copy."""
    with pair_of(lab) as one:
        yield one


@pytest.fixture(scope="module")
def slow(lab: VmLab) -> Iterator[Pair]:
    with pair_of(lab, BULK) as one:
        yield one


@pytest.fixture(autouse=True)
def nothing_left(lab: VmLab, pair: Pair, slow: Pair) -> Iterator[None]:
    """After every test: what is prepared is what VMs have."""
    yield
    lab.wait_libvirt()
    lab.world.settle()
    expected = {pair.here.image, slow.here.image}
    lab.wait(lambda: prepared(lab) == expected, "what was prepared to be let go")
    pair.check_one()
    slow.check_one()


# -- both ends -------------------------------------------------------------------------------


def test_there_and_back(lab: VmLab, pair: Pair) -> None:
    """On the way back over what an earlier time left there."""
    first = pair.here
    for _ in range(2):
        pair.move()
        record = records(pair.machine)["vda"]
        names = (record["domainID"], record["imageID"], record["volumeID"])
        assert names == (pair.here.domain, pair.here.image, pair.here.leaf)
    assert pair.here is first
    # Who did not hear of the end may ask again; who asks for the other one is told.
    assert finish(lab, pair.machine, pair.there, pair.here) == 0
    lab.fails(
        13, "VM.diskReplicateFinish", vmID=pair.machine.id, srcDisk=spec(lab, pair.there),
        dstDisk=spec(lab, pair.there),
    )  # fmt: skip
    lab.fails(
        88, "VM.diskReplicateFinish", vmID=pair.machine.id, srcDisk=spec(lab, pair.here),
        dstDisk=spec(lab, pair.there),
    )  # fmt: skip


def test_given_up(lab: VmLab, slow: Pair) -> None:
    """Before the end: too early for the other side, and never too early for this one."""
    slow.start()
    ends = {"srcDisk": spec(lab, slow.here), "dstDisk": spec(lab, slow.there)}
    message = lab.fails(40, "VM.diskReplicateFinish", vmID=slow.machine.id, **ends)
    assert "not all is copied" in message
    other = new_place(lab, lab.world.second)
    ends["dstDisk"] = spec(lab, other)
    lab.fails(55, "VM.diskReplicateFinish", vmID=slow.machine.id, **ends)
    slow.check_both()
    slow.cancel()
    ends["dstDisk"] = ends["srcDisk"]
    lab.fails(88, "VM.diskReplicateFinish", vmID=slow.machine.id, **ends)


def layered(lab: VmLab) -> Place:
    """Two volumes with a MiB of 0x50 and of 0x51."""
    here = new_place(lab, lab.world.main, size=SMALL)
    lab.world.write(here.image, here.leaf, "qcow2", 0)
    here.volumes.append(
        lab.world.create(here.image, volFormat=COW, size=str(SMALL), srcImgUUID=here.image,
                         srcVolUUID=here.leaf, sequence=2)
    )  # fmt: skip
    lab.world.write(here.image, here.leaf, "qcow2", 1)
    return here


@pytest.mark.parametrize("formats", [(COW, COW), (COW,), (RAW,), (RAW, COW)], ids=str)
def test_layers(lab: VmLab, formats: tuple[int, ...]) -> None:
    """Only the guest's own moves onto a volume with a parent, all of them to one without."""
    here, there = layered(lab), new_place(lab, lab.world.second, formats, SMALL)
    with guest(lab, here) as machine:
        start(lab, machine, here, there)
        if len(formats) == 2:  # the others are copied meanwhile
            world, (base, _) = lab.world, here.volumes
            ends = world.div(here.image, base), world.div(there.image, there.volumes[0],
                                                          there.domain)  # fmt: skip
            assert world.job("SDM.copy_data", source=ends[0], destination=ends[1]) == ""
        qemu_io(machine, f"write -P 9 {5 * MIB} 65536")
        finish(lab, machine, here, there)
        check_on(lab, machine, there, here)
        for byte, place in ((0x50, 0), (0x51, 1), (9, 5)):
            assert reads(machine, byte, place * MIB)
        chain = lab.world.volumes(there.image, there.domain)
        assert len(chain) == len(formats)


def test_vm_stays_while_the_other_side_is_not_whole(lab: VmLab) -> None:
    """A layer below is still being copied, or that failed; or somebody has deleted all of it."""
    world, here = lab.world, layered(lab)
    there = new_place(lab, world.second, (COW, COW), SMALL)
    ends = {"srcDisk": spec(lab, here), "dstDisk": spec(lab, there)}
    base = world.ids(there.image, there.volumes[0], there.domain)
    with guest(lab, here) as machine:
        start(lab, machine, here, there)
        lab.wait(lambda: is_ready(machine), "the copy")
        lab.call("Volume.setLegality", **base, legality="ILLEGAL")
        message = lab.fails(55, "VM.diskReplicateFinish", vmID=machine.id, **ends)
        assert there.volumes[0] in message
        assert is_ready(machine)
        lab.call("Volume.setLegality", **base, legality="LEGAL")
        where = {"storagepoolID": world.pool, "storagedomainID": there.domain}
        deleting = {**where, "imageID": there.image, "postZero": "false", "force": "false"}
        assert world.task("Image.delete", **deleting) == ""
        lab.fails(1630, "VM.diskReplicateFinish", vmID=machine.id, **ends)
        assert is_ready(machine)
        finish(lab, machine, here, here)
        check_on(lab, machine, here, there)
        assert reads(machine, 0x51, MIB)


def test_vm_ends_meanwhile(lab: VmLab) -> None:
    with pair_of(lab, BULK) as pair:
        pair.start()
        pair.machine.guest.destroy()
        lab.wait(lambda: not held(lab, pair.there), "the copy to be let go")
        with guest(lab, pair.here) as again:
            assert mirror(again) is None
            assert reads(again, 17, MIB)


# -- what cannot be --------------------------------------------------------------------------


def test_wrong_requests(lab: VmLab, pair: Pair, slow: Pair) -> None:
    """An error that says what is wrong, and nothing is changed."""
    world, machine = lab.world, pair.machine

    def fails(code: int, there: Place, here: Place = pair.here, vm: str = machine.id) -> str:
        message = lab.fails(
            code, "VM.diskReplicateStart", vmID=vm, srcDisk=spec(lab, here),
            dstDisk=spec(lab, there),
        )  # fmt: skip
        pair.check_one()
        assert not held(lab, there) or there in (pair.here, slow.here)
        return message

    there = pair.there
    fails(1, there, vm=new_id())
    fails(13, there, new_place(lab, world.main))
    fails(1630, Place(world.second, there.image, [new_id()]))
    fails(1630, Place(new_id(), there.image, there.volumes))
    assert "same image" in fails(55, pair.here)
    assert slow.machine.id in fails(55, slow.here)
    assert "extend" in fails(79, new_place(lab, world.second, size=64 * MIB))
    single = new_place(lab, world.main)
    with guest(lab, single) as other:
        two = new_place(lab, world.second, (COW, COW))
        assert "parent" in fails(55, two, single, other.id)
    inner = new_place(lab, world.second, (COW, COW))
    assert "leaf" in fails(55, Place(inner.domain, inner.image, inner.volumes[:1]))
    broken = new_place(lab, world.second)
    where = world.ids(broken.image, broken.leaf, broken.domain)
    lab.call("Volume.setLegality", **where, legality="ILLEGAL")
    assert "ILLEGAL" in fails(55, broken)


def test_others_wait(lab: VmLab) -> None:
    """Whatever else would change the disk says why it does not, until the replication has
    ended."""
    world, here = lab.world, layered(lab)
    there = new_place(lab, world.second, (COW, COW), SMALL)
    with guest(lab, here) as machine:
        start(lab, machine, here, there)
        disk = spec(lab, here)
        leaf = world.create(here.image, volFormat=COW, size=str(SMALL),
                            srcImgUUID=here.image, srcVolUUID=here.leaf, sequence=3)  # fmt: skip
        drive = {"domainID": here.domain, "imageID": here.image, "baseVolumeID": here.leaf,
                 "volumeID": leaf}  # fmt: skip
        job = new_id()
        lab.call("VM.snapshot", vmID=machine.id, snapDrives=[drive], jobUUID=job)
        error = end(lab, job)["error"]
        assert error["code"] == 48
        # Of no disk at all, but with what all of them are made of.
        names = [world.main, world.pool]
        for kind, size in (("MEMD", 64 * MIB), ("MEMM", 64 * 1024)):
            names.append(new_id())
            new = {"volFormat": RAW, "size": str(size), "diskType": kind}
            names.append(world.create(names[-1], **new))
        kept = {"snapDrives": [], "snapMemory": ",".join(names), "jobUUID": (job := new_id())}
        lab.call("VM.snapshot", vmID=machine.id, **kept)
        assert end(lab, job)["error"]["code"] == 48
        for number in (2, 4):
            lab.call("Image.teardown", **world.ids(names[number], names[number + 1]))
        named = {"vmId": machine.id, "drive": {"name": "vda"}}
        base, top = here.volumes
        for message in (
            error["message"],
            lab.fails(46, "VM.hotunplugDisk", vmID=machine.id, params=named),
            lab.fails(58, "VM.diskSizeExtend", vmID=machine.id, driveSpecs=disk,
                      newSize=str(2 * SMALL)),
            lab.fails(52, "VM.merge", vmID=machine.id, drive=disk, baseVolUUID=base,
                      topVolUUID=top, jobUUID=new_id(), bandwidth="0"),
        ):  # fmt: skip
            assert "being replicated" in message
        third = spec(lab, new_place(lab, world.second, (COW, COW), SMALL))
        for where in (third, spec(lab, there)):
            lab.fails(55, "VM.diskReplicateStart", vmID=machine.id, srcDisk=disk, dstDisk=where)
        assert mirror(machine) is not None
        finish(lab, machine, here, here)
        check_on(lab, machine, here, there)
        lab.call("VM.snapshot", vmID=machine.id, snapDrives=[drive])
        here.volumes.append(leaf)
        merged = {"vmID": machine.id, "drive": spec(lab, here), "bandwidth": "1"}
        qemu_io(machine, f"write -P 9 {5 * MIB} {8 * MIB}")
        lab.call("VM.merge", **merged, baseVolUUID=top, topVolUUID=leaf, jobUUID=(job := new_id()))
        message = lab.fails(
            55, "VM.diskReplicateStart", vmID=machine.id, srcDisk=spec(lab, here), dstDisk=third
        )
        assert "merged" in message
        lab.call("Task.stop", taskID=job)
        assert end(lab, job)["status"] == "aborted"


# -- who goes away meanwhile -----------------------------------------------------------------


def dies(lab: VmLab, call: Callable[[], object], then: str = "") -> None:
    """The agent is armed and dies in the call; the next one may be armed as well."""
    with pytest.raises((NoResponse, OSError)):
        call()
    lab.agent.wait_dead()
    lab.world.restart(then)
    lab.wait_libvirt()
    lab.world.settle()


def points(kind: str) -> list[str]:
    return [f"{kind}:{step}" for step in STEPS[kind]]


def test_agent_is_killed_while_it_starts(lab: VmLab, pair: Pair) -> None:
    """It is copied, or was never asked to be."""
    walk = points(STARTED)
    lab.world.restart(walk[0])
    for point, then in zip(walk, [*walk[1:], ""], strict=True):
        dies(lab, lambda: start(lab, pair.machine, pair.here, pair.there), then)
        if point.endswith(":started"):
            pair.check_both()
            pair.cancel()
        pair.check_one()


@pytest.mark.parametrize("pivot", [True, False], ids=["there", "given up"])
def test_agent_is_killed_while_it_ends(lab: VmLab, pair: Pair, pivot: bool) -> None:
    """The guest has left its volume and the record says so, or it goes on as before."""
    first, *walk = points(ENDED)
    walk.append(first)  # the last one: what is done again must not die
    lab.world.restart(walk[0])
    for point, then in zip(walk, [*walk[1:], ""], strict=True):
        pair.write(3)
        pair.start()
        pair.write(4)
        lab.wait(lambda: is_ready(pair.machine), "the copy")
        to = pair.there if pivot else pair.here
        dies(lab, lambda to=to: finish(lab, pair.machine, pair.here, to), then)
        if not pivot:
            pair.check_one()
        elif point.endswith(":begun"):
            pair.check_both()
            pair.pivot()
        else:
            pair.here, pair.there = pair.there, pair.here
            pair.check_one()
            assert finish(lab, pair.machine, pair.there, pair.here) == 0


def test_agent_and_libvirtd_are_killed_meanwhile(lab: VmLab, slow: Pair) -> None:
    """QEMU goes on; both find it again."""
    slow.start()
    lab.world.restart()
    lab.restart_libvirtd()
    lab.wait_libvirt()
    slow.check_both()
    slow.write(4)
    slow.pivot()


def answer(lab: VmLab, verb: str, params: dict[str, Any]) -> tuple[threading.Thread, list[int]]:
    """In a thread; the list gets the code of the answer, 0 for success."""
    codes: list[int] = []

    def run() -> None:
        with Client.dev(str(lab.agent.dir), timeout=120.0) as client:
            try:
                client.call(verb, params)
                codes.append(0)
            except RemoteError as error:
                codes.append(error.code)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, codes


@pytest.mark.parametrize("point", [f"{STARTED}:extended", f"{ENDED}:begun"])
def test_libvirtd_is_killed_when_it_is_asked(lab: VmLab, pair: Pair, point: str) -> None:
    """The answer tells what became of it."""
    lab.world.restart(f"stop {point}")
    starting = point.startswith(f"{STARTED}:")
    if not starting:
        pair.start()
        lab.wait(lambda: is_ready(pair.machine), "the copy")
    ends = {"srcDisk": spec(lab, pair.here), "dstDisk": spec(lab, pair.there)}
    verb = "VM.diskReplicateStart" if starting else "VM.diskReplicateFinish"
    thread, codes = answer(lab, verb, {"vmID": pair.machine.id, **ends})
    process = lab.agent.process
    assert process is not None
    lab.wait(lambda: state_of(process.pid) == "T", "the agent to stop")
    lab.libvirtd.kill_daemon()
    with continued(process.pid):
        time.sleep(0.5)
        lab.libvirtd.start_daemon()
        lab.guests.reconnect()
        thread.join(120)
    assert codes in ([0], [40], [55], [59])
    lab.wait_libvirt()
    lab.world.restart()
    if mirror(pair.machine) is not None:
        assert starting == (codes == [0])
        assert pair.there.leaf in replicas(pair.machine)
        pair.cancel()
    elif not starting:
        assert codes == [0]
        pair.here, pair.there = pair.there, pair.here


# -- how fast it goes ------------------------------------------------------------------------


def limit_of(machine: Machine) -> int:
    """MiB a second, as QEMU has it."""
    found: int = machine.guest.domain.blockJobInfo("vda")["bandwidth"]
    return found


def test_limit_of_a_replication(lab: VmLab, slow: Pair) -> None:
    slow.start()
    which = {"vmID": slow.machine.id, "srcDisk": spec(lab, slow.here)}
    assert limit_of(slow.machine) == SPEED
    for limit in (1, 2):
        lab.call("VM.setReplicationBandwidth", **which, bandwidth=limit)
        assert limit_of(slow.machine) == limit
        lab.world.restart()
    assert limit_of(slow.machine) == 2
    slow.check_both()
    lab.call("VM.setReplicationBandwidth", **which, bandwidth=0)
    assert limit_of(slow.machine) == 0
    slow.pivot()
    which["srcDisk"] = spec(lab, slow.here)
    lab.fails(88, "VM.setReplicationBandwidth", **which, bandwidth=1)
    lab.fails(13, "VM.setReplicationBandwidth", vmID=slow.machine.id, bandwidth=1,
              srcDisk=spec(lab, slow.there))  # fmt: skip


def test_limit_of_a_live_merge(lab: VmLab) -> None:
    """What is usual, unless it is asked for with another one; and what was said last."""
    here = layered(lab)
    with guest(lab, here) as machine:
        qemu_io(machine, f"write -P 9 {5 * MIB} {10 * MIB}")
        base, top = here.volumes
        asked = {"vmID": machine.id, "drive": spec(lab, here), "baseVolUUID": base,
                 "topVolUUID": top}  # fmt: skip
        for asked_for, expected in (("0", SPEED), ("1", 1)):
            job = new_id()
            lab.call("VM.merge", **asked, jobUUID=job, bandwidth=asked_for)
            lab.wait(lambda: machine.guest.domain.blockJobInfo("vda"), "the job")
            assert limit_of(machine) == expected
            if asked_for == "1":
                break
            lab.call("Task.stop", taskID=job)
            assert end(lab, job)["status"] == "aborted"
        lab.call("Host.setJobBandwidth", job_id=job, bandwidth=2)
        lab.wait(lambda: limit_of(machine) == 2, "the limit")
        lab.wait(lambda: lab.stats(machine.id)["vmJobs"][job]["bandwidth"] == 2, "it to be told")
        lab.agent.kill()
        lab.agent.start()
        lab.world.client.close()
        lab.world.client = Client.dev(str(lab.agent.dir))
        lab.wait_libvirt()
        assert limit_of(machine) == 2
        lab.call("Host.setJobBandwidth", job_id=job, bandwidth=0)
        assert end(lab, job)["status"] == "done"
        assert reads(machine, 9, 5 * MIB)
        lab.fails(84, "Host.setJobBandwidth", job_id=job, bandwidth=1)
        here.volumes.pop()


def test_limit_of_a_copy(lab: VmLab) -> None:
    """Without a guest: qemu-img keeps to it, and to another one that comes later."""
    world, mib = lab.world, 24
    here, there = (new_place(lab, domain) for domain in (world.main, world.second))
    path = lab.call("Image.prepare", **world.ids(here.image, here.leaf))["path"]
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P 5 0 {mib}M", path], check=True,
                   timeout=60, capture_output=True)  # fmt: skip
    lab.call("Image.teardown", **world.ids(here.image, here.leaf))

    def copy() -> str:
        job = new_id()
        ends = [world.div(place.image, place.leaf, place.domain) for place in (here, there)]
        lab.call("SDM.copy_data", job_id=job, source=ends[0], destination=ends[1])
        return job

    def state(job: str) -> str:
        found: str = lab.call("Host.getJobs", job_ids=[job])[job]["status"]
        return found

    started = time.monotonic()
    job = copy()
    lab.wait(lambda: state(job) == "done", "the copy")
    assert time.monotonic() - started > 0.8 * mib / SPEED

    job = copy()
    lab.call("Host.setJobBandwidth", job_id=job, bandwidth=1)
    started = time.monotonic()
    time.sleep(0.5 * mib / SPEED)
    assert state(job) == "running"
    lab.call("Host.setJobBandwidth", job_id=job, bandwidth=0)
    lab.wait(lambda: state(job) == "done", "the copy")
    assert time.monotonic() - started < 0.8 * mib
    lab.fails(84, "Host.setJobBandwidth", job_id=job, bandwidth=1)
    lab.fails(66, "Host.setJobBandwidth", job_id=new_id(), bandwidth=1)

    job = copy()  # one that stands still ends when it is told to
    lab.call("Host.setJobBandwidth", job_id=job, bandwidth=1)
    time.sleep(0.3)
    lab.call("Task.stop", taskID=job)
    lab.wait(lambda: state(job) == "aborted", "the copy to end", 10)
