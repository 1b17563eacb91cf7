# SPDX-License-Identifier: GPL-2.0-or-later
"""For extend.py: disks that are written at once, each at a rate of its own, for many extensions.

What is promised of each: it never meets the end of its volume, as long as what it writes during
the slowest of its extensions is no more than an idle disk's headroom (monitor/watermark.py).  A
write that meets the end fails here, as nobody pauses a QEMU storage daemon, and nobody slows it.

Writers write a little of each MiB, so that the LUN need not be as fast as all of them together.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.extend_group import Subject, Volumes
from benchmarks.extend_qemu import (
    CAPACITY,
    MIB,
    PATTERN,
    TIMEOUT,
    Writers,
    storage_daemon,
    tables,
    write,
)
from benchmarks.scale_group import EXTENT

RATES = (1, 4, 16, 64, 256, 512)  # MiB a second
# As many extensions as there can be: of one extent each.
HEADROOM = EXTENT
POLICY = {"headroom_min": HEADROOM, "chunk_min": EXTENT, "chunk_max": EXTENT}
# The product's own, of one that writes as fast as it can.
DEFAULT = {"headroom_min": 256 * MIB, "chunk_min": 256 * MIB}
STEP = MIB  # from one write to the next
PIECE = 4096  # bytes of it that are written
IN_FLIGHT = 4


@dataclass(frozen=True)
class Cycles:
    """What became of one writer.  Bytes a second, and seconds."""

    rate: float  # what it should write
    measured: float
    extends: int
    slowest: float  # of its extensions
    headroom: int  # of an idle disk
    failed: str  # by what, or ""

    @property
    def promised(self) -> bool:
        """That it would not meet the end of its volume."""
        return self.rate * self.slowest <= self.headroom

    def __str__(self) -> str:
        end = f"fails ({self.failed})" if self.failed else "never waits"
        kind = "promised" if self.promised else "not promised"
        return (
            f"a disk written at {self.rate / MIB:,.0f} MiB/s ({self.measured / MIB:,.0f} measured)"
            f" {end}: {self.extends} extensions, the slowest {self.slowest * 1000:.0f} ms,"
            f" {kind}"
        )


def at_rates(subject: Subject, directory: Path, seconds: float) -> Sequence[Cycles]:
    """All RATES at once, for so long."""
    volumes = Volumes.new(100, 0, len(RATES))
    subject.fill(volumes)
    begin, first = tables(directory)
    chosen = volumes.writers(0, len(RATES))
    for volume in chosen:
        subject.grow(volume, HEADROOM + EXTENT)
    with contextlib.ExitStack() as stack:
        paths = stack.enter_context(subject.prepared(chosen, "COW", CAPACITY))
        drives, monitors, disks = [], {}, []
        for rate, path, volume in zip(RATES, paths, chosen, strict=True):
            _format(path, begin)
            pace = rate * MIB // STEP
            daemon = storage_daemon(directory, f"at-{rate}", path, pace)
            qmp, disk = stack.enter_context(daemon)
            drives.append(subject.drive(volume))
            monitors[drives[-1][0]] = qmp
            disks.append(disk)
        subject.control.watch(drives, POLICY, monitors)
        with ThreadPoolExecutor(len(RATES)) as pool:
            found = list(pool.map(
                lambda rate, disk: _write_at(rate * MIB, disk, seconds, HEADROOM - first),
                RATES, disks,
            ))  # fmt: skip
        facts = subject.control.call("facts")["drives"]
        subject.control.call("forget")
    return [
        Cycles(
            rate * MIB, measured, facts[drive[0]]["extends"], facts[drive[0]]["slowest"], HEADROOM,
            failed,
        )
        for rate, drive, (measured, failed) in zip(RATES, drives, found, strict=True)
    ]  # fmt: skip


def at_full_speed(subject: Subject, directory: Path, size: int) -> Cycles:
    """As much as the machine writes, `size` bytes, and all of them."""
    volumes = Volumes.new(100, 0, 2)
    subject.fill(volumes)
    writers = Writers(subject, directory, volumes.writers(0, 2), size)
    full = writers.free_run()
    trial = writers.trial(DEFAULT, ())
    facts = trial.facts
    return Cycles(
        max(full, trial.rate), trial.rate, facts["extends"], facts["slowest"],
        DEFAULT["headroom_min"], trial.failed,
    )  # fmt: skip


def _format(path: str, begin: bytes) -> None:
    with open(path, "r+b", buffering=0) as device:
        device.write(begin)


def _write_at(rate: int, disk: str, seconds: float, threshold: int) -> tuple[float, str]:
    """A slow one begins so that it passes its first threshold after half of the time."""
    first = max(0, threshold - int(rate * seconds / 2)) // STEP * STEP
    count = max(1, int(rate * seconds) // STEP)
    measured, failed = write(disk, count, PIECE, IN_FLIGHT, STEP, first)
    return measured, failed or _read(disk, [first + each * STEP for each in range(count)])


def _read(disk: str, places: Sequence[int]) -> str:
    """What is wrong with what was written, if anything."""
    commands = "".join(f"read -q -P {PATTERN} {place} {PIECE}\n" for place in places)
    done = subprocess.run(
        ["qemu-io", "-r", "-f", "raw", f"nbd+unix:///disk?socket={disk}"], input=commands,
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    if done.returncode or "failed" in done.stdout:
        return f"what was written is not there: {done.stdout[:500]} {done.stderr[:500]}"
    return ""
