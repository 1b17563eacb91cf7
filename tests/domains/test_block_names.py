# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import sys
import tracemalloc
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdsm_storage.base.units import MIB
from vdsm_storage.base.uuids import BLANK
from vdsm_storage.domains import block_names
from vdsm_storage.domains.block_names import VolumeIndex, VolumeTags
from vdsm_storage.errors import MissingTagOnLogicalVolume
from vdsm_storage.lvm.model import LogicalVolume, Segment

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "block-domain"
UUIDS = st.uuids().map(str)
TAGS = st.builds(
    VolumeTags, UUIDS, UUIDS, st.integers(0, 1947), st.booleans(), st.booleans(), st.booleans()
).filter(lambda tags: tags.removed or not tags.zero)


def lvs_of(report: Path) -> dict[str, LogicalVolume]:
    found = {}
    for lv in json.loads(report.read_text())["report"][0]["lv"]:
        tags = tuple(tag for tag in lv["lv_tags"].split(",") if tag)
        found[lv["lv_name"]] = LogicalVolume(lv["lv_name"], lv["lv_uuid"], tags, ())
    return found


@pytest.mark.parametrize("version", [4, 5])
def test_golden_volumes(version: int) -> None:
    where = GOLDEN / f"v{version}"
    asked = json.loads((where / "input.json").read_text())
    lvs = lvs_of(where / "4-volumes-created.lvs.json")
    index = VolumeIndex(lvs)
    first = 1 if version == 5 else 4
    for number, volume in enumerate(asked["volumes"]):
        tags = index.tags(volume["vol"])
        parent = volume.get("src_vol", BLANK)
        assert tags == VolumeTags(volume["img"], parent, first + number)
        assert set(tags.encode()) == set(lvs[volume["vol"]].tags)
        assert volume["vol"] in index.volumes(volume["img"])
        assert volume["vol"] in index.children(parent) or parent == BLANK
        assert block_names.is_volume(lvs[volume["vol"]])
    assert set(index.all_volumes()) == {volume["vol"] for volume in asked["volumes"]}
    assert set(index.images()) == {volume["img"] for volume in asked["volumes"]}
    assert index.slots == set(range(first, first + len(asked["volumes"])))
    special = {name for name, lv in lvs.items() if not block_names.is_volume(lv)}
    assert special == block_names.SPECIAL
    assert index.tags("ids") is None
    assert index.tags("nothing") is None
    assert index.volumes("nothing") == index.children("nothing") == ()


@pytest.mark.parametrize("version", [4, 5])
def test_golden_deletion(version: int) -> None:
    where = GOLDEN / f"v{version}"
    asked = json.loads((where / "input.json").read_text())
    image = asked["delete_img"]
    (volume,) = [v["vol"] for v in asked["volumes"] if v["img"] == image]
    before = VolumeIndex(lvs_of(where / "4-volumes-created.lvs.json"))
    marked = VolumeIndex(lvs_of(where / "6-after-delete-mark.lvs.json"))
    purged = VolumeIndex(lvs_of(where / "7-after-purge.lvs.json"))
    assert before.volumes(image) == (volume,)
    assert marked.volumes(image) == ()
    assert marked.removed() == {image: (volume,)}
    assert marked.slots == before.slots
    assert before.slots - purged.slots == {before.tags(volume).slot}  # type: ignore[union-attr]
    again = VolumeIndex(lvs_of(where / "8-slot-reused.lvs.json"))
    assert again.slots == before.slots
    assert again.by_slot()[before.tags(volume).slot] == asked["reuse"]["vol"]  # type: ignore[index,union-attr]


@pytest.mark.parametrize("version", [4, 5])
def test_golden_special_volumes(version: int) -> None:
    """Sizes and the order of extents as in a group that another host made."""
    report = json.loads((GOLDEN / f"v{version}" / "2-domain-created.lvs.json").read_text())
    found = {lv["lv_name"]: lv for lv in report["report"][0]["lv"]}
    extent = 128 * MIB
    start = 0
    for volume in block_names.special_volumes(version, MIB):
        lv = found.pop(volume.name)
        rounded = -(-volume.size // extent) * extent
        assert int(lv["lv_size"]) == rounded
        assert lv["devices"].endswith(f"({start})")
        start += rounded // extent
    assert not found
    assert start == 36


def test_xleases_came_with_version_4() -> None:
    names = [volume.name for volume in block_names.special_volumes(3, MIB)]
    assert names == ["metadata", "ids", "inbox", "outbox", "leases", "master"]


@given(TAGS)
def test_round_trip(tags: VolumeTags) -> None:
    lv = LogicalVolume("x", "y", tags.encode(), ())
    assert block_names.find(lv) == block_names.parse(lv) == tags


def test_odd_tags() -> None:
    zero = LogicalVolume("v", "u", ("IU__remove_me_ZERO_img", "MD_7", "PU_p", "other"), ())
    assert block_names.find(zero) == VolumeTags("img", "p", 7, removed=True, zero=True)
    for slot in ("MD_", "MD_x", "MD_-1", "MD_\u0663", "MD_99999999999999"):
        bare = LogicalVolume("v", "u", ("IU_i", slot), ())
        assert block_names.find(bare) == VolumeTags("i", BLANK, None)
        assert VolumeIndex({"v": bare}).slots == frozenset()
    with pytest.raises(MissingTagOnLogicalVolume, match="vg/v"):
        block_names.parse(LogicalVolume("v", "u", ("MD_1", "PU_p"), ()), "vg")


def test_half_made_volumes_keep_their_slots_only() -> None:
    tags = VolumeTags("img", BLANK, 3, initializing=True)
    index = VolumeIndex({"v": LogicalVolume("v", "u", tags.encode(), ())})
    assert (list(index.images()), index.slots, index.initializing) == ([], {3}, ("v",))
    assert index.by_slot() == {3: "v"}


def test_the_index_is_small() -> None:
    """Much below the promise of 1 KiB a volume, which has to hold the volume itself as well."""
    count = 2000
    lvs = {}
    parent = BLANK
    for number in range(count):
        name = str(uuid.uuid4())
        tags = (f"IU_{uuid.uuid4()}", f"PU_{parent}", f"MD_{number}")
        lvs[name] = LogicalVolume(name, "u", tags, (Segment(0, 1, "pv0", number),))
        parent = name
    tracemalloc.start()
    try:
        index = VolumeIndex(lvs)
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert size / count < 250
    assert sys.getsizeof(index) < 200
