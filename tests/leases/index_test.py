# SPDX-License-Identifier: GPL-2.0-or-later
"""The index against bytes that other hosts wrote."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdsm_storage.leases import index as ix

GOLDEN = Path(__file__).parent.parent / "data/golden/xlease"
SAMPLES = {sample["file"]: sample for sample in json.loads((GOLDEN / "samples.json").read_text())}
LEASE = "e1e437b7-f735-4fe6-88d1-80113e940bb4"


def whole(name: str) -> bytes:
    """A sample's 1024 bytes and the free records that follow them."""
    head = (GOLDEN / name).read_bytes()
    return head + ix.FREE * ((ix.INDEX_SIZE - len(head)) // len(ix.FREE))


def leases_after(family: str, step: str) -> list[str | None]:
    slots: list[str | None] = []
    if step == "formatted":
        return slots
    slots = [lease["lease"] for lease in SAMPLES[f"{family}-added3.bin"]["leases"]]
    if step in ("removed", "readded"):
        slots[1] = None
    if step == "readded":
        slots[1] = SAMPLES[f"{family}-readded.bin"]["added"]
    return slots


@pytest.mark.parametrize("family", ["a1M-b512", "a1M-b4096", "a8M-b4096"])
@pytest.mark.parametrize("step", ["formatted", "added3", "removed", "readded"])
def test_the_same_bytes_as_other_hosts(family: str, step: str) -> None:
    sample = SAMPLES[f"{family}-{step}.bin"]
    records = tuple(
        ix.Record(number, lease)
        for number, lease in enumerate(leases_after(family, step))
        if lease is not None
    )
    index = ix.Index(sample["lockspace"], sample["mtime"], records)
    data = ix.encode(index, sample["alignment"])
    assert data[:1024] == (GOLDEN / sample["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == sample["sha256_full"]
    assert ix.decode(data, sample["lockspace"]) == index


@pytest.mark.parametrize("family", ["a1M-b512", "a1M-b4096", "a8M-b4096"])
def test_a_half_made_record(family: str) -> None:
    name = f"{family}-record-updating.bin"
    sample = SAMPLES[name]
    index = ix.decode(whole(name), sample["lockspace"])
    listed = {
        record.lease: {
            "offset": ix.lease_offset(record.number, sample["alignment"]),
            "updating": record.updating,
        }
        for record in index.records
    }
    assert listed == sample["leases_listing"]


@pytest.mark.parametrize("family", ["a1M-b512", "a1M-b4096", "a8M-b4096"])
def test_an_index_whose_writing_was_cut_off(family: str) -> None:
    name = f"{family}-index-updating.bin"
    with pytest.raises(ix.IndexUpdatingError):
        ix.decode(whole(name), SAMPLES[name]["lockspace"])


def test_a_domain_that_another_host_made() -> None:
    data = whole("posix-v5-created.bin")
    lockspace = data[10:46].decode()
    index = ix.decode(data, lockspace)
    assert index.records == ()
    assert ix.encode(index, 1024 * 1024) == data


def test_of_another_lockspace() -> None:
    with pytest.raises(ix.IndexDamagedError, match="lockspace"):
        ix.decode(whole("a1M-b512-formatted.bin"), LEASE)


def test_a_record_of_nothing_is_not_free() -> None:
    data = bytearray(whole("a1M-b512-formatted.bin"))
    position = ix.record_position(0)
    data[position : position + 64] = bytes(64)
    index = ix.decode(bytes(data), SAMPLES["a1M-b512-formatted.bin"]["lockspace"])
    assert index.first_free() == 1


def test_a_full_index() -> None:
    records = tuple(ix.Record(n, f"{n:08x}-0000-0000-0000-000000000000") for n in range(ix.RECORDS))
    index = ix.Index(LEASE, 0, records)
    assert index.first_free() is None
    assert ix.decode(ix.encode(index, 1024 * 1024), LEASE) == index


@given(st.binary(max_size=200), st.integers(0, ix.INDEX_SIZE - 200))
def test_hostile_bytes(noise: bytes, position: int) -> None:
    data: Any = bytearray(ix.encode(ix.Index(LEASE, 0, (ix.Record(3, LEASE),)), 1024 * 1024))
    data[position : position + len(noise)] = noise
    with contextlib.suppress(ix.IndexDamagedError):
        index = ix.decode(bytes(data), LEASE)
        assert all(0 <= record.number < ix.RECORDS for record in index.records)
