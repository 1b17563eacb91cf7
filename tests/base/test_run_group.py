# SPDX-License-Identifier: GPL-2.0-or-later
"""A program that is ended takes its helpers along (mount starts mount.TYPE, that one a server)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from vdsm_storage.base.run import Command, run
from vdsm_storage.errors import CommandTimeout


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_helpers_end_too(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    with pytest.raises(CommandTimeout):
        run(Command(["sh", "-c", f"sleep 1000 & echo $! > {mark}; wait"], timeout=1.0))
    pid = int(mark.read_text())
    for _ in range(500):
        if not lives(pid):
            break
        time.sleep(0.02)
    assert not lives(pid)
