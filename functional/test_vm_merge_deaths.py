# SPDX-License-Identifier: GPL-2.0-or-later
"""Live merges through deaths of agent, libvirtd and guest, at every named step."""

from __future__ import annotations

import subprocess
import threading
import time

import pytest

from functional.merge_lab import (
    ACTIVE,
    INNER,
    PIECE,
    ask,
    begin,
    check_chain,
    check_data,
    continued,
    finish,
    guest,
    jobs,
    merge,
    outcome,
    reads,
    slow,
    state_of,
    tower,
)
from functional.vm_lab import VmLab
from functional.walk import STEPS
from functional.world import new_id
from vdsm_storage.rpc.client import Client

# -- the agent, libvirt and the guest come and go --------------------------------------------

ONLY_ACTIVE = ("marked", "pivoted")
POINTS = [
    pytest.param(top, step, id=f"{'active' if top == ACTIVE else 'inner'}:{step}")
    for step in STEPS["vm.merge"]
    for top in (INNER, ACTIVE)
    if top == ACTIVE or step not in ONLY_ACTIVE
]


@pytest.mark.parametrize(("top", "step"), POINTS)
def test_agent_is_killed(lab: VmLab, top: int, step: str) -> None:
    """It goes on where it was, under the same id."""
    with guest(lab, tower(lab, 3)) as machine:
        lab.world.restart(f"vm.merge:{step}")
        job = new_id()
        begin(lab, machine, top, job)
        lab.agent.wait_dead()
        lab.world.restart()
        assert outcome(lab, job)["status"] == "done", outcome(lab, job)
        assert jobs(lab, machine) == {}
        finish(lab, machine, top)
        check_data(machine, 3)


@pytest.mark.parametrize(("top", "step"), POINTS)
def test_libvirtd_is_killed(lab: VmLab, top: int, step: str) -> None:
    """It is waited for; the guest's QEMU goes on."""
    with guest(lab, tower(lab, 3)) as machine:
        lab.world.restart(f"stop vm.merge:{step}")
        job = new_id()
        asking = threading.Thread(target=begin, args=(lab, machine, top, job))
        asking.start()
        process = lab.agent.process
        assert process is not None
        lab.wait(lambda: state_of(process.pid) == "T", "the agent to stop")
        lab.libvirtd.kill_daemon()
        with continued(process.pid):
            time.sleep(0.5)
            lab.libvirtd.start_daemon()
            lab.guests.reconnect()
            asking.join()
            lab.wait_libvirt()
            assert outcome(lab, job)["status"] == "done", outcome(lab, job)
        finish(lab, machine, top)
        check_data(machine, 3)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_agent_that_ends_leaves_the_merge_alone(lab: VmLab, how: str) -> None:
    """QEMU goes on without it, and the next agent finds the job again."""
    with slow(lab) as machine:
        lab.world.restart()
        job = ask(lab, machine, ACTIVE, bandwidth=1)
        lab.wait(lambda: int(jobs(lab, machine)[job]["cur"]) > 0, "the job to begin")
        if how == "stop":
            assert lab.agent.stop() == ""
        else:
            lab.agent.kill()
        assert machine.guest.domain.blockJobInfo("vda")
        lab.agent.start()
        lab.world.client.close()
        lab.world.client = Client.dev(str(lab.agent.dir))
        lab.wait_libvirt()
        assert job in jobs(lab, machine)  # at once, and until it is merged
        if how == "stop":  # it waits to be told
            for server in lab.world.places.values():
                lab.world.connect_server(server)
            lab.world.connect_pool()
        lab.wait(lambda: not jobs(lab, machine), "the merge")
        assert outcome(lab, job)["status"] == "done"
        finish(lab, machine, ACTIVE)
        check_data(machine, 3)


@pytest.mark.parametrize("top", [INNER, ACTIVE])
def test_guest_ends_meanwhile(lab: VmLab, top: int) -> None:
    """The chain is as it was, and can be merged by what does so without a guest."""
    with slow(lab) as machine:
        disk = machine.disks[0]
        job = ask(lab, machine, top, bandwidth=1)
        lab.wait(lambda: int(jobs(lab, machine)[job]["cur"]) > 0, "the job to begin")
        machine.guest.destroy()
        found = outcome(lab, job)
        assert (found["status"], found["error"]["code"]) == ("failed", 52), found
        assert "VM has ended" in found["error"]["message"]
        ids = lab.world.ids(disk.image, disk.leaf)
        ids["leafVolID"] = ids.pop("volumeID")
        assert lab.call("Image.reconcileVolumeChain", **ids) == disk.volumes
    with guest(lab, disk) as machine:
        check_data(machine, 3)
        merge(lab, machine, top)
        check_data(machine, 3)


@pytest.mark.parametrize("step", ["copied", "marked"])
def test_guest_ends_at_the_pivot(lab: VmLab, step: str) -> None:
    """All was copied: merged if the leaf was marked before, else as it was.  No data is lost."""
    with guest(lab, tower(lab, 3)) as machine:
        disk = machine.disks[0]
        lab.world.restart(f"vm.merge:{step}")
        job = new_id()
        begin(lab, machine, ACTIVE, job)
        lab.agent.wait_dead()
        machine.guest.destroy()
        lab.world.restart()
        found = outcome(lab, job)
        if step == "marked":
            assert found["status"] == "done"
            assert lab.world.info(disk.image, disk.leaf)["legality"] == "ILLEGAL"
            disk.volumes.pop()
        else:
            assert (found["status"], found["error"]["code"]) == ("failed", 52)
    with guest(lab, disk) as machine:
        check_chain(lab, machine, disk.volumes)
        check_data(machine, 3)


def test_guest_wrote_before_a_pivot_that_never_was(lab: VmLab) -> None:
    """The leaf was marked, and has more than its base: it stays the guest's disk."""
    with guest(lab, tower(lab, 3)) as machine:
        disk = machine.disks[0]
        lab.world.restart("vm.merge:marked")
        job = new_id()
        begin(lab, machine, ACTIVE, job)
        lab.agent.wait_dead()
        path = machine.guest.domain.XMLDesc().split("<source file='")[1].split("'")[0]
        machine.guest.destroy()
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P 5 0 {PIECE}", path], check=True,
                       timeout=60, capture_output=True)  # fmt: skip
        lab.world.restart()
        assert outcome(lab, job)["status"] == "failed"
    with guest(lab, disk) as machine:
        check_chain(lab, machine, disk.volumes)
        assert reads(machine, 5, 0)
