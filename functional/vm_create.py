# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs as engines ask for them: libvirt's XML, with the volumes in the metadata."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from functional.guests.guest import Disk, Plan, definition
from functional.guests.ram import boot
from functional.vm_disks import ENGINE, pdiv, prepared
from functional.vm_lab import Machine, VmDisk, VmLab
from vdsm_storage.rpc.client import RemoteError


def hint(lab: VmLab, disk: VmDisk) -> str:
    """The path that an engine writes; nothing is there on this host."""
    world = lab.world
    return f"/rhev/data-center/{world.pool}/{world.main}/images/{disk.image}/{disk.leaf}"


def record(lab: VmLab, disk: VmDisk, target: str, shared: str = "") -> str:
    ids = {**pdiv(lab, disk), **({"shared": shared} if shared else {})}
    text = "".join(f"<ovirt-vm:{key}>{value}</ovirt-vm:{key}>" for key, value in ids.items())
    return f'<ovirt-vm:device devtype="disk" name="{target}">{text}</ovirt-vm:device>'


def metadata(records: str) -> str:
    return f'<ovirt-vm:vm xmlns:ovirt-vm="{ENGINE}">{records}</ovirt-vm:vm>'


def plan(
    lab: VmLab, name: str, disks: Sequence[VmDisk] = (), *, boots: bool = False, more: str = "",
    **other: Any,
) -> Plan:  # fmt: skip
    """`more` is in every <disk>."""
    records = "".join(
        record(lab, disk, f"vd{'abcdefgh'[number]}") for number, disk in enumerate(disks)
    )
    drives = tuple(Disk(hint(lab, disk), "raw", disk.image, more) for disk in disks)
    ram = boot() if boots else None
    return Plan(name, drives, ram, metadata=metadata(records), **other)


def xml(lab: VmLab, wanted: Plan) -> str:
    return definition(wanted, lab.libvirtd.directory)


def create(lab: VmLab, wanted: Plan, text: str = "", **more: Any) -> Any:
    params = {"vmId": wanted.id, "xml": text or xml(lab, wanted), **more}
    return lab.call("VM.create", vmID=wanted.id, vmParams=params)


def state(lab: VmLab, vm: str) -> dict[str, Any]:
    """As VM.getStats has it; {} for an unknown VM."""
    try:
        return lab.stats(vm)
    except RemoteError as error:
        if error.code not in (1, 6):
            raise
        return {}


def settled(lab: VmLab, vm: str) -> dict[str, Any]:
    """When it is not being started any more."""
    lab.wait(lambda: state(lab, vm).get("status") != "WaitForLaunch", "the VM to start or not")
    return state(lab, vm)


def start(lab: VmLab, wanted: Plan, disks: Sequence[VmDisk] = (), **more: Any) -> Machine:
    """One that comes up; its processors run unless it is `launchPaused`."""
    answer = create(lab, wanted, **more)
    assert (answer["vmId"], answer["vmName"]) == (wanted.id, wanted.name)
    assert answer["status"] == "WaitForLaunch"
    found = settled(lab, wanted.id)
    assert found["status"] == ("Paused" if more.get("launchPaused") else "Up"), found
    return Machine(lab.guests.adopt(wanted), list(disks))


def obey(machine: Machine) -> None:
    """Give a guest what its agent calls to shut down or to reboot."""
    script = (
        "printf '#!/bin/sh\\ncase \"$*\" in *-r*) reboot -f;; *) poweroff -f;; esac\\n' "
        ">/sbin/shutdown; chmod +x /sbin/shutdown"
    )
    machine.guest.run(script)


def fails(lab: VmLab, wanted: Plan, text: str = "", **more: Any) -> str:
    """One that does not start: it is listed as Down until it is destroyed; why."""
    create(lab, wanted, text, **more)
    found = settled(lab, wanted.id)
    assert found["status"] == "Down", found
    assert (found["vmName"], found["exitCode"], found["exitReason"]) == (wanted.name, 1, 3)
    assert found in lab.call("Host.getAllVmStats")
    listed = {vm["vmId"]: vm["status"] for vm in lab.call("Host.getVMList")}
    assert listed[wanted.id] == "Down"
    assert wanted.id not in lab.call("Host.dumpxmls")
    lab.call("VM.destroy", vmID=wanted.id)
    lab.fails(1, "VM.getStats", vmID=wanted.id)
    return str(found["exitMessage"])


def held(lab: VmLab) -> dict[str, list[str]]:
    """What the agent keeps for VMs: images by VM."""
    found = {}
    for path in (lab.agent.dir / "run" / "holdings").glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            found[path.stem] = [volume["image"] for volume in json.loads(path.read_text())]
    return found


@contextlib.contextmanager
def nothing_stays(lab: VmLab) -> Iterator[None]:
    """What is prepared, held and listed is as it was."""
    before = prepared(lab), held(lab), set(lab.call("Host.getVMList", onlyUUID=True))
    yield

    def now() -> tuple[set[str], dict[str, list[str]], set[str]]:
        return prepared(lab), held(lab), set(lab.call("Host.getVMList", onlyUUID=True))

    lab.wait_libvirt()
    lab.world.settle()
    lab.wait(lambda: now() == before, "all to be let go", 30.0)
