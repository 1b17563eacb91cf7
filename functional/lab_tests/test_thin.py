# SPDX-License-Identifier: GPL-2.0-or-later
"""A thin volume of a running VM grows on real device-mapper: its guest writes ever onward while the
storage is slow, is full, and the agent dies.  The tests go on from each other.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from functional.engine.host import FCP, StorageServer
from functional.guests.libvirtd import Libvirtd
from functional.guests.spread import STRIDE
from functional.lab.inner.dm import Layer, Loops
from functional.onward import EXTENT, Onward
from functional.processes import AgentProcess
from functional.vm_lab import VmLab
from functional.world import RAW, World, new_id
from vdsm_storage.rpc.client import Client

pytestmark = [pytest.mark.dm, pytest.mark.vms, pytest.mark.timeout(900)]

PACE = 12  # numbers a second
HEADROOM = 2 * EXTENT  # more than that pace writes in ten seconds
MOST = 4 * EXTENT
LEFT = 3  # extents, when the group is nearly full
WARN = 60  # seconds
POLICY = {
    "headroom_min": HEADROOM, "headroom_max": MOST, "chunk_min": EXTENT, "chunk_max": EXTENT,
    "chunk_seconds": 1, "first_latency": 2, "half_life": 600, "throttle_floor": 4 * STRIDE,
    "warn_seconds": WARN,
}  # fmt: skip
SLOW = 4000  # ms of each request


@contextlib.contextmanager
def thin_lab(loops: Loops, directory: Any) -> Iterator[tuple[VmLab, Layer]]:
    stopped: list[str] = []
    with contextlib.ExitStack() as stack:
        layer = stack.enter_context(Layer(loops.make(12 * 1024**3), "lun-0"))
        libvirtd = Libvirtd(directory)
        stack.callback(libvirtd.stop)
        libvirtd.start()
        settings = {
            "lvm__devices": "/dev/mapper/lun-*", "storage__lock_timeout": "20",
            "storage__monitor_interval": "2",
            "libvirt__uri": libvirtd.uri, "libvirt__timeout": "60",
            **{f"thin__{name}": str(value) for name, value in POLICY.items()},
        }  # fmt: skip
        agent = AgentProcess(directory / "agent", False, settings)
        stack.callback(lambda: stopped.append(agent.stop()))
        agent.start()
        places = [StorageServer(FCP, devices=(path,)) for path in (layer.path, "/dev/mapper/none")]
        made = VmLab(libvirtd, World(agent, places, attach=False))
        stack.callback(made.close)
        yield made, layer
    assert stopped == [""]


@pytest.fixture(scope="module")
def storage(
    loops: Loops, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VmLab, Layer]]:
    with thin_lab(loops, tmp_path_factory.mktemp("v")) as made:
        yield made


@pytest.fixture(scope="module")
def layer(storage: tuple[VmLab, Layer]) -> Layer:
    return storage[1]


@pytest.fixture(scope="module")
def vm(storage: tuple[VmLab, Layer]) -> Iterator[Onward]:
    lab, layer = storage
    running = Onward(lab, "onward", layer.path, 2 * EXTENT, PACE)
    yield running
    running.close()


def whats(vm: Onward) -> list[str]:
    """What the history of its disk tells."""
    found = vm.lab.call("VM.getThinHistory", vmID=vm.id)["vda"]
    return [point["what"] for point in found]


def test_a_guest_writes_ever_onward(vm: Onward) -> None:
    """Its volume grows again and again, and it never waits."""
    first = vm.size()
    vm.wait_state("armed")
    vm.wait_extends(3)
    vm.check()
    found = vm.thin()
    assert vm.size() >= first + 3 * EXTENT
    assert int(found["events"]) >= 2  # each of them told by libvirt; the first may be seen before
    assert (found["pauses"], vm.limits()) == ("0", {"write_iops_sec": PACE})
    assert "paused" not in whats(vm)


def test_volume_group_is_full_and_has_space_again(vm: Onward) -> None:
    """That is told before the guest waits, and it goes on when a volume is deleted."""
    lab = vm.lab
    image, group = new_id(), vm.group()
    used = sum(lv.extents for lv in group.lvs.values())
    free = sum(pv.pe_count for pv in group.pvs.values()) - used
    events = Client.dev(str(lab.agent.dir))
    events.subscribe()
    other = lab.world.create(image, volFormat=RAW, size=str((free - LEFT) * EXTENT))
    method = f"|storage|space_low|{lab.world.main}"
    facts = next(params for name, params in events.events(120) if name == method)[lab.world.main]
    events.close()
    assert not vm.waits_for_space()
    assert (facts["waiting"], int(facts["timeToFull"]) < WARN) == (0, True)
    vm.wait_state("full")
    lab.wait(vm.waits_for_space, "the guest to wait", 120)
    known, slowest = vm.told(), vm.number("maxLatency")
    assert vm.written() >= vm.size() - STRIDE
    where = {"storagepoolID": lab.world.pool, "storagedomainID": lab.world.main}
    task = lab.call("Image.delete", **where, imageID=image, postZero="false", force="false")
    lab.wait(lambda: other not in vm.group().lvs, "the volume to be deleted")
    began = time.monotonic()
    lab.wait(lambda: vm.told() > known, "the guest to write")
    took = time.monotonic() - began
    assert took < 1 + 4 * slowest, (took, slowest)
    lab.wait(lambda: lab.call("Task.getStatus", taskID=task)["taskState"] == "finished", "the task")
    lab.call("Task.clear", taskID=task)
    vm.check()
    assert vm.thin()["pauses"] == "1"
    assert {"full", "paused", "resumed"} <= set(whats(vm))


def test_storage_becomes_slow(vm: Onward, layer: Layer) -> None:
    """Where lvm keeps its metadata, so that the guest is as fast as before.  It is slowed when it
    would come to the volume's end, and has its user's limits again when that has moved.  What is
    free when it is extended follows the time that extending took."""
    before = vm.thin()
    layer.slow(SLOW, length=next(iter(vm.group().pvs.values())).pe_start)
    try:
        vm.lab.wait(lambda: vm.number("throttle") > 0, "the guest to be slowed", 120)
        slowed = vm.thin()
        assert slowed["state"] == "throttled"
        assert 0 < vm.limits()["write_bytes_sec"] <= int(slowed["throttle"])  # ever slower
        assert vm.limits()["write_iops_sec"] == PACE
        vm.writes()
    finally:
        layer.heal()
    vm.lab.wait(lambda: vm.number("extends") > int(before["extends"]), "the volume to grow", 120)
    vm.check()
    found = vm.thin()
    assert (found["pauses"], int(found["pausesAvoided"]) > 0) == (before["pauses"], True)
    assert vm.limits() == {"write_iops_sec": PACE}
    assert float(found["maxLatency"]) > SLOW / 1000
    follows = float(found["writeRate"]) * float(found["maxLatency"]) * 2
    assert int(found["headroom"]) >= min(MOST, int(follows)) > HEADROOM
    assert {"throttled", "released"} <= set(whats(vm))


def test_the_agent_dies_again_and_again(vm: Onward) -> None:
    """At every step from the event to the armed threshold.  The guest comes to the volume's end
    meanwhile, and waits; it gets what it needs once, and goes on."""
    agent = vm.lab.agent
    agent.kill()
    agent.settings["thin__headroom_max"] = str(HEADROOM)  # so that it is known what is needed
    before = vm.size()

    dies(vm, "thin:planned")
    assert vm.size() == before
    vm.lab.wait(vm.waits_for_space, "the guest to wait", 120)
    wanted = needed(before, vm.written())
    assert wanted > before

    dies(vm, "thin:extended")
    assert vm.size() == wanted
    assert vm.waits_for_space()

    dies(vm, "thin:resumed")
    vm.writes()
    vm.stops()
    assert vm.size() == wanted
    wanted = needed(wanted, vm.written())

    dies(vm, "thin:armed")
    assert vm.size() == wanted
    vm.lab.world.restart()
    armed = vm.wait_state("armed")
    assert (vm.size(), int(armed["size"])) == (wanted, wanted)
    vm.goes_on()
    vm.wait_extends(1)
    vm.check()
    vm.lab.wait(lambda: vm.limits() == {"write_iops_sec": PACE}, "the user's limits")


def dies(vm: Onward, step: str) -> None:
    vm.lab.agent.start(step)
    vm.lab.agent.wait_dead()


def needed(size: int, written: int) -> int:
    """Bytes that a volume is to have, by a policy whose headroom and chunk are fixed."""
    if written < size - HEADROOM:
        return size
    return (written + HEADROOM + EXTENT) // EXTENT * EXTENT
