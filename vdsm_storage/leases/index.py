# SPDX-License-Identifier: GPL-2.0-or-later
"""The index of a domain's external leases: which lease is in which slot.  Pure functions.

A domain's `xleases` is divided into slots of the domain's alignment.  Slot 0 is unused, slot 1
holds the index, slot 2 is sanlock's, lease n is in slot 3 + n.  The index is 253952 bytes:

    block 0 (512 bytes)        magic, format, lockspace, time, whether all of it is being written
    record n (64 bytes)        at 512 + 64 n, for n below 3960

    "e1e437b7-...-80113e940bb4" 12 NULs  NUL  "00003145728"  NUL  "-" or "u"  "-"  "\\n"

A free record has NULs for the id and zeros for the offset.  A record with "u" counts as none: an
older writer was cut off there.  The offset in a record only informs; the record's number decides.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

INDEX_SIZE: Final = 253952  # bytes
RECORDS: Final = 3960
FIRST_SLOT: Final = 3  # of a lease
_MAGIC: Final = 0x12152016
_VERSION: Final = b"0001"
_HEAD: Final = struct.Struct(">i x 4s x 48s x 10s x c 440x c")
_RECORD: Final = struct.Struct("48s x 11s x 3s")
_UPDATING: Final = b"u"
_READY: Final = b"-"


class IndexDamagedError(ValueError):
    """The bytes are no index of this lockspace; the text says why."""


class IndexUpdatingError(IndexDamagedError):
    """The writing of the whole index was cut off."""


@dataclass(frozen=True)
class Record:
    """A lease in the index.  `updating`: half made by an older writer; counts as none."""

    number: int
    lease: str
    updating: bool = False


@dataclass(frozen=True)
class Index:
    """`mtime` in seconds since the epoch: when the index was formatted or rebuilt."""

    lockspace: str
    mtime: int
    records: tuple[Record, ...]

    def find(self, lease: str) -> Record | None:
        """The lease's record, half-made ones too."""
        return next((record for record in self.records if record.lease == lease), None)

    def first_free(self) -> int | None:
        """The lowest number without a record; None when the index is full."""
        taken = {record.number for record in self.records}
        return next((number for number in range(RECORDS) if number not in taken), None)


def lease_offset(number: int, alignment: int) -> int:
    """Where lease `number` is, in bytes."""
    return (FIRST_SLOT + number) * alignment


def encode_head(lockspace: str, mtime: int, updating: bool) -> bytes:
    """The first 512 bytes."""
    state = _UPDATING if updating else _READY
    return _HEAD.pack(_MAGIC, _VERSION, lockspace.encode(), b"%010d" % mtime, state, b"\n")


def encode_record(lease: str, offset: int) -> bytes:
    """A lease's 64 bytes; a free record for "" and 0."""
    return _RECORD.pack(lease.encode(), b"%011d" % offset, b"--\n")


FREE: Final = encode_record("", 0)


def encode(index: Index, alignment: int, updating: bool = False) -> bytes:
    """The whole index."""
    records = [FREE] * RECORDS
    for record in index.records:
        offset = lease_offset(record.number, alignment)
        records[record.number] = encode_record(record.lease, offset)
    return encode_head(index.lockspace, index.mtime, updating) + b"".join(records)


def record_position(number: int) -> int:
    """Bytes from the start of the index to record `number`."""
    return _HEAD.size + number * _RECORD.size


def decode(data: bytes, lockspace: str) -> Index:
    """The index of `lockspace`.  Raises IndexDamagedError, IndexUpdatingError.

    A single record that makes no sense is left alone and its slot is not used.
    """
    if len(data) < INDEX_SIZE:
        raise IndexDamagedError(f"it has {len(data)} bytes, not {INDEX_SIZE}")
    magic, version, name, mtime, state, _ = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise IndexDamagedError("it was never formatted")
    if version != _VERSION:
        raise IndexDamagedError(f"its format is {version!r}, {_VERSION!r} is known")
    found = _text(name)
    if found != lockspace:
        raise IndexDamagedError(f"it is the index of lockspace {found!r}")
    if state == _UPDATING:
        raise IndexUpdatingError("its writing was cut off")
    if state != _READY or not mtime.isdigit():
        raise IndexDamagedError("its first block makes no sense")
    records = []
    for number in range(RECORDS):
        position = record_position(number)
        if data[position : position + _RECORD.size] != FREE:
            records.append(_decode_record(data, number))
    return Index(lockspace, int(mtime), tuple(records))


def _decode_record(data: bytes, number: int) -> Record:
    lease, _, flags = _RECORD.unpack_from(data, record_position(number))
    ready = flags[:1] == _READY and flags[2:] == b"\n"
    return Record(number, _text(lease), updating=not ready)


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("ascii", errors="replace")
