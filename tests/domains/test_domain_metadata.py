# SPDX-License-Identifier: GPL-2.0-or-later
"""Domain metadata against the bytes of other hosts, and with whatever else may be there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdsm_storage.domains import metadata as md
from vdsm_storage.domains.metadata import DomainMetadata
from vdsm_storage.errors import InvalidDomainMetadata, MetadataSealBroken

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
SAMPLES = sorted(GOLDEN.glob("file-domain-metadata/*")) + sorted(
    GOLDEN.glob("file-domain/*/*.metadata")
)

KEYS = st.from_regex(r"[A-Z_][A-Z0-9_]{0,20}", fullmatch=True).filter(lambda k: k != md.CHECKSUM)
VALUES = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=60).map(str.strip)
METADATA = st.dictionaries(KEYS, VALUES, max_size=12)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_golden(path: Path) -> None:
    text = path.read_bytes()
    values = md.decode(text, path.name)
    assert md.encode(values) == text
    found = DomainMetadata(values)
    assert found.version in (3, 4, 5)
    assert found.is_master == ("master" in path.name or path.name.startswith(("2-", "5-")))
    assert (found.pools == []) == ("unattached" in path.name)


def test_samples_are_there() -> None:
    assert len(SAMPLES) > 40


@given(METADATA)
def test_round_trip(values: dict[str, str]) -> None:
    assert md.decode(md.encode(values)) == values


@given(METADATA, KEYS, VALUES)
def test_unknown_keys_survive_a_rewrite(values: dict[str, str], key: str, value: str) -> None:
    old = DomainMetadata(md.decode(md.encode({**values, key: value})))
    new = old.with_changes({"ROLE": "Master", "POOL_UUID": None})
    expected = {**values, key: value, "ROLE": "Master"}
    expected.pop("POOL_UUID", None)
    assert md.decode(md.encode(new.values)) == expected


@given(st.binary(max_size=400))
def test_any_bytes(text: bytes) -> None:
    """Nothing but the two errors ever comes out, whatever is on the storage."""
    try:
        found = DomainMetadata(md.decode(text))
        for name in ("id", "type", "klass", "role", "version", "block_size", "master_version"):
            try:
                getattr(found, name)
            except InvalidDomainMetadata:
                continue
        md.checksum(found.values)
    except MetadataSealBroken:
        return


@given(METADATA.filter(bool), st.data())
def test_a_flipped_bit_is_noticed(values: dict[str, str], data: st.DataObject) -> None:
    text = bytearray(md.encode(values))
    end = text.rindex(b"_SHA_CKSUM=")
    at = data.draw(st.integers(0, end - 1).filter(lambda i: text[i] != ord("\n")))
    text[at] ^= 0x01
    with pytest.raises(MetadataSealBroken):
        md.decode(bytes(text))


def test_no_checksum_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    assert md.decode(b"A=1\nB=2\n", "dom") == {"A": "1", "B": "2"}
    assert "no checksum" in caplog.text


def test_lines_without_equals_and_duplicates() -> None:
    text = b"A=1\nnonsense\n\nA=2\n_SHA_CKSUM=" + md.checksum({"A": "2"}).encode() + b"\n"
    assert md.decode(text) == {"A": "2"}


def test_blanks_around_values() -> None:
    """A writer that counted the blanks is right as well."""
    text = b"A= 1 \n_SHA_CKSUM=" + md.checksum({"A": " 1 "}).encode() + b"\n"
    assert md.decode(text) == {"A": " 1 "}


@pytest.mark.parametrize("value", ["a\nb", "a\0", "\udc80", "\x7f\x1b"])
def test_values_that_cannot_be_stored(value: str) -> None:
    with pytest.raises(InvalidDomainMetadata):
        md.encode({"DESCRIPTION": value})


def test_wrong_checksum() -> None:
    with pytest.raises(MetadataSealBroken) as error:
        md.decode(b"A=1\n_SHA_CKSUM=00\n", "dom")
    assert error.value.code == 752
    assert "dom" in error.value.message
