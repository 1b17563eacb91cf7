# SPDX-License-Identifier: GPL-2.0-or-later
"""Empty qcow2 images against those of the qemu-img that is installed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vdsm_storage.images.qcow2_empty import MAX_SIZE, empty_qcow2

KIB, MIB, GIB, TIB = 1024, 1024**2, 1024**3, 1024**4
PARENT = "6b0d549b-6f03-475a-9600-a35a099950d8"


def qemu_img(*argv: str) -> bytes:
    done = subprocess.run(["qemu-img", *argv], capture_output=True, check=True, timeout=60)
    return done.stdout


def info(path: Path) -> Any:
    answer = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", str(path)))
    for key in ("filename", "full-backing-filename", "actual-size", "children"):
        answer.pop(key, None)
    return answer


@pytest.mark.parametrize("backing", [None, "raw", "qcow2"])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize(
    "size",
    [512, 4096, 512 * MIB - 4096, 512 * MIB, 512 * MIB + 4096, GIB, 5 * TIB, 64 * TIB, MAX_SIZE],
)
def test_the_same_as_qemu_img(tmp_path: Path, size: int, compat: str, backing: str | None) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    how = ["-u", "-b", PARENT, "-F", backing] if backing else []
    qemu_img("create", "-q", "-f", "qcow2", *how, "-o", f"compat={compat}", str(theirs), str(size))
    ours.write_bytes(empty_qcow2(size, compat, PARENT if backing else None, backing))
    assert info(ours) == info(theirs)
    version = qemu_img("--version")
    if b"version 7.2" in version:  # other versions may name other features in the header
        assert ours.read_bytes() == theirs.read_bytes()
        assert os.stat(ours).st_size == os.stat(theirs).st_size


@pytest.mark.parametrize("size", [4096, GIB, 5 * TIB])
def test_it_holds_data(tmp_path: Path, size: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(empty_qcow2(size))
    place = size - 4096
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", f"write -P 7 {place} 4k", str(path)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert json.loads(qemu_img("check", "--output=json", "-f", "qcow2", str(path)))[
        "check-errors"
    ] == 0
    assert info(path)["virtual-size"] == size


@pytest.mark.parametrize("size", [-512, 100, MAX_SIZE + 512])
def test_sizes_that_cannot_be(size: int) -> None:
    with pytest.raises(ValueError, match="cannot have"):
        empty_qcow2(size)
