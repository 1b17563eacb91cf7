# SPDX-License-Identifier: GPL-2.0-or-later
"""A running VM whose disks are logical volumes of a real device-mapper.

Its guest is a boot sector that writes and tells what it wrote: a system needs minutes to boot where
emulation runs in emulation.  One that has a system, with an agent, boots for the last test; what
needs that is tested at length without device-mapper (functional/test_vm_*.py).  The tests go on
from each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator

import libvirt_qemu
import pytest

from functional.engine.host import FCP, StorageServer
from functional.guests import writer
from functional.guests.guest import Disk, Plan
from functional.guests.libvirtd import Libvirtd
from functional.lab.inner import dm
from functional.lab.inner.dm import Layer, Loops, Mapped
from functional.lab.inner.tool import run
from functional.merge_lab import (
    HMP,
    INNER,
    above,
    ask,
    check_chain,
    finish,
    jobs,
    outcome,
    qemu_io,
)
from functional.processes import AgentProcess
from functional.vm_disks import SCSI, pdiv, plug, unplug
from functional.vm_lab import Machine, VmDisk, VmLab
from functional.vm_work import drive, end, path_of, read_log
from functional.world import COW, RAW, World, new_id

pytestmark = [
    pytest.mark.dm, pytest.mark.vms, pytest.mark.slow, pytest.mark.timeout(900)
]  # fmt: skip

MIB, GIB = 1024**2, 1024**3
CAPACITY = 512 * MIB  # of the guest's disk; each of its volumes begins with less
NUMBERS = 24 * MIB  # where the guest writes
USED = 26 * MIB  # nothing is written beyond
PIECE = 65536


class Running:
    """The VM, and what its disk has beside the guest's numbers."""

    def __init__(self, lab: VmLab) -> None:
        self.lab = lab
        self.content = bytearray(USED)
        self.serial = lab.libvirtd.directory / "numbers"
        self.disk = VmDisk(new_id(), [])
        for number in range(2):
            self._add_layer(number)
        drives = (Disk(lab.prepare(self.disk), image=self.disk.image),)
        devices = SCSI + writer.serial_xml(self.serial)
        plan = Plan("writer", drives, agent=False, devices=devices)
        self.machine = Machine(lab.guests.create(plan), [self.disk])
        self.machine.guest.domain.resume()

    def _add_layer(self, number: int) -> None:
        more = {"volFormat": COW, "size": str(CAPACITY), "initialSize": str(MIB)}
        if number:
            image, below = self.disk.image, self.disk.leaf
            more |= {"srcImgUUID": image, "srcVolUUID": below, "sequence": number + 1}
        self.disk.volumes.append(self.lab.world.create(self.disk.image, **more))
        commands = []
        if number == 0:
            sector = self.lab.agent.dir / "sector"
            sector.write_bytes(writer.boot_sector(NUMBERS))
            commands.append(f"write -s {sector} 0 512")
            self.content[:512] = sector.read_bytes()
        for place, length in ((MIB, PIECE), ((number + 2) * MIB, PIECE), (8 * MIB, 6 * MIB)):
            commands.append(f"write -P {number + 1} {place} {length}")
            self._holds(number + 1, place, length)
        words = [word for command in commands for word in ("-c", command)]
        run("qemu-io", "-f", "qcow2", "-n", *words, self.lab.prepare(self.disk))

    def _holds(self, byte: int, place: int, length: int) -> None:
        self.content[place : place + length] = bytes([byte]) * length

    def write(self, byte: int, place: int, length: int) -> None:
        """By the guest's own disk."""
        qemu_io(self.machine, f"write -P {byte} {place} {length}")
        self._holds(byte, place, length)

    def goes_on(self) -> None:
        before = writer.told(self.serial)
        self.lab.wait(lambda: writer.told(self.serial) > before, "the guest to write")

    def check(self) -> None:
        """The guest goes on, and its disk has all that was ever written."""
        self.goes_on()
        domain, known = self.machine.guest.domain, writer.told(self.serial)
        domain.suspend()
        try:
            self.check_volume(self.disk.leaf, known)
        finally:
            domain.resume()
        self.goes_on()

    def check_volume(self, volume: str, known: int) -> None:
        """What a volume shows, with all below it, by a checksum; the numbers for themselves."""
        raw = self.lab.agent.dir / "copy.raw"
        path = path_of(self.lab, self.disk, volume)
        run("qemu-img", "convert", "-U", "-T", "none", "-f", "qcow2", "-O", "raw", path, str(raw))
        with raw.open("rb") as file:
            assert os.fstat(file.fileno()).st_size == CAPACITY
            data = bytearray(file.read(USED))
            with pytest.raises(OSError, match="No such device"):
                os.lseek(file.fileno(), USED, os.SEEK_DATA)
        raw.unlink()
        end_of_numbers = NUMBERS + writer.SLOTS * writer.SECTOR
        writer.check(bytes(data[NUMBERS:end_of_numbers]), known)
        data[NUMBERS:end_of_numbers] = bytes(end_of_numbers - NUMBERS)
        assert hashlib.sha256(data).digest() == hashlib.sha256(self.content).digest()

    def wait_copying(self) -> None:
        domain = self.machine.guest.domain
        self.lab.wait(lambda: domain.blockJobInfo("vda"), "QEMU to copy")


@pytest.fixture(scope="module")
def lab(loops: Loops, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VmLab]:
    directory = tmp_path_factory.mktemp("v")
    stopped: list[str] = []
    with contextlib.ExitStack() as stack:
        layer = stack.enter_context(Layer(loops.make(10 * GIB), "lun-0"))
        libvirtd = Libvirtd(directory)
        stack.callback(libvirtd.stop)
        libvirtd.start()
        settings = {
            "lvm__devices": "/dev/mapper/lun-*", "storage__lock_timeout": "20",
            "storage__monitor_interval": "2",
            "libvirt__uri": libvirtd.uri, "libvirt__timeout": "60", "vms__freeze_timeout": "60",
        }  # fmt: skip
        agent = AgentProcess(directory / "agent", False, settings)
        stack.callback(lambda: stopped.append(agent.stop()))
        agent.start()
        places = [StorageServer(FCP, devices=(path,)) for path in (layer.path, "/dev/mapper/none")]
        made = VmLab(libvirtd, World(agent, places, attach=False))
        stack.callback(made.close)
        yield made
    assert stopped == [""]


@pytest.fixture(scope="module")
def vm(lab: VmLab) -> Iterator[Running]:
    running = Running(lab)
    yield running
    running.machine.guest.destroy()
    lab.call("Image.teardown", **lab.world.ids(running.disk.image, running.disk.leaf))
    assert active(lab) == set()


def active(lab: VmLab) -> set[str]:
    """Volumes that device-mapper has, but for the domain's own."""
    return {one for one in dm.active(lab.world.main) if len(one) == len(new_id())}


def test_snapshot(lab: VmLab, vm: Running) -> None:
    """The volume that stays behind has what the guest was told is written."""
    vm.goes_on()
    base, leaf, known = vm.disk.leaf, above(lab, vm.disk), writer.told(vm.serial)
    job = new_id()
    drives = [drive(lab, vm.disk, leaf)]
    lab.call("VM.snapshot", vmID=vm.machine.id, snapDrives=drives, jobUUID=job)
    found = end(lab, job)
    assert found["status"] == "done", found
    assert "as after a power cut" in found["description"]  # there is no agent in the guest
    assert "freezeAge" not in lab.stats(vm.machine.id)
    vm.disk.volumes.append(leaf)
    assert active(lab) == set(vm.disk.volumes)
    check_chain(lab, vm.machine, vm.disk.volumes)
    vm.check_volume(base, known)
    vm.goes_on()


def test_merge_whose_base_fails(lab: VmLab, vm: Running) -> None:
    """The chain is as it was, and the guest notices nothing."""
    base = Mapped(path_of(lab, vm.disk, vm.disk.volumes[0]))
    base.fail_writes()
    try:
        found = outcome(lab, ask(lab, vm.machine, INNER))
    finally:
        base.heal()
    assert (found["status"], found["error"]["code"]) == ("failed", 52)
    check_chain(lab, vm.machine, vm.disk.volumes)
    vm.goes_on()


def test_merge_of_an_inner_volume_through_a_death_of_the_agent(lab: VmLab, vm: Running) -> None:
    job = ask(lab, vm.machine, INNER, bandwidth=1)
    vm.wait_copying()
    lab.agent.kill()
    vm.goes_on()
    lab.world.restart()
    assert outcome(lab, job)["status"] == "done", outcome(lab, job)
    finish(lab, vm.machine, INNER)
    assert active(lab) == set(vm.disk.volumes)
    vm.check()


def test_merge_of_the_active_volume_while_storage_hangs(lab: VmLab, vm: Running) -> None:
    """The base is extended first.  While it hangs the guest goes on, and so does the agent."""
    image, (base, top) = vm.disk.image, vm.disk.volumes
    before = int(lab.world.info(image, base)["truesize"])
    assert before < CAPACITY
    vm.write(9, 8 * MIB, 8 * MIB)
    job = ask(lab, vm.machine, 1, bandwidth=1)
    vm.wait_copying()
    mapped = Mapped(path_of(lab, vm.disk, base))
    mapped.hang()
    try:
        assert int(lab.world.info(image, base)["truesize"]) >= CAPACITY
        time.sleep(4)
        vm.goes_on()
        started = time.monotonic()
        assert job in jobs(lab, vm.machine)
        assert lab.world.info(image, top)["legality"] == "LEGAL"
        assert time.monotonic() - started < 10
    finally:
        mapped.heal()
    assert outcome(lab, job)["status"] == "done", outcome(lab, job)
    finish(lab, vm.machine, 1)
    assert active(lab) == {base}
    vm.check()


def test_disk_is_added_grows_and_goes(lab: VmLab, vm: Running) -> None:
    """Its volume is active only while the VM has it."""
    domain, size = vm.machine.guest.domain, 128 * MIB
    image = new_id()
    disk = VmDisk(image, [lab.world.create(image, volFormat=RAW, size=str(size))])
    assert disk.leaf not in active(lab)
    plug(lab, vm.machine, disk)
    assert disk.leaf in active(lab)
    assert domain.blockInfo("sdb")[0] == size
    names = lab.world.ids(image, disk.leaf)
    assert lab.world.task("Volume.extendSize", **names, newSize=str(2 * size)) == ""
    specs = {"driveSpecs": pdiv(lab, disk), "newSize": str(2 * size)}
    lab.call("VM.diskSizeExtend", vmID=vm.machine.id, **specs)
    assert domain.blockInfo("sdb")[0] == 2 * size
    last = f"-P 7 {2 * size - PIECE} {PIECE}"
    line = f'qemu-io -d /machine/peripheral/ua-{image} "write {last}"'
    libvirt_qemu.qemuMonitorCommand(domain, line, HMP)
    unplug(lab, vm.machine, disk)
    assert disk.leaf not in active(lab)
    said = run("qemu-io", "-r", "-f", "raw", "-c", f"read {last}", lab.prepare(disk))
    assert f"read {PIECE}/{PIECE}" in said
    assert "verification failed" not in said
    lab.call("Image.teardown", **names)
    assert active(lab) == set(vm.disk.volumes)
    vm.goes_on()


@pytest.mark.timeout(2400)
def test_guest_with_a_system_and_an_agent(lab: VmLab) -> None:
    """It freezes, is snapshotted, thaws, and is snapshotted by one call that does all of that: on
    file systems that need no repair is all that was written before."""
    disk = lab.disk(filled=True)
    machine = lab.machine_of("system", [disk], boots=True)
    machine.guest.wait_ready()

    def write(first: int, last: int) -> None:
        line = f"i={first}; while [ $i -le {last} ]; do echo $i; i=$((i+1)); done >>/mnt/vda/log"
        machine.guest.run(f"{line}; sync")

    def switch(**more: bool) -> str:
        job, base = new_id(), disk.leaf
        disk.volumes.append(lab.new_leaf(disk))
        drives = [{
            "domainID": lab.world.main, "imageID": disk.image, "baseVolumeID": base,
            "volumeID": disk.leaf,
        }]  # fmt: skip
        lab.call("VM.snapshot", vmID=machine.id, snapDrives=drives, jobUUID=job, **more)
        found = end(lab, job)
        assert (found["status"], found["description"]) == ("done", f"Snapshot of VM {machine.id}")
        return base

    write(1, 20)
    lab.call("VM.freeze", vmID=machine.id)
    frozen = switch(frozen=True)
    assert "freezeAge" in lab.stats(machine.id)
    lab.call("VM.thaw", vmID=machine.id)
    assert "freezeAge" not in lab.stats(machine.id)
    write(21, 30)
    by_itself = switch()
    write(31, 32)
    assert active(lab) >= set(disk.volumes)
    for volume, lines in ((frozen, 20), (by_itself, 30)):
        assert read_log(lab.agent.dir, path_of(lab, disk, volume)) == lines
    machine.guest.destroy()
    lab.call("Image.teardown", **lab.world.ids(disk.image, disk.leaf))
