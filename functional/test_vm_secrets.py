# SPDX-License-Identifier: GPL-2.0-or-later
"""Secrets that come with a VM: libvirt has them as long as the VM runs here, and no longer."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.guests.guest import Plan
from functional.processes import AgentProcess
from functional.vm_create import fails, nothing_stays, plan, start, state, xml
from functional.vm_disks import source
from functional.vm_lab import SIZE, Machine, VmDisk, VmLab, vm_lab
from functional.vm_work import end
from functional.world import COW, RAW, new_id
from vdsm_storage.rpc.client import Client

KEY = "Grauer-Wolf-3391-am-Fluss"  # opens the disk
ENCODED = base64.b64encode(KEY.encode()).decode()
SECRET = "6b1f7c52-9f0b-4f0e-8f35-2f3e8a1d6b10"
OTHER = "6b1f7c52-9f0b-4f0e-8f35-2f3e8a1d6b11"


def secret(uuid: str = SECRET, value: str = KEY, kind: str = "volume") -> dict[str, str]:
    password = base64.b64encode(value.encode()).decode()
    return {"uuid": uuid, "usageType": kind, "password": password}


def key(uuid: str = SECRET) -> str:
    return (
        f"<encryption format='luks'><secret type='passphrase' uuid='{uuid}'/></encryption>"
    )


@pytest.fixture(scope="module")
def lab(
    workdir: Path, start_agent: Callable[..., AgentProcess], make_server: Callable[[str], Any]
) -> Iterator[VmLab]:
    settings = {"secrets__luks_iteration_time": "20", "secrets__check_interval": "1"}
    with vm_lab(workdir, start_agent, make_server, **settings) as one:
        yield one


@pytest.fixture(scope="module")
def disk(lab: VmLab) -> VmDisk:
    """A snapshot on a volume, both encrypted; the secret is not registered any more."""
    made = VmDisk(new_id(), [])
    add_layer(lab, made, COW)
    add_layer(lab, made, COW)
    return made


def add_layer(lab: VmLab, disk: VmDisk, form: int) -> None:
    registered = {**secret(), "usageID": "ovirt/for-a-moment"}
    lab.call("Host.registerSecrets", secrets=[registered])
    more = {"srcImgUUID": disk.image, "srcVolUUID": disk.leaf} if disk.volumes else {}
    disk.volumes.append(
        lab.world.create(
            disk.image, volFormat=form, size=str(SIZE), secretID=SECRET,
            sequence=len(disk.volumes) + 1, **more,
        )
    )  # fmt: skip
    lab.call("Host.unregisterSecrets", uuids=[SECRET])
    assert usages(lab) == {}


@pytest.fixture(autouse=True)
def let_go(lab: VmLab) -> Iterator[None]:
    """No secret outlives its VM."""
    with nothing_stays(lab):
        yield
    lab.wait(lambda: usages(lab) == {}, "the secrets to go")
    assert not (lab.agent.dir / "run" / "secrets-of-vms.json").exists()


def usages(lab: VmLab) -> dict[str, str]:
    """Of libvirt's secrets, by UUID."""
    return {one.UUIDString(): one.usageID() for one in lab.guests.connection.listAllSecrets()}


OF_VM = {SECRET: f"ovirt/vm/{SECRET}"}


def wanted_plan(lab: VmLab, disk: VmDisk, name: str = "luks") -> Plan:
    return plan(lab, name, [disk], more=key())


def runs(lab: VmLab, disk: VmDisk, name: str = "luks", **more: Any) -> Machine:
    wanted = wanted_plan(lab, disk, name)
    return start(lab, wanted, [disk], launchPaused=True, secrets=[secret()], **more)


def start_again(lab: VmLab) -> None:
    """After an end in order the agent waits to be told of its storage."""
    lab.agent.start()
    world = lab.world
    world.client = Client.dev(str(lab.agent.dir), timeout=180.0)
    for server in world.places.values():
        world.connect_server(server)
    world.connect_pool()
    world.settle()
    lab.wait_libvirt()


def shown(lab: VmLab) -> list[str]:
    """Files and command lines in which the value is, in whichever form."""
    forms = [KEY.encode(), ENCODED.encode(), ENCODED.rstrip("=").encode()]
    found = []
    for top in (lab.agent.dir, lab.libvirtd.directory):
        for path in top.rglob("*"):
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()
                found += [str(path) for form in forms if form in data]
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/cmdline", "rb") as file:
                data = file.read()
        except OSError:
            continue
        found += [f"argv of {number}" for form in forms if form in data]
    return found


def test_disk_opens_with_its_secret(lab: VmLab, disk: VmDisk) -> None:
    machine = runs(lab, disk)
    assert usages(lab) == OF_VM
    assert machine.guest.domain.blockInfo("vda")[0] == SIZE
    assert shown(lab) == []
    # Whoever manages the host's own secrets touches none of a VM.
    lab.call("Host.registerSecrets", secrets=[], clear=True)
    lab.call("Host.unregisterSecrets", uuids=[SECRET])
    assert usages(lab) == OF_VM
    lab.fails(73, "Host.registerSecrets", secrets=[{**secret(), "usageID": "ovirt/mine"}])
    mine = {**secret(new_id()), "usageID": "ovirt/vm/mine"}
    lab.fails(72, "Host.registerSecrets", secrets=[mine])
    assert usages(lab) == OF_VM
    lab.call("VM.destroy", vmID=machine.id)
    assert usages(lab) == {}


def test_disk_on_a_raw_volume(lab: VmLab) -> None:
    """A guest that boots has its data, also when a snapshot has been made since."""
    made = VmDisk(new_id(), [])
    add_layer(lab, made, RAW)
    assert "encrypted" in fails(lab, plan(lab, "raw", [made]), secrets=[secret()])
    place = "bs=4096 seek=7 conv=notrunc,fsync of=/dev/vda"
    for did in (f"echo then | dd {place}", "dd bs=4096 skip=7 count=1 if=/dev/vda | head -n 1"):
        wanted = plan(lab, "raw", [made], boots=True, more=key())
        machine = start(lab, wanted, [made], secrets=[secret()])
        machine.guest.wait_ready()
        said = machine.guest.run(f"({did}) 2>/dev/null")
        lab.call("VM.destroy", vmID=machine.id)
        add_layer(lab, made, COW)
    assert said == "then"


def test_snapshot_of_it(lab: VmLab, disk: VmDisk) -> None:
    """What opens a volume anew finds the secret, here and when the VM is started again."""
    machine = runs(lab, disk)
    leaf = lab.world.create(
        disk.image, volFormat=COW, size=str(SIZE), srcImgUUID=disk.image, srcVolUUID=disk.leaf,
        sequence=3, secretID=SECRET,
    )  # fmt: skip
    drives = [{"domainID": lab.world.main, "imageID": disk.image, "baseVolumeID": disk.leaf,
               "volumeID": leaf}]  # fmt: skip
    job = new_id()
    lab.call("VM.snapshot", vmID=machine.id, snapDrives=drives, jobUUID=job)
    assert end(lab, job)["status"] == "done"
    disk.volumes.append(leaf)
    assert source(machine, "vda").endswith(leaf)
    lab.call("VM.destroy", vmID=machine.id)
    lab.call("VM.destroy", vmID=runs(lab, disk).id)


def test_without_its_secret(lab: VmLab, disk: VmDisk) -> None:
    """Nothing of a VM that does not start stays; no value is in the reason."""
    wanted = wanted_plan(lab, disk)
    assert SECRET in fails(lab, wanted)
    message = fails(lab, wanted, secrets=[secret(value="Some-other-value")])
    assert "Some-other-value" not in message
    assert usages(lab) == {}
    unlocked = plan(lab, "luks", [disk])
    assert "encrypted" in fails(lab, unlocked, secrets=[secret()])
    assert shown(lab) == []


def test_ceph_disk(lab: VmLab) -> None:
    """libvirt has its secret when QEMU is started: it fails for want of a cluster, not of that."""
    network = (
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/>"
        f"<auth username='cinder'><secret type='ceph' uuid='{OTHER}'/></auth>"
        "<source protocol='rbd' name='pool/volume'><host name='127.0.0.1' port='1'/></source>"
        "<target dev='vda' bus='virtio'/></disk>"
    )
    wanted = Plan("ceph", devices=network)
    assert OTHER in fails(lab, wanted)  # no secret
    message = fails(lab, wanted, secrets=[secret(OTHER, kind="ceph")])
    assert OTHER not in message, message
    assert "qemu" in message  # which was started with it


def test_it_outlives_agents_and_libvirtd(lab: VmLab, disk: VmDisk) -> None:
    machine = runs(lab, disk)
    lab.restart_libvirtd()  # which forgets
    lab.wait_libvirt()
    lab.wait(lambda: usages(lab) == OF_VM, "the secret to be defined again")
    lab.world.restart()
    lab.wait_libvirt()
    lab.restart_libvirtd()
    lab.wait(lambda: usages(lab) == OF_VM, "the secret to be defined again")
    lab.world.client.close()
    assert lab.agent.stop() == ""  # in order, which clears all other secrets
    assert usages(lab) == OF_VM
    assert shown(lab) == []
    start_again(lab)
    assert usages(lab) == OF_VM
    lab.call("VM.cont", vmID=machine.id)
    assert state(lab, machine.id)["status"] == "Up"
    machine.guest.destroy()  # from outside
    lab.wait(lambda: usages(lab) == {}, "the secret to go")
    lab.call("VM.destroy", vmID=machine.id)


@pytest.mark.parametrize("keep", [True, False])
def test_vm_ends_while_no_agent_runs(lab: VmLab, disk: VmDisk, keep: bool) -> None:
    """Also where no values are kept: libvirt's is not touched as long as the VM runs."""
    lab.agent.settings["secrets__keep"] = str(keep).lower()
    try:
        lab.world.restart()
        lab.wait_libvirt()
        machine = runs(lab, disk)
        lab.world.restart()
        lab.wait_libvirt()
        lab.call("Host.registerSecrets", secrets=[], clear=True)
        assert usages(lab) == OF_VM
        lab.world.client.close()
        lab.agent.kill()
        machine.guest.destroy()
        assert usages(lab) == OF_VM
        lab.world.restart()
        lab.wait(lambda: usages(lab) == {}, "the secret to go")
        found = state(lab, machine.id)
        assert (found["status"], found["exitReason"]) == ("Down", 9)
        lab.call("VM.destroy", vmID=machine.id)
    finally:
        del lab.agent.settings["secrets__keep"]


def test_two_vms_with_one_secret(lab: VmLab, disk: VmDisk) -> None:
    """It goes with the last; another value for it is refused."""
    first = runs(lab, disk)
    second = Plan("second")
    machine = start(lab, second, launchPaused=True, secrets=[secret()])
    third = Plan("third")
    message = fails(lab, third, secrets=[secret(value="Something-else")])
    assert "another VM has it" in message
    assert usages(lab) == OF_VM
    lab.call("VM.destroy", vmID=first.id)
    assert usages(lab) == OF_VM
    lab.call("VM.destroy", vmID=machine.id)
    assert usages(lab) == {}


def test_secret_that_the_host_has(lab: VmLab) -> None:
    lab.call("Host.registerSecrets", secrets=[{**secret(), "usageID": "ovirt/mine"}])
    wanted = Plan("has")
    assert "registered on this host" in fails(lab, wanted, xml(lab, wanted), secrets=[secret()])
    assert usages(lab) == {SECRET: "ovirt/mine"}
    lab.call("Host.unregisterSecrets", uuids=[SECRET])
