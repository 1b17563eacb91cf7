# SPDX-License-Identifier: GPL-2.0-or-later
"""A crash point kills or stops the process that reaches it, and no other point does."""

from __future__ import annotations

import os
import signal

import pytest

from vdsm_storage.jobs.operation import CrashPoints


def reach(armed: str | None, *points: str) -> int:
    """What becomes of a process that reaches the points: its status as of waitpid()."""
    crash = CrashPoints(armed)
    pid = os.fork()
    if pid == 0:
        for point in points:
            crash.reach(point)
        os._exit(7)
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        os.kill(pid, signal.SIGCONT)
        _, ended = os.waitpid(pid, 0)
        assert os.WEXITSTATUS(ended) == 7, "it goes on when it is continued"
    return status


@pytest.mark.parametrize(
    ("armed", "points"),
    [("a:b", ["a:b"]), ("a:b", ["a:c", "a:b"]), ("a:b:2", ["a:b", "a:b"])],
)
def test_it_kills(armed: str, points: list[str]) -> None:
    assert os.WTERMSIG(reach(armed, *points)) == signal.SIGKILL


@pytest.mark.parametrize("armed", [None, "", "a:b", "a:c:2", "stop a:b"])
def test_it_does_not(armed: str | None) -> None:
    assert os.WEXITSTATUS(reach(armed, "a:c", "b:b")) == 7


def test_it_stops() -> None:
    status = reach("stop a:b", "a:b")
    assert os.WIFSTOPPED(status)
    assert os.WSTOPSIG(status) == signal.SIGSTOP
