# SPDX-License-Identifier: GPL-2.0-or-later
"""Metadata in tags against what other hosts wrote, and with whatever else may be there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdsm_storage.domains import block_tags
from vdsm_storage.domains import metadata as md
from vdsm_storage.domains.metadata import DomainMetadata
from vdsm_storage.errors import InvalidDomainMetadata, MetadataSealBroken

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
SAMPLES = sorted(GOLDEN.glob("block-domain-tags/v*.json"))
REPORTS = sorted(GOLDEN.glob("block-domain/*/*.vgs.json"))

KEYS = st.from_regex(r"[A-Z_][A-Z0-9_]{0,20}", fullmatch=True).filter(lambda k: k != md.CHECKSUM)
VALUES = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=60).map(str.strip)
METADATA = st.dictionaries(KEYS, VALUES, max_size=12)


def tags_of(report: Path) -> list[str]:
    (group,) = json.loads(report.read_text())["report"][0]["vg"]
    return [tag for tag in group["vg_tags"].split(",") if tag]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.stem)
def test_golden_tags(path: Path) -> None:
    sample = json.loads(path.read_text())
    values = block_tags.decode_tags(reversed(sample["tags"]), path.stem)
    assert block_tags.encode_tags(values) == set(sample["tags"])
    lines = dict(line.split("=", 1) for line in sample["lines"])
    assert values == {key: value for key, value in lines.items() if key != md.CHECKSUM}
    assert DomainMetadata(values).version == int(path.stem[1])


@pytest.mark.parametrize("path", REPORTS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_golden_groups(path: Path) -> None:
    tags = tags_of(path)
    whole = "vg-created" not in path.name
    assert block_tags.is_domain(tags) == whole
    assert (block_tags.UNREADY in tags) != whole
    if not whole:
        return
    values = block_tags.decode_tags(tags, path.name)
    assert block_tags.encode_tags(values) == set(tags) - {block_tags.READY}
    assert block_tags.changes(tags, values) == ((), ())
    devices = block_tags.physical_volumes(values)
    assert [device.mapoffset for device in devices] == [0, 157][: len(devices)]
    assert block_tags.pv_changes(values, [(d.guid, d.uuid, d.pecount) for d in devices]) == {
        key: value for key, value in values.items() if key.startswith("PV")
    }


def test_samples_are_there() -> None:
    assert len(SAMPLES) == 6
    assert len(REPORTS) >= 8


def test_characters() -> None:
    table = json.loads((GOLDEN / "block-domain-tags/char-table.json").read_text())
    for character, encoded in table.items():
        assert block_tags.encode_value(character) == encoded
        assert block_tags.decode_value(encoded) == character


def test_decoding_of_anything() -> None:
    table = json.loads((GOLDEN / "block-domain-tags/decode.json").read_text())
    for encoded, text in table.items():
        assert block_tags.decode_value(encoded) == text
    for none in ("&1114112&", "&55296&", "&99999999999999999999999999999999&"):
        assert block_tags.decode_value(none) == none


def test_pool_creation_changes_only_its_keys() -> None:
    """From a new domain to a pool's master, as the golden run did it."""
    where = GOLDEN / "block-domain/v5"
    before = tags_of(where / "2-domain-created.vgs.json")
    after = tags_of(where / "3-pool-created.vgs.json")
    values = block_tags.decode_tags(after, "after")
    add, remove = block_tags.changes(before, values)
    assert set(add) == set(after) - set(before)
    assert set(remove) == set(before) - set(after)


@given(METADATA)
def test_round_trip(values: dict[str, str]) -> None:
    tags = block_tags.encode_tags(values)
    assert all(len(tag) < 1024 and tag.isascii() and "," not in tag for tag in tags)
    assert block_tags.decode_tags(tags, "x") == values


@given(METADATA, METADATA)
def test_changes_lead_from_one_to_the_other(old: dict[str, str], new: dict[str, str]) -> None:
    tags = block_tags.encode_tags(old) | {block_tags.READY}
    add, remove = block_tags.changes(tags, new)
    assert (tags - set(remove)) | set(add) == block_tags.encode_tags(new) | {block_tags.READY}
    assert not set(add) & tags
    assert set(remove) <= tags


@given(st.lists(st.text(max_size=40), max_size=8))
def test_any_tags(texts: list[str]) -> None:
    """Nothing but the two errors ever comes out, whatever the tags say."""
    for tags in (texts, [block_tags.PREFIX + text for text in texts]):
        try:
            values = block_tags.decode_tags(tags, "x")
            block_tags.physical_volumes(values)
            assert all(isinstance(text, str) for pair in values.items() for text in pair)
        except (MetadataSealBroken, InvalidDomainMetadata):
            pass


def test_what_other_hosts_accept(caplog: pytest.LogCaptureFixture) -> None:
    tags = [
        "MDT_A=1",
        "MDT_nothing",
        "MDT_B=x&61&y",
        "other",
        "MDT_",
        "MDT__NEW=kept",
    ]
    assert block_tags.decode_tags(tags, "sd") == {"A": "1", "B": "x=y", "_NEW": "kept"}
    assert "sd has no checksum" in caplog.text
    with pytest.raises(MetadataSealBroken) as error:
        block_tags.decode_tags([*tags, "MDT__SHA_CKSUM=" + "0" * 40], "sd")
    assert error.value.code == 752
    assert "sd" in str(error.value)
    # A rewrite takes the old spelling of a line for the line, and removes what is no line.
    add, remove = block_tags.changes(tags, {"A": "1", "B": "x=y", "_NEW": "kept"})
    assert [tag[:15] for tag in add] == ["MDT__SHA_CKSUM="]
    assert set(remove) == {"MDT_", "MDT_nothing"}


def test_what_tags_cannot_hold() -> None:
    for values in (
        {"A B": "x"},
        {"": "x"},
        {"A": "two\nlines"},
        {"A": "\ud800"},
        {"A": "x" * 40000},
    ):
        with pytest.raises(InvalidDomainMetadata):
            block_tags.encode_tags(values)
    pool = ",".join("b5b7ae9e-18c0-4c9c-9ae9-0ed1d8b44dd1:Attached" for _ in range(100))
    assert block_tags.encode_tags({"POOL_DOMAINS": pool})


def test_devices() -> None:
    value = block_tags.pv_value("36001", "b9tIul-AGBm", 157, 0)
    assert value == "pv:36001,uuid:b9tIul-AGBm,pestart:0,pecount:157,mapoffset:0"
    assert block_tags.parse_pv(value) == block_tags.PvRecord("36001", "b9tIul-AGBm", 157, 0)
    for wrong in ("", "pv:36001", value + ",x:1", value.replace("157", "x")):
        with pytest.raises(InvalidDomainMetadata, match="sd"):
            block_tags.parse_pv(wrong, "sd")
    values = {f"PV{n}": block_tags.pv_value(f"d{n}", "u", 10, n * 10) for n in range(11)}
    assert [pv.guid for pv in block_tags.physical_volumes(values)] == [f"d{n}" for n in range(11)]
    changed = block_tags.pv_changes(values, [("a", "u", 3), ("b", "u", 4)])
    assert changed.pop("PV0") == block_tags.pv_value("a", "u", 3, 0)
    assert changed.pop("PV1") == block_tags.pv_value("b", "u", 4, 3)
    assert set(changed.values()) == {None}
    assert len(changed) == 9
