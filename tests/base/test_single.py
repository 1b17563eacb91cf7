# SPDX-License-Identifier: GPL-2.0-or-later
"""One process at a time; one that was killed and cannot go away is followed all the same."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from vdsm_storage.base import single


def holder(path: str, keep: bool) -> tuple[int, int]:
    """A process that took the lock, and a child of it that keeps the descriptor (as a thread in
    the kernel would)."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        single.take(path)
        child = os.fork()
        if child == 0:
            while True:
                time.sleep(10)
        os.write(tell, b"%d\n" % child)
        while keep:
            time.sleep(10)
        os._exit(0)
    child = int(os.read(ready, 20))
    os.close(ready)
    os.close(tell)
    return pid, child


def end(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pids[0], 0)


def test_once_at_a_time(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    turn = single.take(path)
    assert not turn.after_stuck
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    with pytest.raises(OSError, match="another agent runs here"):
        single.take(path)
    os.close(turn.fd)
    again = single.take(path)
    assert not again.after_stuck
    os.close(again.fd)


def test_a_living_process_keeps_its_turn(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    pid, child = holder(path, keep=True)
    try:
        with pytest.raises(OSError, match="another agent runs here"):
            single.take(path)
    finally:
        end(pid, child)


def test_after_a_process_that_cannot_die(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    pid, child = holder(path, keep=False)  # not waited for: a zombie whose lock lives on
    try:
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        turn = single.take(path)
        assert turn.after_stuck
        with pytest.raises(OSError, match="another agent runs here"):
            single.take(path)
        os.close(turn.fd)
    finally:
        os.waitpid(pid, 0)
        os.kill(child, signal.SIGKILL)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic"):
        single.take(str(tmp_path / "lock"))
    assert not (tmp_path / "target").exists()
