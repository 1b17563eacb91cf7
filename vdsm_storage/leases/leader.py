# SPDX-License-Identifier: GPL-2.0-or-later
"""The first sector of a lease as sanlock 3.8 writes it: the leader record.

    offset  size  little-endian
         0     4  magic 0x06152010
         4     4  version of the format
         8     4  flags
        12     4  sector size
        16     8  number of hosts
        24     8  most hosts
        32     8  owner's host id
        40     8  owner's generation
        48     8  version of the lease: how often it was acquired
        56    48  lockspace, NUL-padded
       104    48  resource, NUL-padded
       152     8  time of the acquisition in the owner's monotonic seconds; 0 when free
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

LEADER_SIZE: Final = 512
MAGIC: Final = 0x06152010
DELTA_MAGIC: Final = 0x12212010  # of a host id's record in a lockspace, otherwise the same
_RECORD: Final = struct.Struct("<IIIIQQQQQ48s48sQ")


@dataclass(frozen=True)
class Leader:
    """`version` 0: never acquired.  `timestamp` 0: not held exclusively now."""

    lockspace: str
    resource: str
    owner_id: int
    owner_generation: int
    version: int
    timestamp: int


def parse_leader(data: bytes, magic: int = MAGIC) -> Leader | None:
    """None for anything that is no lease."""
    if len(data) < _RECORD.size:
        return None
    fields = _RECORD.unpack_from(data)
    if fields[0] != magic:
        return None
    return Leader(
        lockspace=_text(fields[9]),
        resource=_text(fields[10]),
        owner_id=fields[6],
        owner_generation=fields[7],
        version=fields[8],
        timestamp=fields[11],
    )


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode(errors="replace")
