# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM moves to another host with its disks: two agents, two libvirtds, shared storage."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.guests.guest import Plan
from functional.migrate_lab import Two, listed, shared, shown, two_hosts
from functional.processes import AgentProcess
from functional.test_vm_secrets import ENCODED, KEY, OF_VM, SECRET, key, secret, usages
from functional.vm_create import held, nothing_stays, plan, start, xml
from functional.vm_disks import pdiv, records, source
from functional.vm_lab import SIZE, Machine, VmDisk, VmLab
from functional.world import COW, new_id

ARRIVAL = 4.0  # seconds


@pytest.fixture(scope="module")
def workdir(workdir: Path) -> Iterator[Path]:
    with shared(workdir) as path:
        yield path


@pytest.fixture(scope="module")
def two(
    workdir: Path, start_agent: Callable[..., AgentProcess], make_server: Callable[[str], Any]
) -> Iterator[Two]:
    settings = {"vms__arrival_timeout": str(ARRIVAL), "secrets__check_interval": "1"}
    with two_hosts(workdir, start_agent, make_server, **settings) as made:
        yield made


@pytest.fixture(autouse=True)
def let_go(two: Two) -> Iterator[None]:
    with nothing_stays(two.first), nothing_stays(two.second):
        yield
    for lab in two.both:
        lab.wait(lambda lab=lab: usages(lab) == {}, "the secrets to go")


@pytest.fixture
def counts(two: Two) -> Iterator[Machine]:
    """For those that stay: afterwards it moves, and has told and written every number."""
    machine = two.writer("stays")
    yield machine
    two.ask(machine)
    two.has_moved(machine)
    two.end(machine, two.second)
    two.console("stays").unlink()


def announce(lab: VmLab, wanted: Plan, limit: int = 0, text: str = "", **more: Any) -> Any:
    params = {"vmId": wanted.id, "status": "Up", "xml": text or xml(lab, wanted), **more}
    return lab.call("VM.migrationCreate", vmID=wanted.id, params=params, incomingLimit=limit)


# -- there and back ------------------------------------------------------------------------------


def test_it_moves_and_comes_back(two: Two) -> None:
    """The guest writes all the time; no number is lost, and each host keeps nothing of it."""
    machine = two.writer("counts")
    disk = machine.disks[0]
    disk.volumes.append(two.first.new_leaf(disk))
    drives = [{**pdiv(two.first, disk), "baseVolumeID": disk.volumes[0]}]
    two.first.call("VM.snapshot", vmID=machine.id, snapDrives=drives)
    here, there = two.both
    two.ask(machine)
    two.has_moved(machine)
    # What it has open counts, not what it was started with.
    assert source(machine, "vda").endswith(disk.leaf)
    assert str(there.agent.dir) in source(machine, "vda")
    assert records(machine)["vda"]["volumeID"] == disk.leaf
    assert held(there) == {machine.id: [disk.image]}
    assert held(here) == {}
    two.writes(machine)
    two.ask(machine, there)
    two.has_moved(machine, there)
    two.end(machine, here)


def test_one_after_the_other(two: Two) -> None:
    """An engine's limit of VMs that leave a host at a time."""
    here, there = two.both
    machines = [two.writer(name) for name in ("goes-first", "goes-second")]
    for machine in machines:
        two.ask(machine, outgoingLimit=1)
    assert [listed(here, machine.id) for machine in machines] == ["Migration Source"] * 2
    first, second = (machine.id for machine in machines)
    known: dict[str, str] = {}
    while known.get(first) != "Up":
        known = {vm["vmId"]: vm["status"] for vm in there.call("Host.getVMList")}
        assert known.get(first) == "Up" or second not in known
    for machine in machines:
        two.has_moved(machine)
        two.end(machine, there)


def test_secrets_are_there_before_it(two: Two) -> None:
    """QEMU there opens an encrypted disk with the secret that came with VM.create here."""
    here, there = two.both
    image = new_id()
    registered = {**secret(), "usageID": "ovirt/for-a-moment"}
    here.call("Host.registerSecrets", secrets=[registered])
    volume = here.world.create(image, volFormat=COW, size=str(SIZE), secretID=SECRET)
    here.call("Host.unregisterSecrets", uuids=[SECRET])
    disk = VmDisk(image, [volume])
    wanted = plan(here, "luks", [disk], more=key())
    machine = start(here, wanted, [disk], secrets=[secret()])
    assert usages(here) == OF_VM
    # Another one of that UUID is there: it stays, and that one is not touched.
    there.call("Host.registerSecrets", secrets=[registered])
    two.ask(machine)
    here.wait(lambda: listed(here, machine.id) == "Up", "the end")
    assert "registered on this host" in here.fails(12, "VM.getMigrationStatus", vmID=machine.id)
    assert usages(there) == {SECRET: registered["usageID"]}
    assert usages(here) == OF_VM
    there.call("Host.unregisterSecrets", uuids=[SECRET])
    two.ask(machine)
    two.has_moved(machine)
    assert usages(here) == {}
    assert usages(there) == OF_VM
    assert machine.guest.domain.blockInfo("vda")[0] == SIZE
    assert shown(two, KEY, ENCODED, ENCODED.rstrip("=")) == []
    there.call("VM.destroy", vmID=machine.id)
    assert usages(there) == {}


def test_what_is_told_of_it(two: Two) -> None:
    """Status and progress on both hosts while it moves, and events; a stop leaves it here."""
    here, there = two.both
    disk = here.disk(filled=True)
    wanted = plan(here, "slow", [disk], boots=True)
    machine = start(here, wanted, [disk])
    machine.guest.wait_ready()
    machine.guest.run("head -c 40000000 /dev/urandom >/tmp/fill || :")
    events = here.world.client.events(timeout=20)
    two.ask(machine, maxBandwidth=2)
    here.wait(lambda: here.stats(machine.id).get("migrationProgress", 0) > 5, "progress")
    assert here.stats(machine.id)["status"] == listed(here, machine.id) == "Migration Source"
    assert listed(there, machine.id) == "Migration Destination"
    found = here.call("VM.getMigrationStatus", vmID=machine.id)
    assert found["status"] == "in_progress"
    assert 0 < found["progress"] < 100
    for lab, out, coming in ((here, 1, 0), (there, 0, 1)):
        stats = lab.call("Host.getStats")
        assert stats["outgoingVmMigrations"] == out
        assert stats["incomingVmMigrations"] == coming
    assert int(there.call("VM.refresh_disk", vmID=machine.id, drive=pdiv(here, disk))["truesize"])
    for lab in two.both:
        lab.fails(51, "VM.freeze", vmID=machine.id)
    here.fails(51, "VM.migrate", vmID=machine.id, params={"vmId": machine.id, "dst": "elsewhere"})
    told = next(params for name, params in events if "VM_migration_status" in name)
    assert told[machine.id]["progress"] > 0
    here.call("VM.migrateCancel", vmID=machine.id)
    here.wait(lambda: listed(here, machine.id) == "Up", "it to stay")
    here.wait(lambda: listed(there, machine.id) == "", "the other host to let go")
    assert "stopped" in here.fails(12, "VM.getMigrationStatus", vmID=machine.id)
    here.fails(81, "VM.migrateCancel", vmID=machine.id)
    here.call("VM.freeze", vmID=machine.id)
    two.ask(machine)
    here.wait(lambda: listed(here, machine.id) == "Up", "the end")
    assert "frozen" in here.fails(12, "VM.getMigrationStatus", vmID=machine.id)
    here.call("VM.thaw", vmID=machine.id)
    two.ask(machine)
    assert two.has_moved(machine)["downtime"] > 0
    # Its agent answers there.
    there.call("VM.freeze", vmID=machine.id)
    there.call("VM.thaw", vmID=machine.id)
    there.call("VM.destroy", vmID=machine.id)


# -- it stays ------------------------------------------------------------------------------------


def test_nobody_is_there(two: Two, counts: Machine) -> None:
    two.ask(counts, dst="127.0.0.1:9")
    assert "127.0.0.1:9" in two.stays(counts)
    here = two.first
    here.fails(12, "VM.migrate", vmID=counts.id, params={"vmId": counts.id})
    here.fails(1, "VM.migrate", vmID=new_id(), params={"vmId": counts.id, "dst": "elsewhere"})
    here.fails(81, "VM.getMigrationStatus", vmID=new_id())


def test_libvirt_cannot_send_it(two: Two, counts: Machine) -> None:
    """The other host was ready, and lets go."""
    two.ask(counts, dstqemu="192.0.2.1")
    assert "192.0.2.1" in two.stays(counts)


def test_libvirt_there_is_killed(two: Two, counts: Machine) -> None:
    """When it is ready, before it is sent."""
    there = two.second
    there.libvirtd.signal(signal.SIGSTOP)
    two.ask(counts)
    there.libvirtd.signal(signal.SIGCONT)
    there.libvirtd.kill_daemon()
    two.stays(counts)
    assert listed(two.first, counts.id) == "Up"
    there.libvirtd.start_daemon()
    there.guests.reconnect()
    there.wait_libvirt()


def test_disk_that_is_only_here(two: Two) -> None:
    """What the other host would not see is refused before it is asked."""
    here = two.first
    disk = here.disk(filled=False)
    wanted = plan(here, "cached", [disk])
    text = xml(here, wanted).replace("cache='none'", "cache='unsafe'")
    machine = start(here, wanted, [disk], text=text)
    two.ask(machine)
    here.wait(lambda: listed(here, machine.id) == "Up", "the end")
    assert "cache" in here.fails(12, "VM.getMigrationStatus", vmID=machine.id)
    here.call("VM.destroy", vmID=machine.id)


# -- it does not come ----------------------------------------------------------------------------


def test_it_never_comes(two: Two) -> None:
    there = two.second
    disk = there.disk(filled=False)
    wanted = plan(there, "never", [disk])
    answer = announce(there, wanted, secrets=[secret()])
    assert answer["params"]["status"] == "Migration Destination"
    assert str(there.agent.dir) in answer["params"]["xml"]
    assert usages(there) == OF_VM
    assert held(there)[wanted.id] == [disk.image]
    began = time.monotonic()
    # Who gave a volume more storage asks for this, whether libvirt has begun or not.
    found = there.call("VM.refresh_disk", vmID=wanted.id, drive=pdiv(there, disk))
    assert int(found["apparentsize"]) > 0
    other = plan(there, "other", [])
    there.fails(82, "VM.migrationCreate", vmID=other.id, incomingLimit=1,
                params={"vmId": other.id, "status": "Up", "xml": xml(there, other)})  # fmt: skip
    there.fails(4, "VM.create", vmID=wanted.id,
                vmParams={"vmId": wanted.id, "xml": xml(there, wanted)})  # fmt: skip
    there.wait(lambda: listed(there, wanted.id) == "", "it to be let go")
    assert time.monotonic() - began > ARRIVAL * 0.7
    assert usages(there) == {}
    announce(there, wanted, secrets=[secret()])
    there.call("VM.destroy", vmID=wanted.id)
    assert (listed(there, wanted.id), usages(there)) == ("", {})
    announce(there, wanted)
    there.call("VM.migrateCancel", vmID=wanted.id)
    assert (listed(there, wanted.id), held(there)) == ("", {})


def test_what_cannot_come(two: Two, counts: Machine) -> None:
    there = two.second
    missing = VmDisk(new_id(), [new_id()])
    wanted = plan(there, "missing", [missing])
    params = {"vmId": wanted.id, "status": "Up", "xml": xml(there, wanted)}
    there.fails(1630, "VM.migrationCreate", vmID=wanted.id, params=params, incomingLimit=0)
    assert listed(there, wanted.id) == ""
    bad = {**params, "xml": "<domain"}
    there.fails(9, "VM.migrationCreate", vmID=wanted.id, params=bad, incomingLimit=0)
    two.first.fails(
        4, "VM.migrationCreate", vmID=counts.id, incomingLimit=0,
        params={"vmId": counts.id, "status": "Up", "xml": xml(two.first, counts.guest.plan)},
    )  # fmt: skip
