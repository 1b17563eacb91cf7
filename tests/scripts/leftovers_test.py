# SPDX-License-Identifier: GPL-2.0-or-later
"""What a test run leaves behind is found, and can be put an end to."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="vs."))
    yield path
    leftovers(path, "--clean")
    assert not path.exists()


def leftovers(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-P", str(ROOT / "scripts" / "leftovers.py"), str(path), *options]
    argv += ["--settle", "0.3"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def test_nothing_left_removes_the_directory(run_dir: Path) -> None:
    (run_dir / "file").touch()
    assert leftovers(run_dir).returncode == 0
    assert not run_dir.exists()


def test_a_process_is_found_and_ended(run_dir: Path) -> None:
    marked = {**os.environ, "VDSM_STORAGE_TEST_RUN": str(run_dir)}
    other = subprocess.Popen(["sleep", "61"])
    ours = subprocess.Popen(["sleep", "62"], env=marked)
    try:
        told = leftovers(run_dir)
        assert told.returncode == 1
        assert f"process {ours.pid}: sleep 62" in told.stderr
        assert "sleep 61" not in told.stderr
        assert leftovers(run_dir, "--clean").returncode == 1
        assert ours.wait(10) == -9
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        ours.kill()
        ours.wait()


@pytest.mark.mount
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts: needs root")
def test_mounts_and_loop_devices_are_found_and_ended(run_dir: Path) -> None:
    image, point = run_dir / "image", run_dir / "a mount"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", image, point], check=True, timeout=60)
    told = leftovers(run_dir).stderr
    assert f"mount {point}\n" in told
    assert f": {image}\n" in told
    assert leftovers(run_dir, "--clean").returncode == 1
    assert not run_dir.exists()
