# SPDX-License-Identifier: GPL-2.0-or-later
"""Block domains made here compared with those that VDSM made on real LVM from the same requests.

Everything that lies on the LUNs and everything that is answered is the same, but for ids that LVM
chooses, times, the name of the host, and how many commits it took.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

from functional.checker.check import check
from functional.checker.text import parse
from tests.domains.block_world import block_hosts, workdir
from tests.domains.golden_block import (
    METADATA,
    REPORTS,
    TEXT_BYTES,
    Names,
    Replay,
    comparable,
    golden,
    golden_json,
    golden_rows,
)
from vdsm_storage.base.units import MIB
from vdsm_storage.host.sanlock import Sanlock

pytestmark = [pytest.mark.sanlock, pytest.mark.slow, pytest.mark.timeout(600)]

VG_REPORTS = ("1-vg-created", "2-domain-created", "3-pool-created", "4-volumes-created")
LV_REPORTS = (
    "2-domain-created", "4-volumes-created", "6-after-delete-mark", "7-after-purge",
    "8-slot-reused",
)  # fmt: skip
TEXT_SLACK = 1024  # bytes: names of hosts and devices are longer or shorter
IO_TIMEOUT = 174  # offset in a host's record, two bytes
LEADER, WRITE_TIME = 512, slice(192, 200)
PADDING = slice(LEADER + 20, LEADER + 24)  # of sanlock's request record, never set by sanlock


@pytest.fixture(scope="module", params=["v4", "v5"])
def replay(request: pytest.FixtureRequest, sanlock: Sanlock) -> Iterator[Replay]:
    with workdir() as directory, block_hosts(directory, sanlock) as hosts:
        replay = Replay(request.param, hosts)
        replay.run()
        yield replay


@pytest.fixture(scope="module")
def names(replay: Replay) -> Names:
    return Names.of(replay)


def assert_same_report(replay: Replay, names: Names, name: str) -> None:
    kind = name.split(".")[-2]
    order = {"lvs": ("lv_name", "seg_start_pe"), "pvs": ("pv_name",), "vgs": ("vg_name",)}[kind]

    def key(row: dict[str, Any]) -> list[str]:
        return [row[field] for field in order]

    mine, theirs = replay.seen[name], golden_rows(replay.version, name)
    assert sorted((comparable(row) for row in mine), key=key) == sorted(
        (comparable(row, names) for row in theirs), key=key
    )
    by_name = {names.device(row[order[0]]): row for row in theirs}
    for row in mine:
        for field in set(row) & set(TEXT_BYTES):
            assert int(row[field]) == pytest.approx(
                int(by_name[row[order[0]]][field]), abs=TEXT_SLACK
            )


# -- the volume group ------------------------------------------------------------------------


@pytest.mark.parametrize("stage", VG_REPORTS)
def test_group(replay: Replay, names: Names, stage: str) -> None:
    """Attributes, sizes, tags with the whole metadata of the domain."""
    assert_same_report(replay, names, f"{stage}.vgs.json")


@pytest.mark.parametrize("stage", [stage for stage in VG_REPORTS if not stage.startswith("3")])
def test_devices(replay: Replay, names: Names, stage: str) -> None:
    """Metadata areas: how many, where, which are in use; extents."""
    assert_same_report(replay, names, f"{stage}.pvs.json")


@pytest.mark.parametrize("stage", LV_REPORTS)
def test_volumes(replay: Replay, names: Names, stage: str) -> None:
    """Names, sizes, extents in their order, tags."""
    assert_same_report(replay, names, f"{stage}.lvs.json")


def test_text(replay: Replay, names: Names) -> None:
    """The metadata as LVM itself writes it down: order, status and flags of everything."""
    name = "8-vgcfgbackup.txt"
    texts = replay.seen[name], golden(replay.version, name).decode()
    mine, theirs = (without(parse(text)) for text in texts)
    assert mine == theirs
    assert order(mine) == order(theirs)


def without(tree: dict[str, Any]) -> dict[str, Any]:
    """LVM's text without what varies; of the tags only how many there are."""
    varying = r"id|seqno|device|device_id|device_id_type|creation_.*|description|time"
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if re.fullmatch(varying, key):
            continue
        if key == "tags":
            value = len(value)
        found[key] = without(value) if isinstance(value, dict) else value
    return found


def order(tree: dict[str, Any]) -> list[Any]:
    return [(k, order(v)) if isinstance(v, dict) else k for k, v in tree.items()]


# -- leases ----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 512000, 1023488])
def test_host_ids(replay: Replay, offset: int) -> None:
    name = f"2-ids@{offset}.bin"
    expected = bytearray(golden(replay.version, name))
    mine = replay.seen[name]
    for start in range(0, len(expected), LEADER):
        if any(expected[start : start + LEADER]):  # sanlock here has another time-out
            place = slice(start + IO_TIMEOUT, start + IO_TIMEOUT + 2)
            expected[place] = mine[place]
    assert mine == expected


def lease(data: bytes) -> bytes:
    """A lease without what sanlock does not set; `data` has the leader and the request record."""
    comparable = bytearray(data)
    comparable[PADDING] = bytes(4)
    return bytes(comparable)


def test_domain_lease(replay: Replay) -> None:
    name = "2-leases@1048576.bin"
    assert lease(replay.seen[name]) == lease(golden(replay.version, name))


def test_domain_lease_after_the_pool_was_made(replay: Replay) -> None:
    """Host 250 had it once."""
    name = "3-leases@1048576.bin"
    mine, theirs = replay.seen[name], bytearray(golden(replay.version, name))
    theirs[WRITE_TIME] = mine[WRITE_TIME]
    assert lease(mine) == lease(bytes(theirs))


def test_volume_leases(replay: Replay) -> None:
    rows = golden_json(replay.version, "4-volume-leases.json")
    found = {offset: lease(data) for offset, data in replay.seen["4-volume-leases.json"].items()}
    assert found == {
        row["offset"]: lease(bytes.fromhex(row["first_1024_bytes_hex"]).ljust(1024, b"\0"))
        for row in rows
    }


MTIME = slice(4 + 1 + 4 + 1 + 48 + 1, 4 + 1 + 4 + 1 + 48 + 1 + 10)


def test_index_of_external_leases(replay: Replay) -> None:
    what = golden_json(replay.version, "../index.json")[f"{replay.version}/2-xleases-index.bin"]
    start = golden(replay.version, "2-xleases-index.bin")
    mine = bytearray(replay.seen["2-xleases-index.bin"])
    mine[MTIME] = start[MTIME]
    assert mine[: len(start)] == start
    assert len(mine) == what["full_size"]
    assert hashlib.sha256(mine).hexdigest() == what["sha256_full"]


@pytest.mark.parametrize("name", ["5-xleases-index.bin", "5-xleases-index-removed.bin"])
def test_index_after_changes(replay: Replay, name: str) -> None:
    theirs = golden(replay.version, name)
    mine = bytearray(replay.seen[name])
    mine[MTIME] = theirs[MTIME]
    assert mine == theirs


@pytest.mark.parametrize("name", ["2-xleases@0.bin", "2-xleases@2align.bin"])
def test_no_external_leases(replay: Replay, name: str) -> None:
    assert replay.seen[name] == golden(replay.version, name)


@pytest.mark.parametrize("name", ["5-xleases@3align.bin", "5-xleases@3align-removed.bin"])
def test_external_leases(replay: Replay, name: str) -> None:
    assert lease(replay.seen[name]) == lease(golden(replay.version, name))


# -- other special volumes -------------------------------------------------------------------


def test_zeroed(replay: Replay) -> None:
    """Although the LUNs held something else before."""
    expected = golden_json(replay.version, "2-zero-check.json")
    found = {lv: not any(replay.seen[f"zero {lv}"]) for lv in expected}
    assert found == expected
    for mailbox in ("inbox", "outbox"):
        name = f"2-{mailbox}@0.bin"
        assert replay.seen[name] == golden(replay.version, name)


def test_master_file_system(replay: Replay) -> None:
    varying = re.compile(r"Filesystem UUID|Directory Hash Seed|.*(created|checked|write time):")

    def lines(text: str) -> list[str]:
        return [line.strip() for line in text.splitlines() if line and not varying.match(line)]

    name = "2-master-dumpe2fs.txt"
    assert lines(replay.seen[name]) == lines(golden(replay.version, name).decode())


# -- volumes ---------------------------------------------------------------------------------


def test_metadata_slots(replay: Replay) -> None:
    name = METADATA[replay.version]
    assert replay.seen[name] == golden(replay.version, name)
    assert replay.seen["7-metadata"] == replay.seen[name]  # a purge leaves it


def test_volume_info(replay: Replay) -> None:
    expected = golden_json(replay.version, "4-volume-info.json")
    for info in expected.values():
        info["lease"]["path"] = replay.host.activation.path(replay.sd_id, "leases")
    assert replay.seen["4-volume-info.json"] == expected


def test_links(replay: Replay) -> None:
    dev = replay.host.activation.path(replay.sd_id, "")
    expected = golden_json(replay.version, "4-links.json")
    prefix = f"/dev/{replay.sd_id}/"
    assert replay.seen["4-links.json"] == [line.replace(prefix, dev) for line in expected]


# -- answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 5])
def test_domain_info(replay: Replay, names: Names, stage: int) -> None:
    expected = golden_json(replay.version, f"{stage}-sd-info.json")
    expected["vguuid"] = names.text(expected["vguuid"])
    assert replay.seen[f"{stage}-sd-info.json"] == expected


@pytest.mark.parametrize("stage", [2, 5])
def test_domain_stats(replay: Replay, stage: int) -> None:
    expected = golden_json(replay.version, f"{stage}-sd-stats.json")
    found = dict(replay.seen[f"{stage}-sd-stats.json"])
    free = int(found.pop("mdafree")), int(expected.pop("mdafree"))
    assert found == expected
    assert free[0] == pytest.approx(free[1], abs=TEXT_SLACK)


def test_dump(replay: Replay, names: Names) -> None:
    expected = golden_json(replay.version, "6-dump.json")
    expected["metadata"]["vguuid"] = names.text(expected["metadata"]["vguuid"])
    assert replay.seen["6-dump.json"] == expected


def test_full_dump(replay: Replay, names: Names) -> None:
    """But for who took the domain's lease: this host did, for each change."""
    expected = golden_json(replay.version, "5-dump-full.json")
    expected["metadata"]["vguuid"] = names.text(expected["metadata"]["vguuid"])
    found = {**replay.seen["5-dump-full.json"]}
    (temporary,) = expected.pop("lockspace")
    mine, theirs = found.pop("lockspace")
    assert (mine["own"], mine["offset"], mine["gen"]) == (1, 0, 1)
    assert theirs == {**temporary, "resource": theirs["resource"]}
    sdm = found["leases"][0]
    assert sdm.keys() == expected["leases"][0].keys()
    expected["leases"][0].update(lver=sdm["lver"], own=1, timestamp=sdm["timestamp"])
    assert found == expected


def test_sound(replay: Replay) -> None:
    """An independent reader finds nothing wrong."""
    assert check(replay.devices, replay.sd_id) == []
    slot = golden_rows(replay.version, "8-slot-reused.lvs.json")
    tags = next(r["lv_tags"] for r in slot if r["lv_name"] == replay.given["reuse"]["vol"])
    number = int(re.findall(r"MD_(\d+)", tags)[0])
    offset = MIB + number * 8192 if replay.version == "v5" else number * 512
    text = replay.luns.group(replay.sd_id).read("metadata", offset, 512)
    assert f"IMAGE={replay.given['reuse']['img']}".encode() in text


def test_every_golden_file_is_used(replay: Replay) -> None:
    known = {name.removeprefix(f"{replay.version}/") for name in golden_json(
        replay.version, "../index.json") if name.startswith(f"{replay.version}/")}  # fmt: skip
    zero = {"2-zero-check.json"}
    seen = {name for name in replay.seen if re.match(r"\d-\w+[-@.\w]*\.\w+$", name)}
    assert known - seen == {"input.json"} | zero
    assert set(REPORTS) == {"lvs", "vgs", "pvs"}
