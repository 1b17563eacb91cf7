# SPDX-License-Identifier: GPL-2.0-or-later
"""The chapter of make demo on running VMs: a guest writes all the time, and loses nothing.

A libvirtd in name spaces of its own, a tiny guest that boots under emulation, with a guest agent
and two disks on a local domain.  Run by demo.py.  Exit 0 only if every check holds.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from functional import demo_guests, merge_lab
from functional.demo import check, say, title
from functional.engine.host import LOCALFS, StorageServer
from functional.guests.libvirtd import Libvirtd
from functional.processes import AgentProcess
from functional.vm_lab import Machine, VmLab
from functional.vm_work import Log, ask, end, follow, path_of, read_log
from functional.world import World

STILL = 1.0  # seconds in which a frozen guest writes nothing


def storage(directory: Path, agent: AgentProcess) -> World:
    servers = []
    for name in ("disks", "more-disks"):
        (directory / name).mkdir()
        servers.append(StorageServer(LOCALFS, str(directory / name)))
    world = World(agent, servers, attach=False)
    check(f"a local domain in {servers[0].spec} serves disks", world.exists(world.main))
    return world


def boot(lab: VmLab) -> Machine:
    title("A guest with two disks and a guest agent boots (some seconds, emulated)")
    began = time.monotonic()
    machine = lab.machine("demo", disks=2, boots=True)
    machine.guest.wait_ready()
    say(f"   up and answering after {time.monotonic() - began:.1f} s")
    stats = lab.stats(machine.id)
    images = {disk["imageID"] for disk in stats["disks"].values()}
    check("the agent knows its disks by their images", images == {d.image for d in machine.disks})
    machine.guest.run("dd if=/dev/urandom of=/mnt/vda/precious bs=64k count=64 2>/dev/null; sync")
    machine.guest.run("sha256sum /mnt/vda/precious >/run/precious")
    return machine


def frozen_snapshot(lab: VmLab, machine: Machine, log: Log) -> tuple[int, list[str]]:
    """Returns how many lines were on disk when the guest froze, and the volumes of that moment."""
    title("VM.freeze: the guest's file systems are quiet")
    volumes = [disk.leaf for disk in machine.disks]
    log.wait(5)
    lab.call("VM.freeze", vmID=machine.id)
    time.sleep(0.2)  # for what was acknowledged before, and is on its way here
    lines = log.acked
    time.sleep(STILL)
    check(f"it acknowledged {lines} lines before, and none for {STILL:g} s", log.acked == lines)
    age = float(lab.stats(machine.id)["freezeAge"])
    check(f"VM.getStats says that it has been frozen for {age} s", age >= STILL)
    say("   now an engine makes snapshots of the disks that are on storage of another kind")

    title("VM.snapshot with frozen=true: both disks go on in new volumes")
    found = end(lab, ask(lab, machine, frozen=True))
    check(f"the job is {found['status']}: {found['description']}", found["status"] == "done")
    for disk in machine.disks:
        follow(lab, machine, disk)
        say(f"   {disk.image}: {' <- '.join(volume[:8] for volume in disk.volumes)}")
    check("both have a new leaf", all(len(disk.volumes) == 2 for disk in machine.disks))
    check("the guest is still frozen", "freezeAge" in lab.stats(machine.id))

    title("VM.thaw: it goes on")
    lab.call("VM.thaw", vmID=machine.id)
    log.wait(5)
    check("it writes again, and is not frozen", "freezeAge" not in lab.stats(machine.id))
    return lines, volumes


def look_into(lab: VmLab, machine: Machine, lines: int, volumes: list[str]) -> None:
    title("What the snapshot holds")
    for disk, volume in zip(machine.disks, volumes, strict=True):
        held = read_log(lab.agent.dir, path_of(lab, disk, volume))
        check(
            f"{volume[:8]} mounts clean, without a journal replay, and has {held} lines",
            held >= lines,
        )


def merge(lab: VmLab, machine: Machine, log: Log) -> None:
    title("VM.merge: the snapshots go, while the guest writes")
    for number, disk in enumerate(machine.disks):
        top = disk.leaf
        job = merge_lab.ask(lab, machine, 1, number)
        found = merge_lab.outcome(lab, job)
        check(f"the merge of {top[:8]} is {found['status']}", found["status"] == "done")
        check("no job is left in its statistics", job not in lab.stats(machine.id)["vmJobs"])
        merge_lab.finish(lab, machine, 1, number)
        check(f"{top[:8]} is deleted, the chain is one volume", len(disk.volumes) == 1)
    log.wait(5)


def after_all(lab: VmLab, machine: Machine, log: Log) -> None:
    title("What the guest has")
    log.stop()
    lines = log.acked
    machine.guest.run("sync; echo 3 >/proc/sys/vm/drop_caches")
    check("its file of random bytes is as it was",
          "OK" in machine.guest.run("sha256sum -c /run/precious"))  # fmt: skip
    written = int(machine.guest.run("wc -l </mnt/vda/log"))
    check(f"all {lines} acknowledged lines are there", written >= lines)
    machine.guest.run("umount /mnt/vda /mnt/vdb")
    machine.guest.destroy()
    for disk in machine.disks:
        path = path_of(lab, disk, disk.leaf)
        done = subprocess.run(["qemu-img", "check", "-q", path], timeout=60, check=False)
        check(f"{disk.leaf[:8]} is sound for qemu-img", done.returncode == 0)
        held = read_log(lab.agent.dir, path)
        check(f"and mounts clean, with {held} lines, none missing", held >= lines)


def chapter(directory: Path) -> None:
    title("A libvirtd of its own, in name spaces of its own")
    libvirtd = Libvirtd(directory / "v")
    agent = AgentProcess(directory / "agent", True, {"libvirt__uri": libvirtd.uri})
    with demo_guests.lab(agent, libvirtd, lambda: storage(directory, agent)) as lab:
        check("an agent serves, connected to it", agent.alive())
        machine = boot(lab)
        log = Log(machine)
        try:
            lines, volumes = frozen_snapshot(lab, machine, log)
            look_into(lab, machine, lines, volumes)
            merge(lab, machine, log)
        except BaseException:
            log.stop()
            raise
        after_all(lab, machine, log)


if __name__ == "__main__":
    sys.exit(demo_guests.run_chapter("VMs", chapter))
