# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of snapshots check on every sort of storage."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

from functional.vm_lab import Machine, VmDisk, VmLab
from functional.vm_work import (
    Log,
    check_chain,
    follow,
    memory_volumes,
    path_of,
    read_log,
    snapshot,
)


def boot_with_data(lab: VmLab) -> Machine:
    machine = lab.machine("tiny", disks=2, boots=True)
    machine.guest.wait_ready()
    machine.guest.run("dd if=/dev/urandom of=/mnt/vda/precious bs=64k count=16 2>/dev/null; sync")
    machine.guest.run("sha256sum /mnt/vda/precious >/run/precious")
    return machine


def check_sound(lab: VmLab, machine: Machine) -> None:
    """The guest is not frozen, its data is right, its chains are valid."""
    lab.wait(lambda: "freezeAge" not in lab.stats(machine.id), "the guest to be thawed")
    machine.guest.run("sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum -c /run/precious")
    for disk in machine.disks:
        follow(lab, machine, disk)
        check_chain(lab, disk)


@contextlib.contextmanager
def consistent(lab: VmLab, machine: Machine, rounds: int) -> Iterator[None]:
    """Snapshots of two disks while the guest writes to both; the caller looks around, then they are
    checked: what was acknowledged before is there, on a file system that needs no repair, and both
    disks are of one moment."""
    log = Log(machine)
    known = []
    try:
        for _ in range(rounds):
            before = log.wait(2)
            volumes = [disk.leaf for disk in machine.disks]
            found = snapshot(lab, machine)
            assert found["description"] == f"Snapshot of VM {machine.id}"
            assert (found["job_type"], found["progress"]) == ("virt", 100.0)
            known.append((before, volumes))
            log.wait(2)  # the guest goes on
    finally:
        log.stop()
    yield
    for before, volumes in known:
        first, second = (
            read_log(lab.agent.dir, path_of(lab, disk, volume))
            for disk, volume in zip(machine.disks, volumes, strict=True)
        )
        assert first >= before
        assert first - second in (0, 1)  # the second is written after the first
        assert second >= before


def restored_from_memory(
    lab: VmLab, machine: Machine, path: Callable[[VmDisk], str]
) -> tuple[VmDisk, VmDisk]:
    """A snapshot with memory, then the guest is restored from it: in its own RAM, with its disks as
    they were then.  What was written since is lost, and the guest is gone in the end.

    `path` tells where a volume can be read.  Returns the two of the snapshot.
    """
    where, memory, conf = memory_volumes(lab)
    machine.guest.run("echo then >/run/mark; echo then >/mnt/vda/mark; sync")
    found = snapshot(lab, machine, snapMemory=where, timeout=5)
    assert found["description"] == f"Snapshot of VM {machine.id}"
    machine.guest.run("echo later >/run/mark; echo later >/mnt/vda/mark; sync")
    configuration = pickle.loads(Path(path(conf)).read_bytes())
    assert f"<uuid>{machine.id}</uuid>" in configuration["_srcDomXML"]
    saved = path(memory)
    machine.guest.destroy()
    try:
        lab.guests.connection.restoreFlags(saved, configuration["_srcDomXML"], 0)
        lab.guests.reconnect()
        lab.wait(lambda: lab.stats(machine.id)["status"] == "Up", "the guest to go on")
        assert machine.guest.run("cat /run/mark") == "then"
        machine.guest.run("echo 3 >/proc/sys/vm/drop_caches")
        assert machine.guest.run("cat /mnt/vda/mark") == "then"
    finally:
        machine.guest.destroy()
        lab.guests.reconnect()
    return memory, conf
