# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.run import Command, Limits, run
from vdsm_storage.errors import ActionStopped, CommandError, CommandTimeout


def test_output_and_input_of_any_size() -> None:
    data = os.urandom(3_000_000)
    assert run(Command(["cat"], timeout=20, input=data)).stdout == data


def test_a_program_that_ignores_its_input_is_judged_by_its_exit_code() -> None:
    assert run(Command(["true"], timeout=20, input=b"x" * 1_000_000)).stdout == b""


def test_stderr_and_status_are_in_the_error() -> None:
    with pytest.raises(CommandError, match=r"sh failed \(exit code 7\): no such thing"):
        run(Command(["sh", "-c", "echo no such thing >&2; exit 7"], timeout=20))
    with pytest.raises(CommandError, match="SIGUSR1"):
        run(Command(["sh", "-c", "kill -USR1 $$"], timeout=20))


def test_accepted_exit_codes() -> None:
    command = Command(["sh", "-c", "echo part; exit 3"], timeout=20, ok=(0, 3))
    assert run(command).stdout == b"part\n"


def test_a_missing_program_is_named() -> None:
    with pytest.raises(CommandError, match="no-such-program"):
        run(Command(["no-such-program"], timeout=20))


def test_timeout_kills_even_what_ignores_sigterm(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"trap '' TERM; echo $$ > {pid_file}; while :; do sleep 0.1; done"
    with pytest.raises(CommandTimeout, match="sh did not end within 1 seconds"):
        run(Command(["sh", "-c", script], timeout=1))
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_cancel_stops_the_program() -> None:
    cancel = Cancel()
    timer = threading.Timer(0.3, cancel.request)
    timer.start()
    with pytest.raises(ActionStopped):
        run(Command(["sleep", "60"], timeout=50, cancel=cancel))
    timer.join()
    with pytest.raises(ActionStopped):
        run(Command(["sleep", "60"], timeout=50, cancel=cancel))


def test_output_arrives_while_the_program_runs() -> None:
    pieces: list[bytes] = []
    script = "echo one; sleep 0.3; echo two"
    result = run(Command(["sh", "-c", script], timeout=20, on_output=pieces.append))
    assert result.stdout == b""
    assert len(pieces) == 2
    assert b"".join(pieces) == b"one\ntwo\n"


def test_memory_limit() -> None:
    script = "bytearray(600 * 1024 * 1024)"
    with pytest.raises(CommandError, match="MemoryError"):
        run(
            Command(
                ["/usr/bin/python3", "-c", script],
                timeout=20,
                limits=Limits(memory=300 * 1024 * 1024),
            )
        )


def test_a_child_dies_with_a_killed_agent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program = (
        "from vdsm_storage.base.run import Command, run\n"
        f"run(Command(['sh', '-c', 'echo $$ > {pid_file}; exec sleep 60'], timeout=60))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    while not (pid_file.exists() and pid_file.read_text().strip()):
        time.sleep(0.02)
    child = int(pid_file.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 60
    while not (dead := is_dead(child)) and time.monotonic() < end:
        time.sleep(0.02)
    if not dead:
        os.kill(child, signal.SIGKILL)
    assert dead


def is_dead(pid: int) -> bool:
    """Gone, or nobody has asked for its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True
