# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.create: disks of every kind, what cannot be started, and an agent or a libvirtd that goes away
in the middle.  Most VMs here never run: QEMU opens all their disks without that."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.guests.guest import Disk, Plan
from functional.nbd import NbdServer
from functional.vm_create import (
    create,
    fails,
    held,
    hint,
    metadata,
    nothing_stays,
    obey,
    plan,
    record,
    settled,
    start,
    state,
    xml,
)
from functional.vm_disks import CDROM, SCSI, element, pdiv, plug, prepared, records, source
from functional.vm_lab import MIB, Machine, VmDisk, VmLab
from functional.world import new_id
from vdsm_storage.rpc.client import Client, RemoteError

BOUND = 60.0  # seconds within which everything must have answered


@pytest.fixture(autouse=True)
def let_go(lab: VmLab) -> Iterator[None]:
    with nothing_stays(lab):
        yield


def paused(lab: VmLab, wanted: Plan, disks: tuple[VmDisk, ...] = (), **more: Any) -> Machine:
    return start(lab, wanted, disks, launchPaused=True, **more)


def destroy(lab: VmLab, vm: str) -> None:
    lab.call("VM.destroy", vmID=vm)
    lab.fails(1, "VM.getStats", vmID=vm)


def driver(machine: Machine, target: str) -> str:
    found = element(machine, target)
    assert found is not None
    where = found.find("driver")
    return "" if where is None else where.get("type", "")


# -- disks -----------------------------------------------------------------------------------


def test_disks_of_every_kind(lab: VmLab, workdir: Path) -> None:
    by_id, by_path, below = (lab.disk(filled=False) for _ in range(3))
    below.volumes.append(lab.new_leaf(below))
    shown = VmDisk(below.image, below.volumes[:1])
    plain, disc = workdir / "plain.img", workdir / "disc.iso"
    for path in (plain, disc):
        path.write_bytes(b"\0" * MIB)
    real = f"{lab.agent.dir}/run/storage/{lab.world.main}/{by_path.image}/{by_path.leaf}"
    with NbdServer(workdir, MIB) as server:
        network = (
            "<disk type='network' device='disk'><driver name='qemu' type='raw' cache='none'/>"
            f"<source protocol='nbd'><host transport='unix' socket='{server.socket}'/></source>"
            "<target dev='sda' bus='scsi'/></disk>"
        )
        cd = CDROM.replace("<target", f"<source file='{disc}'/><target").replace("hdc", "hdd")
        drives = (
            Disk(hint(lab, by_id), "raw"), Disk(real, "raw"), Disk(str(plain), "raw"),
            Disk(hint(lab, shown), "raw", more="<readonly/>"), Disk(hint(lab, shown), "raw"),
        )  # fmt: skip
        told = (
            record(lab, by_id, "vda") + record(lab, shown, "vdd")
            + record(lab, shown, "vde", "transient")
        )  # fmt: skip
        devices = SCSI + network + CDROM + cd
        wanted = Plan("kinds", drives, devices=devices, metadata=metadata(told))
        machine = paused(lab, wanted, (by_id, by_path, below))
        for target, disk in (("vda", by_id), ("vdb", by_path), ("vdd", shown)):
            assert source(machine, target).endswith(f"/{disk.image}/{disk.leaf}")
            assert driver(machine, target) == "qcow2"  # as the storage says, not the request
            ids = {key: value for key, value in pdiv(lab, disk).items() if key != "poolID"}
            assert ids.items() <= records(machine)[target].items()
        own = Path(source(machine, "vde"))
        assert own.parent == lab.agent.dir / "state" / "transient" / machine.id
        assert source(machine, "vdc") == str(plain)
        assert driver(machine, "vdc") == "raw"
        assert machine.guest.domain.blockInfo("sda")[0] == MIB
        assert (source(machine, "hdc"), source(machine, "hdd")) == ("", str(disc))
        images = {by_id.image, by_path.image, below.image}
        assert set(held(lab)[machine.id]) == images
        assert images <= prepared(lab)
        disks = lab.stats(machine.id)["disks"]
        assert (disks["vda"]["imageID"], disks["vdb"]["imageID"]) == (by_id.image, by_path.image)
        plugged = lab.disk(filled=False)
        plug(lab, machine, plugged)  # what else is done to it works on
        assert plugged.image in held(lab)[machine.id]
        destroy(lab, machine.id)
        assert not own.parent.exists()
    assert not (images | {plugged.image}) & prepared(lab)


def test_guest_runs_until_it_ends(lab: VmLab) -> None:
    """Told when it comes up and, shut down by its agent, goes; Down is known until VM.destroy."""
    disk = lab.disk(filled=True)
    lab.call("Image.teardown", **lab.world.ids(disk.image, disk.leaf))
    host = lab.agent.host("engine", 1)
    try:
        host.vds.call("Host.ping2", {})
        wanted = plan(lab, "runs", [disk], boots=True)
        machine = start(lab, wanted, [disk])
        assert wanted.id in lab.call("Host.dumpxmls")
        machine.guest.wait_ready()
        machine.guest.run("echo here >/mnt/vda/file; sync; umount /mnt/vda")
        obey(machine)
        began = time.monotonic()
        lab.call("VM.shutdown", vmID=machine.id, delay=1, timeout=30, message="over", force=True)
        lab.wait(lambda: state(lab, machine.id).get("status") == "Down", "the guest to end")
        assert time.monotonic() - began >= 1.0
        found = state(lab, machine.id)
        assert (found["exitCode"], found["exitReason"]) == (0, 7)  # in order; by its user
        log = (lab.agent.dir / "agent.log").read_text()
        assert "its guest agent is asked" in log
        assert "is pressed" not in log
        name = f"|virt|VM_status|{machine.id}"

        def told() -> list[tuple[str, int | None]]:
            rows = [params.get(machine.id, {}) for method, params in host.events if method == name]
            return [(row["status"], row.get("exitReason")) for row in rows]

        lab.wait(lambda: len(told()) == 2, "both events")
        assert told() == [("Up", None), ("Down", 7)]
    finally:
        host.close()
    lab.wait(lambda: disk.image not in prepared(lab), "the image to be let go")
    again = start(lab, plan(lab, "runs", [disk], id=machine.id), [disk], launchPaused=True)
    again.guest.destroy()  # from outside
    lab.wait(lambda: state(lab, machine.id).get("status") == "Down", "the VM to end")
    assert state(lab, machine.id)["exitReason"] == 6
    lab.world.restart()
    assert state(lab, machine.id)["exitReason"] == 6
    destroy(lab, machine.id)


# -- what does not start -----------------------------------------------------------------------


def test_requests_that_cannot_be_meant(lab: VmLab) -> None:
    """Nothing is begun: no VM is listed, nothing is touched."""
    disk = lab.disk(filled=False)
    wanted = plan(lab, "bad", [disk])
    good = xml(lab, wanted)
    secret = {"uuid": new_id(), "usageType": "volume", "password": "=no base64="}

    def refused(code: int, text: str | None = None, vm: str = wanted.id, **more: Any) -> str:
        params = {"vmId": wanted.id, **({} if text == "" else {"xml": text or good}), **more}
        message = lab.fails(code, "VM.create", vmID=vm, vmParams=params)
        assert state(lab, wanted.id) == {}
        assert disk.image not in prepared(lab)
        return message

    assert "vmParams.xml" in refused(9, "")
    assert "document type" in refused(9, "<!DOCTYPE x><domain/>")
    refused(9, good[:-10])
    assert "<domain>" in refused(9, "<disk/>")
    assert "vmID" in refused(9, good.replace(wanted.id, new_id()))
    assert "vmID" in refused(9, vm=new_id())
    assert "<name>" in refused(9, good.replace("<name>bad</name>", ""))
    assert "target" in refused(9, good.replace("<target dev='vda'", "<target"))
    assert "no UUID" in refused(9, good.replace(disk.image, "../../etc"))
    two = xml(lab, plan(lab, "bad", [disk, disk], id=wanted.id))
    assert "same image" in refused(9, two)
    assert "target vda" in refused(9, two.replace("'vdb'", "'vda'"))
    none = xml(lab, Plan("bad", [Disk("")], id=wanted.id))
    assert "neither" in refused(9, none)
    for key in ("memoryDumpVolume", "_X_tpmdata"):
        assert "not built" in refused(9, **{key: "x"})
    message = refused(72, secrets=[secret])
    assert "base64" in message
    assert "=no base64=" not in message
    refused(72, secrets=[{**secret, "password": "eA=="}] * 2)


def test_disks_that_cannot_be_used(lab: VmLab) -> None:
    """The VM is Down, with the reason; what was prepared for it is let go."""
    good, other = lab.disk(filled=False), lab.disk(filled=False)
    missing = VmDisk(other.image, [new_id()])
    assert missing.leaf in fails(lab, plan(lab, "missing", [good, missing]))
    nowhere = xml(lab, (wanted := plan(lab, "nowhere", [good, other])))
    domain = new_id()
    second = nowhere.rindex(lab.world.main + "</ovirt-vm:domainID>")
    nowhere = nowhere[:second] + nowhere[second:].replace(lab.world.main, domain, 1)
    assert domain in fails(lab, wanted, nowhere)
    base = VmDisk(other.image, [other.leaf])
    other.volumes.append(lab.new_leaf(other))
    assert "read-only" in fails(lab, plan(lab, "base", [good, base]))
    path = f"{lab.world.places[lab.world.main].spec}/{lab.world.main}/images/{other.image}"
    argv = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "/etc/hostname", "-F", "raw"]
    subprocess.run([*argv, f"{path}/{other.leaf}"], check=True, timeout=60)
    assert "/etc/hostname" in fails(lab, plan(lab, "header", [good, other]))
    assert not {good.image, other.image} & prepared(lab)


def test_vm_that_libvirt_does_not_start(lab: VmLab) -> None:
    disk = lab.disk(filled=False)
    wanted = plan(lab, "refused", [disk], devices="<hostdev mode='subsystem' type='usb'/>")
    assert "hostdev" in fails(lab, wanted)
    address = "<address type='pci' bus='0x17'/>"
    fails(lab, plan(lab, "refused", [disk], more=address))
    gone = plan(lab, "gone", [disk])
    drives = (*gone.disks, Disk("/nowhere/at/all", "raw"))
    wanted = Plan(gone.name, drives, metadata=gone.metadata)
    assert "/nowhere/at/all" in fails(lab, wanted)
    machine = paused(lab, plan(lab, "refused", [disk], id=wanted.id), (disk,))  # it is free again
    destroy(lab, machine.id)


# -- twice, and meanwhile ----------------------------------------------------------------------


def attempt(lab: VmLab, verb: str, params: dict[str, Any]) -> tuple[threading.Thread, list[int]]:
    """In a thread; the list gets the code of the answer, 0 for success."""
    codes: list[int] = []

    def run() -> None:
        with Client.dev(str(lab.agent.dir), timeout=BOUND) as client:
            try:
                client.call(verb, params)
                codes.append(0)
            except RemoteError as error:
                codes.append(error.code)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, codes


def test_same_vm_twice(lab: VmLab) -> None:
    disk = lab.disk(filled=False)
    wanted = plan(lab, "twice", [disk])
    params = {"vmId": wanted.id, "xml": xml(lab, wanted), "launchPaused": True}
    request = {"vmID": wanted.id, "vmParams": params}
    attempts = [attempt(lab, "VM.create", request) for _ in range(4)]
    for thread, _codes in attempts:
        thread.join(BOUND)
    assert sorted(codes[0] for _thread, codes in attempts) == [0, 4, 4, 4]
    assert settled(lab, wanted.id)["status"] == "Paused"
    lab.fails(4, "VM.create", **request)
    lab.world.restart()
    lab.wait_libvirt()
    lab.fails(4, "VM.create", **request)
    destroy(lab, wanted.id)
    other = lab.machine("other", disks=0)  # that somebody else started
    params = {"vmId": other.id, "xml": xml(lab, other.guest.plan)}
    lab.fails(4, "VM.create", vmID=other.id, vmParams=params)
    assert state(lab, other.id)["status"] == "Paused"
    other.guest.destroy()


def stopped(lab: VmLab, point: str, request: dict[str, Any]) -> Any:
    """The agent stands still at a point of a VM.create; its process."""
    lab.world.restart(f"stop {point}")
    process = lab.agent.process
    assert process is not None
    attempt(lab, "VM.create", request)
    where = Path(f"/proc/{process.pid}/stat")
    lab.wait(lambda: where.read_text().rpartition(")")[2].split()[0] == "T", "the agent to stop")
    return process


@pytest.mark.parametrize("point", ["begun", "started"])
def test_destroyed_while_it_starts(lab: VmLab, point: str) -> None:
    disk = lab.disk(filled=False)
    wanted = plan(lab, "short", [disk])
    params = {"vmId": wanted.id, "xml": xml(lab, wanted)}
    process = stopped(lab, f"vm.create:{point}", {"vmID": wanted.id, "vmParams": params})
    thread, codes = attempt(lab, "VM.destroy", {"vmID": wanted.id})
    time.sleep(0.3)
    process.send_signal(signal.SIGCONT)
    thread.join(BOUND)
    assert codes == [0]
    assert state(lab, wanted.id) == {}
    assert wanted.name not in [domain.name() for domain in lab.guests.connection.listAllDomains()]
    lab.world.restart()
    assert state(lab, wanted.id) == {}


@pytest.mark.parametrize("point", ["started", "resumed"])
def test_vm_ends_while_it_starts(lab: VmLab, point: str) -> None:
    """It did not start; or it did, and was lost, or ended, when libvirt's event comes later."""
    reasons = (3,) if point == "started" else (2, 6)
    disk = lab.disk(filled=False)
    wanted = plan(lab, "brief", [disk])
    params = {"vmId": wanted.id, "xml": xml(lab, wanted)}
    process = stopped(lab, f"vm.create:{point}", {"vmID": wanted.id, "vmParams": params})
    lab.guests.adopt(wanted).destroy()
    process.send_signal(signal.SIGCONT)
    settled(lab, wanted.id)
    lab.wait(lambda: state(lab, wanted.id)["status"] == "Down", "the VM to be known as down")
    assert state(lab, wanted.id)["exitReason"] in reasons
    lab.wait(lambda: disk.image not in prepared(lab), "the image to be let go")
    lab.world.restart()
    lab.call("VM.destroy", vmID=wanted.id)


@pytest.mark.parametrize("how", ["stopped", "killed", "stopped, and the agent killed"])
def test_libvirt_goes_away_meanwhile(lab: VmLab, how: str) -> None:
    """The VM runs and its image is held, or there is neither; a late start is undone."""
    disk = lab.disk(filled=False)
    wanted = plan(lab, "late", [disk])
    params = {"vmId": wanted.id, "xml": xml(lab, wanted)}
    process = stopped(lab, "vm.create:prepared", {"vmID": wanted.id, "vmParams": params})
    lab.libvirtd.signal(signal.SIGSTOP)
    process.send_signal(signal.SIGCONT)
    time.sleep(4.0 if how != "stopped, and the agent killed" else 1.0)
    if how == "killed":
        lab.restart_libvirtd()
    elif how == "stopped":  # its connection was given up meanwhile
        lab.libvirtd.signal(signal.SIGCONT)
    else:  # and told to start the VM: it may do so when it goes on
        lab.world.client.close()
        lab.agent.kill()
        lab.agent.start()
        lab.libvirtd.signal(signal.SIGCONT)
        lab.world.client = Client.dev(str(lab.agent.dir), timeout=180.0)
        lab.world.settle()
    lab.wait_libvirt()
    lab.guests.reconnect()
    settled(lab, wanted.id)  # a start that comes too late may be seen for a moment

    def agrees() -> bool:
        names = [domain.name() for domain in lab.guests.connection.listAllDomains()]
        runs = wanted.name in names
        return runs == (disk.image in prepared(lab)) == (state(lab, wanted.id)["status"] == "Up")

    lab.wait(agrees, "libvirt and what is held to agree", BOUND)
    lab.world.restart()
    lab.wait_libvirt()
    lab.wait(agrees, "a start that comes now to be undone", BOUND)
    lab.call("VM.destroy", vmID=wanted.id)
    assert state(lab, wanted.id) == {}


STEPS = ("begun", "secrets", "prepared", "started", "resumed")


def test_agent_killed_at_every_step(lab: VmLab) -> None:
    """At restart the VM runs and its image is held, or nothing is left."""
    disk = lab.disk(filled=False)
    wanted = plan(lab, "walk", [disk])
    secret = {"uuid": new_id(), "usageType": "volume", "password": "d2Fsaw=="}
    lab.world.restart(f"vm.create:{STEPS[0]}")
    for step, following in zip(STEPS, [*STEPS[1:], ""], strict=True):
        with contextlib.suppress(RemoteError, OSError):
            create(lab, wanted, secrets=[secret])
        lab.agent.wait_dead()
        for path in (lab.agent.dir / "state").rglob("*"):  # neither XML nor secrets
            data = path.read_bytes() if path.is_file() else b""
            assert b"<domain" not in data, path
            assert secret["password"].encode() not in data, path
        lab.world.restart(f"vm.create:{following}" if following else "")
        lab.wait_libvirt()
        runs = step in ("started", "resumed")
        status = settled(lab, wanted.id)["status"]
        assert status == ("Up" if runs else "Down"), step
        secrets = [one.UUIDString() for one in lab.guests.connection.listAllSecrets()]
        assert (disk.image in prepared(lab)) == runs, step
        assert (wanted.id in held(lab)) == runs, step
        assert (secret["uuid"] in secrets) == runs, step
        destroy(lab, wanted.id)
        lab.world.settle()
        assert lab.guests.connection.listAllSecrets() == [], step


def test_agent_dies_before_it_begins(lab: VmLab) -> None:
    """What was promised and not begun is not waited for for ever."""
    path = lab.agent.dir / "run" / "launches"
    vm = new_id()
    lab.world.client.close()
    lab.agent.kill()
    row = f'{{"vm": "{vm}", "name": "never", "status": "WaitForLaunch", "exit": {{}}}}'
    (path / f"{vm}.json").write_text(row)
    lab.world.restart()
    found = state(lab, vm)
    assert (found["status"], found["exitReason"]) == ("Down", 1)
    destroy(lab, vm)
    assert not (path / f"{vm}.json").exists()
