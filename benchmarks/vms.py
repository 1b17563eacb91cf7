# SPDX-License-Identifier: GPL-2.0-or-later
"""What the agent adds to the calls of libvirt's that it makes on running VMs, in the same run.

On guests that boot, with a guest agent, a local domain, and one disk or eight:

- VM.freeze and VM.thaw against fsFreeze and fsThaw, of a guest that had a moment to itself: right
  after a thaw there is nothing to write
- VM.snapshot, from the request to the end of its job, against the calls that it is made of
  (fsFreeze, snapshotCreateXML, fsThaw) and, without a promise, against the one call that does all
  of that (snapshotCreateXML with QUIESCE); the new volumes are there before, on all sides
- for how long the guest is frozen in it, against that one call.  That is what its agent says by the
  guest's clock: it logs the moment right before it freezes the first file system, and that right
  after it has thawed the last one

On 100 VMs (QEMUs with a disk and 16 MiB each, paused before they boot):

- Host.getAllVmStats against one getAllDomainStats of the same groups of values

    benchmarks/vms.py [--quick] [--json] [-v]

--quick makes 20 VMs.  Needs root, and some minutes: without KVM the guests are emulated.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.table import ROUNDS, TRIES, Row, Table, conclude, directory, low, options, wall
from functional.engine.host import LOCALFS, StorageServer
from functional.guests.libvirtd import Libvirtd
from functional.lab.guest import why_not
from functional.processes import AgentProcess
from functional.vm_lab import Machine, VmLab
from functional.world import World, new_id

DISKS = (1, 8)
MANY, QUICK = 100, 20  # VMs
LAYERS = 30  # of a disk: libvirt and QEMU open each
REST = 0.1  # seconds that a guest has before it is frozen again
POLL = 0.001  # seconds between two looks at a job's entry
LOGGING = "-v -l /run/agent.log"
FROZEN = re.compile(r"([\d.]+): .* due to filesystem (?:un)?freeze")
SNAPSHOT = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
)
QUIESCED = SNAPSHOT | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE
STATS = (
    libvirt.VIR_DOMAIN_STATS_STATE
    | libvirt.VIR_DOMAIN_STATS_CPU_TOTAL
    | libvirt.VIR_DOMAIN_STATS_BALLOON
    | libvirt.VIR_DOMAIN_STATS_VCPU
    | libvirt.VIR_DOMAIN_STATS_INTERFACE
    | libvirt.VIR_DOMAIN_STATS_BLOCK
)
STATS_OF = (
    libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_RUNNING
    | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_PAUSED
    | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_OTHER
    | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
)


class Subject:
    """A guest with so many disks; another one when the chains of its disks have become long."""

    def __init__(self, lab: VmLab, disks: int) -> None:
        self._lab, self._disks = lab, disks
        self._number = 0
        self._machine: Machine | None = None

    @property
    def machine(self) -> Machine:
        if self._machine is not None and len(self._machine.disks[0].volumes) >= LAYERS:
            self.close()
        if self._machine is None:
            self._number += 1
            name = f"subject-{self._disks}-{self._number}"
            self._machine = self._lab.machine(name, self._disks, boots=True)
            self._machine.guest.wait_ready()
            self._machine.guest.stop_agent()
            self._machine.guest.start_agent(LOGGING)
        return self._machine

    def close(self) -> None:
        if self._machine is not None:
            self._machine.guest.destroy()
            self._machine = None

    # -- freezing ----------------------------------------------------------------------------

    def freeze_and_thaw(self) -> float:
        vm = self.machine.id
        time.sleep(REST)
        return wall(lambda: [self._lab.call(f"VM.{verb}", vmID=vm) for verb in ("freeze", "thaw")])

    def bare_freeze_and_thaw(self) -> float:
        domain = self.machine.guest.domain
        time.sleep(REST)
        return wall(lambda: [domain.fsFreeze(), domain.fsThaw()])

    # -- snapshots: seconds for all of it, and seconds that the guest was frozen ---------------

    def snapshot(self) -> tuple[float, float]:
        lab, machine, job = self._lab, self.machine, new_id()
        leaves = [lab.new_leaf(disk) for disk in machine.disks]
        drives = [
            {"domainID": lab.world.main, "imageID": disk.image, "baseVolumeID": disk.leaf,
             "volumeID": leaf}
            for disk, leaf in zip(machine.disks, leaves, strict=True)
        ]  # fmt: skip
        asked = {"snapDrives": drives, "frozen": False, "freeze_timeout": 8, "jobUUID": job}

        def whole() -> None:
            lab.call("VM.snapshot", vmID=machine.id, **asked)
            wait_finished(lab.agent, job)

        time.sleep(REST)
        took = wall(whole)
        found = lab.call("Host.getJobs", job_ids=[job])[job]
        if found["status"] != "done" or found["description"] != f"Snapshot of VM {machine.id}":
            raise SystemExit(f"a snapshot is not as it should be: {found}")
        return took, self._frozen(leaves)

    def bare_calls(self) -> tuple[float, float]:
        def calls(domain: libvirt.virDomain, xml: str) -> None:
            domain.fsFreeze()
            domain.snapshotCreateXML(xml, SNAPSHOT)
            domain.fsThaw()

        return self._bare(calls)

    def bare_snapshot(self) -> tuple[float, float]:
        return self._bare(lambda domain, xml: domain.snapshotCreateXML(xml, QUIESCED))

    def _bare(self, work: Callable[[libvirt.virDomain, str], object]) -> tuple[float, float]:
        lab, machine = self._lab, self.machine
        leaves = [lab.new_leaf(disk) for disk in machine.disks]
        disks = ""
        for number, (disk, leaf) in enumerate(zip(machine.disks, leaves, strict=True)):
            path = f"{os.path.dirname(lab.prepare(disk))}/{leaf}"
            disks += (
                f"<disk name='vd{'abcdefgh'[number]}' snapshot='external' type='file'>"
                f"<driver type='qcow2'/><source file='{path}'>"
                "<seclabel model='dac' relabel='no'/></source></disk>"
            )
        xml = f"<domainsnapshot><disks>{disks}</disks></domainsnapshot>"
        time.sleep(REST)
        took = wall(lambda: work(machine.guest.domain, xml))
        return took, self._frozen(leaves)

    def _frozen(self, leaves: list[str]) -> float:
        """In the snapshot that was made just now, to these volumes."""
        assert self._machine is not None
        for disk, leaf in zip(self._machine.disks, leaves, strict=True):
            disk.volumes.append(leaf)
        text = self._machine.guest.run("grep -a filesystem /run/agent.log; : >/run/agent.log")
        moments = [float(found) for found in FROZEN.findall(text)]
        if len(moments) != 2:
            raise SystemExit(f"the guest agent does not tell when it froze: {text}")
        return moments[1] - moments[0]

    def forget(self) -> None:
        """What the guest agent has logged."""
        self.machine.guest.run(": >/run/agent.log")


def wait_finished(agent: AgentProcess, job: str) -> None:
    """As its journal tells: asking the agent again and again would cost it as much as its work."""
    entry = agent.dir / "state" / "journal" / f"{job}.json"
    while '"state": "finished"' not in entry.read_text():
        if not agent.alive():
            raise SystemExit("the agent died")
        time.sleep(POLL)


def freezing(table: Table, subject: Subject, disks: int) -> None:
    row = Row("VM.freeze and VM.thaw / libvirt's", disks, 0.0, 1.3)
    table.compare(row, subject.freeze_and_thaw, subject.bare_freeze_and_thaw)


def snapshots(table: Table, subject: Subject, disks: int) -> None:
    rows = (
        Row("VM.snapshot / libvirt's three calls", disks, 0.0, 1.3),
        Row("VM.snapshot / libvirt's one call", disks, 0.0, None),
        Row("guest frozen in it / in libvirt's one", disks, 0.0, 1.2 if disks > 1 else None),
    )
    subject.forget()
    took: dict[str, list[float]] = {}
    for _ in range(TRIES):
        for _ in range(ROUNDS):
            for name, work in (
                ("ours", subject.snapshot), ("three", subject.bare_calls),
                ("one", subject.bare_snapshot),
            ):  # fmt: skip
                whole, frozen = work()
                took.setdefault(name, []).append(whole)
                took.setdefault(f"{name} frozen", []).append(frozen)
        sides = (("ours", "three"), ("ours", "one"), ("ours frozen", "one frozen"))
        for row, (ours, bare) in zip(rows, sides, strict=True):
            row.value = low(took[ours]) / low(took[bare])
            row.ours = statistics.median(took[ours]) * 1000
            row.against = statistics.median(took[bare]) * 1000
        if all(row.kept for row in rows):
            break
    for row in rows:
        table.add(row)


def statistics_of_many(table: Table, lab: VmLab, wanted: int) -> list[str]:
    """Returns what there is to remark."""
    remarks, made = [], 0
    try:
        for made in range(1, wanted + 1):
            lab.machine(f"many-{made}")
    except libvirt.libvirtError as error:
        made -= 1
        remarks.append(f"only {made} VMs of {wanted} could be started here: {error}")
    connection = lab.guests.connection

    def asked(what: Callable[[], list[object]]) -> float:
        found: list[object] = []
        took = wall(lambda: found.extend(what()))
        if len(found) != made:
            raise SystemExit(f"statistics of {len(found)} VMs instead of {made}")
        return took

    def ours() -> float:
        return asked(lambda: lab.call("Host.getAllVmStats"))

    ours()  # the first one reads the XML of each VM
    table.compare(
        Row("Host.getAllVmStats / libvirt's bulk call", made, 0.0, 1.5),
        ours,
        lambda: asked(lambda: connection.getAllDomainStats(STATS, STATS_OF)),
    )
    return remarks


@contextlib.contextmanager
def lab_in(directory: Path) -> Iterator[VmLab]:
    """An agent with two local domains, and a libvirtd of its own."""
    libvirtd = Libvirtd(directory / "v")
    libvirtd.start()
    settings = {
        "libvirt__uri": libvirtd.uri, "rpc__check_replies": "false",
        "storage__monitor_interval": "10",
    }  # fmt: skip
    agent = AgentProcess(directory / "agent", False, settings)
    try:
        agent.start()
        servers = []
        for name in ("first", "second"):
            (directory / name).mkdir()
            servers.append(StorageServer(LOCALFS, str(directory / name)))
        lab = VmLab(libvirtd, World(agent, servers, attach=True))
        try:
            yield lab
        finally:
            lab.close()
    finally:
        if wrong := agent.stop():
            print(wrong, file=sys.stderr)
        libvirtd.stop()


def main() -> int:
    chosen = options()
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 1
    libvirt.registerErrorHandler(lambda *_: None, None)  # they are raised as well
    table, began = Table(), time.monotonic()
    with directory() as place, lab_in(place) as lab:
        for disks in DISKS:
            subject = Subject(lab, disks)
            freezing(table, subject, disks)
            snapshots(table, subject, disks)
            subject.close()
        remarks = statistics_of_many(table, lab, QUICK if chosen.quick else MANY)
    remarks.append(f"{time.monotonic() - began:.0f} s")
    return conclude(table.rows, remarks, chosen.json)


if __name__ == "__main__":
    sys.exit(main())
