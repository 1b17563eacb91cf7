# SPDX-License-Identifier: GPL-2.0-or-later
"""Either agent, or either libvirtd, dies while a VM moves: the VM runs on one host, and nothing of
it stays on the other."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.migrate_lab import Two, listed, shared, two_hosts
from functional.processes import AgentProcess
from functional.test_vm_secrets import OF_VM, secret, usages
from functional.vm_create import held, nothing_stays, plan, start
from functional.vm_lab import Machine, VmLab

ARRIVAL = 3.0  # seconds


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


@pytest.fixture
def counts(two: Two) -> Iterator[Machine]:
    """With a secret; wherever it is at the end, it told every number and wrote it."""
    with nothing_stays(two.first), nothing_stays(two.second):
        machine = two.writer("counts", secrets=[secret()])
        yield machine
        (where,) = [lab for lab in two.both if listed(lab, machine.id) in ("Up", "Paused")]
        two.writes(machine)
        two.end(machine, where)
        two.console("counts").unlink()
    for lab in two.both:
        lab.wait(lambda lab=lab: usages(lab) == {}, "the secrets to go")


def is_on(two: Two, machine: Machine, lab: VmLab) -> None:
    """There and nowhere else."""
    other = two.other(lab)
    lab.wait(lambda: listed(lab, machine.id) == "Up", "it to be Up")
    other.wait(lambda: listed(other, machine.id) in ("", "Down"), "the other host to know")
    other.wait(lambda: held(other) == {} and usages(other) == {}, "it to let go")
    assert held(lab) == {machine.id: [machine.disks[0].image]}
    assert usages(lab) == OF_VM
    two.writes(machine)


def revive(lab: VmLab) -> None:
    lab.agent.wait_dead()
    lab.world.restart()
    lab.wait_libvirt()


@pytest.mark.parametrize("step", ["begun", "prepared"])
def test_source_dies_before_it_is_sent(two: Two, counts: Machine, step: str) -> None:
    here = two.first
    here.world.restart(f"vm.migrate:{step}")
    here.wait_libvirt()
    two.ask(counts)
    revive(here)
    is_on(two, counts, here)
    assert "restarted" in here.fails(12, "VM.getMigrationStatus", vmID=counts.id)


@pytest.mark.parametrize("step", ["sent", "ended"])
def test_source_dies_when_it_is_sent(two: Two, counts: Machine, step: str) -> None:
    """The libvirts go on without it."""
    here = two.first
    here.world.restart(f"vm.migrate:{step}")
    here.wait_libvirt()
    two.ask(counts)
    revive(here)
    two.has_moved(counts)
    is_on(two, counts, two.second)
    assert listed(two.second, counts.id) == "Up"


@pytest.mark.parametrize("step", ["begun", "secrets", "prepared"])
def test_destination_dies_before_it_comes(two: Two, counts: Machine, step: str) -> None:
    there = two.second
    there.world.restart(f"vm.incoming:{step}")
    there.wait_libvirt()
    two.ask(counts)
    revive(there)
    is_on(two, counts, two.first)
    assert listed(two.first, counts.id) == "Up"


def test_destination_dies_when_it_came(two: Two, counts: Machine) -> None:
    there = two.second
    there.world.restart("vm.incoming:arrived")
    there.wait_libvirt()
    two.ask(counts)
    revive(there)
    two.has_moved(counts)
    is_on(two, counts, there)
    assert listed(there, counts.id) == "Up"


def test_secret_that_was_forgotten(two: Two) -> None:
    """Its value is not kept, and the agent was restarted: the VM cannot be opened elsewhere."""
    here = two.first
    here.agent.settings["secrets__keep"] = "false"
    try:
        with nothing_stays(here), nothing_stays(two.second):
            here.world.restart()
            here.wait_libvirt()
            machine = two.writer("forgotten", secrets=[secret()])
            here.world.restart()
            here.wait_libvirt()
            two.ask(machine)
            assert "secrets.keep" in two.stays(machine)
            here.call("VM.destroy", vmID=machine.id)
    finally:
        del here.agent.settings["secrets__keep"]
        here.world.restart()
        here.wait_libvirt()


# -- in the middle -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(two: Two) -> Iterator[Machine]:
    """It has so much memory in use that its way takes long."""
    here = two.first
    disk = here.disk(filled=True)
    machine = start(here, plan(here, "slow", [disk], boots=True), [disk], secrets=[secret()])
    machine.guest.wait_ready()
    machine.guest.run("head -c 40000000 /dev/urandom >/tmp/fill || :")
    yield machine
    with contextlib.suppress(Exception):
        here.call("VM.destroy", vmID=machine.id)


def begin(
    two: Two, machine: Machine, bandwidth: int = 2, source: VmLab | None = None
) -> None:
    here = source or two.first
    two.ask(machine, here, maxBandwidth=bandwidth)
    here.wait(lambda: here.stats(machine.id).get("migrationProgress", 0) > 2, "progress")


def stays(two: Two, machine: Machine) -> None:
    here, there = two.both
    here.wait(lambda: listed(here, machine.id) == "Up", "it to stay")
    there.wait(lambda: listed(there, machine.id) == "", "the other host to let go")
    there.wait(lambda: held(there) == {} and usages(there) == {}, "it to let go")
    assert machine.id in held(here)
    assert usages(here) == OF_VM
    machine.guest.run("true")


def test_both_agents_die_in_the_middle(two: Two, slow: Machine) -> None:
    """It is found on its way again, and can be stopped."""
    here, there = two.both
    begin(two, slow)
    for lab in two.both:
        lab.world.client.close()
        lab.agent.kill()
    for lab in reversed(two.both):
        lab.agent.start()
        lab.world.reconnect()
        lab.wait_libvirt()
    assert listed(here, slow.id) == "Migration Source"
    assert listed(there, slow.id) == "Migration Destination"
    here.wait(lambda: here.stats(slow.id).get("migrationProgress", 0) > 0, "progress")
    assert slow.id in held(there)
    assert usages(there) == OF_VM
    here.call("VM.migrateCancel", vmID=slow.id)
    stays(two, slow)


@pytest.mark.parametrize("number", [0, 1])
def test_libvirtd_dies_in_the_middle(two: Two, slow: Machine, number: int) -> None:
    begin(two, slow)
    two.both[number].restart_libvirtd()
    two.both[number].wait_libvirt()
    stays(two, slow)
    assert listed(two.first, slow.id) == "Up"


def test_destination_is_told_to_destroy_it(two: Two, slow: Machine) -> None:
    """It stays, for it does not run there."""
    begin(two, slow)
    two.second.call("VM.destroy", vmID=slow.id)
    assert listed(two.second, slow.id) == ""
    stays(two, slow)


def test_agent_is_stopped_in_the_middle(two: Two, slow: Machine) -> None:
    """In order: the VM moves on, and the next agent is told the end."""
    here = two.first
    begin(two, slow, bandwidth=4)
    here.world.client.close()
    assert here.agent.stop() == ""
    here.agent.start()
    here.world.reconnect()
    here.wait_libvirt()
    assert listed(here, slow.id) in ("Migration Source", "Down")  # it may be there already
    for server in here.world.places.values():
        here.world.connect_server(server)
    here.world.connect_pool()
    two.has_moved(slow)


def test_it_is_destroyed_in_the_middle(two: Two, slow: Machine) -> None:
    """On its way back, when all of the tests before this one ran."""
    (source,) = [lab for lab in two.both if listed(lab, slow.id) == "Up"]
    begin(two, slow, source=source)
    source.call("VM.destroy", vmID=slow.id)
    for lab in two.both:
        lab.wait(lambda lab=lab: listed(lab, slow.id) == "", "it to be unknown")
        lab.wait(lambda lab=lab: held(lab) == {} and usages(lab) == {}, "it to be let go")
    source.wait(lambda: "VM.migrate" not in unfinished(source), "it to be over")
    source.fails(12, "VM.getMigrationStatus", vmID=slow.id)
    assert [listed(lab, slow.id) for lab in two.both] == ["", ""]


def unfinished(lab: VmLab) -> list[str]:
    """The verbs in an agent's journal."""
    found = []
    for path in (lab.agent.dir / "state" / "journal").glob("*.json"):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # gone, or half written
            found.append(json.loads(path.read_text())["verb"])
    return found
