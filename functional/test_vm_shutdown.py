# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.shutdown: by the guest's agent, by the power button, by force; it never hangs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from functional.guests.guest import Plan
from functional.vm_create import nothing_stays, obey, plan, start, state, xml
from functional.vm_lab import Machine, VmLab
from functional.world import new_id

AGENT = "/run/qemu-ga.pid"
# Waits for the power button of a VM, which QEMU tells of by an event.
WATCH = """
import sys, threading, libvirt, libvirt_qemu
libvirt.virEventRegisterDefaultImpl()
def turn():
    while True:
        libvirt.virEventRunDefaultImpl()
threading.Thread(target=turn, daemon=True).start()
pressed = threading.Event()
connection = libvirt.open(sys.argv[1])
domain = connection.lookupByUUIDString(sys.argv[2])
libvirt_qemu.qemuMonitorEventRegister(
    connection, domain, "POWERDOWN", lambda *_: pressed.set(), None, 0)
print("watching", flush=True)
print("pressed" if pressed.wait(60) else "not pressed", flush=True)
"""


@pytest.fixture(autouse=True)
def let_go(lab: VmLab) -> Iterator[None]:
    with nothing_stays(lab):
        yield


def booted(lab: VmLab, name: str, **more: Any) -> Machine:
    wanted = plan(lab, name, boots=True)
    text = xml(lab, wanted).replace("<on_reboot>destroy", "<on_reboot>restart")
    machine = start(lab, wanted, text=text, **more)
    machine.guest.wait_ready()
    obey(machine)
    return machine


def ended(lab: VmLab, machine: Machine, within: float) -> dict[str, Any]:
    lab.wait(lambda: state(lab, machine.id).get("status") == "Down", "the VM to end", within)
    return state(lab, machine.id)


def readies(machine: Machine) -> int:
    """How often it has booted."""
    return machine.guest.console.read_bytes().count(b"tiny: ready")


def log(lab: VmLab) -> str:
    return (lab.agent.dir / "agent.log").read_text()


def test_agent_obeys_then_hangs(lab: VmLab) -> None:
    """It reboots the guest; when it hangs, the button is pressed, and a guest that ignores that
    goes on, unless it is forced.  How it ends a guest is in test_vm_create.py."""
    machine = booted(lab, "guest")
    before = time.monotonic()
    lab.call("VM.shutdown", vmID=machine.id, reboot=True, timeout=60, force=True)
    assert time.monotonic() - before < 5.0  # nobody waits for the guest
    machine.guest.close()
    lab.wait(lambda: readies(machine) == 2, "the guest to boot again", 120.0)
    assert state(lab, machine.id)["status"] == "Up"
    assert "is pressed" not in log(lab)

    machine.guest.run(f"kill -STOP $(cat {AGENT})")
    lab.wait(lambda: "state='connected'" in machine.guest.domain.XMLDesc(), "the agent")
    watch = [sys.executable, "-c", WATCH, lab.libvirtd.uri, machine.id]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "watching\n"
        before = time.monotonic()
        lab.call("VM.shutdown", vmID=machine.id, timeout=1)
        assert watcher.stdout.readline() == "pressed\n"
    given_up = f"The guest of VM {machine.id} does not shut down"
    lab.wait(lambda: given_up in log(lab), "it to be given up", 30.0)
    assert time.monotonic() - before < 20.0
    assert state(lab, machine.id)["status"] == "Up"
    assert machine.guest.run("echo on") == "on"
    lab.call("VM.shutdown", vmID=machine.id, timeout=1, force=True)
    found = ended(lab, machine, 30.0)
    assert (found["exitCode"], found["exitReason"]) == (0, 6)
    lab.call("VM.destroy", vmID=machine.id)


def test_guest_without_an_agent(lab: VmLab) -> None:
    """One request replaces another: the first would have waited for an hour."""
    machine = start(lab, plan(lab, "mute", agent=False))
    lab.call("VM.shutdown", vmID=machine.id, timeout=3600, force=True)
    time.sleep(1.0)
    assert state(lab, machine.id)["status"] == "Up"
    lab.call("VM.shutdown", vmID=machine.id, timeout=1, force=True)
    ended(lab, machine, 20.0)
    lab.fails(1, "VM.shutdown", vmID=new_id())
    lab.fails(6, "VM.shutdown", vmID=machine.id)
    lab.call("VM.destroy", vmID=machine.id)


def test_no_way_to_ask(lab: VmLab) -> None:
    wanted = Plan("none", agent=False)
    text = xml(lab, wanted).replace("<acpi/>", "")
    machine = start(lab, wanted, text=text, launchPaused=True)
    message = lab.fails(19, "VM.shutdown", vmID=machine.id)
    assert "force" in message
    # It would be another one when the time is over.
    lab.call("VM.shutdown", vmID=machine.id, delay=1, force=True)
    lab.call("VM.destroy", vmID=machine.id)
    again = start(lab, wanted, text=text, launchPaused=True)
    time.sleep(2.5)
    assert state(lab, again.id)["status"] == "Paused"
    lab.call("VM.destroy", vmID=again.id)
