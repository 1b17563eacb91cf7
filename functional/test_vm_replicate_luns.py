# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks of running VMs that move between files and volumes on LUNs (by a stand-in for
device-mapper), as engines migrate storage: with a guest at work, and on storage that fails."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.engine.host import FCP, StorageServer
from functional.processes import AgentProcess
from functional.replicate_lab import (
    NOT_YET,
    Pair,
    Place,
    check_on,
    finish,
    guest,
    is_ready,
    mirror,
    new_place,
    spec,
    start,
    twin,
)
from functional.standin.process import StandInProcess
from functional.vm_lab import MIB, Machine, VmLab, vm_lab
from functional.vm_work import Log, end, snapshot
from functional.world import COW, RAW, new_id
from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.rpc.client import Client, NoResponse, RemoteError

GIB = 1024 * MIB

# The laboratory's image, whose kernel the guests have, may have to be made first.
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def lab(
    workdir: Path,
    start_agent: Callable[..., AgentProcess],
    make_server: Callable[[str], StorageServer],
    make_standin: Callable[..., StandInProcess],
    make_luns: Callable[..., list[str]],
) -> Iterator[VmLab]:
    """The main domain is a directory, the second one on LUNs."""
    luns = make_luns(1)
    standin = make_standin(sync=False)

    def agent(_name: str, **settings: Any) -> AgentProcess:
        more = {"lvm__devices": ",".join(luns), "sanlock__io_timeout": "1"}
        return start_agent("block", standin=standin, **more, **settings)

    places = [StorageServer(FCP, devices=tuple(luns)), make_server("local")]
    with vm_lab(workdir / "b", agent, lambda _: places.pop()) as one:
        yield one


def standin_of(lab: VmLab) -> StandInProcess:
    assert lab.agent.standin is not None
    return lab.agent.standin


def active(lab: VmLab) -> set[str]:
    """Volumes on LUNs that are active on this host."""
    return {name for name in standin_of(lab).active(lab.world.second) if is_uuid(name)}


@pytest.fixture(autouse=True)
def nothing_left(lab: VmLab) -> Iterator[None]:
    before = active(lab)
    yield
    lab.world.settle()
    lab.wait(lambda: active(lab) == before, "what was active to be let go")


# -- as engines do it, with a guest at work --------------------------------------------------


def migrate(lab: VmLab, machine: Machine, moves: list[tuple[Place, Place]]) -> None:
    """Two disks at once; the layers below are copied by jobs meanwhile."""
    world = lab.world
    for here, there in moves:
        start(lab, machine, here, there, needExtend=False)
    for here, there in moves:
        ends = [world.div(place.image, place.volumes[0], place.domain) for place in (here, there)]
        assert world.job("SDM.copy_data", source=ends[0], destination=ends[1]) == ""
    for disk, (here, there) in zip(("vda", "vdb"), moves, strict=True):
        assert mirror(machine, disk) is not None
        finish(lab, machine, here, there)
        check_on(lab, machine, there, here, disk)
        where = {"storagepoolID": world.pool, "storagedomainID": here.domain}
        deleting = {**where, "imageID": here.image, "postZero": "false", "force": "false"}
        assert world.task("Image.delete", **deleting) == ""


def drop_snapshot(lab: VmLab, machine: Machine, place: Place) -> None:
    """The one that was made for the migration."""
    base, top = place.volumes
    job = new_id()
    lab.call("VM.merge", vmID=machine.id, drive=spec(lab, place), baseVolUUID=base, topVolUUID=top,
             jobUUID=job, bandwidth="0")  # fmt: skip
    assert end(lab, job)["status"] == "done"
    gone = lab.world.ids(place.image, place.volumes.pop(), place.domain)
    gone["volumeList"] = [gone.pop("volumeID")]
    assert lab.world.task("Image.deleteVolumes", **gone, postZero="false", force="false") == ""


def check_files(machine: Machine, lines: int) -> None:
    """Read from the disks anew: every line that was acknowledged, and what was there before."""
    run = machine.guest.run
    for disk in ("vda", "vdb"):
        run(f"umount /mnt/{disk} && mount -t ext4 /dev/{disk} /mnt/{disk}")
        run("sha256sum -c /run/precious")
        assert int(run(f"wc -l </mnt/{disk}/log")) >= lines
        run(f"seq 1 $(wc -l </mnt/{disk}/log) | cmp - /mnt/{disk}/log")


def test_guest_at_work_moves(lab: VmLab) -> None:
    """One disk to LUNs, another to files, and the first one back; nothing that the guest was told
    is on disk is lost."""
    world = lab.world
    machine = lab.machine("mover", disks=2, boots=True)
    guest_ = machine.guest
    guest_.wait_ready()
    for disk in ("vda", "vdb"):
        guest_.run(f"dd if=/dev/urandom of=/mnt/{disk}/precious bs=64k count=64 2>/dev/null")
    guest_.run("sync; sha256sum /mnt/vd?/precious >/run/precious")
    log = Log(machine)
    snapshot(lab, machine, frozen=True)
    here = [Place(world.main, disk.image, list(disk.volumes)) for disk in machine.disks]
    there = [twin(lab, here[0], world.second)]
    there.append(Place(world.main, new_id()))
    for number in range(2):
        more = {"volFormat": COW, "size": str(64 * MIB)}
        if number:
            more |= {"srcImgUUID": there[1].image, "srcVolUUID": there[1].leaf, "sequence": "2"}
        there[1].volumes.append(world.create(there[1].image, **more))
    log.wait(10)
    migrate(lab, machine, list(zip(here, there, strict=True)))
    log.wait(10)
    for place in there:
        drop_snapshot(lab, machine, place)
    back = new_place(lab, world.main, (COW,), 64 * MIB)
    start(lab, machine, there[0], back)
    log.wait(10)
    finish(lab, machine, there[0], back)
    check_on(lab, machine, back, there[0])
    lines = log.wait(10)
    log.stop()
    check_files(machine, lines)
    path = f"{world.places[world.main].spec}/{world.main}/images/{back.image}/{back.leaf}"
    guest_.run("umount /mnt/vda")
    guest_.destroy()
    subprocess.run(["qemu-img", "check", "-q", path], check=True, timeout=60)
    world.settle()


@pytest.mark.parametrize(
    ("here", "there"), [(RAW, RAW), (RAW, COW), (COW, RAW)], ids=["raw", "to cow", "to raw"]
)
def test_formats(lab: VmLab, here: int, there: int) -> None:
    """To LUNs and back."""
    files = new_place(lab, lab.world.main, (here,))
    luns = new_place(lab, lab.world.second, (there,))
    with guest(lab, files) as machine:
        pair = Pair(lab, machine, files, luns)
        pair.move()
        assert active(lab) == set(luns.volumes)
        pair.move()
        assert mirror(machine) is None
        lab.wait(lambda: not active(lab), "the LUN's volume to be let go")


# -- storage that is full, fails or hangs ----------------------------------------------------


def full_pair(lab: VmLab) -> tuple[Place, Place]:
    """A disk that will have more than its copy has room for."""
    here = new_place(lab, lab.world.main, (COW,), GIB)
    return here, new_place(lab, lab.world.second, (COW,), GIB, initialSize=str(MIB))


def test_thin_copy_gets_room(lab: VmLab) -> None:
    here, there = full_pair(lab)
    before = int(lab.world.info(there.image, there.leaf, there.domain)["truesize"])
    with guest(lab, here) as machine:
        pair = Pair(lab, machine, here, there)
        pair.write(1, 200)
        pair.start(needExtend=True)
        pair.pivot()
        after = int(lab.world.info(there.image, there.leaf, there.domain)["truesize"])
        assert before < 200 * MIB < after


@pytest.mark.parametrize("how", ["full", "fails"])
def test_copy_fails(lab: VmLab, how: str) -> None:
    """The guest does not notice; the copy is let go at once, and whoever ends it is told."""
    here, there = full_pair(lab)
    standin, target = standin_of(lab), f"{there.domain}/{there.leaf}"
    with guest(lab, here) as machine:
        pair = Pair(lab, machine, here, there)
        pair.write(1, 200)
        start(lab, machine, here, there, needExtend=how == "fails")
        if how == "fails":
            standin.fail(target, "write")
            pair.write(400, 8)
        lab.wait(lambda: mirror(machine) is None, "the copy to fail")
        standin.resume(target)
        better = Pair(lab, machine, here, new_place(lab, lab.world.second, (COW,), GIB))
        if how == "full":
            lab.wait(lambda: there.leaf not in active(lab), "the copy to be let go")
            ends = {"srcDisk": spec(lab, here), "dstDisk": spec(lab, there)}
            message = lab.fails(55, "VM.diskReplicateFinish", vmID=machine.id, **ends)
            assert "space" in message
            pair.check_one()
            ends["dstDisk"] = ends["srcDisk"]
            lab.fails(88, "VM.diskReplicateFinish", vmID=machine.id, **ends)
        better.move()  # also when nobody ended the first one
        assert there.leaf not in active(lab)


@pytest.mark.parametrize("then", ["given up", "goes on", "agent dies"])
def test_copy_hangs(lab: VmLab, then: str) -> None:
    """It ends when its storage lets it go; everything else goes on meanwhile."""
    here, there = new_place(lab, lab.world.main), new_place(lab, lab.world.second)
    standin, target = standin_of(lab), f"{there.domain}/{there.leaf}"
    with guest(lab, here) as machine:
        pair = Pair(lab, machine, here, there)
        pair.start()
        lab.wait(lambda: is_ready(machine), "the copy")
        standin.hang(target, "write")
        try:
            pair.write(1)
            lab.wait(lambda: standin.held() > 0, "the copy to hang")
            end_ = Ending(lab, machine, here, there if then == "goes on" else here)
            time.sleep(2)
            started = time.monotonic()
            with Client.dev(str(lab.agent.dir)) as other:
                assert other.call("VM.getStats", {"vmID": machine.id})
            assert time.monotonic() - started < 15
            assert end_.is_alive()
            if then == "agent dies":
                lab.agent.kill()
                end_.join(60)
                lab.agent.start()
                lab.world.client.close()
                lab.world.client = Client.dev(str(lab.agent.dir))
                time.sleep(3)  # and looks at it
                assert mirror(machine) is not None
        finally:
            standin.resume(target)
        end_.join(60)
        assert not end_.is_alive()
        lab.world.settle()
        if then == "goes on":
            pair.here, pair.there = there, here
        pair.check_one()


class Ending(threading.Thread):
    """Somebody who ends a replication, and asks again."""

    def __init__(self, lab: VmLab, machine: Machine, here: Place, there: Place) -> None:
        super().__init__()
        self._lab = lab
        self._ends = {"srcDisk": spec(lab, here), "dstDisk": spec(lab, there)}
        self._vm = machine.id
        self.start()

    def run(self) -> None:
        with Client.dev(str(self._lab.agent.dir), timeout=120.0) as client:
            while True:
                try:
                    client.call("VM.diskReplicateFinish", {"vmID": self._vm, **self._ends})
                except NoResponse:
                    return
                except RemoteError as error:
                    if error.code != NOT_YET:
                        raise
                    time.sleep(0.2)
                else:
                    return


@pytest.mark.parametrize("step", ["prepared", "started"])
def test_agent_is_killed_while_it_starts(lab: VmLab, step: str) -> None:
    here, there = new_place(lab, lab.world.main), new_place(lab, lab.world.second)
    with guest(lab, here) as machine:
        pair = Pair(lab, machine, here, there)
        lab.world.restart(f"vm.replicate:{step}")
        with pytest.raises((NoResponse, OSError)):
            pair.start()
        lab.agent.wait_dead()
        lab.world.restart()
        if step == "started":
            pair.check_both()
            pair.cancel()
        else:
            lab.wait(lambda: there.leaf not in active(lab), "it to be let go")
        pair.check_one()
