# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest image, made once a machine and kept until what goes into it changes.

It lies outside of the tree, in $VDSM_STORAGE_LAB_CACHE or /var/cache/vdsm-storage-lab, so that a
fresh clone finds it; without the right to write there, in .lab of the tree.  What is made from
packages (rootfs.py, half a minute to some minutes) and the initial RAM disk (initrd.py, a moment)
have each a key: a digest of the sources that make it, and of the distribution's name.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from functional.lab import initrd, rootfs

TREE = Path(__file__).parents[2]
UNUSED = 14 * 86400.0  # seconds after which an image that nobody used is removed


@dataclass(frozen=True)
class Image:
    root: Path
    kernel: Path
    initrd: Path


def cache() -> Path:
    chosen = os.environ.get("VDSM_STORAGE_LAB_CACHE")
    path = Path(chosen or "/var/cache/vdsm-storage-lab")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        if chosen:
            raise
    return path if os.access(path, os.W_OK) else TREE / ".lab"


def image(say: Callable[[str], None] = lambda _: None) -> Image:
    """The image for this tree, built if it is not there.  Raises BuildError."""
    place = cache()
    place.mkdir(parents=True, exist_ok=True)
    root = place / f"root-{_key(Path(rootfs.__file__))}"
    ram = place / f"initrd-{_key(Path(rootfs.__file__), *initrd.SOURCES)}"
    with _one_at_a_time(place / "build.lock"):
        if not root.exists():
            say(f"building {root} from packages")
            started = time.monotonic()
            _whole(root, rootfs.build)
            say(f"built in {time.monotonic() - started:.0f} s")
        if not ram.exists():
            _whole(ram, lambda directory: initrd.build(root, directory / "initrd"))
        for path in (root, ram):
            os.utime(path)
        _remove_unused(place)
    return Image(root / "root.img", root / "vmlinux", ram / "initrd")


def _key(*sources: Path) -> str:
    digest = hashlib.sha256(Path("/etc/os-release").read_bytes())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _whole(target: Path, build: Callable[[Path], None]) -> None:
    """A directory that appears only when it is complete."""
    half = target.with_name(f"half-{target.name}")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    try:
        build(half)
        half.rename(target)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise


def _remove_unused(place: Path) -> None:
    """A guest that runs from a removed image goes on: QEMU has it open."""
    for path in (*place.glob("root-*"), *place.glob("initrd-*")):
        if path.stat().st_mtime < time.time() - UNUSED:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
