# SPDX-License-Identifier: GPL-2.0-or-later
"""An empty qcow2 image as bytes.

qemu-img needs some 7 ms to make one, nearly all of it to load itself; an image without data is
five fixed structures (docs/interop/qcow2.txt in QEMU): the header with its extensions, one
cluster of refcount table, one refcount block, and the L1 table.  The result is byte for byte what
qemu-img 7.2 writes with clusters of 64 KiB; the tests compare the two.
"""

from __future__ import annotations

import struct
from typing import Final

CLUSTER: Final = 65536
L2_COVERS: Final = CLUSTER * (CLUSTER // 8)  # bytes of the disk that one L1 entry stands for
MAX_L1: Final = 32 * 1024 * 1024 // 8  # entries; qemu opens nothing larger
MAX_SIZE: Final = MAX_L1 * L2_COVERS

_MAGIC = b"QFI\xfb"
_EXT_BACKING_FORMAT = 0xE2792ACA
_EXT_FEATURE_NAMES = 0x6803F857
_REFCOUNT_TABLE, _REFCOUNT_BLOCK, _L1 = 1, 2, 3  # their cluster numbers
_V3_HEADER = 112
# (kind, bit, name): 0 incompatible, 1 compatible, 2 autoclear
_FEATURES = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)


def empty_qcow2(
    size: int, compat: str = "1.1", backing: str | None = None, backing_format: str | None = None
) -> bytes:
    """The whole file of an image of `size` bytes (a multiple of 512, at most MAX_SIZE).

    `backing` goes into the header as it stands.  The end of the L1 table is the end of the file.
    """
    if size % 512 or not 0 <= size <= MAX_SIZE:
        raise ValueError(f"a qcow2 image cannot have {size} bytes")
    l1_size = max(1, -(-size // L2_COVERS))
    l1_bytes = l1_size * 8
    used = _L1 + -(-l1_bytes // CLUSTER)
    image = bytearray(_L1 * CLUSTER + l1_bytes)
    header = _header(size, l1_size, compat, backing, backing_format)
    image[: len(header)] = header
    struct.pack_into(">Q", image, _REFCOUNT_TABLE * CLUSTER, _REFCOUNT_BLOCK * CLUSTER)
    struct.pack_into(f">{used}H", image, _REFCOUNT_BLOCK * CLUSTER, *([1] * used))
    return bytes(image)


def full_size(size: int) -> int:
    """What the file of an image of `size` bytes takes at most once all of it is written.

    Data, one L2 entry of 8 bytes and one refcount of 2 bytes a cluster, the L1 table and the
    clusters of an empty image; bitmaps and internal snapshots come on top.
    """
    clusters = -(-size // CLUSTER)
    tables = -(-size // L2_COVERS) * CLUSTER
    refcounts = -(-(clusters + tables // CLUSTER + 8) * 2 // CLUSTER) * CLUSTER
    return clusters * CLUSTER + tables + 2 * refcounts + len(empty_qcow2(size)) + CLUSTER


def _header(
    size: int, l1_size: int, compat: str, backing: str | None, backing_format: str | None
) -> bytes:
    modern = compat != "0.10"
    extensions = b""
    if backing is not None and backing_format is not None:
        extensions += _extension(_EXT_BACKING_FORMAT, backing_format.encode())
    if modern:
        names = b"".join(struct.pack(">BB46s", k, bit, n.encode()) for k, bit, n in _FEATURES)
        extensions += _extension(_EXT_FEATURE_NAMES, names)
    extensions += _extension(0, b"")
    name = (backing or "").encode()
    length = _V3_HEADER if modern else 72
    offset = length + len(extensions) if name else 0
    header = struct.pack(
        ">4sIQIIQIIQQIIQ",
        _MAGIC,
        3 if modern else 2,
        offset,
        len(name),
        16,  # cluster bits
        size,
        0,  # not encrypted
        l1_size,
        _L1 * CLUSTER,
        _REFCOUNT_TABLE * CLUSTER,
        1,  # cluster of refcount table
        0,  # internal snapshots
        0,
    )
    if modern:
        header += struct.pack(">QQQIIB7x", 0, 0, 0, 4, _V3_HEADER, 0)  # refcounts of 16 bits, zlib
    return header + extensions + name


def _extension(kind: int, data: bytes) -> bytes:
    padding = -len(data) % 8
    return struct.pack(">II", kind, len(data)) + data + bytes(padding)
