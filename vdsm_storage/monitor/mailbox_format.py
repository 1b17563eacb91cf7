# SPDX-License-Identifier: GPL-2.0-or-later
"""What lies in the mailbox of a pool, byte for byte; no I/O here.

The master domain has two volumes (or files): hosts write `inbox` and read `outbox`, the storage
pool manager (SPM) reads `inbox` and writes `outbox`.  In both, host n owns the 4096 bytes at
n * 4096: 63 slots of 64 bytes, and 64 bytes of which the last four are a checksum.

A request asks to extend a volume:

    "1xtnd" domain(16) volume(16) "0000000000000a00" "00000000000"

with the size in MiB as 16 hexadecimal digits.  The answer is the same message with the new size,
0 for a failure.  Then the host writes CLEAN, the SPM answers with CLEAN, and the slot is free.

The block of host 0 in `inbox` belongs to nobody: a host writes an event there to wake the SPM.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

BLOCK: Final = 4096  # bytes of one host
MESSAGE: Final = 64
SLOTS: Final = 63  # of 64: the last one holds the checksum
HOSTS: Final = 250  # blocks 0 to 249: host 250 is not served
MAX_SIZE: Final = 0xFFFFFFFF  # MiB

EMPTY: Final = bytes(MESSAGE)
CLEAN: Final = b"\1" * MESSAGE
EMPTY_BLOCK: Final = bytes(BLOCK)

_KEY: Final = 37  # bytes that say what a message is about
_SIZE: Final = slice(37, 53)
_VERSION: Final = b"1"
_EXTEND: Final = b"xtnd"
_PADDING: Final = b"0" * 11
_EVENT: Final = b"\0evt"
_CHECKSUM: Final = 4  # bytes
_HEX = re.compile(rb"[0-9a-fA-F]{16}")


@dataclass(frozen=True)
class Extend:
    """A request for `size` MiB, or an answer: `size` MiB the volume has now, 0 for a failure."""

    domain: str
    volume: str
    size: int

    def encode(self) -> bytes:
        """64 bytes.  Raises ValueError for a size or a uuid that no message can hold."""
        if not 0 <= self.size <= MAX_SIZE:
            raise ValueError(f"a message cannot ask for {self.size} MiB")
        return b"".join(
            (
                _VERSION, _EXTEND, _pack(self.domain), _pack(self.volume),
                b"%016x" % self.size, _PADDING,
            )
        )  # fmt: skip


def decode(message: bytes) -> Extend | None:
    """None for what is no request to extend.  Readers look at the op code, not at the version."""
    digits = message[_SIZE]
    if message[1:5] != _EXTEND or not _HEX.fullmatch(digits):
        return None
    size = int(digits, 16)
    if size > MAX_SIZE:
        return None
    return Extend(_unpack(message[5:21]), _unpack(message[21:37]), size)


def answer(message: bytes, size: int) -> bytes:
    """The answer to a request: `size` MiB, 0 for a failure."""
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"a message cannot tell of {size} MiB")
    return message[:_KEY] + b"%016x" % size + message[_SIZE.stop :]


def same_subject(one: bytes, other: bytes) -> bool:
    """Whether a message answers another one: all but their sizes is equal."""
    return one[:_KEY] == other[:_KEY]


def is_empty(message: bytes) -> bool:
    """Whether a slot is unused."""
    return message[:1] in (b"\0", b"0")


def _pack(text: str) -> bytes:
    return uuid.UUID(text).int.to_bytes(16, "little")


def _unpack(data: bytes) -> str:
    return str(uuid.UUID(int=int.from_bytes(data, "little")))


# -- the block of a host ---------------------------------------------------------------------


def messages(block: bytes) -> list[bytes]:
    """The 63 slots of a block."""
    return [block[start : start + MESSAGE] for start in range(0, SLOTS * MESSAGE, MESSAGE)]


def seal(slots: Sequence[bytes]) -> bytes:
    """The block of a host with its 63 slots and the checksum."""
    body = b"".join(slots).ljust(BLOCK - _CHECKSUM, b"\0")
    return body + _checksum(body)


def is_sound(block: bytes) -> bool:
    """Whether the checksum is right; a block without one is not, unless it is empty."""
    if len(block) != BLOCK:
        return False
    body = block[:-_CHECKSUM]
    return block[-_CHECKSUM:] == _checksum(body)


def _checksum(body: bytes) -> bytes:
    return sum(body).to_bytes(_CHECKSUM, "little")


# -- events ----------------------------------------------------------------------------------


def new_event() -> bytes:
    """A block for host 0's place that differs from all before it."""
    return event(uuid.uuid4())


def event(number: uuid.UUID) -> bytes:
    """Its bytes are in the order of RFC 4122, unlike those in messages."""
    return (_EVENT + number.bytes).ljust(BLOCK, b"\0")


def event_of(block: bytes) -> bytes | None:
    """What tells one event from another; None when there is none."""
    return block[len(_EVENT) : len(_EVENT) + 16] if block.startswith(_EVENT) else None
