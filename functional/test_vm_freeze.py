# SPDX-License-Identifier: GPL-2.0-or-later
"""What is told of VMs, freezing and thawing them; on real guests with a real agent."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.guests.guest import AGENT_PORT
from functional.processes import AgentProcess
from functional.vm_lab import Machine, VmLab, vm_lab
from functional.vm_work import ask, end, follow
from vdsm_storage.rpc.client import Client, RemoteError

LIMIT = 4.0  # seconds that a guest may stay frozen here
ANSWER = 2.0  # seconds for its agent
BOUND = 15.0  # seconds within which everything must have answered


# The laboratory's image, whose kernel the guests have, may have to be made first.
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def lab(
    workdir: Path, start_agent: Callable[..., AgentProcess], make_server: Callable[[str], Any]
) -> Iterator[VmLab]:
    limits = {"vms__freeze_limit": str(LIMIT), "vms__freeze_timeout": str(ANSWER)}
    with vm_lab(workdir, start_agent, make_server, **limits) as one:
        yield one


@pytest.fixture(scope="module")
def booted(lab: VmLab) -> Machine:
    machine = lab.machine("tiny", disks=2, boots=True)
    machine.guest.wait_ready()
    return machine


@pytest.fixture(scope="module")
def paused(lab: VmLab) -> Machine:
    """Without a guest; its agent's channel is there, and nobody listens."""
    return lab.machine("paused")


@pytest.fixture
def vm(lab: VmLab, booted: Machine) -> Iterator[Machine]:
    """The guest that boots; whatever a test did, the next one finds it thawed."""
    yield booted
    lab.wait_libvirt()
    lab.call("VM.thaw", vmID=booted.id)
    assert writes(booted)


def writes(machine: Machine) -> bool:
    """Whether the guest can write to its first disk: its second is frozen with it."""
    machine.guest.send("echo x >>/mnt/vda/probe; sync; echo wrote")
    try:
        while machine.guest.line(20.0) != "wrote":
            pass
    except TimeoutError:
        return False
    assert machine.guest.line() == "=0"
    return True


def is_frozen(machine: Machine) -> bool:
    """As its kernel has it, without touching the file system."""
    command = "fsfreeze --unfreeze /mnt/vd$d && echo thawed && fsfreeze --freeze /mnt/vd$d"
    return "thawed" in machine.guest.run(f"for d in a b; do {command}; done; true")


# -- what is told of VMs ---------------------------------------------------------------------


def test_vms_are_what_libvirt_runs(lab: VmLab, booted: Machine, paused: Machine) -> None:
    both = {booted.id, paused.id}
    assert set(lab.call("Host.getVMList", onlyUUID=True)) == both
    found = {vm["vmId"]: vm["status"] for vm in lab.call("Host.getVMList")}
    assert found == {booted.id: "Up", paused.id: "Paused"}
    assert [vm["vmId"] for vm in lab.call("Host.getVMList", vmList=[paused.id])] == [paused.id]
    assert {vm["vmId"] for vm in lab.call("Host.getVMFullList")} == both

    def counted() -> bool:
        stats = lab.call("Host.getStats")
        return (stats["vmCount"], stats["vmActive"]) == (2, 1)

    lab.wait(counted, "both to be counted")


def test_xml_names_the_volumes(lab: VmLab, booted: Machine) -> None:
    (xml,) = lab.call("Host.dumpxmls", vmList=[booted.id]).values()
    for disk in booted.disks:
        assert f"/{disk.image}/{disk.leaf}'" in xml


def test_statistics(lab: VmLab, booted: Machine, paused: Machine) -> None:
    lab.stats(booted.id)
    booted.guest.run("dd if=/dev/zero of=/mnt/vda/big bs=1M count=8 conv=fsync; rm /mnt/vda/big")
    stats = {vm["vmId"]: vm for vm in lab.call("Host.getAllVmStats")}
    up = stats[booted.id]
    assert (up["status"], up["vmName"], up["pauseCode"]) == ("Up", "tiny", "NOERR")
    assert (up["vmJobs"], up["monitorResponse"]) == ({}, "0")
    assert "freezeAge" not in up
    assert set(up["disks"]) == {"vda", "vdb"}
    disk = up["disks"]["vda"]
    assert disk["imageID"] == booted.disks[0].image
    assert int(disk["writtenBytes"]) > 8 * 1024**2
    assert float(disk["writeRate"]) > 0
    assert int(disk["writeLatency"]) > 0
    assert int(disk["flushLatency"]) > 0
    assert int(disk["truesize"]) > 1024**2
    assert float(up["cpuUser"]) + float(up["cpuSys"]) > 0
    assert stats[paused.id]["status"] == "Paused"
    assert lab.stats(paused.id)["hash"] == stats[paused.id]["hash"]


def test_a_vm_that_starts_and_ends_is_noticed(lab: VmLab) -> None:
    both = len(lab.call("Host.getVMList"))
    lab.wait(lambda: lab.call("Host.getStats")["vmCount"] == both, "all VMs to be counted")
    before = both
    short = lab.machine("short")
    lab.wait(lambda: lab.call("Host.getStats")["vmCount"] == before + 1, "the VM to be counted")
    assert lab.stats(short.id)["status"] == "Paused"
    short.guest.destroy()
    lab.wait(lambda: lab.call("Host.getStats")["vmCount"] == before, "the VM to be forgotten")
    for verb in ("VM.freeze", "VM.thaw", "VM.getStats"):
        lab.fails(6, verb, vmID=short.id)
    assert short.id not in lab.call("Host.getVMList", onlyUUID=True)


def test_state_changes_are_told(lab: VmLab, paused: Machine) -> None:
    host = lab.agent.host("engine", 1)
    name = f"|virt|VM_status|{paused.id}"

    def told(after: int = 0) -> list[str]:
        return [p[paused.id]["status"] for m, p in host.events if m == name][after:]

    try:
        host.vds.call("Host.ping2", {})
        for change, status in ((paused.guest.domain.resume, "Up"),
                               (paused.guest.domain.suspend, "Paused")):  # fmt: skip
            before = len(told())
            change()
            lab.wait(
                lambda status=status, before=before: status in told(before),
                f"an event that tells {status}",
            )
            assert told()[-1] == status
    finally:
        host.close()


# -- pause, go on, reset, end ----------------------------------------------------------------


def test_pause_and_continue(lab: VmLab, vm: Machine) -> None:
    assert lab.call("VM.pause", vmID=vm.id) == {"vmList": {}}
    assert lab.stats(vm.id)["status"] == "Paused"
    assert lab.stats(vm.id)["pauseCode"] == "NOERR"
    vm.guest.send("true")
    with pytest.raises(TimeoutError):
        vm.guest.line(1.0)
    assert lab.call("VM.cont", vmID=vm.id) == {"vmList": {}}
    assert vm.guest.line() == "=0"
    info = lab.call("VM.getInfo", vmID=vm.id)
    assert (info["vmId"], info["status"], info["vmName"]) == (vm.id, "Up", "tiny")
    assert f"<uuid>{vm.id}</uuid>" in info["xml"]


def test_a_vm_is_ended(lab: VmLab) -> None:
    """Its image is given up; it is down until it is forgotten, and then unknown."""
    before = lab.call("Host.getStats")["vmCount"]
    short = lab.machine("ended")
    link = lab.agent.dir / "run" / "storage" / lab.world.main / short.disks[0].image
    assert link.is_symlink()
    lab.wait(lambda: lab.call("Host.getStats")["vmCount"] == before + 1, "it to be counted")
    lab.call("VM.destroy", vmID=short.id)
    assert lab.call("Host.getStats")["vmCount"] == before
    assert not link.is_symlink()
    for verb in ("VM.destroy", "VM.pause", "VM.cont", "VM.reset", "VM.getInfo"):
        lab.fails(1, verb, vmID=short.id)
    again = lab.machine("again")
    link = lab.agent.dir / "run" / "storage" / lab.world.main / again.disks[0].image
    assert lab.stats(again.id)["status"] == "Paused"
    lab.call("VM.reset", vmID=again.id)  # which ends these guests: on_reboot is destroy
    lab.wait(lambda: lab.call("Host.getStats")["vmCount"] == before, "its end to be noticed")
    for verb in ("VM.pause", "VM.cont", "VM.reset", "VM.getInfo"):
        lab.fails(6, verb, vmID=again.id)
    assert link.is_symlink()
    lab.call("VM.destroy", vmID=again.id)
    assert not link.is_symlink()
    lab.fails(1, "VM.destroy", vmID=again.id)


# -- freeze and thaw -------------------------------------------------------------------------


def test_freeze_and_thaw(lab: VmLab, vm: Machine) -> None:
    lab.call("VM.freeze", vmID=vm.id)
    assert is_frozen(vm)
    time.sleep(0.3)
    assert 0.2 < float(lab.stats(vm.id)["freezeAge"]) < LIMIT
    lab.fails(76, "VM.freeze", vmID=vm.id)  # and it is still frozen
    assert is_frozen(vm)
    lab.call("VM.thaw", vmID=vm.id)
    assert "freezeAge" not in lab.stats(vm.id)
    assert writes(vm)
    lab.call("VM.thaw", vmID=vm.id)  # once more does no harm


def test_unknown_vm(lab: VmLab) -> None:
    for verb in ("VM.freeze", "VM.thaw", "VM.getStats"):
        vm = str(uuid.uuid4())
        assert vm in lab.fails(1, verb, vmID=vm)


def test_agent_that_was_never_there(lab: VmLab, paused: Machine) -> None:
    paused.guest.domain.resume()
    try:
        started = time.monotonic()
        for verb in ("VM.freeze", "VM.thaw"):
            assert "agent" in lab.fails(19, verb, vmID=paused.id)
        assert time.monotonic() - started < 2
        assert "freezeAge" not in lab.stats(paused.id)
    finally:
        paused.guest.domain.suspend()


def test_vm_that_is_paused(lab: VmLab, paused: Machine) -> None:
    """Nobody is there to freeze anything."""
    lab.fails(76, "VM.freeze", vmID=paused.id)
    lab.fails(77, "VM.thaw", vmID=paused.id)
    assert "freezeAge" not in lab.stats(paused.id)


def test_vm_without_a_channel_for_an_agent(lab: VmLab) -> None:
    bare = lab.machine("bare", agent=False)
    bare.guest.domain.resume()
    lab.fails(76, "VM.freeze", vmID=bare.id)
    lab.fails(77, "VM.thaw", vmID=bare.id)
    assert "freezeAge" not in lab.stats(bare.id)
    bare.guest.destroy()


def test_agent_that_hangs(lab: VmLab, vm: Machine) -> None:
    """The verb answers in time, and what its agent does later is undone."""
    vm.guest.run("kill -STOP $(pidof qemu-ga)")
    started = time.monotonic()
    lab.fails(19, "VM.freeze", vmID=vm.id)
    assert time.monotonic() - started < BOUND
    assert float(lab.stats(vm.id)["freezeAge"]) > 0  # it may freeze at any time
    assert lab.call("Host.getVMList", onlyUUID=True)
    vm.guest.run("kill -CONT $(pidof qemu-ga)")
    lab.wait(lambda: "freezeAge" not in lab.stats(vm.id), "the guest to be thawed")
    assert writes(vm)


def test_agent_that_dies_while_the_guest_is_frozen(lab: VmLab, vm: Machine) -> None:
    lab.call("VM.freeze", vmID=vm.id)
    vm.guest.stop_agent()
    lab.fails(19, "VM.thaw", vmID=vm.id)
    lab.fails(19, "VM.freeze", vmID=vm.id)  # which does not mean that it is thawed
    assert is_frozen(vm)
    vm.guest.start_agent()
    lab.wait(lambda: "freezeAge" not in lab.stats(vm.id), "the guest to be thawed")
    assert writes(vm)


def test_guard_thaws_what_nobody_thaws(lab: VmLab, vm: Machine) -> None:
    host = lab.agent.host("engine", 1)
    try:
        host.vds.call("Host.ping2", {})
        lab.call("VM.freeze", vmID=vm.id)
        lab.wait(lambda: "freezeAge" not in lab.stats(vm.id), "the guard", 3 * LIMIT)
        assert writes(vm)
        name = f"|virt|VM_thawed|{vm.id}"
        lab.wait(lambda: name in dict(host.events), "an event")
        facts = dict(host.events)[name][vm.id]
        assert float(facts["frozenFor"]) >= LIMIT
        assert "nobody thawed it" in facts["reason"]
        lab.call("VM.thaw", vmID=vm.id)  # the caller comes at last
    finally:
        host.close()


def test_guest_that_thaws_by_itself_is_told(lab: VmLab, vm: Machine) -> None:
    host = lab.agent.host("engine", 1)
    try:
        host.vds.call("Host.ping2", {})
        lab.call("VM.freeze", vmID=vm.id)
        vm.guest.run("fsfreeze --unfreeze /mnt/vda; fsfreeze --unfreeze /mnt/vdb")
        lab.call("VM.thaw", vmID=vm.id)
        name = f"|virt|VM_thawed|{vm.id}"
        lab.wait(lambda: name in dict(host.events), "an event")
        assert "by itself" in dict(host.events)[name][vm.id]["reason"]
    finally:
        host.close()


# -- agents that refuse ----------------------------------------------------------------------


@contextlib.contextmanager
def other_agent(vm: Machine, options: str) -> Iterator[None]:
    """The guest's agent runs with other options."""
    vm.guest.stop_agent()
    vm.guest.start_agent(options)
    try:
        yield
    finally:
        vm.guest.stop_agent()
        vm.guest.start_agent()


def test_agent_that_may_not_freeze(lab: VmLab, vm: Machine) -> None:
    """Its guest does not support it: nobody tries to thaw it for ever."""
    with other_agent(vm, "-b guest-fsfreeze-freeze,guest-fsfreeze-thaw"):
        assert "has been disabled" in lab.fails(75, "VM.freeze", vmID=vm.id)
        assert "freezeAge" not in lab.stats(vm.id)
        assert not is_frozen(vm)
        lab.fails(75, "VM.thaw", vmID=vm.id)
        assert "freezeAge" not in lab.stats(vm.id)


HOOK = "/run/hook"


def hook(vm: Machine, fails: str) -> str:
    """The option of a hook that fails when it is called so."""
    vm.guest.write_script(HOOK, f"[ $1 != {fails} ]")
    return f"-F{HOOK}"


def test_hook_of_the_guest_that_fails_at_the_freeze(lab: VmLab, vm: Machine) -> None:
    with other_agent(vm, hook(vm, "freeze")):
        assert "hook" in lab.fails(76, "VM.freeze", vmID=vm.id)
        assert not is_frozen(vm)
        lab.wait(lambda: "freezeAge" not in lab.stats(vm.id), "the guard to be sure of it")


def test_hook_of_the_guest_that_fails_at_the_thaw(lab: VmLab, vm: Machine) -> None:
    """Its file systems are thawed all the same; the guard goes on until the guest says so."""
    with other_agent(vm, hook(vm, "thaw")):
        lab.call("VM.freeze", vmID=vm.id)
        assert "hook" in lab.fails(77, "VM.thaw", vmID=vm.id)
        assert not is_frozen(vm)
        assert "freezeAge" in lab.stats(vm.id)
    lab.wait(lambda: "freezeAge" not in lab.stats(vm.id), "the guard")


# Answers as the agent of a Windows guest that was frozen for more than ten seconds.
WINDOWS = """
exec 3<>"$1"
while :; do
    while read -r line <&3; do
        case $line in
        *guest-sync*) id=${line##*:}; say="{\\"return\\": ${id%%[!0-9]*}}" ;;
        *fsfreeze-freeze*) say='{"return": 2}' ;;
        *fsfreeze-thaw*) say='{"error": {"class": "GenericError", "desc":
            "cannot hold writes: fsfreeze is limited up to 10 seconds: "}}' ;;
        *) say='{"return": {}}' ;;
        esac
        echo $say >&3
    done
    sleep 0.1
done
"""


def test_windows_that_thawed_by_itself(lab: VmLab, vm: Machine) -> None:
    """Who froze it is told, and so is who has a snapshot of it."""
    host = lab.agent.host("engine", 1)
    vm.guest.stop_agent()
    vm.guest.write_script("/run/windows", WINDOWS)
    vm.guest.run(f"/run/windows {AGENT_PORT} & windows=$!")
    try:
        host.vds.call("Host.ping2", {})
        lab.wait(lambda: freezes(lab, vm), "the agent to answer")
        lab.call("VM.thaw", vmID=vm.id)
        name = f"|virt|VM_thawed|{vm.id}"
        lab.wait(
            lambda: any(
                method == name and "by itself" in facts[vm.id]["reason"]
                for method, facts in host.events
            ),
            "an event",
        )
        assert "freezeAge" not in lab.stats(vm.id)
        found = end(lab, ask(lab, vm))
        assert found["status"] == "done", found
        assert "thawed by itself" in found["description"]
        for disk in vm.disks:
            follow(lab, vm, disk)
    finally:
        vm.guest.run("kill $windows; sleep 0.3")
        vm.guest.start_agent()
        host.close()


def freezes(lab: VmLab, vm: Machine) -> bool:
    try:
        lab.call("VM.freeze", vmID=vm.id)
    except RemoteError as error:
        if error.code != 19:
            raise
        return False
    return True


# -- libvirt and the agent come and go -------------------------------------------------------


def test_libvirtd_is_killed_while_a_guest_is_frozen(lab: VmLab, vm: Machine) -> None:
    lab.call("VM.freeze", vmID=vm.id)
    lab.libvirtd.kill_daemon()
    for verb in ("VM.thaw", "VM.freeze", "VM.getStats"):
        assert "try again" in lab.fails(59, verb, vmID=vm.id)
    for verb in ("Host.getVMList", "Host.getAllVmStats", "Host.dumpxmls"):
        lab.fails(59, verb)
    assert lab.call("Host.getStats")["vmCount"] == 2  # nothing was heard of their end
    lab.libvirtd.start_daemon()
    lab.guests.reconnect()
    lab.wait_libvirt()
    lab.wait(lambda: "freezeAge" not in lab.stats(vm.id), "the thaw that had failed")
    assert writes(vm)


def test_libvirtd_that_hangs(lab: VmLab, vm: Machine) -> None:
    lab.libvirtd.signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        lab.fails(59, "VM.getStats", vmID=vm.id)
        assert time.monotonic() - started < BOUND
        lab.call("Host.ping2")
        lab.wait(lambda: _seconds(lab, vm) < 0.5, "the connection to be given up")
    finally:
        lab.libvirtd.signal(signal.SIGCONT)
    lab.wait_libvirt()
    assert lab.stats(vm.id)["status"] == "Up"


def _seconds(lab: VmLab, vm: Machine) -> float:
    """How long a verb takes to say that libvirt is not there."""
    started = time.monotonic()
    lab.fails(59, "VM.getStats", vmID=vm.id)
    return time.monotonic() - started


def test_libvirtd_is_killed_under_load(lab: VmLab, vm: Machine) -> None:
    """Every answer is right, or an error that says: try again."""
    wrong: list[object] = []
    end = threading.Event()

    def ask() -> None:
        with Client.dev(str(lab.agent.dir)) as client:
            while not end.is_set():
                try:
                    (stats,) = client.call("VM.getStats", {"vmID": vm.id})
                    if stats["status"] != "Up":
                        wrong.append(stats)
                except RemoteError as error:
                    if error.code != 59:
                        wrong.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            time.sleep(0.5)
            lab.restart_libvirtd()
            lab.wait_libvirt()
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_agent_is_killed_between_freeze_and_thaw(lab: VmLab, vm: Machine) -> None:
    """The next one knows; its caller may still thaw, or the guard does."""
    lab.call("VM.freeze", vmID=vm.id)
    lab.world.restart()
    assert float(lab.stats(vm.id)["freezeAge"]) > 0
    lab.wait(lambda: "freezeAge" not in lab.stats(vm.id), "the guard", 3 * LIMIT)
    assert writes(vm)


def test_agent_is_killed_while_the_guest_freezes(lab: VmLab, vm: Machine) -> None:
    """Nobody knows what became of it: it is thawed."""
    vm.guest.run("kill -STOP $(pidof qemu-ga)")
    freeze = threading.Thread(target=lambda: _quietly(lab, vm))
    freeze.start()
    lab.wait(lambda: list(lab.agent.dir.glob("run/frozen/*.json")), "the freeze to begin")
    time.sleep(0.3)
    lab.agent.kill()
    freeze.join()
    vm.guest.run("kill -CONT $(pidof qemu-ga)")
    lab.agent.start()
    lab.world.client = Client.dev(str(lab.agent.dir))
    lab.world.settle()
    lab.wait(lambda: "freezeAge" not in lab.stats(vm.id), "the guest to be thawed")
    assert writes(vm)


def _quietly(lab: VmLab, vm: Machine) -> None:
    with Client.dev(str(lab.agent.dir)) as client:
        try:
            client.call("VM.freeze", {"vmID": vm.id})
        except (RemoteError, OSError):
            return
