# SPDX-License-Identifier: GPL-2.0-or-later
"""A process is killed at every step of an operation; the next one completes it or takes it back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WALKER = Path(__file__).parent / "walker.py"
ROOT = Path(__file__).parent.parent.parent


def walk(directory: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(WALKER), str(directory), *arguments],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else {}


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {"journal"}


def only(statuses: dict[str, Any]) -> dict[str, Any]:
    assert len(statuses) == 1
    return dict(next(iter(statuses.values())))


@pytest.mark.parametrize(("point", "left"), [("a", set()), ("b", set()), ("c", {"a", "b", "c"})])
def test_killed_at_a_step(tmp_path: Path, point: str, left: set[str]) -> None:
    code, _ = walk(tmp_path, "run", f"files:{point}")
    assert code == -signal.SIGKILL
    code, shown = walk(tmp_path, "recover")
    assert code == 0
    assert files(tmp_path) == left
    task = only(shown["tasks"])
    assert task["taskState"] == "finished"
    if left:
        assert (task["taskResult"], task["code"]) == ("success", 0)
    else:
        assert (task["taskResult"], task["code"]) == ("cleanSuccess", 100)
        assert "restart" in task["message"]
    _, again = walk(tmp_path, "recover")
    assert again == shown


def test_killed_while_taking_back(tmp_path: Path) -> None:
    walk(tmp_path, "run", "files:b")
    code, _ = walk(tmp_path, "recover", "undo:b")
    assert code == -signal.SIGKILL
    _, shown = walk(tmp_path, "recover")
    assert files(tmp_path) == set()
    assert only(shown["tasks"])["taskResult"] == "cleanSuccess"


def test_killed_while_reverting(tmp_path: Path) -> None:
    _, shown = walk(tmp_path, "run")
    assert only(shown["tasks"])["taskResult"] == "success"
    assert only(shown["jobs"])["status"] == "done"
    code, _ = walk(tmp_path, "revert", "undo:b")
    assert code == -signal.SIGKILL
    _, shown = walk(tmp_path, "recover")
    assert files(tmp_path) == set()
    task = only(shown["tasks"])
    assert (task["taskState"], task["taskResult"]) == ("finished", "cleanSuccess")
    assert only(shown["jobs"])["status"] == "done"  # ended jobs survive a restart
