# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that a shell becomes which stood ready."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vdsm_storage.base.run import Command, Process, run, start
from vdsm_storage.errors import CommandError, CommandTimeout
from vdsm_storage.lvm.launcher import Launcher

PATIENCE = 60.0
SCRIPT = 'echo "$@" $A $LC_ALL; readlink /proc/self/fd/0; ps -o pgid= -p $$; echo $$'
TELL = ["sh", "-c", SCRIPT, "-"]


class Ready(Launcher):
    """Waits until the shell stands ready; `shells` are the processes that became a command."""

    def __init__(self) -> None:
        super().__init__()
        self.shells: list[int] = []
        assert run(Command(["true"], timeout=20), self.start).stdout == b""
        self.wait()

    def wait(self) -> None:
        until(lambda: not self._ready.empty())

    def _take(self) -> Process | None:
        shell = super()._take()
        self.shells += [] if shell is None else [shell.pid]
        return shell


@pytest.fixture
def ready() -> Iterator[Ready]:
    launcher = Ready()
    yield launcher
    launcher.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_command_is_what_it_would_be_without(ready: Ready) -> None:
    words = ["two words", "it's", '"$HOME"', "*", "a\nb", "", "\\", "ü"]
    command = Command([*TELL, *words], timeout=20, env={"A": "b 'c'"})
    lines = [run(command, how).stdout.decode().splitlines() for how in (start, ready.start)]
    for *said, group, own in lines:
        assert said == [*" ".join([*words, "b 'c' C"]).split("\n"), "/dev/null"]
        assert group.strip() == own  # a process group of its own, to be killed with its helpers
    assert ready.shells == [int(lines[1][-1])]


def test_the_next_one_stands_ready_soon(ready: Ready) -> None:
    for _ in range(3):
        assert run(Command(["echo", "yes"], timeout=20), ready.start).stdout == b"yes\n"
        ready.wait()
    assert len(set(ready.shells)) == 3
    assert all(is_gone(pid) for pid in ready.shells)


def test_failures_are_told(ready: Ready) -> None:
    with pytest.raises(CommandError, match=r"sh failed \(exit code 3\): oh"):
        run(Command(["sh", "-c", "echo oh >&2; exit 3"], timeout=20), ready.start)
    ready.wait()
    with pytest.raises(CommandError, match=r"exit code 127\).*no-such-program"):
        run(Command(["no-such-program"], timeout=20), ready.start)
    ready.wait()
    with pytest.raises(CommandTimeout):
        run(Command(["sleep", "60"], timeout=0.3), ready.start)
    assert len(ready.shells) == 3
    assert all(is_gone(pid) for pid in ready.shells)


def test_one_that_cannot_is_replaced(ready: Ready) -> None:
    """It was killed; the command is too long for it."""
    shell = ready._ready.get()
    shell.kill()
    shell.wait()
    ready._ready.put(shell)
    assert run(Command(["echo", "yes"], timeout=20), ready.start).stdout == b"yes\n"
    ready.wait()
    long = "x" * 40_000
    assert run(Command(["echo", long], timeout=20), ready.start).stdout == f"{long}\n".encode()
    ready.wait()
    assert len(ready.shells) == 2
    assert all(is_gone(pid) for pid in ready.shells)


def test_nothing_is_begun_of_a_command_that_is_cut_off(ready: Ready, tmp_path: Path) -> None:
    shell = ready._ready.get()
    made = tmp_path / "made"
    assert shell.stdin is not None
    shell.stdin.write(f"{{ export A=b; exec touch {made}".encode())
    _, wrong = shell.communicate()
    assert shell.returncode == 2
    assert b"end of file" in wrong.lower()
    assert not made.exists()


def test_without_processes_there_is_another_try(
    ready: Ready, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shell = ready._ready.get()
    shell.kill()
    shell.communicate()
    with monkeypatch.context() as patched:
        patched.setenv("PATH", "/nowhere")
        ready._orders.put(True)  # as for one that was taken
        until(lambda: not ready._ordered)
    assert "sh failed (not started)" in caplog.text
    assert run(Command(["echo", "yes"], timeout=20), ready.start).stdout == b"yes\n"
    assert not ready.shells
    ready.wait()


AGENT = """
import os, sys, threading, time
from vdsm_storage.base.run import Command, run
from vdsm_storage.lvm.launcher import Launcher

launcher = Launcher()
run(Command(["true"], timeout=20), launcher.start)
while launcher._ready.empty():
    time.sleep(0.01)
command = Command(["sh", "-c", "echo $$ > {file}; exec sleep 60"], timeout=60)
threading.Thread(target=run, args=(command, launcher.start)).start()
while launcher._ready.empty():  # the next one stands ready
    time.sleep(0.01)
shell = launcher._ready.get()
print(shell.pid, flush=True)
time.sleep(60)
"""


def test_both_die_with_a_killed_agent(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT.format(file=file)], stdout=subprocess.PIPE, text=True
    )
    assert agent.stdout is not None
    shell = int(agent.stdout.readline())
    until(lambda: file.exists() and file.read_text().endswith("\n"))
    command = int(file.read_text())
    assert shell != command
    assert not is_gone(shell)
    assert not is_gone(command)
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    agent.stdout.close()
    until(lambda: is_gone(shell) and is_gone(command))


def is_gone(pid: int) -> bool:
    """Or nobody has asked for its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True
