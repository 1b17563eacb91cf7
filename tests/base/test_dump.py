# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that holds secrets leaves no core."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PR_GET_DUMPABLE = 3
CAN = """
import resource
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
"""
# As a program that collects dumps finds it, which the limit does not stop.
BY_PRCTL = """
from vdsm_storage.base import dump
dump.resource.setrlimit = lambda *_: None
dump.never()
"""
BOTH = "from vdsm_storage.base import dump; dump.never()"


def dumped(code: str, directory: Path) -> bool:
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", f"{CAN}\n{code}\nimport os; os.abort()"],
        cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status = os.waitpid(child.pid, 0)
    child.returncode = -os.WTERMSIG(status)
    return os.WCOREDUMP(status) or any(directory.glob("core*"))


def test_never(tmp_path: Path) -> None:
    if not dumped("", tmp_path):
        pytest.skip("no process dumps a core here")
    for path in tmp_path.iterdir():
        path.unlink()
    assert not dumped(BY_PRCTL, tmp_path)
    assert not dumped(BOTH, tmp_path)


def test_what_is_set() -> None:
    code = f"""
import ctypes, resource
{BOTH}
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
assert ctypes.CDLL(None).prctl({PR_GET_DUMPABLE}) == 0
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env=environment, timeout=60)
