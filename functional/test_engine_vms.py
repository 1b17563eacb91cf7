# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's flows with VMs that run: snapshots, live merges, live storage migration.

One guest that boots, with two disks, which writes all the time; on a local directory, and on LUNs.
The tests of a module run in order and build on each other's chains.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from functional.engine.datacenter import DataCenter, Disk, Domain
from functional.engine.host import COW, FCP, RAW, Host, StorageServer
from functional.engine.running import RunningVm, fill, metadata, prepare, xml_disk
from functional.engine.wire import VdsError
from functional.guests.guest import Guests, Plan
from functional.guests.libvirtd import Libvirtd
from functional.guests.ram import boot
from functional.lab.guest import why_not
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess
from functional.vm_lab import Machine
from functional.vm_work import Log, read_log
from vdsm_storage.verbs.tables import BUILT

MIB = 1024**2
LOCAL, LUN = "local", "lun"
SIZES = {LOCAL: 64 * MIB, LUN: 128 * MIB}
FORMATS = (RAW, COW)  # of the disks' bases
LIMIT = 6.0  # seconds that a guest may stay frozen
REPLICATION = {"VM.diskReplicateStart", "VM.diskReplicateFinish"}

# The laboratory's image, whose kernel the guests have, may have to be made first.
pytestmark = pytest.mark.timeout(1500)


@dataclass
class Lab:
    agent: AgentProcess
    host: Host
    dc: DataCenter
    kind: str
    guests: Guests
    make_server: Callable[[], StorageServer]

    @property
    def scratch(self) -> Path:
        return self.agent.dir

    def second_domain(self) -> str:
        """Of the pool, active."""
        domain = Domain(str(uuid.uuid4()), self.make_server())
        self.dc.create_domain(self.host, domain, pool=self.dc.id)
        self.dc.irs("StorageDomain.attach", storagedomainID=domain.id)
        self.dc.irs("StorageDomain.activate", storagedomainID=domain.id)
        self.dc.domains[domain.id] = domain
        self.dc.connect_pool(self.host)
        self.dc.wait_healthy(self.host)
        return domain.id


@pytest.fixture(scope="module", params=[LOCAL, LUN])
def lab(
    request: pytest.FixtureRequest,
    workdir: Path,
    make_server: Callable[[str], StorageServer],
    start_agent: Callable[..., AgentProcess],
    make_standin: Callable[..., StandInProcess],
    make_luns: Callable[..., list[str]],
) -> Iterator[Lab]:
    if reason := why_not():
        pytest.skip(reason)
    kind = request.param
    settings: dict[str, Any] = {"vms__freeze_limit": str(LIMIT), "vms__freeze_timeout": "2"}
    places: list[StorageServer] = []
    if kind == LUN:
        luns = make_luns(2)
        places = [StorageServer(FCP, devices=(lun,)) for lun in luns]
        settings |= {"standin": make_standin(sync=False), "lvm__devices": ",".join(luns)}
    libvirtd = Libvirtd(workdir / f"v-{kind}")
    libvirtd.start()
    settings["libvirt__uri"] = libvirtd.uri
    try:
        agent = start_agent(f"agent-{kind}", tls=kind == LOCAL, **settings)
        host = agent.host("host-1", 1)

        def make() -> StorageServer:
            return places.pop(0) if kind == LUN else make_server("local")

        made = Lab(agent, host, DataCenter.begin([host], make()), kind, Guests(libvirtd), make)
        made.dc.wait_healthy(host)
        try:
            yield made
        finally:
            made.guests.close()
            errors = host.vds.errors + host.irs.errors
            host.close()
        assert errors == []
    finally:
        libvirtd.stop()


@dataclass
class Subject:
    """The VM as the engine has it, and the guest in it."""

    vm: RunningVm
    machine: Machine


@pytest.fixture(scope="module")
def subject(lab: Lab) -> Subject:
    size, disks, drives = SIZES[lab.kind], [], []
    for fmt in FORMATS:
        disk = lab.dc.create_disk(lab.dc.master, size, fmt=fmt)
        path = prepare(lab.dc, lab.host, disk)
        fill(lab.scratch, path, fmt, size)
        disks.append(disk)
        drives.append(xml_disk(disk, path, fmt))
    plan = Plan(f"tiny-{lab.kind}", drives, boot(), metadata=metadata(lab.dc, disks))
    guest = lab.guests.create(plan)
    guest.wait_ready()
    guest.run("dd if=/dev/urandom of=/mnt/vda/precious bs=64k count=16 2>/dev/null; sync")
    guest.run("sha256sum /mnt/vda/precious >/run/precious")
    return Subject(RunningVm(lab.dc, lab.host, guest.id, disks), Machine(guest))


@pytest.fixture
def writing(subject: Subject) -> Iterator[Log]:
    """The guest writes all the time, and goes on after the test; its data is as it was."""
    log = Log(subject.machine)
    try:
        yield log
        log.wait(2)
    finally:
        log.stop()
    subject.machine.guest.run(
        "sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum -c /run/precious"
    )
    subject.vm.check()
    assert subject.vm.stats().frozen is None


def volume_path(lab: Lab, disk: Disk, volume: str) -> str:
    """Its image is prepared, and so is this one."""
    return f"{Path(prepare(lab.dc, lab.host, disk)).parent}/{volume}"


def lines_of(lab: Lab, disk: Disk, number: int) -> int:
    """In the log on what a disk's leaf was, without a journal replay."""
    layered = len(disk.volumes) > 1 or FORMATS[number] == COW
    path = volume_path(lab, disk, disk.leaf)
    return read_log(lab.scratch, path, form="qcow2" if layered else "raw")


# -- what the engine polls -------------------------------------------------------------------


def test_poll(lab: Lab, subject: Subject) -> None:
    stats = subject.vm.stats()
    assert (stats.status, stats.pause_code, stats.jobs) == ("Up", "NOERR", {})
    assert set(stats.images) == {disk.image for disk in subject.vm.disks}
    subject.vm.check()


# -- 3.7: snapshots --------------------------------------------------------------------------


def test_snapshot_of_two_disks(lab: Lab, subject: Subject, writing: Log) -> None:
    """The agent freezes the guest; what it acknowledged before is in the snapshot."""
    before, disks, seen = writing.wait(2), list(subject.vm.disks), subject.vm.stats().hash
    assert subject.vm.snapshot().status == "done"
    assert subject.vm.stats().hash != seen  # or the engine would not look at the XML
    subject.vm.check()
    first, second = (lines_of(lab, disk, number) for number, disk in enumerate(disks))
    assert first >= second >= before
    assert first - second in (0, 1)


def test_snapshot_with_disks_on_other_storage(lab: Lab, subject: Subject, writing: Log) -> None:
    """The engine freezes and thaws; all that is in between is of one moment."""
    disks, seen = list(subject.vm.disks), []

    def elsewhere() -> None:
        time.sleep(0.3)  # for what is on its way here
        seen.append(writing.acked)
        assert subject.vm.stats().frozen is not None

    writing.wait(2)
    assert subject.vm.snapshot(elsewhere=elsewhere).status == "done"
    assert subject.vm.stats().frozen is None
    for number, disk in enumerate(disks):
        assert lines_of(lab, disk, number) - seen[0] in (0, 1)


def test_guest_that_cannot_be_frozen(lab: Lab, subject: Subject) -> None:
    """Inconsistent snapshots are allowed: the engine goes on."""
    subject.machine.guest.stop_agent()
    done: list[bool] = []
    try:
        with pytest.raises(VdsError) as caught:
            lab.host.vds.call("VM.freeze", {"vmID": subject.vm.id})
        assert caught.value.code == 19
        assert subject.vm.snapshot(elsewhere=lambda: done.append(True)).status == "done"
    finally:
        subject.machine.guest.start_agent()
    assert done == [True]
    subject.vm.check()


def test_snapshot_that_fails(lab: Lab, subject: Subject, writing: Log) -> None:
    """The XML says that the VM kept its old volumes; the guest is not left frozen."""
    first, second = subject.vm.disks
    before = subject.vm.chains()
    lab.host.vds.call("VM.freeze", {"vmID": subject.vm.id})
    drives = [
        {"domainID": disk.domain, "imageID": disk.image, "baseVolumeID": disk.leaf,
         "volumeID": str(uuid.uuid4())}
        for disk in (first, second)
    ]  # fmt: skip
    state = subject.vm.ask_snapshot(drives, frozen=True)
    lab.host.vds.call("VM.thaw", {"vmID": subject.vm.id})
    assert (state.status, state.code) == ("failed", 201)
    assert subject.vm.chains() == before


def test_snapshot_with_memory(lab: Lab, subject: Subject, writing: Log) -> None:
    names = []
    for kind, size in (("MEMD", 384 * MIB), ("MEMM", MIB)):
        made = lab.dc.create_disk(lab.dc.master, size, fmt=RAW, disk_type=kind)
        names += [made.image, made.leaf]
    memory = ",".join((lab.dc.master, lab.dc.id, *names))
    assert subject.vm.snapshot(memory=memory).status == "done"
    lab.dc.wait(lambda: subject.vm.stats().status == "Up", "the guest to go on")


def test_all_disks_on_other_storage(lab: Lab, subject: Subject, writing: Log) -> None:
    """Then the engine sends VM.freeze and nothing else: the guest must not stay frozen, nor what
    the engine does later (a live migration says that it is) be refused."""
    if lab.kind != LOCAL:
        pytest.skip("it is the same on all storage")
    lab.host.vds.call("VM.freeze", {"vmID": subject.vm.id})
    assert subject.vm.stats().frozen is not None
    name = f"|virt|VM_thawed|{subject.vm.id}"
    lab.dc.wait(lambda: name in dict(lab.host.events), "the agent to thaw it")
    assert "nobody thawed it" in dict(lab.host.events)[name][subject.vm.id]["reason"]
    assert subject.vm.stats().frozen is None
    time.sleep(LIMIT)
    assert subject.vm.snapshot([0], migrating=True).status == "done"


# -- 3.8: live merges ------------------------------------------------------------------------


def test_snapshots_are_removed(lab: Lab, subject: Subject, writing: Log) -> None:
    """From the middle, from below, and the guest's own layer."""
    for number in range(2):
        subject.vm.merge(number, 2)
        subject.vm.check()
    for number in range(2):
        while len(subject.vm.disks[number].volumes) > 1:
            subject.vm.merge(number, 1)
    subject.vm.check()
    for disk in subject.vm.disks:
        found = lab.host.vds.call("StorageDomain.getVolumes", {
            "storagedomainID": disk.domain, "storagepoolID": lab.dc.id, "imageID": disk.image,
        })  # fmt: skip
        assert found == [disk.leaf]


# -- 3.9: live storage migration -------------------------------------------------------------


needs_replication = pytest.mark.skipif(
    not REPLICATION <= BUILT, reason="VM.diskReplicateStart and Finish are not built"
)


@pytest.fixture(scope="module")
def target(lab: Lab) -> str:
    return lab.second_domain()


@needs_replication
def test_disk_goes_back_when_its_move_fails(
    lab: Lab, subject: Subject, target: str, writing: Log
) -> None:
    before = subject.vm.disks[0]
    source, moved = subject.vm.start_move(0, target)
    subject.vm.end_move(0, source, moved, back=True)
    assert subject.vm.disks[0] == before
    assert before.image not in lab.host.images(target)


@needs_replication
def test_disks_move_to_another_domain(
    lab: Lab, subject: Subject, target: str, writing: Log
) -> None:
    for number in range(2):
        before = subject.vm.disks[number]
        source, moved = subject.vm.start_move(number, target)
        writing.wait(2)
        subject.vm.end_move(number, source, moved)
        assert subject.vm.disks[number].domain == target
        subject.vm.check()
        assert before.image not in lab.host.images(lab.dc.master)
        assert before.image in lab.host.images(target)
