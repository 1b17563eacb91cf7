# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from vdsm_storage.base import files
from vdsm_storage.base.secret import Secret
from vdsm_storage.base.units import round_up
from vdsm_storage.base.uuids import is_uuid, new_uuid


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "f"
    files.write_atomic(str(path), b"one", mode=0o600)
    files.write_atomic(str(path), b"two", mode=0o644)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["f"]


def test_write_new_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_new(str(path), b"new", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for taken in (path, tmp_path / "link"):
        with pytest.raises(FileExistsError):
            files.write_new(str(taken), b"other")
    assert path.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_write_atomic_follows_no_planted_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "f.new").symlink_to(victim)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        files.write_atomic(str(tmp_path / "f"), b"x")
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("size", [0, 1, 511, 512, 4095, 4096, 4097, 10000])
def test_read_direct_gives_what_is_there(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    path = tmp_path / "f"
    path.write_bytes(data)
    assert files.read_direct(str(path), 8192) == data[:8192]
    assert files.read_direct(str(path), 100) == data[:100]
    assert files.read_direct(str(path), 8192, offset=4096) == data[4096 : 4096 + 8192]


def test_write_direct(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"\0" * 8192)
    files.write_direct(str(path), b"x" * 512, 1024)
    assert path.read_bytes() == b"\0" * 1024 + b"x" * 512 + b"\0" * (8192 - 1536)
    with pytest.raises(ValueError, match="not aligned"):
        files.write_direct(str(path), b"x" * 100, 0)


def test_read_small_refuses_links_and_large_files(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 100)
    (tmp_path / "l").symlink_to(tmp_path / "f")
    assert files.read_small(str(tmp_path / "f")) == b"x" * 100
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        files.read_small(str(tmp_path / "l"))
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        files.read_small(str(tmp_path / "f"), limit=99)


def test_small_things() -> None:
    assert [round_up(n, 4096) for n in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
    assert is_uuid(new_uuid())
    assert not any(map(is_uuid, ["", "../../etc", new_uuid().upper(), new_uuid() + "\n"]))
    secret = Secret("s3cret")
    assert "s3cret" not in f"{secret} {secret!r} {[secret]}"
    assert secret.reveal() == "s3cret"
