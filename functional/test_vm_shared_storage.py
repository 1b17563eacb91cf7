# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks of VMs on storage with leases: on LUNs, and on a shared file system."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.engine.host import FCP, StorageServer
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess
from functional.vm_create import fails, held, plan, record, start, xml
from functional.vm_disks import SCSI, element, pdiv, plug, records, root, source, unplug
from functional.vm_lab import MIB, Machine, VmDisk, VmLab, vm_lab
from functional.world import COW, PREALLOCATED, RAW, SPARSE, new_id
from vdsm_storage.rpc.client import RemoteError

CHUNK = 128 * MIB  # an extent


@pytest.fixture(scope="module")
def lab(
    workdir: Path,
    start_agent: Callable[..., AgentProcess],
    make_standin: Callable[..., StandInProcess],
    make_luns: Callable[..., list[str]],
) -> Iterator[VmLab]:
    luns = make_luns(2)
    servers = iter([StorageServer(FCP, devices=(lun,)) for lun in luns])
    start = functools.partial(start_agent, standin=make_standin(sync=False))
    settings = {"lvm__devices": ",".join(luns), "sanlock__io_timeout": "1"}
    with vm_lab(workdir, start, lambda _kind: next(servers), **settings) as one:
        yield one


@pytest.fixture(scope="module")
def paused(lab: VmLab) -> Machine:
    return lab.machine_of("paused", [], devices=SCSI)


def volume(lab: VmLab, fmt: int) -> VmDisk:
    image = new_id()
    kind = PREALLOCATED if fmt == RAW else SPARSE
    return VmDisk(
        image, [lab.world.create(image, volFormat=fmt, preallocate=kind, size=str(CHUNK))]
    )


def active(lab: VmLab) -> set[str]:
    """Volumes that are active on this host."""
    assert lab.agent.standin is not None
    links = lab.agent.standin.dir.glob(f"dev/{lab.world.main}/*")
    return {link.name for link in links}


def test_disk_on_a_lun(lab: VmLab, paused: Machine) -> None:
    disk = volume(lab, COW)
    plug(lab, paused, disk)
    found = element(paused, "sdb")
    assert found is not None
    assert found.get("type") == "block"
    driver = found.find("driver")
    assert driver is not None
    assert (driver.get("type"), driver.get("io")) == ("qcow2", "threads")
    assert source(paused, "sdb").endswith(f"/{disk.image}/{disk.leaf}")
    assert records(paused)["sdb"] == pdiv(lab, disk)
    assert disk.leaf in active(lab)
    unplug(lab, paused, disk)
    assert disk.leaf not in active(lab)


@pytest.mark.parametrize("fmt", [RAW, COW])
def test_disk_on_a_lun_grows(lab: VmLab, paused: Machine, fmt: int) -> None:
    disk = volume(lab, fmt)
    plug(lab, paused, disk)
    size = 2 * CHUNK
    ids = lab.world.ids(disk.image, disk.leaf)
    assert lab.world.task("Volume.extendSize", **ids, newSize=str(size)) == ""
    answer = lab.call(
        "VM.diskSizeExtend", vmID=paused.id, driveSpecs=pdiv(lab, disk), newSize=str(size)
    )
    assert answer == str(size)
    assert paused.guest.domain.blockInfo("sdb")[0] == size
    assert int(lab.world.info(disk.image, disk.leaf)["capacity"]) == size
    found = lab.call("VM.refresh_disk", vmID=paused.id, drive=pdiv(lab, disk))
    # The storage of a qcow2 volume grows by what is free in it, not with its capacity.
    assert size <= int(found["apparentsize"]) <= size + (0 if fmt == RAW else CHUNK)
    unplug(lab, paused, disk)
    assert disk.leaf not in active(lab)


def test_agent_killed_with_a_disk_on_a_lun(lab: VmLab, paused: Machine) -> None:
    disk = volume(lab, COW)
    lab.world.restart("vm.hotplug_disk:recorded")
    with pytest.raises((RemoteError, OSError)):
        plug(lab, paused, disk)
    lab.world.restart("vm.hotplug_disk:attached")
    lab.wait(lambda: disk.leaf not in active(lab), "recovery")
    with pytest.raises((RemoteError, OSError)):
        plug(lab, paused, disk)
    lab.world.restart()
    lab.world.settle()
    assert disk.leaf in active(lab)
    assert source(paused, "sdb").endswith(disk.leaf)
    unplug(lab, paused, disk)
    assert disk.leaf not in active(lab)


def test_leases(lab: VmLab, paused: Machine) -> None:
    world = lab.world
    lease = {"sd_id": world.main, "lease_id": new_id()}
    assert world.task("Lease.create", lease=lease, metadata=None) == ""
    info = lab.call("Lease.info", lease=lease)

    def call(verb: str) -> Any:
        return lab.call(verb, vmID=paused.id, lease={**lease, "type": "lease"})

    def there() -> list[tuple[str | None, str | None, str | None, str | None]]:
        found = root(paused).iterfind("./devices/lease")
        return [
            (each.findtext("lockspace"), each.findtext("key"), target.get("path"),
             target.get("offset"))
            for each in found if (target := each.find("target")) is not None
        ]  # fmt: skip

    assert call("VM.hotplugLease")["vmId"] == paused.id
    assert there() == [(world.main, lease["lease_id"], info["path"], str(info["offset"]))]
    lab.fails(86, "VM.hotplugLease", vmID=paused.id, lease=lease)
    call("VM.hotunplugLease")
    assert there() == []
    lab.fails(87, "VM.hotunplugLease", vmID=paused.id, lease=lease)
    missing = {**lease, "lease_id": new_id()}
    lab.fails(936, "VM.hotplugLease", vmID=paused.id, lease=missing)
    lab.fails(1, "VM.hotplugLease", vmID=new_id(), lease=lease)


def test_vm_with_leases(lab: VmLab) -> None:
    """Where they are is the storage's to say; a disk may want the lease of its volume."""
    world = lab.world
    disk = volume(lab, COW)
    disk.volumes.append(
        world.create(
            disk.image, volFormat=COW, preallocate=SPARSE, size=str(CHUNK),
            srcImgUUID=disk.image, srcVolUUID=disk.leaf, sequence=2,
        )
    )  # fmt: skip
    lease = {"sd_id": world.main, "lease_id": new_id()}
    assert world.task("Lease.create", lease=lease, metadata=None) == ""
    own = lab.call("Lease.info", lease=lease)
    wanted = plan(
        lab, "leases", [disk],
        devices=f"<lease><lockspace>{world.main}</lockspace><key>{lease['lease_id']}</key>"
        "<target path='LEASE-PATH' offset='0'/></lease>",
    )  # fmt: skip
    text = xml(lab, wanted).replace(record(lab, disk, "vda"), record(lab, disk, "vda", "exclusive"))
    machine = start(lab, wanted, [disk], text=text, launchPaused=True)
    found = element(machine, "vda")
    assert found is not None
    assert found.get("type") == "block"
    assert source(machine, "vda").endswith(f"/{disk.image}/{disk.leaf}")
    assert set(disk.volumes) <= active(lab)
    of_disk = world.info(disk.image, disk.leaf)["lease"]
    there = {
        each.findtext("key"): (target.get("path"), target.get("offset"))
        for each in root(machine).iterfind("./devices/lease")
        if (target := each.find("target")) is not None
    }
    assert there == {
        lease["lease_id"]: (own["path"], str(own["offset"])),
        disk.leaf: (of_disk["path"], str(of_disk["offset"])),
    }
    lab.call("VM.destroy", vmID=machine.id)
    assert not set(disk.volumes) & active(lab)
    assert held(lab) == {}
    missing = text.replace(lease["lease_id"], new_id())
    assert "lease" in fails(lab, wanted, missing)
