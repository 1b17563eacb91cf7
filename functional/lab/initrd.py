# SPDX-License-Identifier: GPL-2.0-or-later
"""The initial RAM disk: busybox, a few modules, and our own two programs (init.sh, inside.py)."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = (HERE / "init.sh", HERE / "inside.py", Path(__file__))
_FOLDERS = ("bin", "proc", "sys", "dev", "root", "modules")


def build(rootfs: Path, target: Path) -> None:
    """`rootfs` is a directory that rootfs.build() filled."""
    files = {"bin/busybox": rootfs / "busybox", "init": SOURCES[0], "inside.py": SOURCES[1]}
    files |= {f"modules/{path.name}": path for path in sorted((rootfs / "modules").iterdir())}
    write(target, _FOLDERS, files)


def write(target: Path, folders: Sequence[str], files: Mapping[str, Path]) -> None:
    """A cpio archive: folders (parents first), and files by the name that they have in it."""
    with target.open("wb") as archive:
        for number, (name, mode, content) in enumerate(_entries(folders, files)):
            archive.write(_entry(number, name, mode, content))
        archive.write(_entry(0, "TRAILER!!!", 0, b""))


def _entries(
    folders: Sequence[str], files: Mapping[str, Path]
) -> Iterator[tuple[str, int, bytes]]:
    for name in folders:
        yield name, stat.S_IFDIR | 0o755, b""
    for name, path in files.items():
        yield name, stat.S_IFREG | 0o755, path.read_bytes()


def _entry(number: int, name: str, mode: int, content: bytes) -> bytes:
    """One member of a cpio archive in the `newc` format: a header in hexadecimal, name, content.

    The fields: inode, mode, uid, gid, links, mtime, size, device and special device as major and
    minor, length of the name, checksum (unused here).
    """
    fields = (number + 1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name.encode() + b"\0") + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
