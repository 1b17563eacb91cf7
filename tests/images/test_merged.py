# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vdsm_storage.host.qemu_img import QCOW2, RAW, Image, QemuImg
from vdsm_storage.images.merged import absent_at

MIB = 1024 * 1024


def layer(path: Path, *pieces: int) -> Image:
    """With a cluster of data at each of these MiBs."""
    subprocess.run(["qemu-img", "create", "-q", "-f", QCOW2, path, "16M"], check=True)
    for piece in pieces:
        command = f"write -P 1 {piece}M 64k"
        argv = ["qemu-io", "-f", QCOW2, "-c", command, path]
        subprocess.run(argv, check=True, capture_output=True)
    return Image(str(path), QCOW2)


@pytest.mark.parametrize(
    ("top", "base", "where"),
    [
        ((), (), None),
        ((1, 5), (0, 1, 5, 9), None),
        ((0, 1), (1,), 0),
        ((1, 5, 15), (1, 5), 15 * MIB),
        ((3,), (), 3 * MIB),
    ],
)
def test_data_without_a_place(
    tmp_path: Path, top: tuple[int, ...], base: tuple[int, ...], where: int | None
) -> None:
    above, below = layer(tmp_path / "top", *top), layer(tmp_path / "base", *base)
    assert absent_at(QemuImg(), above, below) == where


def test_raw_base_has_a_place_for_all(tmp_path: Path) -> None:
    (tmp_path / "raw").touch()
    raw = Image(str(tmp_path / "raw"), RAW)
    assert absent_at(QemuImg(), layer(tmp_path / "top", 1), raw) is None
