# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk for the guest of writer.py on which each of its numbers takes a cluster of 2 MiB.

So a guest that writes a few sectors a second needs ever more of its volume, also where emulation
runs in emulation, and of all of it is known what it must be.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from functional.checker.group import Group
from functional.checker.qcow2 import ADDRESS, HEADER
from functional.guests import writer

STRIDE = 2 * 1024**2
PLACE = 2 * STRIDE  # of the first number
CAPACITY = PLACE + (writer.SLOTS + 2) * STRIDE
TABLES = 8  # clusters at the begin of an image: all that is no data, and the boot sector


def boot_sector() -> bytes:
    return writer.boot_sector(PLACE, STRIDE)


def commands(path: str, sector: str) -> Sequence[Sequence[str]]:
    """What makes an empty image of `path`, with the boot sector that is in the file `sector`."""
    return _create(path), _boot(path, sector)


def placed_commands(path: str, sector: str, work: str) -> Sequence[Sequence[str]]:
    """The same with a place for each cluster, one behind the other, so that a number is a write of
    one sector, not of a cluster: for storage that is slow.  `work` is the name of a file for the
    image meanwhile: it has an end, which `path` need not have room for."""
    return (
        _create(work, ",preallocation=metadata"), _boot(work, sector),
        ("dd", "status=none", "conv=notrunc", f"bs={STRIDE}", f"count={TABLES}", f"if={work}",
         f"of={path}"),
        ("rm", work),
    )  # fmt: skip


def _create(path: str, more: str = "") -> Sequence[str]:
    options = f"cluster_size={STRIDE}{more}"
    return "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(CAPACITY)


def _boot(path: str, sector: str) -> Sequence[str]:
    return "qemu-io", "-f", "qcow2", "-n", "-c", f"write -s {sector} 0 512", path


def check(group: Group, lv: str, known: int) -> int:
    """What the volume has, as writer.check; read through its extents."""
    return writer.check(b"".join(_sectors(group, lv)), known)


def _sectors(group: Group, lv: str) -> Iterator[bytes]:
    """One table leads to all clusters: it has more entries than the disk has clusters."""
    (l1,) = struct.unpack(">Q", group.read(lv, HEADER.unpack_from(group.read(lv, 0, 4096))[8], 8))
    first = PLACE // STRIDE
    count = first + writer.SLOTS
    table = struct.unpack(f">{count}Q", group.read(lv, l1 & ADDRESS, count * 8))
    for entry in table[first:]:
        place = entry & ADDRESS
        there = 0 < place < group.size(lv)
        yield group.read(lv, place, writer.SECTOR) if there else bytes(writer.SECTOR)
