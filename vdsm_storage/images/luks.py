# SPDX-License-Identifier: GPL-2.0-or-later
"""The header of a LUKS container, which a raw volume is when its data are encrypted (LUKS1 on-disk
format; all numbers big-endian).

Which volumes are containers is said by the domain's metadata alone.  The header is looked at only
to refuse what is none: a guest may well put a LUKS header of its own on a disk in the clear.
"""

from __future__ import annotations

import struct
from typing import Final

READ_LENGTH: Final = 4096  # bytes, which have all that is looked at
# What QEMU puts in front of the data: a header and eight slots of a key of AES-256 in XTS mode.
PAYLOAD: Final = 2_068_480  # bytes
_SECTOR: Final = 512
_START: Final = struct.Struct(">6sH96xI")  # magic, version, ..., first sector of the data
_MAGIC: Final = b"LUKS\xba\xbe"


def problem(data: bytes) -> str | None:
    """Why a volume with these first bytes is not a container of ours; None if it is one."""
    if len(data) < _START.size:
        return f"it has {len(data)} bytes"
    magic, version, payload = _START.unpack_from(data)
    if (magic, version) != (_MAGIC, 1):
        return "it has no LUKS header"
    if payload * _SECTOR != PAYLOAD:
        return f"its data begin at {payload * _SECTOR}, not at {PAYLOAD}"
    return None
