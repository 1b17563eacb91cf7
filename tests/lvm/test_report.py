# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports of lvm's tools, captured and live."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lvm.conftest import LoopDevices, LvmTool, comparable
from vdsm_storage.errors import UnexpectedVolumeGroupMetadata
from vdsm_storage.lvm.model import Segment
from vdsm_storage.lvm.report import (
    FULL,
    LVS,
    PVS,
    VGS,
    group_from_full_report,
    group_from_reports,
    parse_report,
)

DATA = Path(__file__).parent.parent / "data" / "lvm"


def captured(kind: str) -> bytes:
    return (DATA / f"odd-volumes-2.03.16.{kind}.json").read_bytes()


def test_captured_reports() -> None:
    group = group_from_full_report(captured("fullreport"))
    assert group == group_from_reports(captured("vgs"), captured("lvs"), captured("pvs"))
    assert (group.name, group.extent_size, group.exported) == ("odd", 1 << 20, False)
    assert group.tags == ("a+b_c.d-e/f=g!h:i&j#k",)
    pv0, pv1 = group.pvs.values()
    assert (pv0.name, pv0.device, pv0.tags, pv0.allocatable) == (
        "pv0",
        "/dev/loop7",
        ("ptag",),
        True,
    )
    assert (pv1.name, pv1.size, pv1.pe_start, pv1.allocatable) == ("pv1", 2 << 30, 2 << 20, False)
    assert group.lvs["plain"].segments == (Segment(0, 8, "pv0", 0),)
    assert group.lvs["mirrored_rimage_1"].segments == (Segment(0, 8, "pv1", 201),)
    assert group.lvs["mirrored"].segments == (Segment(0, 8, "", 0),)
    assert not group.lvs["pvmove0"].visible


def test_live_reports(loops: LoopDevices, lvm: LvmTool) -> None:
    lvm("pvcreate", *loops(1))  # of no group
    lvm("vgcreate", "other", *loops(1))
    lvm.make_group("vg", loops(2))
    lvm.create("vg", "one", 3, tags=["b", "a"])
    lvm("lvextend", "-l", "+2", "vg/one", loops.paths[-1])
    lvm("vgchange", "--addtag", "t", "vg")
    full = group_from_full_report(lvm(*FULL, "vg").encode())
    three = (lvm(*command).encode() for command in ((*VGS, "vg"), (*LVS, "vg"), PVS))
    assert full == group_from_reports(*three)
    assert full.lvs["one"].tags == ("a", "b")
    assert [s.count for s in full.lvs["one"].segments] == [3, 2]
    assert (full.extents - full.used) * full.extent_size == full.free


def test_exported_group(loops: LoopDevices, lvm: LvmTool) -> None:
    lvm.make_group("vg", loops(1))
    assert not lvm.report("vg").exported
    lvm("vgexport", "vg")
    assert lvm.report("vg").exported


def test_missing_volumes(loops: LoopDevices, lvm: LvmTool) -> None:
    one, two, three = loops(3)
    lvm.make_group("vg", [one, two, three])
    lvm("lvcreate", "-an", "-Zn", "-Wn", "-l", "3", "-n", "lv", "vg", two)
    whole = lvm.report("vg")
    loops.drop(two)
    part = lvm.report("vg")
    assert part.partial
    assert [pv.missing for pv in part.pvs.values()].count(True) == 1
    now = comparable(part)["lvs"]["lv"][2]
    assert now == comparable(whole)["lvs"]["lv"][2]  # on the missing one, by its uuid
    loops.drop(three)  # now nobody can tell which of the two
    part = lvm.report("vg")
    assert [pv.missing for pv in part.pvs.values()].count(True) == 2
    assert part.lvs["lv"].segments == (Segment(0, 3, "", 0),)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"report": []}',
        b'{"report": 1}',
        b'{"report": [1]}',
        b'{"report": [{"vg": 1}]}',
        b'{"report": [{"vg": [1]}]}',
        b'{"report": [{"vg": [{"vg_name": 1}]}]}',
        b'{"report": [{"vg": [{"vg_name": "odd"}], "pv": [], "seg": []}]}',
        b'{"report": [{"vg": [{"vg_name": "a"}, {"vg_name": "b"}]}]}',
    ],
)
def test_what_is_no_report(text: bytes) -> None:
    with pytest.raises(UnexpectedVolumeGroupMetadata):
        group_from_full_report(text)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    if isinstance(value, dict):
        found = [(value, key) for key in value]
    elif isinstance(value, list):
        found = [(value, index) for index in range(len(value))]
    else:
        return []
    return found + [place for _, key in found for place in places(value[key])]


@given(st.data(), st.sampled_from([None, 1, "", "x", [], {}, -1.5]))
def test_a_report_with_anything_wrong(data: st.DataObject, value: Any) -> None:
    document = json.loads(captured("fullreport"))
    container, key = data.draw(st.sampled_from(places(document)))
    if data.draw(st.booleans()):
        del container[key]
    else:
        container[key] = value
    try:
        found = group_from_full_report(json.dumps(document).encode())
    except UnexpectedVolumeGroupMetadata:
        return
    assert all(lv.name == name for name, lv in found.lvs.items())
    assert found.extents >= 0


def test_rows() -> None:
    assert [row["vg_name"] for row in parse_report(captured("pvs"))["pv"]] == ["odd", "odd"]
    with pytest.raises(ValueError, match="no report"):
        parse_report(b"3")
