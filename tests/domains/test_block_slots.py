# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdsm_storage.base.units import KIB, MIB
from vdsm_storage.domains import block_slots, block_tags, block_upgrade
from vdsm_storage.domains.block_slots import Slots
from vdsm_storage.domains.metadata import DomainMetadata
from vdsm_storage.errors import TooManyVolumes
from vdsm_storage.images import metadata

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "block-domain"


def lay_out(path: Path, *pieces: tuple[int, bytes]) -> str:
    """A `metadata` volume with some pieces at their offsets."""
    with open(path, "wb") as file:
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
        file.truncate(block_slots.METADATA_SIZE)
    return str(path)


@pytest.mark.parametrize(("version", "name", "offset"), [(4, "0", 0), (5, "1M", MIB)])
def test_golden_slots(tmp_path: Path, version: int, name: str, offset: int) -> None:
    where = GOLDEN / f"v{version}"
    golden = (where / f"4-metadata@{name}.bin").read_bytes()
    slots = Slots(lay_out(tmp_path / "metadata", (offset, golden)), version)
    asked = json.loads((where / "input.json").read_text())
    first = block_slots.first_slot(version)
    numbers = range(first, first + len(asked["volumes"]))
    found = slots.read_all(numbers)
    for number, volume in zip(numbers, asked["volumes"], strict=True):
        assert slots.read(number) == found[number]
        decoded = metadata.decode(found[number])
        assert decoded.image == volume["img"]
        assert decoded.encode_slot(version) == found[number]
    assert slots.read(numbers[-1] + 1) == bytes(512)


@pytest.mark.parametrize("version", [3, 4, 5])
def test_writing_touches_nothing_else(tmp_path: Path, version: int) -> None:
    path = lay_out(tmp_path / "metadata", (0, b"x" * (3 * MIB)))
    slots = Slots(path, version)
    slots.write(7, b"y" * 512)
    expected = bytearray(b"x" * (3 * MIB))
    at = MIB + 7 * 8 * KIB if version == 5 else 7 * 512
    expected[at : at + 512] = b"y" * 512
    assert (tmp_path / "metadata").read_bytes()[: 3 * MIB] == expected
    slots.clear(7)
    expected[at : at + 512] = bytes(512)
    assert (tmp_path / "metadata").read_bytes()[: 3 * MIB] == expected


def test_links_lead_to_the_volume(tmp_path: Path) -> None:
    """The names of logical volumes are links, below /dev or where a test puts them."""
    lay_out(tmp_path / "device")
    (tmp_path / "metadata").symlink_to("device")
    slots = Slots(str(tmp_path / "metadata"), 5)
    slots.write(1, b"z" * 512)
    assert slots.read(1) == b"z" * 512


@pytest.mark.parametrize("version", [4, 5])
def test_reading_many(tmp_path: Path, version: int) -> None:
    path = tmp_path / "metadata"
    data = os.urandom(18 * MIB)
    slots = Slots(lay_out(path, (0, data)), version)

    @given(st.sets(st.integers(0, 2000), max_size=60))
    def check(numbers: set[int]) -> None:
        found = slots.read_all(numbers)
        assert found.keys() == numbers
        for number, text in found.items():
            offset = block_slots.slot_offset(number, version)
            assert text == data[offset : offset + 512]
        for number in list(found)[:2]:
            assert slots.read(number) == found[number]

    check()
    assert slots.read_all(range(1, 2001)).keys() == set(range(1, 2001))


def test_a_short_file(tmp_path: Path) -> None:
    (tmp_path / "metadata").write_bytes(b"x" * (512 * 5 + 100))
    slots = Slots(str(tmp_path / "metadata"), 4)
    found = slots.read_all([4, 5, 6, 1900])
    assert {slot: slots.read(slot) for slot in found} == found
    assert found[4] == b"x" * 512
    assert found[5] == b"x" * 100 + bytes(412)
    assert found[6] == found[1900] == bytes(512)


def test_impossible_slots(tmp_path: Path) -> None:
    slots = Slots(lay_out(tmp_path / "metadata"), 5)
    for slot in (-1, 16256):
        with pytest.raises(ValueError, match="no slot"):
            slots.read(slot)
        with pytest.raises(ValueError, match="no slot"):
            slots.write(slot, bytes(512))
    with pytest.raises(ValueError, match="512 bytes"):
        slots.write(1, b"short")
    assert slots.read(16255) == bytes(512)


def test_lowest_free() -> None:
    assert block_slots.lowest_free((), 5) == 1
    assert block_slots.lowest_free((), 4) == 4
    assert block_slots.lowest_free({1, 2, 4}, 5) == 3
    assert block_slots.lowest_free(set(range(1, 1947)), 5) == 1947
    assert block_slots.lowest_free_many({2}, 5, 3) == [1, 3, 4]
    for version in (4, 5):
        with pytest.raises(TooManyVolumes, match="sd") as error:
            block_slots.lowest_free(set(range(1948)), version, "sd")
        assert error.value.code == 397


def test_lease_offsets_of_golden_volumes() -> None:
    for version in (4, 5):
        where = GOLDEN / f"v{version}"
        first = block_slots.first_slot(version)
        asked = json.loads((where / "input.json").read_text())["volumes"]
        info = json.loads((where / "4-volume-info.json").read_text())
        for number, volume in enumerate(asked):
            lease = info[volume["vol"]]["lease"]
            assert lease["offset"] == block_slots.lease_offset(first + number, MIB)
    assert block_slots.lease_offset(block_slots.LAST_SLOT, MIB) == 2047 * MIB


# -- format 4 becomes format 5 ---------------------------------------------------------------


def test_golden_conversion(tmp_path: Path) -> None:
    where = GOLDEN / "v4-converted-to-v5"
    before = (where / "before-metadata@0.bin").read_bytes()
    path = lay_out(tmp_path / "metadata", (0, before))
    for _ in range(2):  # cut off and done again
        assert block_upgrade.copy_slots(path, {4: "a", 5: "b"}) == []
        assert (tmp_path / "metadata").read_bytes()[:4096] == before
    block_upgrade.zero_old_slots(path)
    after = (tmp_path / "metadata").read_bytes()
    assert after[:4096] == (where / "converted-metadata@0.bin").read_bytes()
    assert after[MIB : MIB + 57344] == (where / "converted-metadata@1M.bin").read_bytes()
    assert not after[:MIB].strip(b"\0")

    tags = {}
    for name in ("before", "converted"):
        report = json.loads((where / f"{name}.vgs.json").read_text())
        tags[name] = report["report"][0]["vg"][0]["vg_tags"].split(",")
    old = DomainMetadata(block_tags.decode_tags(tags["before"], "x"))
    new = old.with_changes(block_upgrade.upgraded())
    assert new.values == block_tags.decode_tags(tags["converted"], "x")


def test_conversion_of_what_cannot_be_read(tmp_path: Path) -> None:
    where = GOLDEN / "v4-converted-to-v5"
    before = bytearray((where / "before-metadata@0.bin").read_bytes())
    before[5 * 512 : 6 * 512] = b"\xff" * 512
    path = lay_out(tmp_path / "metadata", (0, bytes(before)), (MIB, b"old" * 4096))
    assert block_upgrade.copy_slots(path, {4: "a", 5: "b", 1900: "c"}) == ["b", "c"]
    slots = Slots(path, 5)
    assert slots.read(5) == b"\xff" * 512
    assert slots.read(1900) == bytes(512)
    assert metadata.decode(slots.read(4)).capacity == 1073741824
    assert (tmp_path / "metadata").read_bytes()[MIB:].startswith(b"old" * 2730)


def test_conversion_of_a_copy_keeps_every_volume(tmp_path: Path) -> None:
    """All slots that a domain may have at once."""
    path = lay_out(tmp_path / "metadata")
    text = (GOLDEN / "v4" / "4-metadata@0.bin").read_bytes()[4 * 512 : 5 * 512]
    with open(path, "r+b") as file:
        for slot in range(4, block_slots.LAST_SLOT + 1):
            file.seek(slot * 512)
            file.write(text.replace(b"GEN=0", b"GEN=%d" % (slot % 10)))
    shutil.copy(path, tmp_path / "copy")
    numbers = {slot: str(slot) for slot in range(4, block_slots.LAST_SLOT + 1)}
    assert block_upgrade.copy_slots(path, numbers) == []
    for slot, data in Slots(path, 5).read_all(numbers).items():
        assert metadata.decode(data).generation == slot % 10
