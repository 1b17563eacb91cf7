# SPDX-License-Identifier: GPL-2.0-or-later
"""Live merges of volumes on LUNs, by a stand-in for device-mapper."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from functional.merge_lab import (
    ACTIVE,
    BULK,
    INNER,
    PIECE,
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
    qemu_io,
    reads,
    tower,
    write,
)
from functional.vm_lab import MIB, VmDisk, VmLab
from functional.vm_luns import (
    MakeStandIn,
    StartAgent,
    luns_lab,
    managing,
    other_host,
    standin_of,
    task,
)
from functional.world import COW, RAW, new_id
from vdsm_storage.rpc.client import Client

# -- volumes on LUNs -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def block(
    workdir: Path, start_agent: StartAgent, make_standin: MakeStandIn,
    make_luns: Callable[..., list[str]],
) -> Iterator[VmLab]:  # fmt: skip
    with luns_lab(workdir, start_agent, make_standin, make_luns(2)) as one:
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


@pytest.mark.parametrize("top", [INNER, ACTIVE])
def test_base_fails(block: VmLab, top: int) -> None:
    """As it was, and the guest noticed nothing; a leaf that is written to goes on."""
    standin = standin_of(block)
    with guest(block, tower(block, 3)) as machine:
        disk = machine.disks[0]
        target = f"{block.world.main}/{disk.volumes[top - 1]}"
        standin.fail(target, "write")
        try:
            found = outcome(block, ask(block, machine, top))
        finally:
            standin.resume(target)
        assert (found["status"], found["error"]["code"]) == ("failed", 52)
        check_chain(block, machine, disk.volumes)
        check_data(machine, 3)
        merge(block, machine, top)
        check_data(machine, 3)


@pytest.mark.parametrize("top", [INNER, ACTIVE])
def test_base_hangs(block: VmLab, top: int) -> None:
    standin = standin_of(block)
    with guest(block, tower(block, 3)) as machine:
        target = f"{block.world.main}/{machine.disks[0].volumes[top - 1]}"
        standin.hang(target, "write")
        try:
            job = ask(block, machine, top)
            time.sleep(4)
            assert job in jobs(block, machine)
            assert standin.held() > 0
        finally:
            standin.resume(target)
        assert outcome(block, job)["status"] == "done", outcome(block, job)
        finish(block, machine, top)
        check_data(machine, 3)


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
    block: VmLab, start_agent: StartAgent, make_standin: MakeStandIn
) -> Iterator[Client]:
    """Another host, which may become the pool's manager."""
    with other_host(block, start_agent, make_standin) as client:
        yield client


@pytest.mark.parametrize("top", [INNER, ACTIVE])
def test_manager_is_another_host(block: VmLab, manager: Client, top: int) -> None:
    """It keeps the domain's lock: it extends, and later puts right what this host could not."""
    world = block.world
    with guest(block, tower(block, 3)) as machine:
        disk = machine.disks[0]
        with managing(block, manager):
            job = ask(block, machine, top)
            assert outcome(block, job)["status"] == "done", outcome(block, job)
            assert jobs(block, machine) == {}
            gone = disk.volumes.pop(top)
            check_chain(block, machine, disk.volumes)
            ids = world.ids(disk.image, gone)
            ids["volumeList"] = [ids.pop("volumeID")]
            deleting = {**ids, "postZero": "false", "force": "false"}
            assert task(manager, "Image.deleteVolumes", **deleting) == 0
        check_chain(block, machine, disk.volumes)
        check_data(machine, 3)
    world.check()
