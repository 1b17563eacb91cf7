# SPDX-License-Identifier: GPL-2.0-or-later
"""How much of a block domain a new volume gets.

A thin volume begins small and is grown before its guest has filled it; files need none of this,
they grow by themselves.
"""

from __future__ import annotations

from typing import Final

from vdsm_storage.base.units import MIB, round_up
from vdsm_storage.images.qcow2_empty import full_size

# What a thin volume begins with; upstream has the same value.  Once a guest uses it, what is free
# is the affair of monitor/watermark.py.
CHUNK: Final = 2560 * MIB
# A thin volume that is told how much it will hold gets a tenth more, for qcow2's own tables.
OVERHEAD: Final = (11, 10)


def cow_size(capacity: int, initial: int | None, *, preallocated: bool) -> int:
    """Bytes to allocate for a new qcow2 volume of `capacity` bytes.

    `initial` is how much it will soon hold.  A preallocated one never has to grow.
    """
    if preallocated:
        return full_size(capacity)
    if initial:
        more, of = OVERHEAD
        return round_up(min(initial * more // of, full_size(capacity)), MIB)
    return min(CHUNK, round_up(capacity, MIB))


def copied_size(required: int, capacity: int, *, leaf: bool) -> int:
    """Bytes for a qcow2 volume into which `required` bytes, as measured, will be copied.

    A leaf gets a chunk more: its guest goes on to write.
    """
    wanted = required + (CHUNK if leaf else 0)
    return round_up(min(wanted, max(required, full_size(capacity))), MIB)
