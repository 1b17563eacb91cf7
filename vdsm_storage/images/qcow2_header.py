# SPDX-License-Identifier: GPL-2.0-or-later
"""A qcow2 header read by hand, before a program is trusted with a stranger's image.

The layout is that of the qcow2 specification that comes with QEMU (docs/interop/qcow2.txt): numbers
are big-endian, version 2 has 72 bytes, version 3 at least 104, then extensions, then (anywhere
in the first cluster) the backing file's name.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

MAGIC = b"QFI\xfb"
READ_LENGTH = 128 * 1024  # bytes: what is looked at; QEMU keeps all of this in 64 KiB

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_V3_LENGTH = 104

# Incompatible features, by bit.
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = range(5)

# Types of header extensions.
_END = 0
_DATA_FILE_NAME = 0x44415441
_ENCRYPTION = 0x0537BE77
_BACKING_FORMAT = 0xE2792ACA
_BITMAPS = 0x23852875

# Limits of QEMU's own.
_CLUSTER_BITS = range(9, 22)
_MAX_L1 = 32 * 1024 * 1024 // 8  # entries
_MAX_REFCOUNT_TABLE = 8 * 1024 * 1024  # bytes
_MAX_BACKING_NAME = 1023
_MAX_EXTENSIONS = 64
_MAX_LISTED = 1000  # of snapshots and of bitmaps: qemu-img tells about each, in memory

# What other formats start with; none of them is a raw disk by accident.
_OTHER_MAGIC: Mapping[bytes, str] = {
    MAGIC: "qcow",
    b"QED\0": "qed",
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"vhdxfile": "vhdx",
    b"conectix": "vpc",
}


class HeaderError(ValueError):
    """Not a qcow2 header that may be used; the text says why."""


@dataclass(frozen=True)
class Header:
    version: int
    size: int  # bytes a guest sees
    cluster_bits: int
    backing: str | None
    encryption: int
    snapshots: int
    l1_entries: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    refcount_order: int
    incompatible: int  # feature bits
    extensions: dict[int, bytes] = field(default_factory=dict)

    def has(self, feature: int) -> bool:
        return bool(self.incompatible >> feature & 1)

    @property
    def external_data(self) -> bool:
        """Whether the guest's data are in another file, which QEMU would open."""
        return self.has(DATA_FILE) or _DATA_FILE_NAME in self.extensions

    @property
    def bitmaps(self) -> int:
        """How many bitmaps it says that it holds."""
        return int.from_bytes(self.extensions.get(_BITMAPS, b"")[:4], "big")

    @property
    def crowded(self) -> str | None:
        """Why merely to look at it would take too much memory; None if it would not."""
        if max(self.snapshots, self.bitmaps) <= _MAX_LISTED:
            return None
        return f"it says that it holds {self.snapshots} snapshots and {self.bitmaps} bitmaps"

    @property
    def backing_format(self) -> str | None:
        """What QEMU takes the backing file for; None lets it guess from that file's bytes."""
        found = self.extensions.get(_BACKING_FORMAT)
        return None if found is None else found.partition(b"\0")[0].decode("utf-8", "replace")

    @property
    def compat(self) -> str:
        return "0.10" if self.version == 2 else "1.1"


def foreign_format(data: bytes) -> str | None:
    """The format whose magic number a raw volume's first bytes show."""
    for magic, name in _OTHER_MAGIC.items():
        if data.startswith(magic):
            return name
    return None


def looks_raw(data: bytes) -> bool:
    """Whether no program would take a file with these first bytes for another format: it is empty
    there, or has the signature of a disk or of a file system that we know to be one."""
    return (
        not any(data[:512])
        or (data[510:512] == b"\x55\xaa" and foreign_format(data) is None)  # MBR, GPT, FAT
        or (data[:4] == b"XFSB")
    )


def parse(data: bytes) -> Header:
    """Read the header from an image's first bytes (READ_LENGTH of them, if there are so many).

    Raises HeaderError for what is no header, or one beyond QEMU's limits.
    """
    if len(data) < _V2.size:
        raise HeaderError(f"it has {len(data)} bytes, a qcow2 header has {_V2.size} at least")
    values = _V2.unpack_from(data)
    magic, version, backing_offset, backing_length, cluster_bits, size = values[:6]
    encryption, l1_entries, l1_offset, refcount_offset, refcount_clusters, snapshots, _ = values[6:]
    if magic != MAGIC:
        raise HeaderError("it does not start with the qcow2 magic number")
    if version not in (2, 3):
        raise HeaderError(f"qcow2 version {version} is not known")
    if cluster_bits not in _CLUSTER_BITS:
        raise HeaderError(f"clusters of 2^{cluster_bits} bytes do not exist")
    incompatible, refcount_order, length = 0, 4, _V2.size
    if version == 3:
        if len(data) < _V3_LENGTH:
            raise HeaderError(f"it has {len(data)} bytes, a header of version 3 has {_V3_LENGTH}")
        incompatible, _compatible, _autoclear, refcount_order, length = _V3.unpack_from(data, 72)
        if length < _V3_LENGTH or length % 8 or length > 1 << cluster_bits:
            raise HeaderError(f"a header of {length} bytes does not exist")
    end = min(len(data), 1 << cluster_bits)
    extensions_end = min(end, backing_offset) if backing_offset else end
    header = Header(
        version=version,
        size=size,
        cluster_bits=cluster_bits,
        backing=_backing(data[:end], backing_offset, backing_length),
        encryption=encryption,
        snapshots=snapshots,
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        refcount_offset=refcount_offset,
        refcount_clusters=refcount_clusters,
        refcount_order=refcount_order,
        incompatible=incompatible,
        extensions=_extensions(data[:extensions_end], length),
    )
    _check_limits(header)
    return header


def _backing(data: bytes, offset: int, length: int) -> str | None:
    if offset == 0:
        return None
    if length == 0 or length > _MAX_BACKING_NAME or offset + length > len(data):
        raise HeaderError(f"a backing file's name of {length} bytes at {offset} cannot be")
    name = data[offset : offset + length]
    if b"\0" in name:  # QEMU's string ends there, ours would not
        raise HeaderError("the backing file's name holds a NUL")
    return name.decode("utf-8", "replace")


def _extensions(data: bytes, offset: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while offset + _EXTENSION.size <= len(data):
        kind, length = _EXTENSION.unpack_from(data, offset)
        if kind == _END:
            return found
        offset += _EXTENSION.size
        if offset + length > len(data):
            raise HeaderError(f"header extension {kind:#x} is cut off")
        if kind in found or len(found) >= _MAX_EXTENSIONS:
            raise HeaderError(f"header extension {kind:#x} is there twice, or there are too many")
        found[kind] = data[offset : offset + length]
        offset += -(-length // 8) * 8
    return found


def _check_limits(header: Header) -> None:
    if header.l1_entries > _MAX_L1:
        raise HeaderError(f"an L1 table of {header.l1_entries} entries is beyond the limit")
    entry_bits = header.cluster_bits - (4 if header.has(EXTENDED_L2) else 3)
    needed = -(-header.size // (1 << header.cluster_bits + entry_bits))
    if needed > _MAX_L1 or header.size >= 1 << 63:
        raise HeaderError(f"a size of {header.size} bytes is beyond the limit")
    if header.l1_entries < needed:
        raise HeaderError(
            f"an L1 table of {header.l1_entries} entries is too small for {header.size} bytes"
        )
    if header.refcount_clusters << header.cluster_bits > _MAX_REFCOUNT_TABLE:
        clusters = header.refcount_clusters
        raise HeaderError(f"a refcount table of {clusters} clusters is beyond the limit")
    if header.refcount_order > 6:
        raise HeaderError(f"refcounts of 2^{header.refcount_order} bits do not exist")


def dangers(header: Header, length: int) -> list[str]:
    """Why the image must not be opened: it would reach for other files, or cannot be used here.

    `length` is the file's, in bytes; its tables must lie inside, or a guest's first write would
    make it reach that far.  Backing files are not among them: the volume decides about those.
    """
    found = []
    if header.external_data:
        found.append("it keeps its data in an external file")
    if header.has(EXTENDED_L2):
        found.append("it has extended L2 entries")
    if header.has(CORRUPT):
        found.append("it is marked corrupt")
    unknown = header.incompatible >> (EXTENDED_L2 + 1)
    if unknown:
        found.append(f"it needs unknown features ({header.incompatible:#x})")
    if header.encryption or _ENCRYPTION in header.extensions:
        found.append("it is encrypted")
    if header.snapshots:
        found.append(f"it holds {header.snapshots} internal snapshots")
    if header.crowded:
        found.append(header.crowded)
    end = length + (1 << header.cluster_bits)  # the last cluster may be cut short
    refcounts = header.refcount_clusters << header.cluster_bits
    if max(header.l1_offset + header.l1_entries * 8, header.refcount_offset + refcounts) > end:
        found.append("its tables lie behind the end of the file")
    return found
