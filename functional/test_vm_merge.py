# SPDX-License-Identifier: GPL-2.0-or-later
"""Live merges: every layer, through failures of everything that takes part.

Most need no guest that boots: QEMU is paused, and writes for it by its monitor.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from functional.engine.host import FCP, StorageServer
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess
from functional.vm_lab import MIB, PATIENCE, Machine, VmDisk, VmLab, vm_lab
from functional.walk import STEPS
from functional.world import COW, RAW, SPARSE, new_id
from vdsm_storage.rpc.client import Client, NoResponse, RemoteError

HMP = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
SIZE = 32 * MIB  # of a disk
PIECE = 64 * 1024  # bytes that each layer writes at places of its own
BULK = 8 * MIB  # where the many bytes are that make a merge last


@pytest.fixture(scope="module")
def lab(
    workdir: Path, start_agent: Callable[..., AgentProcess], make_server: Callable[[str], Any]
) -> Iterator[VmLab]:
    with vm_lab(workdir, start_agent, make_server) as one:
        yield one


# -- disks and guests ------------------------------------------------------------------------


def tower(lab: VmLab, height: int, base: int = COW, bulk: int = 0) -> VmDisk:
    """A disk of `height` volumes.  Layer n wrote the byte n+1 at its own place (n+1) MiB, and over
    what the layers below wrote at place 0; and `bulk` bytes at BULK."""
    image = new_id()
    disk = VmDisk(image, [lab.world.create(image, volFormat=base, size=str(SIZE))])
    write(lab, disk, 0, bulk, "raw" if base == RAW else "qcow2")
    for number in range(1, height):
        disk.volumes.append(above(lab, disk))
        write(lab, disk, number, bulk)
    return disk


def above(lab: VmLab, disk: VmDisk, size: int = 0) -> str:
    """A volume on the leaf, of its size or of another."""
    capacity = str(size) if size else lab.world.info(disk.image, disk.leaf)["capacity"]
    return lab.world.create(
        disk.image, volFormat=COW, preallocate=SPARSE, size=capacity, srcImgUUID=disk.image,
        srcVolUUID=disk.leaf, sequence=len(disk.volumes) + 1,
    )  # fmt: skip


def write(lab: VmLab, disk: VmDisk, number: int, bulk: int = 0, fmt: str = "qcow2") -> None:
    commands = [f"write -P {number + 1} {place} {PIECE}" for place in (0, (number + 1) * MIB)]
    if bulk:
        commands.append(f"write -P {number + 1} {BULK} {bulk}")
    argv = ["qemu-io", "-f", fmt]
    for command in commands:
        argv += ["-c", command]
    subprocess.run([*argv, lab.prepare(disk)], check=True, timeout=60, capture_output=True)


def qemu_io(machine: Machine, command: str, disk: int = 0) -> None:
    """By the guest's own disk."""
    device = f"/machine/peripheral/virtio-disk{disk}/virtio-backend"
    libvirt_qemu.qemuMonitorCommand(
        machine.guest.domain, f'qemu-io -d {device} "{command}"', HMP
    )


def reads(machine: Machine, byte: int, place: int) -> bool:
    """Whether the guest's disk has a piece of these bytes there."""
    qemu_io(machine, "flush")
    root = ET.fromstring(machine.guest.domain.XMLDesc())
    disk = root.find("./devices/disk")
    assert disk is not None
    source, driver = disk.find("source"), disk.find("driver")
    assert source is not None
    assert driver is not None
    path = source.get("file") or source.get("dev")
    argv = ["qemu-io", "-U", "-r", "-f", driver.get("type", ""), "-c",
            f"read -P {byte} {place} {PIECE}", path or ""]  # fmt: skip
    done = subprocess.run(argv, check=False, timeout=60, capture_output=True, text=True)
    assert f"read {PIECE}/" in done.stdout, done
    return "Pattern verification failed" not in done.stdout


def check_data(machine: Machine, layers: int) -> None:
    """What a tower shows."""
    assert reads(machine, layers, 0)
    for number in range(layers):
        assert reads(machine, number + 1, (number + 1) * MIB), f"layer {number}"


# -- merging ---------------------------------------------------------------------------------


def ask(lab: VmLab, machine: Machine, top: int, disk: int = 0, **more: Any) -> str:
    """Volume number `top` into the one below it; returns the job."""
    what = machine.disks[disk]
    job = more.pop("job", new_id())
    drive = {
        "device": "disk", "poolID": lab.world.pool, "domainID": lab.world.main,
        "imageID": what.image, "volumeID": what.leaf,
    }  # fmt: skip
    lab.call(
        "VM.merge", vmID=machine.id, drive=drive, baseVolUUID=what.volumes[top - 1],
        topVolUUID=what.volumes[top], jobUUID=job, bandwidth=str(more.pop("bandwidth", 0)), **more,
    )  # fmt: skip
    return job


def jobs(lab: VmLab, machine: Machine) -> dict[str, Any]:
    found = lab.stats(machine.id)["vmJobs"]
    assert isinstance(found, dict)
    return found


def outcome(lab: VmLab, job: str) -> dict[str, Any]:
    """As Host.getJobs has it when it has ended."""
    found: dict[str, Any] = {}

    def ended() -> bool:
        found.update(lab.call("Host.getJobs", job_type="virt", job_ids=[job])[job])
        return found["status"] in ("done", "failed", "aborted")

    lab.wait(ended, "the job to end")
    return found


def chain(machine: Machine, disk: int = 0) -> list[str]:
    """The volumes that the VM uses, base first, by libvirt."""
    image = machine.disks[disk].image
    xml = re.sub(r"<mirror.*?</mirror>", "", machine.guest.domain.XMLDesc(), flags=re.DOTALL)
    return re.findall(rf"<source (?:file|dev)='[^']*/{image}/([0-9a-f-]+)'", xml)[::-1]


def check_chain(lab: VmLab, machine: Machine, expected: list[str], disk: int = 0) -> None:
    """libvirt, the headers and the metadata agree on it."""
    world, image = lab.world, machine.disks[disk].image
    assert chain(machine, disk) == expected
    where = lab.world.ids(image, expected[-1])
    names = {"leafVolID": where.pop("volumeID"), **where}
    assert lab.call("Image.reconcileVolumeChain", **names) == expected
    for number, volume in enumerate(expected):
        info = world.info(image, volume)
        parent = expected[number - 1] if number else "00000000-0000-0000-0000-000000000000"
        role = "LEAF" if volume == expected[-1] else "INTERNAL"
        assert (info["parent"], info["voltype"]) == (parent, role)
        assert info["legality"] == "LEGAL"


def finish(lab: VmLab, machine: Machine, top: int, disk: int = 0) -> None:
    """What an engine does when the job has gone; the disk has one volume less then."""
    what = machine.disks[disk]
    gone = what.volumes.pop(top)
    check_chain(lab, machine, what.volumes, disk)
    assert lab.world.info(what.image, gone)["legality"] == "ILLEGAL"
    ids = lab.world.ids(what.image, gone)
    ids["volumeList"] = [ids.pop("volumeID")]
    assert lab.world.task("Image.deleteVolumes", **ids, postZero="false", force="false") == ""
    check_chain(lab, machine, what.volumes, disk)


def merge(lab: VmLab, machine: Machine, top: int) -> None:
    """One that succeeds."""
    job = ask(lab, machine, top)
    lab.wait(lambda: not jobs(lab, machine), "the job to end")
    assert outcome(lab, job)["status"] == "done", outcome(lab, job)
    finish(lab, machine, top)


@contextlib.contextmanager
def guest(lab: VmLab, disk: VmDisk) -> Iterator[Machine]:
    machine = lab.machine_of(f"m{new_id()[:8]}", [disk])
    try:
        yield machine
    finally:
        machine.guest.destroy()


@contextlib.contextmanager
def slow(lab: VmLab, height: int = 3) -> Iterator[Machine]:
    """A guest whose merges last for some seconds, with `bandwidth=1`."""
    with guest(lab, tower(lab, height, bulk=10 * MIB)) as machine:
        yield machine


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


# -- the agent, libvirt and the guest come and go --------------------------------------------

INNER, ACTIVE = 1, 2  # what is merged of three layers
ONLY_ACTIVE = ("marked", "pivoted")
POINTS = [
    pytest.param(top, step, id=f"{'active' if top == ACTIVE else 'inner'}:{step}")
    for step in STEPS["vm.merge"]
    for top in (INNER, ACTIVE)
    if top == ACTIVE or step not in ONLY_ACTIVE
]


def begin(lab: VmLab, machine: Machine, top: int, job: str) -> None:
    """The agent may die, or be stopped, before it has answered."""
    with contextlib.suppress(NoResponse):
        ask(lab, machine, top, job=job)


@pytest.mark.parametrize(("top", "step"), POINTS)
def test_agent_is_killed(lab: VmLab, top: int, step: str) -> None:
    """It goes on where it was, under the same id."""
    with guest(lab, tower(lab, 3)) as machine:
        lab.world.restart(f"vm.merge:{step}")
        job = new_id()
        begin(lab, machine, top, job)
        lab.agent.wait_dead()
        lab.world.restart()
        assert outcome(lab, job)["status"] == "done", outcome(lab, job)
        assert jobs(lab, machine) == {}
        finish(lab, machine, top)
        check_data(machine, 3)


@pytest.mark.parametrize(("top", "step"), POINTS)
def test_libvirtd_is_killed(lab: VmLab, top: int, step: str) -> None:
    """It is waited for; the guest's QEMU goes on."""
    with guest(lab, tower(lab, 3)) as machine:
        lab.world.restart(f"stop vm.merge:{step}")
        job = new_id()
        asking = threading.Thread(target=begin, args=(lab, machine, top, job))
        asking.start()
        process = lab.agent.process
        assert process is not None
        lab.wait(lambda: state_of(process.pid) == "T", "the agent to stop")
        lab.libvirtd.kill_daemon()
        with continued(process.pid):
            time.sleep(0.5)
            lab.libvirtd.start_daemon()
            lab.guests.reconnect()
            asking.join()
            lab.wait_libvirt()
            assert outcome(lab, job)["status"] == "done", outcome(lab, job)
        finish(lab, machine, top)
        check_data(machine, 3)


@contextlib.contextmanager
def continued(pid: int) -> Iterator[None]:
    """It goes on whenever it is stopped: a pivot that is tried again comes to its step again."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(0.1):
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_agent_that_ends_leaves_the_merge_alone(lab: VmLab, how: str) -> None:
    """QEMU goes on without it, and the next agent finds the job again."""
    with slow(lab) as machine:
        lab.world.restart()
        job = ask(lab, machine, ACTIVE, bandwidth=1)
        lab.wait(lambda: int(jobs(lab, machine)[job]["cur"]) > 0, "the job to begin")
        if how == "stop":
            assert lab.agent.stop() == ""
        else:
            lab.agent.kill()
        assert machine.guest.domain.blockJobInfo("vda")
        lab.agent.start()
        lab.world.client.close()
        lab.world.client = Client.dev(str(lab.agent.dir))
        lab.wait_libvirt()
        assert job in jobs(lab, machine)  # at once, and until it is merged
        if how == "stop":  # it waits to be told
            for server in lab.world.places.values():
                lab.world.connect_server(server)
            lab.world.connect_pool()
        lab.wait(lambda: not jobs(lab, machine), "the merge")
        assert outcome(lab, job)["status"] == "done"
        finish(lab, machine, ACTIVE)
        check_data(machine, 3)


@pytest.mark.parametrize("top", [INNER, ACTIVE])
def test_guest_ends_meanwhile(lab: VmLab, top: int) -> None:
    """The chain is as it was, and can be merged by what does so without a guest."""
    with slow(lab) as machine:
        disk = machine.disks[0]
        job = ask(lab, machine, top, bandwidth=1)
        lab.wait(lambda: int(jobs(lab, machine)[job]["cur"]) > 0, "the job to begin")
        machine.guest.destroy()
        found = outcome(lab, job)
        assert (found["status"], found["error"]["code"]) == ("failed", 52)
        assert "VM has ended" in found["error"]["message"]
        ids = lab.world.ids(disk.image, disk.leaf)
        ids["leafVolID"] = ids.pop("volumeID")
        assert lab.call("Image.reconcileVolumeChain", **ids) == disk.volumes
    with guest(lab, disk) as machine:
        check_data(machine, 3)
        merge(lab, machine, top)
        check_data(machine, 3)


@pytest.mark.parametrize("step", ["copied", "marked"])
def test_guest_ends_at_the_pivot(lab: VmLab, step: str) -> None:
    """All was copied: merged if the leaf was marked before, else as it was.  No data is lost."""
    with guest(lab, tower(lab, 3)) as machine:
        disk = machine.disks[0]
        lab.world.restart(f"vm.merge:{step}")
        job = new_id()
        begin(lab, machine, ACTIVE, job)
        lab.agent.wait_dead()
        machine.guest.destroy()
        lab.world.restart()
        found = outcome(lab, job)
        if step == "marked":
            assert found["status"] == "done"
            assert lab.world.info(disk.image, disk.leaf)["legality"] == "ILLEGAL"
            disk.volumes.pop()
        else:
            assert (found["status"], found["error"]["code"]) == ("failed", 52)
    with guest(lab, disk) as machine:
        check_chain(lab, machine, disk.volumes)
        check_data(machine, 3)


def test_guest_wrote_before_a_pivot_that_never_was(lab: VmLab) -> None:
    """The leaf was marked, and has more than its base: it stays the guest's disk."""
    with guest(lab, tower(lab, 3)) as machine:
        disk = machine.disks[0]
        lab.world.restart("vm.merge:marked")
        job = new_id()
        begin(lab, machine, ACTIVE, job)
        lab.agent.wait_dead()
        path = machine.guest.domain.XMLDesc().split("<source file='")[1].split("'")[0]
        machine.guest.destroy()
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P 5 0 {PIECE}", path], check=True,
                       timeout=60, capture_output=True)  # fmt: skip
        lab.world.restart()
        assert outcome(lab, job)["status"] == "failed"
    with guest(lab, disk) as machine:
        check_chain(lab, machine, disk.volumes)
        assert reads(machine, 5, 0)


# -- bitmaps ---------------------------------------------------------------------------------


def bitmaps(lab: VmLab, disk: VmDisk, volume: str) -> dict[str, set[str]]:
    """Their flags by name, as the file has them; QEMU writes them when it closes it."""
    path = path_of(lab, disk, volume)
    text = subprocess.check_output(
        ["qemu-img", "info", "-U", "--output=json", path], timeout=60, text=True
    )
    data = json.loads(text)["format-specific"]["data"]
    return {each["name"]: set(each["flags"]) for each in data.get("bitmaps", [])}


def path_of(lab: VmLab, disk: VmDisk, volume: str) -> str:
    domain = lab.world.places[lab.world.main].spec
    return f"{domain}/{lab.world.main}/images/{disk.image}/{volume}"


def bitmap(lab: VmLab, disk: VmDisk, how: str, name: str) -> None:
    argv = ["qemu-img", "bitmap", "-f", "qcow2", how, path_of(lab, disk, disk.leaf), name]
    subprocess.run(argv, check=True, timeout=60, capture_output=True)


def dirty(lab: VmLab, disk: VmDisk, volume: str, name: str) -> set[int]:
    """The numbers of the MiBs in which a bitmap has a bit, as a backup tool sees them."""
    socket = lab.agent.dir / "bitmap.socket"
    argv = ["qemu-nbd", "-r", "-f", "qcow2", "-B", name, "-k", str(socket), "-t",
            path_of(lab, disk, volume)]  # fmt: skip
    server = subprocess.Popen(argv)
    try:
        lab.wait(socket.exists, "qemu-nbd")
        context = f"x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        options = f"driver=nbd,server.type=unix,server.path={socket},{context}"
        argv = ["qemu-img", "map", "--output=json", "--image-opts", options]
        found = json.loads(subprocess.check_output(argv, timeout=60))
    finally:
        server.terminate()
        server.wait(20)
        socket.unlink(missing_ok=True)
    return {
        number
        for extent in found
        if not extent["data"]
        for number in range(extent["start"] // MIB, -(-(extent["start"] + extent["length"]) // MIB))
    }


@pytest.mark.parametrize("top", [INNER, ACTIVE])
def test_bitmaps_are_kept(lab: VmLab, top: int) -> None:
    disk = tower(lab, 1)
    bitmap(lab, disk, "--add", "old")
    write(lab, disk, 0)
    for number in (1, 2):
        disk.volumes.append(above(lab, disk))
        bitmap(lab, disk, "--add", "old")  # as a new leaf gets those of its parent
        if number == top:
            bitmap(lab, disk, "--add", "new")
        write(lab, disk, number)
    with guest(lab, disk) as machine:
        base = disk.volumes[top - 1]
        merge(lab, machine, top)
    found = bitmaps(lab, disk, base)
    assert set(found) == {"old", "new"}
    assert found["old"] == found["new"] == {"auto"}
    assert dirty(lab, disk, base, "old") == {0, top, top + 1}
    assert dirty(lab, disk, base, "new") == {0, top + 1}


def broken(lab: VmLab, disk: VmDisk, name: str) -> None:
    """A bitmap that was in use when its QEMU died."""
    bitmap(lab, disk, "--add", name)
    with guest(lab, disk) as machine:
        qemu_io(machine, "flush")
        os.kill(lab.libvirtd.qemu(machine.guest.plan.name), signal.SIGKILL)
        lab.wait(lambda: machine.id not in lab.call("Host.getVMList", onlyUUID=True), "its end")
    assert "in-use" in bitmaps(lab, disk, disk.leaf)[name]


def test_bitmaps_of_a_merge_that_was_aborted(lab: VmLab) -> None:
    """Nothing is left that lets the next one fail."""
    disk = tower(lab, 1)
    bitmap(lab, disk, "--add", "old")
    disk.volumes.append(above(lab, disk))
    for name in ("old", "new"):
        bitmap(lab, disk, "--add", name)
    write(lab, disk, 1, bulk=10 * MIB)
    with guest(lab, disk) as machine:
        job = ask(lab, machine, 1, bandwidth=1)
        lab.wait(lambda: int(jobs(lab, machine)[job]["cur"]) > 0, "the job to begin")
        lab.call("Task.stop", taskID=job)
        assert outcome(lab, job)["status"] == "aborted"
        merge(lab, machine, 1)
    assert set(bitmaps(lab, disk, disk.leaf)) == {"old", "new"}
    bulk = range(BULK // MIB, BULK // MIB + 10)
    assert dirty(lab, disk, disk.leaf, "new") == dirty(lab, disk, disk.leaf, "old") == {0, 2, *bulk}


@pytest.mark.parametrize("where", ["base", "top", "both"])
@pytest.mark.parametrize("top", [INNER, ACTIVE])
def test_broken_bitmaps_do_no_harm(lab: VmLab, top: int, where: str) -> None:
    disk = tower(lab, 1)
    for number in (0, 1, 2):
        if number:
            disk.volumes.append(above(lab, disk))
        write(lab, disk, number)
        if number == top - 1 and where in ("base", "both"):
            broken(lab, disk, "old")
        elif number == top - 1 or (number == top and where == "base"):
            bitmap(lab, disk, "--add", "old")
        elif number == top:
            broken(lab, disk, "old")
    with guest(lab, disk) as machine:
        base = disk.volumes[top - 1]
        merge(lab, machine, top)
        check_data(machine, 3)
    if where == "top":  # base's recorded what was written there
        assert bitmaps(lab, disk, base)["old"] == {"auto"}
        assert dirty(lab, disk, base, "old") == {0, top + 1}
    else:  # nobody can take it for whole
        assert "in-use" in bitmaps(lab, disk, base)["old"]


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


# -- storage that fails ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tight(
    workdir: Path, start_agent: Callable[..., AgentProcess], make_server: Callable[[str], Any]
) -> Iterator[VmLab]:
    """Its domains are file systems of their own, mounted before libvirtd's world is made."""
    places = [make_server("local-4k") for _ in range(2)]

    def agent(_name: str, **settings: Any) -> AgentProcess:
        return start_agent("tight", **settings)

    with vm_lab(workdir / "t", agent, lambda _: places.pop()) as one:
        yield one


@contextlib.contextmanager
def full(lab: VmLab) -> Iterator[None]:
    """The main domain has no space left but a little."""
    place = Path(lab.world.places[lab.world.main].spec)
    filler = place / "filler"
    state = os.statvfs(place)
    length = state.f_bavail * state.f_frsize - 2 * MIB
    subprocess.run(["fallocate", "-l", str(length), filler], check=True, timeout=60)
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def hanging(lab: VmLab) -> Iterator[None]:
    """Nothing can be written to the main domain."""
    place = lab.world.places[lab.world.main].spec
    subprocess.run(["fsfreeze", "--freeze", place], check=True, timeout=60)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", place], check=True, timeout=60)


def heavy(lab: VmLab, top: int) -> VmDisk:
    """Volume `top` has 10 MiB that are not in the one below it."""
    disk = tower(lab, top)
    disk.volumes.append(above(lab, disk))
    write(lab, disk, top, bulk=10 * MIB)
    if top == INNER:
        disk.volumes.append(above(lab, disk))
        write(lab, disk, ACTIVE)
    return disk


@pytest.mark.parametrize("top", [INNER, ACTIVE])
def test_no_space_left(tight: VmLab, top: int) -> None:
    with guest(tight, heavy(tight, top)) as machine:
        with full(tight):
            job = ask(tight, machine, top)
            found = outcome(tight, job)
            assert (found["status"], found["error"]["code"]) == ("failed", 52)
            assert "space" in found["error"]["message"]
            check_chain(tight, machine, machine.disks[0].volumes)
            check_data(machine, 3)
        merge(tight, machine, top)
        check_data(machine, 3)


@pytest.mark.parametrize("then", ["goes on", "aborted"])
@pytest.mark.parametrize("top", [INNER, ACTIVE])
def test_storage_hangs(tight: VmLab, top: int, then: str) -> None:
    """Everything else is told meanwhile; the merge goes on with the storage, or is undone."""
    with guest(tight, heavy(tight, top)) as machine:
        job = ask(tight, machine, top, bandwidth=2)
        tight.wait(lambda: int(jobs(tight, machine)[job]["cur"]) > 0, "the job to begin")
        with hanging(tight):
            time.sleep(6)
            started = time.monotonic()
            assert job in jobs(tight, machine)
            assert tight.call("Host.getJobs", job_ids=[job])[job]["status"] == "running"
            if then == "aborted":
                tight.call("Task.stop", taskID=job)
                assert tight.call("Host.getJobs", job_ids=[job])[job]["status"] == "aborting"
            assert time.monotonic() - started < 15
        assert outcome(tight, job)["status"] == ("done" if then == "goes on" else "aborted")
        if then == "goes on":
            finish(tight, machine, top)
        else:
            check_chain(tight, machine, machine.disks[0].volumes)
        check_data(machine, 3)


# -- volumes on LUNs -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def block(
    workdir: Path,
    start_agent: Callable[..., AgentProcess],
    make_standin: Callable[..., StandInProcess],
    make_luns: Callable[..., list[str]],
) -> Iterator[VmLab]:
    """Logical volumes, by a stand-in for device-mapper."""
    luns = make_luns(2)
    # Where the manager's tests find them.
    (workdir / "luns").write_text(",".join(luns))
    standin = make_standin(sync=False)

    def agent(_name: str, **settings: Any) -> AgentProcess:
        more = {"lvm__devices": ",".join(luns), "sanlock__io_timeout": "1"}
        return start_agent("block", standin=standin, **more, **settings)

    places = [StorageServer(FCP, devices=(lun,)) for lun in luns]
    with vm_lab(workdir / "b", agent, lambda _: places.pop()) as one:
        yield one


def size_of(lab: VmLab, disk: VmDisk, volume: str) -> int:
    return int(lab.world.info(disk.image, volume)["truesize"])


@pytest.mark.parametrize("base", [RAW, COW])
def test_all_layers_on_luns(block: VmLab, base: int) -> None:
    with guest(block, tower(block, 4, base)) as machine:
        for top in (2, 1, 1):
            merge(block, machine, top)
            check_data(machine, 4)
        assert len(chain(machine)) == 1


@pytest.mark.parametrize("top", [INNER, ACTIVE])
def test_base_gets_the_room_that_it_needs(block: VmLab, top: int) -> None:
    """An inner volume not an extent more; the guest's own a chunk, as far as it can use it."""
    image, size, length = new_id(), 1024 * MIB, 200 * MIB
    disk = VmDisk(image, [])
    for number in range(3):
        initial = 400 * MIB if number == top else MIB
        more = {"volFormat": COW, "size": str(size), "initialSize": str(initial)}
        if number:
            more |= {"srcImgUUID": image, "srcVolUUID": disk.leaf, "sequence": number + 1}
        disk.volumes.append(block.world.create(image, **more))
        if number == top:
            write(block, disk, number, length)
    base = disk.volumes[top - 1]
    before = size_of(block, disk, base)
    assert before < length
    with guest(block, disk) as machine:
        merge(block, machine, top)
        extent, after = 128 * MIB, size_of(block, disk, base)
        assert after > length
        if top == INNER:
            assert after <= length + extent
        else:
            assert size <= after <= size + extent
        assert reads(machine, top + 1, BULK + length - PIECE)


def test_raw_base_on_luns_gets_the_size_of_top(block: VmLab) -> None:
    disk = tower(block, 1, RAW)
    disk.volumes.append(above(block, disk, 256 * MIB))
    with guest(block, disk) as machine:
        qemu_io(machine, f"write -P 9 {200 * MIB} {PIECE}")
        merge(block, machine, 1)
        assert block.world.info(disk.image, disk.leaf)["capacity"] == str(256 * MIB)
        assert reads(machine, 9, 200 * MIB)


@pytest.mark.parametrize(
    ("top", "step"),
    [(INNER, step) for step in ("extended", "started", "copied", "synchronised")]
    + [(ACTIVE, step) for step in ("extended", "marked", "pivoted")],
)
def test_agent_is_killed_on_luns(block: VmLab, top: int, step: str) -> None:
    with guest(block, tower(block, 3)) as machine:
        block.world.restart(f"vm.merge:{step}")
        job = new_id()
        begin(block, machine, top, job)
        block.agent.wait_dead()
        block.world.restart()
        assert outcome(block, job)["status"] == "done", outcome(block, job)
        finish(block, machine, top)
        check_data(machine, 3)


@pytest.fixture
def manager(
    block: VmLab,
    workdir: Path,
    start_agent: Callable[..., AgentProcess],
    make_standin: Callable[..., StandInProcess],
) -> Iterator[Client]:
    """Another host, which may become the pool's manager."""
    more = {"lvm__devices": (workdir / "luns").read_text(), "sanlock__io_timeout": "1"}
    agent = start_agent("manager", tls=False, standin=make_standin("manager", False), **more)
    client = Client.dev(str(agent.dir), timeout=PATIENCE)
    world = block.world
    client.call("StoragePool.connect", {
        "storagepoolID": world.pool, "hostID": 2, "scsiKey": world.pool, "masterSdUUID": world.main,
        "masterVersion": world.version, "domainDict": dict.fromkeys(world.attached, "active"),
    })  # fmt: skip

    def usable() -> bool:
        found = client.call("Host.getStats", {})["storageDomains"]
        return all(found.get(d, {}).get("acquired") for d in world.attached)

    block.wait(usable, "the manager to have its host id")
    yield client
    client.close()
    agent.stop()


def task(client: Client, verb: str, **params: Any) -> int:
    name = client.call(verb, params)
    while (found := client.call("Task.getStatus", {"taskID": name}))["taskState"] != "finished":
        time.sleep(0.05)
    client.call("Task.clear", {"taskID": name})
    return int(found["code"])


@pytest.mark.parametrize("top", [INNER, ACTIVE])
def test_manager_is_another_host(block: VmLab, manager: Client, top: int) -> None:
    """It keeps the domain's lock: it extends, and later puts right what this host could not."""
    world = block.world
    with guest(block, tower(block, 3)) as machine:
        disk = machine.disks[0]
        pool = {"storagepoolID": world.pool}
        started = {**pool, "prevID": -1, "prevLver": "-1", "enableScsiFencing": "false",
                   "maxHostID": 250, "domVersion": "5"}  # fmt: skip
        assert task(manager, "StoragePool.spmStart", **started) == 0
        try:
            job = ask(block, machine, top)
            assert outcome(block, job)["status"] == "done", outcome(block, job)
            assert jobs(block, machine) == {}
            gone = disk.volumes.pop(top)
            check_chain(block, machine, disk.volumes)
            ids = world.ids(disk.image, gone)
            ids["volumeList"] = [ids.pop("volumeID")]
            deleting = {**ids, "postZero": "false", "force": "false"}
            assert task(manager, "Image.deleteVolumes", **deleting) == 0
        finally:
            manager.call("StoragePool.spmStop", pool)
        check_chain(block, machine, disk.volumes)
        check_data(machine, 3)
    ids = world.ids(disk.image, disk.leaf)
    block.call("Image.teardown", **ids)
    world.check()


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
