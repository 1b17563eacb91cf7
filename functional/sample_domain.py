# SPDX-License-Identifier: GPL-2.0-or-later
"""A sound block domain of golden bytes, laid out on two sparse files; for tests of the checker.

The text of the metadata, the slots, the leases and the index were written by VDSM on real LVM
(tests/data/golden/block-domain/v5).  What the golden data leave out is made here.
"""

from __future__ import annotations

import json
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from functional.checker import leases
from functional.checker.group import CRC_START, HEADER, LABEL, LOCATION, MAGIC, crc
from functional.checker.group import make_group as parse_group

GOLDEN: Final = Path(__file__).parents[1] / "tests" / "data" / "golden" / "block-domain" / "v5"
MIB: Final = 1024**2
SIZE: Final = 20 * 1024 * MIB
AREA: Final = 128 * MIB
AREAS: Final = ((4096, MIB + AREA - 4096), (SIZE - AREA, AREA))
REUSED: Final = "afbd67f9-6196-49cf-a198-8ad9f06c144a"  # the volume whose slot the data lack
REUSED_TEXT: Final = (
    "CAP=268435456\nCTIME=1700000006\nDESCRIPTION=reuses the slot\nDISKTYPE=DATA\n"
    "DOMAIN={domain}\nFORMAT=RAW\nGEN=0\nIMAGE=ea90a8f0-d66b-429e-aa8a-c4ba05805975\n"
    "LEGALITY=LEGAL\nPUUID=00000000-0000-0000-0000-000000000000\nSEQ=1\nTYPE=PREALLOCATED\n"
    "VOLTYPE=LEAF\nEOF\n"
)
# Volumes in qcow2: capacity, parent, the parent's format.
QCOW2: Final = {
    "b2221a58-008a-45a6-8464-7159c324c985":
        (1024 * MIB, "9b810e76-6ec9-4286-a3ca-828dd5f4b3b2", "raw"),
    "05b6e6e3-07d4-4edc-9143-1193e6c3f339": (200 * MIB, "", ""),
    "025b413f-8a9a-421e-a648-a7dd06839eb9":
        (200 * MIB, "05b6e6e3-07d4-4edc-9143-1193e6c3f339", "qcow2"),
}  # fmt: skip


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


class SampleDomain:
    def __init__(self, directory: Path) -> None:
        self.domain: str = json.loads(golden("input.json"))["sd_uuid"]
        self.text = golden("8-vgcfgbackup.txt").decode()
        self.paths = [directory / "pv0", directory / "pv1"]
        self.devices = [str(path) for path in self.paths]
        for path in self.paths:
            with path.open("wb") as file:
                file.truncate(SIZE)
        self.lay_out()
        self._slots()
        self._leases()
        self._qcow2()

    # -- the volume group --------------------------------------------------------------------

    def lay_out(self, *texts: str, offset: int = 512 * 7) -> None:
        """The labels and the metadata areas; `texts` for the two areas that are in use."""
        if not texts:
            texts = (self.text, self.text)
        group = parse_group(self.text.encode(), {})
        for number, pv in enumerate(group.pvs.values()):
            self._label(self.paths[number], pv.uuid.replace("-", ""))
            for copy, (start, size) in enumerate(AREAS):
                text = texts[copy].encode() + b"\0" if number == 0 else b""
                self.area(self.paths[number], (start, size), text, offset)

    @staticmethod
    def _label(path: Path, uuid: str) -> None:
        content = uuid.encode() + struct.pack("<Q", SIZE)
        content += struct.pack("<QQQQ", MIB + AREA, 0, 0, 0)
        content += b"".join(struct.pack("<QQ", *area) for area in AREAS) + bytes(16)
        sector = bytearray(512)
        LABEL.pack_into(sector, 0, b"LABELONE", 1, 0, 32, b"LVM2 001")
        sector[32 : 32 + len(content)] = content
        struct.pack_into("<I", sector, 16, crc(bytes(sector[20:])))
        put(path, 512, bytes(sector))

    @staticmethod
    def area(path: Path, place: tuple[int, int], text: bytes, offset: int) -> None:
        """A metadata area; an unused one without a text.  A negative offset is one from the end."""
        start, size = place
        offset %= size
        header = bytearray(512)
        HEADER.pack_into(header, 0, 0, MAGIC, 1, start, size)
        location = (offset, len(text), crc(text), 0) if text else (512, 0, CRC_START, 1)
        LOCATION.pack_into(header, HEADER.size, *location)
        struct.pack_into("<I", header, 0, crc(bytes(header[4:])))
        put(path, start, bytes(header))
        first = text[: size - offset]
        put(path, start + offset, first)
        put(path, start + 512, text[len(first) :])

    # -- what is in the volumes --------------------------------------------------------------

    def place(self, lv: str, offset: int) -> tuple[Path, int]:
        """Where a byte of a volume is."""
        group = parse_group(self.text.encode(), {})
        extent, inside = divmod(offset, group.extent_size)
        for segment in group.lvs[lv].segments:
            if segment.start <= extent < segment.start + segment.count:
                pv = group.pvs[segment.pv]
                at = (segment.pv_start + extent - segment.start) * group.extent_size
                return self.paths[int(segment.pv[2:])], pv.pe_start + at + inside
        raise ValueError(f"{lv} has no byte {offset}")

    def put(self, lv: str, offset: int, data: bytes) -> None:
        """Within one extent."""
        put(*self.place(lv, offset), data)

    def get(self, lv: str, offset: int, length: int) -> bytes:
        path, at = self.place(lv, offset)
        with path.open("rb") as file:
            file.seek(at)
            return file.read(length)

    def slot(self, number: int, text: bytes) -> None:
        self.put("metadata", MIB + number * 8192, text.ljust(512, b"\0"))

    def slot_text(self, number: int) -> bytes:
        return self.get("metadata", MIB + number * 8192, 512).rstrip(b"\0")

    def lease(self, lv: str, number: int, name: str, space: str = "") -> None:
        self.put(lv, number * MIB, leader(space or self.domain, name))

    def _slots(self) -> None:
        self.put("metadata", MIB, golden("4-metadata@1M.bin"))
        self.slot(3, REUSED_TEXT.format(domain=self.domain).encode())

    def _leases(self) -> None:
        host = golden("2-ids@0.bin")[:512]
        self.put("ids", 0, golden("2-ids@0.bin") + host * 234)
        self.put("leases", MIB, golden("3-leases@1048576.bin"))
        for row in json.loads(golden("4-volume-leases.json")):
            self.put("leases", row["offset"], bytes.fromhex(row["first_1024_bytes_hex"]))
        self.lease("leases", 103, REUSED)
        index = golden("5-xleases-index.bin")
        self.put("xleases", MIB, index + leases.FREE * (leases.RECORDS - 8))
        self.put("xleases", 3 * MIB, golden("5-xleases@3align.bin"))
        self.lease("xleases", 4, index[576:612].decode())

    def _qcow2(self) -> None:
        for volume, (capacity, parent, kind) in QCOW2.items():
            self.put(volume, 0, qcow2(capacity, parent, kind))


def put(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def leader(space: str, name: str) -> bytes:
    """The first sector of a free lease."""
    fields: Sequence[int | bytes] = (
        leases.LEASE, 0x60004, 16, 512, 2000, 2000, 0, 0, 0,
        space.encode(), name.encode(), 0, 0, 0, 0, 0,
    )  # fmt: skip
    data = bytearray(leases.LEADER.pack(*fields).ljust(512, b"\0"))
    checksum = leases.crc32c(bytes(data[: leases.CHECKED]), leases.make_table(), 0xFFFFFFFE)
    struct.pack_into("<I", data, leases.CHECKED, checksum)
    return bytes(data)


def qcow2(capacity: int, parent: str, kind: str) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        backing = ["-u", "-b", parent, "-F", kind] if parent else []
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", *backing, file.name, str(capacity)]
        subprocess.run(argv, check=True, timeout=60)
        return Path(file.name).read_bytes()
