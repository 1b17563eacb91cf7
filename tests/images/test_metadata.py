# SPDX-License-Identifier: GPL-2.0-or-later
"""The text of volume metadata, against samples that other hosts wrote and read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdsm_storage.errors import MetadataCleared, MetadataOverflow, VolumeMetadataReadError
from vdsm_storage.images import metadata
from vdsm_storage.images.metadata import VolumeMetadata

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "volume-metadata"
INDEX = json.loads((GOLDEN / "index.json").read_text())
SLOTS = [entry for entry in INDEX if "input" in entry and entry["file"].endswith(".slot")]
ERRORS = [entry for entry in INDEX if entry["file"].endswith(".error.json")]
ODD = json.loads((GOLDEN / "parse.json").read_text())


@pytest.mark.parametrize("entry", SLOTS, ids=lambda entry: Path(entry["file"]).stem)
def test_writes_and_reads_the_golden_bytes(entry: dict[str, object]) -> None:
    volume = VolumeMetadata(**entry["input"])
    data = (GOLDEN / Path(entry["file"]).name).read_bytes()
    version = entry["domain_version"]
    assert volume.encode_slot(version) == data
    assert volume.encode(version) == data[: entry["text_length"]]
    expected = dict(entry["input"], description=entry["description_stored"].strip())
    if version < 5:
        expected["sequence"] = 0
        expected["capacity"] = expected["capacity"] // 512 * 512
    assert metadata.decode(data) == VolumeMetadata(**expected)
    assert metadata.decode(data[: entry["text_length"]]) == VolumeMetadata(**expected)


@pytest.mark.parametrize("entry", ERRORS, ids=lambda entry: Path(entry["file"]).stem)
def test_text_that_does_not_fit(entry: dict[str, object]) -> None:
    with pytest.raises(MetadataOverflow) as caught:
        VolumeMetadata(**entry["input"]).encode(entry["domain_version"], "the-volume")
    assert caught.value.code == 756
    assert "the-volume" in str(caught.value)


@pytest.mark.parametrize("name", ["cleared", "legacy-cleared-none"])
def test_cleared(name: str) -> None:
    with pytest.raises(MetadataCleared) as caught:
        metadata.decode((GOLDEN / f"{name}.slot").read_bytes())
    assert caught.value.code == 757


@pytest.mark.parametrize("name", sorted(ODD))
def test_reads_odd_text_as_others_do(name: str) -> None:
    sample = ODD[name]
    data = sample["content"].encode("latin-1")
    parsed = metadata.parse(data)
    assert dict(parsed.fields) == sample["parsed"]
    assert len(parsed.errors) == len(sample["errors"])
    if parsed.cleared:
        with pytest.raises(MetadataCleared):
            metadata.decode(data)
    elif sample["errors"]:
        with pytest.raises(VolumeMetadataReadError):
            metadata.decode(data)
    else:
        assert metadata.decode(data) == VolumeMetadata(**sample["parsed"])


def test_generation_starts_again() -> None:
    volume = VolumeMetadata("d", "i", 4096, "RAW", "SPARSE", "LEAF", "DATA", generation=998)
    assert volume.next_generation().generation == 999
    assert volume.next_generation().next_generation().generation == 0


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=20)
NUMBERS = st.integers(0, 2**63 - 1)


@given(
    st.builds(
        VolumeMetadata,
        domain=st.uuids().map(str),
        image=st.uuids().map(str),
        parent=st.uuids().map(str),
        capacity=NUMBERS,
        format=st.sampled_from(["RAW", "COW"]),
        type=st.sampled_from(["SPARSE", "PREALLOCATED", "UNKNOWN"]),
        voltype=st.sampled_from(["LEAF", "INTERNAL", "SHARED"]),
        disktype=st.sampled_from(["DATA", "OVFS", "2"]),
        description=st.text(max_size=300),
        legality=st.sampled_from(["LEGAL", "ILLEGAL", "FAKE"]),
        ctime=st.integers(0, 2**33),
        generation=st.integers(0, 999),
        sequence=st.integers(0, 2**32 - 1),
    ),
    st.sampled_from([3, 4, 5]),
)
def test_what_is_written_is_read_again(volume: VolumeMetadata, version: int) -> None:
    try:
        data = volume.encode_slot(version)
    except MetadataOverflow:
        assert len(volume.description[:210].encode("utf-8", "replace")) > 210
        return
    assert len(data) == 512
    stored = metadata.clean_description(volume.description)
    stored = stored.encode("utf-8", "replace").decode().strip()
    expected = volume.with_(description=stored)
    if version < 5:
        expected = expected.with_(sequence=0, capacity=volume.capacity // 512 * 512)
    assert metadata.decode(data) == expected


@given(st.text(st.characters(), max_size=210))
def test_no_description_can_add_a_key(text: str) -> None:
    volume = VolumeMetadata(
        "d", "i", 4096, "RAW", "SPARSE", "LEAF", "DATA", description="\nLEGALITY=ILLEGAL\n" + text
    )
    assert metadata.decode(_encode_or_short(volume)).legality == "LEGAL"


def _encode_or_short(volume: VolumeMetadata) -> bytes:
    try:
        return volume.encode(5)
    except MetadataOverflow:
        return volume.with_(description=volume.description[:60]).encode(5)


@given(st.binary(max_size=600))
def test_hostile_bytes(data: bytes) -> None:
    parsed = metadata.parse(data)
    assert isinstance(parsed.errors, tuple)
    try:
        metadata.decode(data)
    except (MetadataCleared, VolumeMetadataReadError):
        return


@given(st.lists(st.tuples(st.sampled_from(["CAP", "GEN", "SEQ", "EOF", "NONE", "X"]), WORDS)))
def test_hostile_lines(lines: list[tuple[str, str]]) -> None:
    parsed = metadata.parse("".join(f"{key}={value}\n" for key, value in lines).encode())
    assert isinstance(parsed.errors, tuple)


@given(st.text(st.sampled_from("AB=\n\r\x85\u2028 EOF"), max_size=60))
def test_the_fast_reading_is_the_thorough_one(text: str) -> None:
    data = text.encode()
    assert metadata._lines(data) == metadata._damaged_lines(data)
