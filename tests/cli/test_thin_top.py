# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of disks that grow."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.rpc.conftest import Start, Wire, authorities, dev_directory, start
from vdsm_storage.cli import top

__all__ = ["authorities", "start"]  # fixtures

MIB = 1 << 20
PROGRAM = str(Path(sys.executable).parent / "vdsm-client")
IDS = [f"8d6a1f0e-0000-4000-8000-00000000000{n}" for n in range(3)]
HEADINGS = (
    "VM drive state rate written size free lasts threshold headroom extends latency worst pauses "
    "avoided throttle full in"
)  # fmt: skip


def thin(state: str, allocation: int, rate: float = 0.0, **more: object) -> dict[str, str]:
    """Of a volume of 1 GiB; MiB, and MiB a second."""
    plain = {
        "state": state, "size": 1024 * MIB, "allocation": allocation * MIB, "threshold": 768 * MIB,
        "headroom": 256 * MIB, "chunk": 512 * MIB, "limit": 4096 * MIB,
        "writeRate": f"{rate * MIB:.1f}", "extends": 3, "lastLatency": "0.045",
        "maxLatency": "0.31", "events": 3, "pauses": 0, "pausesAvoided": 0, "throttleTime": "0.0",
        "throttle": 0,
    }  # fmt: skip
    return {key: str(value) for key, value in {**plain, **more}.items()}


def vm(number: int, name: str, disks: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    found = {drive: {"thin": told} if told else {} for drive, told in disks.items()}
    return {
        "vmId": IDS[number], "vmName": name, "status": "Up", "hash": "1", "statusTime": "1",
        "monitorResponse": "0", "pauseCode": "NOERR", "vcpuCount": "1", "vmJobs": {},
        "disks": found, "cpuUser": "0.00", "cpuSys": "0.00", "memUsage": "0",
    }  # fmt: skip


VMS = [
    vm(0, "web", {
        "vda": thin("armed", 512), "vdb": thin("extending", 800, 100, timeToFull="432.5"),
        "vdc": {},
    }),
    vm(1, "db", {
        "sda": thin("throttled", 1000, 64, throttle=16 * MIB, throttleTime="3.25",
                    pausesAvoided=2),
        "sdb": thin("full", 1024, pauses=1, error="no space in group g"),
        "sdc": thin("at limit", 900, 10, threshold=0),
    }),
    {"vmId": IDS[2], "status": "Down", "exitCode": 0, "exitMessage": "ended"},
]  # fmt: skip


def printed(disks: list[top.Disk], width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(top.view(disks, width))
    assert isinstance(console.file, io.StringIO)
    return [row.rstrip() for row in console.file.getvalue().splitlines() if row.strip()]


def test_those_that_will_need_space_first_come_first() -> None:
    """One that is full waits for it; one at its limit never will."""
    found = [(disk.vm, disk.drive, disk.lasts) for disk in top.disks_of(VMS)]
    assert found == [
        ("db", "sdb", 0.0), ("db", "sda", 24 / 64), ("web", "vdb", 2.24),
        ("db", "sdc", top.NEVER), ("web", "vda", top.NEVER),
    ]  # fmt: skip


def test_all_columns() -> None:
    heading, _rule, *rows, error = printed(top.disks_of(VMS), 250)
    assert heading.split() == HEADINGS.split()
    cells = [re.split(r"\s{2,}", row.strip()) for row in rows]
    assert cells[0] == [
        "db", "sdb", "full", "-", "█████████┃██ 100 %", "1 GiB", "0 B", "0 s", "768 MiB",
        "256 MiB", "3", "45 ms", "310 ms", "1", "0", "-", "-",
    ]  # fmt: skip
    assert cells[1][:4] == ["db", "sda", "throttled", "64 MiB/s"]
    assert rows[1].endswith("0        2  16 MiB/s (3.2 s)         -")
    assert rows[2].endswith("7.21 min")
    assert "██████░░░│░░  50 %" in rows[4]
    assert error == "db sdb: no space in group g"


@pytest.mark.parametrize(
    ("width", "there", "gone"),
    [
        (200, "threshold avoided throttle", ""),
        (130, "written headroom pauses full extends", "avoided threshold"),
        (80, "VM state free lasts written", "throttle headroom"),
        (60, "VM drive state rate size free lasts", "written"),
        (52, "VM drive state rate size free", "lasts"),
    ],
)
def test_a_narrow_terminal_does_without_some(width: int, there: str, gone: str) -> None:
    rows = printed(top.disks_of(VMS), width)
    assert max(len(row) for row in rows) <= width
    assert set(there.split()) <= set(rows[0].split())
    assert not set(gone.split()) & set(rows[0].split())
    if width > 60:
        assert not any("…" in row for row in rows)


def test_names_are_words_and_nothing_else() -> None:
    """Neither rich's markup nor escape sequences of a terminal; a long name is cut."""
    names = ["[red]a[/red]", "a\x1b[2Jb", "long" * 20]
    disks = [top.Disk(name, "vda", thin("armed", 1, error="\x1b]0;x")) for name in names]
    rows = printed(disks, 250)
    assert rows[2].startswith(" [red]a[/red] ")
    assert rows[3].startswith(" a?[2Jb ")
    assert rows[4].startswith(" " + "long" * 7 + "lon… ")
    assert not any("\x1b" in row for row in rows)


def test_a_disk_of_which_little_is_told() -> None:
    rows = printed([top.Disk("a", "vda", {"state": "unarmed"})], 250)
    assert rows[2].split()[:4] == ["a", "vda", "unarmed", "-"]


def test_none() -> None:
    assert printed([], 100)[-1].strip() == "No disk of a running VM grows"


# -- the program ----------------------------------------------------------------------------------


@pytest.fixture
def wire(start: Start, tmp_path: Path, authorities: tuple[str, str]) -> Wire:
    wire = start(secure=True)
    wire.probe.gate.set()
    dev_directory(wire, tmp_path, authorities[0])
    wire.probe.vms = VMS
    return wire


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [PROGRAM, "--dev", str(tmp_path), "thin", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("words", [["--once"], []])
def test_a_pipe_gets_all_of_it_once(wire: Wire, tmp_path: Path, words: list[str]) -> None:
    done = run(tmp_path, "top", *words)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [row.rstrip() for row in done.stdout.splitlines() if row.strip()]
    assert rows == printed(top.disks_of(VMS), 250)


@pytest.mark.parametrize(
    ("words", "told"),
    [([], "thin top or thin plot"), (["bottom"], "--help thin"), (["top", "web"], "takes no web"),
     (["top", "--interval", "0"], "--interval")],
)  # fmt: skip
def test_mistakes(wire: Wire, tmp_path: Path, words: list[str], told: str) -> None:
    done = run(tmp_path, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr


def test_an_agent_that_is_not_there(tmp_path: Path) -> None:
    done = run(tmp_path, "top", "--once")
    assert done.returncode == 1
    assert "-32605" in done.stderr


def test_on_a_terminal_it_follows(wire: Wire, tmp_path: Path) -> None:
    """An event renews it at once, the interval does so anyway; an agent that goes is waited for."""
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    command = [PROGRAM, "--dev", str(tmp_path), "thin", "top", "--interval", "600"]
    program = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs,
        # Whoever runs the tests in the background ignores the signal for all of them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(theirs)
    try:
        shown = read_until(mine, b"no space in group g")
        assert b"throttled" in shown
        wire.probe.vms = [vm(0, "other", {"vda": thin("armed", 1)})]
        wire.broker.publish_event("|virt|VM_status|x", {"status": "Up"})
        assert b"armed" in read_until(mine, b"other")
        program.send_signal(signal.SIGINT)
        assert program.wait(20) == 0
    finally:
        program.kill()
        program.wait(10)
        os.close(mine)


def test_it_looks_again_by_itself(wire: Wire, tmp_path: Path) -> None:
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    command = [PROGRAM, "--dev", str(tmp_path), "thin", "top", "--interval", "0.3"]
    program = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        read_until(mine, b"no space in group g")
        wire.probe.vms = [vm(0, "other", {"vda": thin("armed", 1)})]
        assert b"armed" in read_until(mine, b"other")
    finally:
        program.kill()
        program.wait(10)
        os.close(mine)


def read_until(terminal: int, text: bytes) -> bytes:
    shown, end = b"", time.monotonic() + 30
    while text not in shown:
        assert time.monotonic() < end, shown
        if select.select([terminal], [], [], 0.5)[0]:
            shown += os.read(terminal, 4096)
    return shown
