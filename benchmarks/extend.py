# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast volumes of running guests grow, and what watching them costs; against bare lvm in turn.

1. From the event until the guest can use the space: until the volume's device here is larger; with
   N volumes in the group.
   - One disk: a real guest's (libvirt, QEMU), from libvirt's event and from the write that passes
     the threshold; and one whose event is told to the agent itself, without libvirt.  Against
     `lvextend` as the agent runs it, and making the device larger, of another volume of the same
     group, in turn with them.
   - 50 and 500 disks at once, whose events are told to the agent.  All else is the product's: the
     service, the domain's lease (this host is not the pool's manager, it takes and returns it each
     time), lvm, the devices.  libvirt is a few lines that answer at once; guests are not slowed.
2. How much must be free when the event comes, so that a QEMU that writes as fast as this machine
   can neither meets the end of its volume nor would be slowed: headroom of a fixed size, and as it
   adapts to a disk that was idle before.  Found by bisection; against what one needs whose slowest
   extension takes 1.39 s.
3. Whether a disk ever meets the end of its volume where that is not to happen: several at once, at
   rates from 1 to 512 MiB a second, and one as fast as the machine writes; hundreds of extensions
   (extend_cycles.py).
4. CPU and system calls of 1,000 disks that nobody writes to, and of the look at all of them that
   the agent takes every few minutes.
5. Memory of a disk that is watched.

The agent has the priority that its unit gives it, and so has lvm bare; QEMU has the usual one.
Without device-mapper the volumes are loop devices on the LUN (loop_volumes.py).  The LUN is a file
in `--lun`, by default in memory: the machine's disk has other work than ours, and its queue is not
what is measured.

    benchmarks/extend.py [--quick] [--volumes 10,350] [--disks 1,50]
                         [--parts grow,headroom,cycles,idle] [--json FILE] [-v]

Needs root, and some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import libvirt

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import extend_cycles, extend_idle
from benchmarks.extend_group import (
    SINGLES,
    STEADY,
    BenchProcess,
    Control,
    Subject,
    Times,
    Volumes,
    opened,
    progress,
)
from benchmarks.extend_qemu import GIB, MIB, NICE, EventLoop, Trial, Writers, guest_disk, tables
from benchmarks.loop_volumes import Pieces
from benchmarks.scale_agent import kernel_maps, served, settings_for
from benchmarks.scale_group import SIZE, Bench, loop_device
from benchmarks.table import Row, Table, show
from functional.guests.libvirtd import Libvirtd
from functional.lab.guest import why_not
from vdsm_storage.lvm.activation import Activation, DeviceMapper

KIB = 1024
VOLUMES = (10, 350, 1000, 3000)
DISKS = (1, 50, 500)
PARTS = ("grow", "headroom", "cycles", "idle")
PUBLISHED = 1.39  # seconds that an extension takes at most where VDSM's documentation measured it
FIFTH = 0.2
CHUNK = 512 * MIB  # of the writers' disks
MEMORY = Path("/dev/shm")
STEPS = 3  # of the bisection
SEARCHES = 2
AGAIN = 2  # times that what was found must hold once more


@dataclass(frozen=True)
class Effort:
    """How much is done."""

    volumes: Sequence[int]
    disks: Sequence[int]
    rounds: int = 40  # of one disk
    storms: int = 4
    written: int = 4 * GIB  # by a writer
    steps: int = STEPS  # 0: no search, one trial
    cycles: float = 50.0  # seconds
    idle: tuple[int, float] = (1000, 60.0)  # disks, seconds
    watched: int = 10_000
    parts: Sequence[str] = PARTS

    @property
    def writing(self) -> int:
        """Volumes in the group while a writer is at work."""
        return min(self.volumes, key=lambda count: abs(count - 350))


QUICK: dict[str, Any] = {
    "rounds": 3, "storms": 1, "written": GIB, "steps": 0, "cycles": 25.0,
    "idle": (100, 1.0), "watched": 1000,
}  # fmt: skip


@dataclass
class Report:
    table: Table = field(default_factory=Table)
    times: list[Times] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def row(self, name: str, count: int, value: float, limit: float | None, *ms: float) -> None:
        self.table.add(Row(name, count, value, limit, False, *(1000 * each for each in ms)))

    def noted(self, name: str, count: int, seconds: list[float]) -> Times:
        times = Times(name, count, seconds)
        self.times.append(times)
        return times

    def note(self, text: str) -> None:
        self.remarks.append(text)
        progress(text)


# -- from the event to the space ------------------------------------------------------------------


def grow(report: Report, subject: Subject, libvirtd: Libvirtd, effort: Effort) -> None:
    made = tables(subject.bench.directory)
    for count in effort.volumes:
        wanted = [disks for disks in effort.disks if disks + SINGLES <= count or disks == 1]
        volumes = Volumes.new(count, max(wanted) if max(wanted) > 1 else 0, 0)
        subject.fill(volumes)
        ours, bare = one(report, subject, libvirtd, volumes, made, effort.rounds)
        for disks in wanted:
            if disks > 1:
                many(report, subject, volumes, disks, effort.storms, ours, bare)


def one(
    report: Report, subject: Subject, libvirtd: Libvirtd, volumes: Volumes,
    made: tuple[bytes, int], rounds: int,
) -> tuple[Times, Times]:  # fmt: skip
    """Returns ours, of which the event is told, and bare."""
    count = len(volumes.all)
    guest = report.noted("one disk, a guest's, from libvirt's event", count, [])
    written = report.noted("the same, from the guest's write", count, [])
    told = report.noted("one disk, its event told", count, [])
    bare = report.noted("lvextend and the device, bare", count, [])
    with (
        guest_disk(subject, libvirtd, volumes.guest, made) as disk,
        subject.prepared([volumes.ours, volumes.bare]),
        opened([subject.path(volumes.ours.name)]) as fds,
    ):
        subject.control.watch([subject.drive(volumes.ours)], STEADY)
        for number in range(rounds + 1):
            grown, storm = disk.grow(), subject.storm(fds)
            lvm = subject.bare(volumes.bare)
            if number:  # the first time is everybody's warm-up
                guest.seconds.append(grown.event)
                written.seconds.append(grown.write)
                told.seconds += storm.seconds
                bare.seconds.append(lvm)
        subject.control.call("forget")
    for times, name in ((guest, "a guest's disk"), (told, "a disk, event told")):
        for share, limit in ((0.5, 1.5), (0.99, 3.0)):
            mine, other = times.at(share), bare.at(share)
            what = f"{name}: p{share * 100:.0f} / bare p{share * 100:.0f}"
            report.row(what, count, mine / other, limit, mine, other)
    return told, bare


def many(
    report: Report, subject: Subject, volumes: Volumes, disks: int, storms: int,
    ours: Times, bare: Times,
) -> None:  # fmt: skip
    count, grown = len(volumes.all), volumes.storm(disks)
    times = report.noted(f"{disks} disks at once, their events told", count, [])
    with (
        subject.prepared(grown),
        opened([subject.path(volume.name) for volume in grown]) as fds,
    ):
        subject.control.watch([subject.drive(volume) for volume in grown], STEADY)
        found = [subject.storm(fds) for _ in range(storms + 1)][1:]
        subject.control.call("forget")
    for storm in found:
        times.seconds += storm.seconds
    last = max(times.seconds)
    report.row(f"{disks} disks: the last / one bare p50", count, last / bare.median,
               15 if disks >= 500 else None, last, bare.median)  # fmt: skip
    report.row(f"{disks} disks: the last / one of ours p50", count, last / ours.median,
               15 if disks >= 500 else None, last, ours.median)  # fmt: skip
    commits = max(storm.commits for storm in found)
    report.note(f"{count:,} volumes: {disks} disks at once are {commits} commits of lvm at most")


# -- headroom -------------------------------------------------------------------------------------


class Headroom:
    """`policy(bytes)` with that headroom; the least with which a writer is never held up."""

    def __init__(self, writers: Writers, rate: float, latencies: Sequence[float]) -> None:
        self._writers = writers
        self.rate = rate  # the highest that was seen
        self._latencies = latencies

    @staticmethod
    def fixed(size: int) -> dict[str, int]:
        return {
            "headroom_min": size, "headroom_max": size, "chunk_min": CHUNK, "chunk_max": CHUNK
        }  # fmt: skip

    @staticmethod
    def adaptive(size: int) -> dict[str, int]:
        """As by default, but for what an idle disk has (monitor/watermark.py says why chunk_min is
        no less), and extended as often as the fixed one."""
        return {"headroom_min": size, "chunk_min": max(size, 256 * MIB), "chunk_max": CHUNK}

    def best(self, policy: Any, steps: int) -> Trial | None:
        """Searched for again while the promise is not kept: other work only takes time."""
        found = [self._search(policy, steps)]
        while steps and len(found) < SEARCHES and not self._is_kept(found[-1]):
            found.append(self._search(policy, steps))
        good = [trial for trial in found if trial is not None]
        return min(good, key=lambda trial: trial.policy["headroom_min"], default=None)

    def _is_kept(self, found: Trial | None) -> bool:
        allowed = self.rate * PUBLISHED * FIFTH
        return found is not None and found.policy["headroom_min"] <= allowed

    def _search(self, policy: Any, steps: int) -> Trial | None:
        """From a fifth of what VDSM needs up or down; None if even all of that is too little."""
        allowed = self.rate * PUBLISHED
        size = allowed * FIFTH
        best = self._try(policy, size, AGAIN if steps else 1)
        while best is None and steps:
            size *= 1.5
            if size > allowed * 1.5:
                return None
            best = self._try(policy, size, AGAIN)
        low, high = (0.0, size) if size <= allowed * FIFTH else (size / 1.5, size)
        for _ in range(steps):
            middle = (low + high) / 2
            found = self._try(policy, middle, AGAIN)
            if found is None:
                low = middle
            else:
                high, best = middle, found
        return best

    def _try(self, policy: Any, size: float, times: int) -> Trial | None:
        """One that is good, as often as that."""
        for _ in range(times):
            found = self._writers.trial(policy(int(size)), self._latencies)
            self.rate = max(self.rate, found.rate)
            if not found.good:
                return None
        return found


def headroom(report: Report, subject: Subject, directory: Path, effort: Effort) -> None:
    count = effort.writing
    trials = 80 if effort.steps else 4
    volumes = Volumes.new(max(count, trials + SINGLES), 0, trials)
    subject.fill(volumes)
    latencies = warm(subject, volumes, 20 if effort.steps else 2)
    writers = Writers(subject, directory, volumes.writers(0, trials), effort.written)
    rate = max(writers.free_run() for _ in range(3 if effort.steps else 1))
    report.note(f"a writer with all the space that it needs writes {rate / MIB:,.0f} MiB/s;"
                f" VDSM's published latency needs {rate * PUBLISHED / MIB:,.0f} MiB")  # fmt: skip
    search = Headroom(writers, rate, latencies)
    for name, policy in (("fixed", search.fixed), ("adaptive, idle", search.adaptive)):
        found = search.best(policy, effort.steps)
        rate = search.rate
        if found is None:
            report.row(f"headroom, {name} / W x 1.39 s", count, float("inf"), FIFTH)
            report.note(f"headroom, {name}: none that was tried is enough")
            continue
        size = found.policy["headroom_min"]
        report.row(f"headroom, {name} / W x 1.39 s", count, size / (rate * PUBLISHED), FIFTH)
        facts = found.facts
        report.note(
            f"headroom, {name}: {size / MIB:,.0f} MiB are enough, {facts['headroom'] / MIB:,.0f} at"
            f" the end; {found.rate / MIB:,.0f} MiB/s, {facts['extends']} extensions,"
            f" the slowest {facts['slowest'] * 1000:.0f} ms"
        )


def warm(subject: Subject, volumes: Volumes, rounds: int) -> list[float]:
    """Seconds of some extensions: what an agent knows of a domain that has been up for a while."""
    with (
        subject.prepared([volumes.ours]),
        opened([subject.path(volumes.ours.name)]) as fds,
    ):
        subject.control.watch([subject.drive(volumes.ours)], STEADY)
        found = []
        for _ in range(rounds):
            subject.storm(fds)
            found += subject.control.call("facts")["latencies"]
        subject.control.call("forget")
    return found


# -- cycles ---------------------------------------------------------------------------------------


def cycles(report: Report, subject: Subject, directory: Path, effort: Effort) -> None:
    found = list(extend_cycles.at_rates(subject, directory, effort.cycles))
    found.append(extend_cycles.at_full_speed(subject, directory, effort.written))
    broken = [each for each in found if each.failed and each.promised]
    extends = sum(each.extends for each in found)
    report.row("extensions, with writes that met the end", extends, len(broken), 0)
    for each in found:
        report.note(str(each))


# -- idle disks -----------------------------------------------------------------------------------


def idle(report: Report, found: dict[str, float], disks: int) -> None:
    share = found["asleep"] / found["seconds"] + found["scan"] / found["interval"]
    report.row("CPU of idle disks, % of a core", disks, share * 100, 0.1)
    if (calls := found["scan_calls"]) >= 0:
        report.row("system calls in a look at them, for a disk", disks, calls / disks, 0.1)
    report.note(
        f"{disks:,} idle disks: {found['asleep'] * 1000:.1f} ms of CPU in {found['seconds']:.0f} s,"
        f" woken {found['switches']:.0f} times; a look at all takes {found['scan'] * 1000:.1f} ms"
        f" of CPU, every {found['interval']:.0f} s, and {calls:.0f} system calls"
    )


def memory(report: Report, effort: Effort) -> None:
    for name, traced in (("traced", True), ("resident", False)):
        found = extend_idle.result(extend_idle.begin("memory", effort.watched, traced))
        name = f"memory of a watched disk, KiB, {name}"
        report.row(name, effort.watched, found["bytes"] / KIB, 4)


# -- all of it ------------------------------------------------------------------------------------


@contextlib.contextmanager
def mapped(bench: Bench, directory: Path) -> Iterator[Activation]:
    if kernel_maps():
        yield DeviceMapper(bench.ours)
        return
    pieces = Pieces(directory)
    try:
        yield pieces
    finally:
        if left := pieces.close():
            print(left, file=sys.stderr)


@contextlib.contextmanager
def subject_in(directory: Path, lun: Path, libvirtd: Libvirtd) -> Iterator[Subject]:
    """An agent with libvirt and an empty domain; it is not the pool's manager."""
    in_memory = lun.is_relative_to(MEMORY)
    with loop_device(lun, SIZE, direct=not in_memory) as device:
        bench = Bench(directory, device)
        settings = {
            **settings_for(bench), "libvirt__uri": libvirtd.uri, "thin__throttle": "false",
            "sanlock__io_timeout": "1", **{f"thin__{key}": str(STEADY[key]) for key in STEADY},
        }  # fmt: skip
        with mapped(bench, directory / "pieces") as activation:
            process = BenchProcess(directory / "agent", False, settings)
            if isinstance(activation, Pieces):
                process.pieces = directory / "pieces"
            with served(bench, process, activation) as domain:
                control = Control(process.control)
                try:
                    yield Subject(domain, control)
                finally:
                    control.close()


def measure(report: Report, effort: Effort, directory: Path, lun: Path) -> None:
    with contextlib.ExitStack() as stack:
        resting = None
        if "idle" in effort.parts:  # it rests while the others are at work
            resting = stack.enter_context(extend_idle.begin("idle", *effort.idle))
            stack.callback(resting.kill)
        if effort.parts != ["idle"]:
            guests(report, effort, directory, lun)
        if resting is not None:
            idle(report, extend_idle.result(resting), effort.idle[0])
            memory(report, effort)


def guests(report: Report, effort: Effort, directory: Path, lun: Path) -> None:
    libvirtd = Libvirtd(directory / "v")
    libvirtd.start()
    try:
        EventLoop()
        os.setpriority(os.PRIO_PROCESS, 0, NICE)  # inherited by the agent, and by lvm bare
        with subject_in(directory, lun, libvirtd) as subject:
            if "grow" in effort.parts:
                grow(report, subject, libvirtd, effort)
            if "headroom" in effort.parts:
                headroom(report, subject, directory, effort)
            if "cycles" in effort.parts:
                cycles(report, subject, directory, effort)
    finally:
        libvirtd.stop()


def show_times(found: Sequence[Times]) -> None:
    print(f"{'N':>6}  {'seconds':46} {'times':>6} {'p50':>8} {'p99':>8} {'max':>8}")
    for times in found:
        numbers = " ".join(f"{each:8.4f}" for each in (times.median, times.at(0.99), times.at(1)))
        print(f"{times.count:6,}  {times.name:46} {len(times.seconds):6} {numbers}")


def numbers(text: str) -> list[int]:
    return sorted(int(each) for each in text.split(","))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="little of everything")
    parser.add_argument("--volumes", type=numbers, help="in the group; by default 10 to 3000")
    parser.add_argument("--disks", type=numbers, help="at once; by default 1, 50 and 500")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=PARTS)
    parser.add_argument("--lun", type=Path, help="directory of the LUN; by default in memory")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("-v", action="store_true")
    options = parser.parse_args()
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 1
    libvirt.registerErrorHandler(lambda *_: None, None)  # they are raised as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and clean up
    effort = Effort(
        options.volumes or ((10, 60) if options.quick else VOLUMES),
        options.disks or ((1, 50) if options.quick else DISKS),
        parts=list(options.parts), **(QUICK if options.quick else {}),
    )  # fmt: skip
    report, began = Report(), time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="vb", dir=os.environ.get("TMPDIR", "/var/tmp")))
    directory.chmod(0o755)
    lun = Path(tempfile.mkdtemp(prefix="vb", dir=options.lun or MEMORY))
    try:
        measure(report, effort, directory, lun)
    finally:
        shutil.rmtree(directory)
        shutil.rmtree(lun)
    report.note(f"{time.monotonic() - began:.0f} s")
    show(report.table.rows)
    show_times(report.times)
    print(*report.remarks, sep="\n")
    if options.json:
        rows = [{**asdict(row), "ok": row.kept} for row in report.table.rows]
        text = {
            "measures": rows, "times": [times.shown() for times in report.times],
            "remarks": report.remarks,
        }  # fmt: skip
        Path(options.json).write_text(json.dumps(text, indent=1) + "\n")
    return 0 if all(row.kept for row in report.table.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
