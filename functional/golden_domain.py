# SPDX-License-Identifier: GPL-2.0-or-later
"""A block domain that VDSM made, laid out again on LUNs from its golden data.

The volume group is restored by lvm's own tools, with the ids that it had; what VDSM and sanlock
wrote into the special volumes goes to its places there.  The golden data leave out what is in the
volumes and in the master file system: that is made by the tools that VDSM uses.
"""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from functional.checker import leases, tags
from functional.checker.group import Group
from functional.luns import Luns
from functional.sample_domain import leader, put, qcow2
from functional.standin.process import StandInProcess

GOLDEN: Final = Path(__file__).parents[1] / "tests" / "data" / "golden" / "block-domain"
MIB: Final = 1024**2
EXTENT: Final = 128 * MIB
STAGE: Final = "4-volumes-created"  # external leases came and went after it, and no LVM change
INDEX_SIZE: Final = 62 * 4096
HOSTS: Final = 2000  # records of a lockspace
LEADER: Final = 512
IO_TIMEOUT: Final = 174  # offset in a host's record, after what the checksum is of
PATTERN: Final = 0x5A  # of the data in the raw volume


class GoldenDomain:
    """With `io_timeout` seconds host 1 gets its id as fast as one that had this time-out before; as
    it is it takes 20 seconds, because sanlock goes by the time-out in the golden record, 10.
    """

    def __init__(
        self, version: str, luns: Luns, standin: StandInProcess, io_timeout: int = 0
    ) -> None:
        self.version = version
        self._io_timeout = io_timeout
        self.luns = luns
        self.given = self.json("input.json")
        self.domain: str = self.given["sd_uuid"]
        self.pool: str = self.given["pool_uuid"]
        self.devices = [luns.make(guid) for guid in self.given["devices"]]
        self.rows = self.json(f"{STAGE}.lvs.json")["report"][0]["lv"]
        self._restore_group()
        self.group = luns.group(self.domain)
        self._special_volumes()
        self._leases()
        self._external_leases()
        self._data(standin)

    def golden(self, name: str) -> bytes:
        return (GOLDEN / self.version / name).read_bytes()

    def json(self, name: str) -> Any:
        return json.loads(self.golden(name))

    # -- the volume group --------------------------------------------------------------------

    def _restore_group(self) -> None:
        """As an administrator would from a backup."""
        path = self.luns.directory / f"{self.domain}.backup"
        path.write_text(self._text())
        lvm = self.luns.bare
        pvs = self.json(f"{STAGE}.pvs.json")["report"][0]["pv"]
        areas = ("--metadatasize", "128m", "--metadatacopies", "2", "--metadataignore", "y")
        for device, pv in zip(self.devices, pvs, strict=True):
            assert device.endswith(Path(pv["pv_name"]).name)
            which = ("--uuid", pv["pv_uuid"], "--restorefile", str(path))
            lvm.run("pvcreate", "--yes", "--zero", "y", *areas, *which, device)
        lvm.run("pvchange", "--metadataignore", "n", self.devices[0])
        lvm.run("vgcfgrestore", "--yes", "--file", str(path), self.domain)

    def _text(self) -> str:
        """LVM's text of the stage, from the backup of the last stage and the reports of this."""
        last = self.golden("8-vgcfgbackup.txt").decode()
        head, sign, _ = last.partition("logical_volumes {\n")
        (vg,) = self.json("4-volumes-created.vgs.json")["report"][0]["vg"]
        assert set(vg["vg_tags"].split(",")) == set(last_tags(last))  # nothing was changed since
        volumes = "".join(_volume(row) for row in sorted(self.rows, key=_place))
        return f"{head}{sign}{volumes}\t}}\n}}\n"

    # -- special volumes ---------------------------------------------------------------------

    def put(self, lv: str, offset: int, data: bytes) -> None:
        """Bytes of a volume that lie in one extent."""
        for device, place, length in self.places(self.group, lv):
            if offset < length:
                put(Path(device), place + offset, data)
                return
            offset -= length
        raise ValueError(f"{lv} has no such byte")

    @staticmethod
    def places(group: Group, lv: str) -> Iterator[tuple[str, int, int]]:
        """(device, offset, length) of a volume's pieces."""
        for segment in group.lvs[lv].segments:
            pv = group.pvs[segment.pv]
            start = pv.pe_start + segment.pv_start * group.extent_size
            yield pv.device, start, segment.count * group.extent_size

    def _special_volumes(self) -> None:
        if self.version == "v5":
            self.put("metadata", MIB, self.golden("4-metadata@1M.bin"))
        else:
            self.put("metadata", 0, self.golden("4-metadata@0.bin"))
        for mailbox in ("inbox", "outbox"):
            self.put(mailbox, 0, self.golden(f"2-{mailbox}@0.bin"))

    def _leases(self) -> None:
        first = self.golden("2-ids@0.bin")
        record = first[:LEADER]
        for name in ("2-ids@512000.bin", "2-ids@1023488.bin"):
            assert self.golden(name)[:LEADER] == record  # all of them are the same
        self.put("ids", 0, first + record * (HOSTS - len(first) // LEADER))
        for row in self.json("5-dump-full.json")["lockspace"]:
            self.put("ids", row["offset"], host_record(record, row))
        if self._io_timeout:
            self.put("ids", IO_TIMEOUT, struct.pack("<H", self._io_timeout))
        self.put("leases", MIB, self.golden("3-leases@1048576.bin"))
        for row in self.json("4-volume-leases.json"):
            self.put("leases", row["offset"], bytes.fromhex(row["first_1024_bytes_hex"]))

    def _external_leases(self) -> None:
        first = self._index("2-xleases-index.bin")
        last = self._index("5-xleases-index-removed.bin")
        what = self.json("../index.json")[f"{self.version}/2-xleases-index.bin"]
        assert hashlib.sha256(first).hexdigest() == what["sha256_full"]
        self.put("xleases", MIB, last)
        self.put("xleases", 3 * MIB, self.golden("5-xleases@3align-removed.bin"))
        for lease, row in self.json("5-dump-full.json")["xleases"].items():
            self.put("xleases", row["offset"], leader(self.domain, lease))

    def _index(self, name: str) -> bytes:
        """All of it: the golden files have its first 1024 bytes, the rest are free records."""
        start = self.golden(name)
        return start + leases.FREE * ((INDEX_SIZE - len(start)) // leases.RECORD)

    # -- data ----------------------------------------------------------------------------------

    def _data(self, standin: StandInProcess) -> None:
        volumes: Mapping[str, Any] = {v["vol"]: v for v in self.given["volumes"]}
        for name, volume in volumes.items():
            if volume["format"] != "COW":
                self.put(name, 0, bytes([PATTERN]) * MIB)
                continue
            parent = volumes.get(volume.get("src_vol", ""))
            kind = {"RAW": "raw", "COW": "qcow2"}[parent["format"]] if parent else ""
            self.put(name, 0, qcow2(volume["capacity"], volume.get("src_vol", ""), kind))
        path = standin.activate(self.domain, "master", self.places(self.group, "master"))
        mkfs = ["mkfs", "-q", "-t", "ext3", "-F", "-E", "nodiscard", str(path)]
        subprocess.run(mkfs, check=True, timeout=60)
        standin.call("deactivate", vg=self.domain, lv="master")


def last_tags(text: str) -> list[str]:
    """Of the group: the first tags in its text."""
    line = next(line for line in text.splitlines() if line.startswith("\ttags = "))
    found: list[str] = json.loads(line.partition("= ")[2])
    return found


def _place(row: Mapping[str, str]) -> int:
    """Where a volume begins on the device: volumes were made in this order."""
    return int(row["devices"].rpartition("(")[2].removesuffix(")"))


def _volume(row: Mapping[str, str]) -> str:
    """A volume's section, from its row of `lvs`; of one segment, on the first device."""
    assert row["seg_count"] == "1"
    named = ", ".join(f'"{tag}"' for tag in row["lv_tags"].split(",") if tag)
    marked = f"tags = [{named}]\n" if named else ""
    count = int(row["lv_size"]) // EXTENT
    return (
        f'{row["lv_name"]} {{\nid = "{row["lv_uuid"]}"\nstatus = ["READ", "WRITE", "VISIBLE"]\n'
        f'flags = []\n{marked}creation_time = 1795199711\ncreation_host = "host"\n'
        "segment_count = 1\nsegment1 {\nstart_extent = 0\n"
        f'extent_count = {count}\ntype = "striped"\nstripe_count = 1\n'
        f'stripes = ["pv0", {_place(row)}]\n}}\n}}\n'
    )


def host_record(free: bytes, row: Mapping[str, Any]) -> bytes:
    """The record of a host id that was used and given back, as the dump tells of it."""
    data = bytearray(free)
    struct.pack_into("<QQ", data, 32, row["own"], row["gen"])
    data[104:152] = row["resource"].encode().ljust(48, b"\0")
    struct.pack_into("<Q", data, 152, row["timestamp"])
    checksum = leases.crc32c(bytes(data[: leases.CHECKED]), leases.make_table(), 0xFFFFFFFE)
    struct.pack_into("<I", data, leases.CHECKED, checksum)
    return bytes(data)


def is_sealed(group: Group) -> bool:
    """The checksum over the domain's metadata is VDSM's, and right."""
    values = tags.values_of(group, [])
    return values[tags.CHECKSUM] == tags.checksum(values)
