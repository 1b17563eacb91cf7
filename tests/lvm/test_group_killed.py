# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 of the process at any moment of a change: afterwards all of it or nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.lvm.conftest import LoopDevices, LvmTool
from tests.lvm.writing import MIB, CountedLvm, check, made_group, open_group, sizes, told
from vdsm_storage.lvm.changes import CreateLv, ExtendLv, RemoveLv, RetagLv, RetagVg
from vdsm_storage.lvm.group import Group

ROOT = Path(__file__).resolve().parents[2]
BEGIN = (CreateLv("a", 5 * MIB, ("OLD",)), CreateLv("r", MIB), RetagVg((), ("VG",)))
BATCH = (
    ExtendLv("a", 9 * MIB),
    RetagLv("a", ("NEW",), ("OLD",)),
    *(CreateLv(f"c{n}", MIB) for n in range(200)),
    RemoveLv("r"),
    RetagVg(("VG",)),
)
SINGLE = (ExtendLv("a", 9 * MIB),)


def child(kind: str, directory: str, devices: Sequence[str]) -> None:
    """What is killed: says when it begins, makes one change."""
    group = open_group(devices, CountedLvm(directory))
    group.read()
    print("ready", flush=True)
    sys.stdin.readline()
    group.apply(*(BATCH if kind == "batch" else SINGLE))
    print("done", flush=True)


def start(kind: str, directory: str, devices: Sequence[str]) -> subprocess.Popen[bytes]:
    code = "import sys; from tests.lvm.test_group_killed import child; "
    code += "child(sys.argv[1], sys.argv[2], sys.argv[3:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, kind, directory, *devices],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def kill_after(process: subprocess.Popen[bytes], seconds: float) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    assert process.stdout is not None
    process.stdout.close()


LONGEST = 120  # moments, where a machine is busier than when the time of a change was measured


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batch", "single"])
def test_killed_at_any_moment(loops: LoopDevices, lvm: LvmTool, tmp_path: Path, kind: str) -> None:
    group, ours = made_group(loops, lvm, tmp_path)
    group.apply(*BEGIN)
    old = sizes(group.read())
    group.apply(*(BATCH if kind == "batch" else SINGLE))
    new = sizes(group.read())
    took = time_of_change(group, kind)
    seen: set[bool] = set()
    for step in range(LONGEST):
        if step >= 24 and seen == {True, False}:
            break
        restore(group)
        assert sizes(group.read()) == old
        process = start(kind, str(tmp_path / "child"), loops.paths)
        kill_after(process, took * step / 18)
        time.sleep(0.05)  # lvm dies with its parent, but not at the same instant
        found = sizes(told(lvm))
        assert found in (old, new)
        assert sizes(group.read()) == found
        check(lvm, group.read())
        seen.add(found == new)
    assert seen == {True, False}
    assert not ours.refuse


def restore(group: Group) -> None:
    model = group.read()
    group.apply(*(RemoveLv(name) for name in model.lvs), *BEGIN)


def time_of_change(group: Group, kind: str) -> float:
    restore(group)
    begun = time.monotonic()
    group.apply(*(BATCH if kind == "batch" else SINGLE))
    return time.monotonic() - begun
