# SPDX-License-Identifier: GPL-2.0-or-later
"""Live merges with bitmaps, and on storage that is full or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.merge_lab import (
    ACTIVE,
    BULK,
    INNER,
    above,
    ask,
    check_chain,
    check_data,
    finish,
    guest,
    jobs,
    merge,
    outcome,
    path_of,
    qemu_io,
    tower,
    write,
)
from functional.processes import AgentProcess
from functional.vm_lab import MIB, VmDisk, VmLab, vm_lab

# -- bitmaps ---------------------------------------------------------------------------------


def bitmaps(lab: VmLab, disk: VmDisk, volume: str) -> dict[str, set[str]]:
    """Their flags by name, as the file has them; QEMU writes them when it closes it."""
    path = path_of(lab, disk, volume)
    text = subprocess.check_output(
        ["qemu-img", "info", "-U", "--output=json", path], timeout=60, text=True
    )
    data = json.loads(text)["format-specific"]["data"]
    return {each["name"]: set(each["flags"]) for each in data.get("bitmaps", [])}


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
