# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM on LUNs moves to another host: volumes are active where it runs, leases are where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from functional.engine.host import FCP, StorageServer
from functional.migrate_lab import Two, listed, shared, two_hosts
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess
from functional.thin_lab import (
    PIECE,
    begin,
    broken_lvm,
    check,
    check_written,
    device_size,
    limits,
    lv_size,
    thin,
    thin_disk,
    wait_armed,
    wait_thin,
    writing,
)
from functional.vm_create import held, nothing_stays, plan, record, start, xml
from functional.vm_disks import pdiv, root, source
from functional.vm_lab import MIB, Machine, VmDisk, VmLab
from functional.world import COW, PREALLOCATED, RAW, SPARSE, new_id

CHUNK = 128 * MIB  # an extent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdir(workdir: Path) -> Iterator[Path]:
    with shared(workdir) as path:
        yield path


@pytest.fixture(scope="module")
def two(
    workdir: Path,
    start_agent: Callable[..., AgentProcess],
    make_standin: Callable[..., StandInProcess],
    make_luns: Callable[..., list[str]],
) -> Iterator[Two]:
    luns = make_luns(2)
    servers = iter([StorageServer(FCP, devices=(lun,)) for lun in luns])
    standins = [make_standin(f"s{number}", sync=False) for number in (1, 2)]
    settings = {
        "lvm__devices": ",".join(luns), "sanlock__io_timeout": "1", "vms__arrival_timeout": "20"
    }  # fmt: skip
    with two_hosts(
        workdir, start_agent, lambda _kind: next(servers), standins, **settings
    ) as made:
        yield made


def active(lab: VmLab) -> set[str]:
    """Volumes that are active on a host."""
    assert lab.agent.standin is not None
    links = lab.agent.standin.dir.glob(f"dev/{lab.world.main}/*")
    return {link.name for link in links}


def test_it_moves_with_its_leases(two: Two) -> None:
    here, there = two.both
    world = here.world
    lease = {"sd_id": world.main, "lease_id": new_id()}
    assert world.task("Lease.create", lease=lease, metadata=None) == ""
    places = {lab: lab.call("Lease.info", lease=lease)["path"] for lab in two.both}
    with nothing_stays(here), nothing_stays(there):
        disk = VmDisk(new_id(), [])
        for _ in range(2):
            below = {"srcImgUUID": disk.image, "srcVolUUID": disk.leaf} if disk.volumes else {}
            disk.volumes.append(
                world.create(
                    disk.image, volFormat=COW, preallocate=SPARSE, size=str(CHUNK), **below,
                    sequence=len(disk.volumes) + 1,
                )
            )  # fmt: skip
        wanted = plan(
            here, "leases", [disk],
            devices=f"<lease><lockspace>{world.main}</lockspace><key>{lease['lease_id']}</key>"
            "<target path='LEASE-PATH' offset='0'/></lease>",
        )  # fmt: skip
        plain = record(here, disk, "vda")
        text = xml(here, wanted).replace(plain, record(here, disk, "vda", "exclusive"))
        machine = start(here, wanted, [disk], text=text)
        assert set(disk.volumes) <= active(here)
        two.ask(machine)
        two.has_moved(machine)
        assert set(disk.volumes) <= active(there)
        here.wait(lambda: not set(disk.volumes) & active(here), "them to be inactive here")
        assert source(machine, "vda").endswith(f"/{disk.image}/{disk.leaf}")
        assert str(there.agent.dir) in source(machine, "vda")
        found = {
            each.findtext("key", ""): target.get("path", "")
            for each in root(machine).iterfind("./devices/lease")
            if (target := each.find("target")) is not None
        }
        own = there.world.info(disk.image, disk.leaf)["lease"]["path"]
        assert found == {lease["lease_id"]: places[there], disk.leaf: own}
        assert held(there) == {machine.id: [disk.image]}
        there.call("VM.destroy", vmID=machine.id)
        assert not set(disk.volumes) & active(there)


def test_guest_that_writes(two: Two) -> None:
    """Each host has the volume active in its turn; no number is lost."""
    here, there = two.both
    with nothing_stays(here), nothing_stays(there):
        machine = two.writer("counts")
        two.ask(machine)
        two.has_moved(machine)
        two.writes(machine)
        assert set(machine.disks[0].volumes) <= active(there)
        here.wait(lambda: not set(machine.disks[0].volumes) & active(here), "it to be inactive")
        two.ask(machine, there)
        two.has_moved(machine, there)
        two.writes(machine)
        two.end(machine, here)


def test_volume_that_grows_meanwhile(two: Two) -> None:
    """The other host sees its new size when it is told."""
    here, there = two.both
    with nothing_stays(here), nothing_stays(there):
        image = new_id()
        volume = here.world.create(image, volFormat=RAW, preallocate=PREALLOCATED, size=str(CHUNK))
        disk = VmDisk(image, [volume])
        wanted = plan(there, "grows", [disk])
        params = {"vmId": wanted.id, "status": "Up", "xml": xml(there, wanted)}
        there.call("VM.migrationCreate", vmID=wanted.id, params=params, incomingLimit=0)
        assert there.agent.standin is not None
        device = there.agent.standin.dir / "dev" / there.world.main / volume

        def size() -> int:
            with device.open("rb") as file:
                return file.seek(0, 2)

        assert size() == CHUNK
        ids = here.world.ids(image, volume)
        assert here.world.task("Volume.extendSize", **ids, newSize=str(2 * CHUNK)) == ""
        assert size() == CHUNK  # this host was not asked
        found = there.call("VM.refresh_disk", vmID=wanted.id, drive=pdiv(there, disk))
        assert int(found["apparentsize"]) == size() == 2 * CHUNK
        there.call("VM.migrateCancel", vmID=wanted.id)
        assert volume not in active(there)


def thin_guest(lab: VmLab, name: str) -> Machine:
    """It has something to write, and its disk is watched."""
    disk = thin_disk(lab)
    machine = start(lab, plan(lab, f"{name}-{disk.image[:8]}", [disk], boots=True), [disk])
    begin(machine)
    wait_armed(lab, machine)
    return machine


def test_guest_that_needs_more_meanwhile(two: Two) -> None:
    """Its volume grows here as often as it must, though libvirt lets nobody arm it; the other host
    has the new size at once."""
    here, there = two.both
    pieces = 24
    with nothing_stays(here), nothing_stays(there):
        machine = thin_guest(here, "onward")
        leaf = machine.disks[0].leaf
        before = lv_size(here, leaf)
        # What an idle disk has lasts for some looks at it, on a busy machine too.
        user = {"write_bytes_sec": 96 * MIB}
        here.call("VM.setIoTune", vmID=machine.id, tunables=[{"name": "vda", "ioTune": user}])
        two.ask(machine, maxBandwidth=3)
        here.wait(lambda: here.stats(machine.id).get("migrationProgress", 0) > 2, "progress")
        machine.guest.send(writing(0, pieces))
        here.wait(lambda: int(thin(here, machine).get("extends", 0)) > 0, "the volume to grow")
        wait_thin(here, machine, lambda one: one["state"] == "polled", "it to be looked at")
        there.wait(lambda: device_size(there, leaf) > before, "it to have grown there", 5)
        assert listed(here, machine.id) == "Migration Source"
        assert machine.guest.line(300) == "=0"
        two.has_moved(machine)
        found = check(there, machine)
        assert int(found["size"]) > before
        check_written(there, machine, 0, pieces)
        assert found["pauses"] == "0"
        there.call("VM.destroy", vmID=machine.id)


def test_guest_that_is_slowed(two: Two) -> None:
    """For want of space, which the other host has: it has its user's limits there."""
    here, there = two.both
    pieces = 24
    with nothing_stays(here), nothing_stays(there):
        machine = thin_guest(here, "slowed")
        user = {"write_iops_sec": 5000, "read_bytes_sec": 512 * MIB}
        here.call("VM.setIoTune", vmID=machine.id, tunables=[{"name": "vda", "ioTune": user}])
        with broken_lvm(here):
            machine.guest.send(writing(0, pieces))
            # So slow that what is free lasts until it is there: nobody can slow it on its way.
            wait_thin(
                here, machine, lambda one: 0 < int(one["throttle"]) < 16 * MIB, "it to be slowed"
            )
            assert 0 < limits(machine)["write_bytes_sec"] < 16 * MIB
            two.ask(machine, abortOnError=False)
            two.has_moved(machine)
        assert {key: value for key, value in limits(machine).items() if value} == user
        wait_thin(
            there, machine, lambda one: int(one["allocation"]) >= pieces * PIECE, "it to write",
            timeout=120,
        )  # fmt: skip
        check(there, machine)
        check_written(there, machine, 0, pieces)
        there.call("VM.destroy", vmID=machine.id)
