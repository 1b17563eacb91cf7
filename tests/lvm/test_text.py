# SPDX-License-Identifier: GPL-2.0-or-later
"""The metadata text: golden texts against the reports of the same groups, round trips, garbage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.lvm.conftest import comparable
from vdsm_storage.lvm.model import LogicalVolume, PhysicalVolume, Segment, VolumeGroup
from vdsm_storage.lvm.report import group_from_full_report
from vdsm_storage.lvm.text import IncrementalParser, TextError, name_and_id, parse_group, seqno_of

DATA = Path(__file__).parent.parent / "data"
GOLDEN = DATA / "golden" / "block-domain"
ODD = (DATA / "lvm" / "odd-volumes-2.03.16.text").read_bytes()


# -- texts of real groups --------------------------------------------------------------------


def rows(name: str, kind: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads((GOLDEN / name).read_text())["report"][0][kind]
    return found


@pytest.mark.parametrize("version", ["v4", "v5"])
def test_golden_text_is_what_the_reports_say(version: str) -> None:
    group = parse_group((GOLDEN / version / "8-vgcfgbackup.txt").read_bytes())
    (vg,) = rows(f"{version}/4-volumes-created.vgs.json", "vg")
    assert (group.name, group.uuid) == (vg["vg_name"], vg["vg_uuid"])
    assert sorted(group.tags) == vg["vg_tags"].split(",")
    assert group.extent_size == int(vg["vg_extent_size"])
    assert group.extents == int(vg["vg_extent_count"])
    assert group.size == int(vg["vg_size"])
    pvs = rows(f"{version}/4-volumes-created.pvs.json", "pv")
    assert [(pv.device, pv.uuid, pv.size, pv.pe_start, pv.pe_count) for pv in group.pvs.values()]
    for pv, row in zip(group.pvs.values(), pvs, strict=True):
        assert (pv.device, pv.uuid) == (row["pv_name"], row["pv_uuid"])
        assert (pv.size, pv.pe_start) == (int(row["dev_size"]), int(row["pe_start"]))
        assert pv.pe_count == int(row["pv_pe_count"])
    lvs: dict[str, list[dict[str, str]]] = {}
    for row in rows(f"{version}/8-slot-reused.lvs.json", "lv"):
        lvs.setdefault(row["lv_name"], []).append(row)
    assert lvs.keys() == group.lvs.keys()
    devices = {pv.name: pv.device for pv in group.pvs.values()}
    for name, segments in lvs.items():
        lv = group.lvs[name]
        assert (lv.uuid, lv.visible) == (segments[0]["lv_uuid"], True)
        assert sorted(lv.tags) == [tag for tag in segments[0]["lv_tags"].split(",") if tag]
        assert group.size_of(name) == int(segments[0]["lv_size"])
        for segment, row in zip(lv.segments, segments, strict=True):
            assert segment.start == int(row["seg_start_pe"])
            assert f"{devices[segment.pv]}({segment.pv_start})" == row["devices"]


def test_order_of_tags_is_that_of_the_text() -> None:
    group = parse_group((GOLDEN / "v5" / "8-vgcfgbackup.txt").read_bytes())
    assert group.tags[:2] == (
        "MDT_VGUUID=Dxzv10-gMnm-EsIZ-vUO9-q8LQ-uNT6-h1IWoQ",
        "MDT_BLOCK_SIZE=512",
    )


def test_volumes_of_other_kinds_are_what_the_report_says() -> None:
    group = parse_group(ODD)
    report = group_from_full_report((DATA / "lvm/odd-volumes-2.03.16.fullreport.json").read_bytes())
    assert comparable(group) == comparable(report)
    assert {name for name, lv in group.lvs.items() if not lv.visible} == {
        "pvmove0",
        "mirrored_rmeta_0",
        "mirrored_rmeta_1",
        "mirrored_rimage_0",
        "mirrored_rimage_1",
    }
    assert group.lvs["moving"].segments == (Segment(0, 4, "pv0", 100), Segment(4, 6, "", 0))
    assert group.lvs["striped"].segments == (Segment(0, 8, "", 0),)
    assert group.lvs["007"].extents == 4


def test_snapshots_are_left_to_the_report() -> None:
    text = ODD.replace(b'type = "zero"', b'type = "snapshot"')
    with pytest.raises(TextError, match="snapshots"):
        parse_group(text)


def test_a_text_that_is_indented_and_one_that_is_not_say_the_same() -> None:
    lines = []
    depth = 0
    for line in ODD.decode().rstrip("\0").splitlines():
        depth -= line.count("}")
        comment = '\t# a comment with } and "' if line.endswith("{") else ""
        lines.append("\t" * depth + line + comment)
        depth += line.count("{")
    indented = parse_group("\n".join(lines).encode())
    assert replace(indented, text_size=len(ODD)) == parse_group(ODD)


def test_name_and_seqno_from_the_start() -> None:
    assert name_and_id(ODD[:512]) == ("odd", parse_group(ODD).uuid)
    assert seqno_of(ODD[:512]) == parse_group(ODD).seqno
    assert name_and_id(b"\0" * 512) is None
    assert name_and_id(b"") is None
    assert seqno_of(b"nothing") == -1


# -- a printer, as lvm writes ----------------------------------------------------------------


def print_list(name: str, values: Sequence[str]) -> str:
    return f"{name} = [" + ", ".join(f'"{value}"' for value in values) + "]\n"


def print_lv(lv: LogicalVolume) -> str:
    status = ["READ", "WRITE", "VISIBLE"] if lv.visible else ["READ", "WRITE"]
    head = f'{lv.name} {{\nid = "{lv.uuid}"\n{print_list("status", status)}flags = []\n'
    tags = print_list("tags", lv.tags) if lv.tags else ""
    more = 'creation_time = 1795766984\ncreation_host = "host"\n'
    segments = "".join(print_segment(i, s) for i, s in enumerate(lv.segments, 1))
    return f"{head}{tags}{more}segment_count = {len(lv.segments)}\n\n{segments}}}\n"


def print_segment(number: int, segment: Segment) -> str:
    head = f"segment{number} {{\nstart_extent = {segment.start}\nextent_count = {segment.count}\n\n"
    if segment.pv:
        place = f'stripe_count = 1\n\nstripes = [\n"{segment.pv}", {segment.pv_start}\n]'
        return f'{head}type = "striped"\n{place}\n}}\n'
    return f'{head}type = "mirror"\nmirror_count = 2\n\nmirrors = [\n"pv0", 1,\n"pv1", 2\n]\n}}\n'


def print_pv(pv: PhysicalVolume) -> str:
    flags = ["MISSING"] if pv.missing else []
    return (
        f'{pv.name} {{\nid = "{pv.uuid}"\ndevice = "{pv.device}"\n\n'
        + print_list("status", ["ALLOCATABLE"] if pv.allocatable else [])
        + print_list("flags", flags)
        + (print_list("tags", pv.tags) if pv.tags else "")
        + f"dev_size = {pv.size // 512}\npe_start = {pv.pe_start // 512}\n"
        + f"pe_count = {pv.pe_count}\n}}\n"
    )


def print_group(group: VolumeGroup) -> bytes:
    status = ["RESIZEABLE", "READ", "WRITE"] + (["EXPORTED"] if group.exported else [])
    text = (
        f'{group.name} {{\nid = "{group.uuid}"\nseqno = {group.seqno}\nformat = "lvm2"\n'
        + print_list("status", status)
        + 'flags = ["NOAUTOACTIVATE"]\n'
        + (print_list("tags", group.tags) if group.tags else "")
        + f"extent_size = {group.extent_size // 512}\nmax_lv = 0\nmax_pv = 0\n"
        + "metadata_copies = 0\n\nphysical_volumes {\n\n"
        + "\n".join(map(print_pv, group.pvs.values()))
        + "}\n\n"
    )
    if group.lvs:
        text += "logical_volumes {\n\n" + "\n".join(map(print_lv, group.lvs.values())) + "}\n\n"
    text += '}\n# Generated by LVM2\n\ncontents = "Text Format Volume Group"\nversion = 1\n\n'
    text += 'description = "Write from lvchange \\"odd\\" \\\\ }."\n\n'
    text += 'creation_host = "host"\t# Linux\ncreation_time = 1795767969\t# Fri Nov 27\n\n'
    return text.encode() + b"\0"


# -- what groups there may be ----------------------------------------------------------------

NAME = st.text("abcXYZ019_.+-", min_size=1, max_size=20).filter(
    lambda name: not name.startswith(("-", "pv")) and name not in (".", "..")
)
TAG = st.text("abZ09_+.-/=!:&#", min_size=1, max_size=30)
TAGS = st.lists(TAG, max_size=4, unique=True).map(tuple)
UUID = st.text("abcdefXYZ0123456789", min_size=32, max_size=32).map(
    lambda s: "-".join((s[:6], s[6:10], s[10:14], s[14:18], s[18:22], s[22:26], s[26:]))
)
COUNT = st.integers(1, 10**6)
SEGMENT = st.builds(
    Segment, st.integers(0, 10**6), COUNT, st.sampled_from(["pv0", "pv1", "pv0", ""]), COUNT
).map(lambda s: s if s.pv else replace(s, pv_start=0))
LV = st.builds(
    LogicalVolume,
    NAME,
    UUID,
    TAGS,
    st.lists(SEGMENT, min_size=1, max_size=3).map(tuple),
    st.booleans(),
)
LVS = st.lists(LV, max_size=80, unique_by=lambda lv: lv.name)
PV = st.builds(
    PhysicalVolume,
    name=st.just("pv"),
    uuid=UUID,
    device=st.just("/dev/mapper/36001405"),
    size=COUNT.map(lambda n: n * 512),
    pe_start=COUNT.map(lambda n: n * 512),
    pe_count=COUNT,
    tags=TAGS,
    missing=st.booleans(),
    allocatable=st.booleans(),
)
GROUP = st.builds(
    VolumeGroup,
    name=NAME,
    uuid=UUID,
    seqno=COUNT,
    extent_size=COUNT.map(lambda n: n * 512),
    tags=TAGS,
    pvs=st.tuples(PV, PV).map(
        lambda pvs: {f"pv{i}": replace(pv, name=f"pv{i}") for i, pv in enumerate(pvs)}
    ),
    lvs=LVS.map(lambda lvs: {lv.name: lv for lv in lvs}),
    exported=st.booleans(),
)


def test_printer_writes_what_lvm_writes() -> None:
    """Else the properties below would prove nothing."""
    plain = parse_group(ODD).lvs["mirrored_rimage_1"]
    assert print_lv(plain).encode() in ODD


@given(GROUP)
@settings(max_examples=60, deadline=None)
def test_round_trip(group: VolumeGroup) -> None:
    text = print_group(group)
    assert parse_group(text) == replace(group, text_size=len(text))


@given(GROUP, st.lists(st.tuples(st.integers(0, 7), st.integers(0, 99), LV), max_size=12))
@settings(max_examples=60, deadline=None)
def test_changes_one_after_the_other(
    group: VolumeGroup, changes: list[tuple[int, int, LogicalVolume]]
) -> None:
    """Each text gives what a first reading of it gives, and what is the same is the same object."""
    parser = IncrementalParser()
    before = parser.parse(print_group(group))
    for kind, place, lv in changes:
        group = changed(group, kind, place, lv)
        text = print_group(group)
        after = parser.parse(text)
        assert after == parse_group(text) == replace(group, text_size=len(text))
        for name, now in after.lvs.items():
            if before.lvs.get(name) == now:
                assert before.lvs[name] is now
        before = after


def changed(group: VolumeGroup, kind: int, place: int, lv: LogicalVolume) -> VolumeGroup:
    lvs = list(group.lvs.values())
    names = [lv.name for lv in lvs]
    place %= len(lvs) + 1
    if kind == 0 and lv.name not in names:
        lvs.insert(place, lv)
    elif kind == 1:
        del lvs[place : place + 1]
    elif kind == 2 and place < len(lvs):
        lvs[place] = replace(lvs[place], tags=lv.tags)
    elif kind == 3 and place < len(lvs):
        lvs[place] = replace(lvs[place], segments=lv.segments)
    elif kind == 4 and place < len(lvs) and lv.name not in names:
        lvs[place] = replace(lvs[place], name=lv.name)
    elif kind == 5:  # all move to other places
        lvs = lvs[place:] + lvs[:place]
    elif kind == 6:
        group = replace(group, tags=lv.tags)
    elif kind == 7:
        pv = replace(group.pvs["pv1"], pe_count=place + 1, tags=lv.tags)
        group = replace(group, pvs={**group.pvs, "pv1": pv})
    return replace(group, seqno=group.seqno + 1, lvs={lv.name: lv for lv in lvs})


def many(count: int) -> VolumeGroup:
    group = parse_group(ODD)
    base = group.lvs["mirrored_rimage_1"]
    uuid = base.uuid[:-6]
    lvs = [
        replace(base, name=f"lv{i:05}", uuid=f"{uuid}{i:06}", tags=(f"MD_{i}", "PU_x"))
        for i in range(count)
    ]
    return replace(group, lvs={lv.name: lv for lv in lvs})


def test_only_what_changed_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    read = IncrementalParser.parse.__globals__["LvReader"].read

    def counting(self: Any, text: memoryview, at: int) -> tuple[LogicalVolume, int]:
        lv, end = read(self, text, at)
        parsed.append(lv.name)
        return lv, end

    monkeypatch.setattr("vdsm_storage.lvm.text.LvReader.read", counting)
    group = many(1000)
    parser = IncrementalParser()
    parsed.clear()
    parser.parse(print_group(group))
    assert len(parsed) == 1000
    parsed.clear()
    lvs = dict(group.lvs)
    names = ["lv00000", "lv00031", "lv00032", "lv00500", "lv00999"]
    for name in names:
        lvs[name] = replace(lvs[name], tags=("new",))
    del lvs["lv00777"]
    lvs["another"] = replace(lvs["lv00001"], name="another")
    parser.parse(print_group(replace(group, lvs=lvs)))
    assert parsed == [*names, "another"]


def test_what_is_around_the_volumes_is_parsed_when_it_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parsed: list[bytes] = []
    parse = IncrementalParser.parse.__globals__["parse_config"]

    def counting(text: bytes) -> Any:
        parsed.append(text)
        return parse(text)

    group = many(3)
    parser = IncrementalParser()
    parser.parse(print_group(group))
    monkeypatch.setattr("vdsm_storage.lvm.text.parse_config", counting)
    later = replace(group, seqno=group.seqno + 9)
    assert parser.parse(text := print_group(later)) == replace(later, text_size=len(text))
    assert parsed == []
    tagged = replace(later, tags=("a", "b"))
    assert parser.parse(text := print_group(tagged)) == replace(tagged, text_size=len(text))
    assert len(parsed) == 1
    with pytest.raises(TextError, match="contents"):
        parser.parse(print_group(tagged).replace(b"version = 1\n", b"version = 2\n"))
    parser.parse(ODD)
    parsed.clear()
    assert parser.parse(ODD.replace(b"\nseqno = ", b"\nseqno = 1")).seqno > 10
    assert parsed == []
    named = replace(tagged, name="seqno", seqno=7)
    text = print_group(named).replace(b"seqno = 7\n", b"seqno=7\n")
    assert parser.parse(text) == replace(named, text_size=len(text))
    text = text.replace(b'flags = ["NOAUTO', b'more {\nseqno = 8\n}\nflags = ["NOAUTO')
    assert parser.parse(text).seqno == 7
    assert parser.parse(text.replace(b"seqno = 8", b"seqno = 9")).seqno == 7


def test_strings_that_repeat_are_one_object() -> None:
    lvs = list(parse_group(print_group(many(3))).lvs.values())
    assert lvs[0].tags[1] is lvs[1].tags[1] is lvs[2].tags[1]
    assert lvs[0].segments[0].pv is lvs[2].segments[0].pv


def test_the_name_of_a_pv_that_goes_away_is_no_place_any_more() -> None:
    """The same text of a volume means something else then."""
    parser = IncrementalParser()
    group = many(2)
    assert parser.parse(print_group(group)).lvs["lv00000"].segments[0].pv == "pv1"
    less = replace(group, pvs={"pv0": group.pvs["pv0"]})
    assert parser.parse(print_group(less)).lvs["lv00000"].segments[0].pv == ""


def test_an_error_leaves_the_parser_as_it_was() -> None:
    parser = IncrementalParser()
    group = many(100)
    text = print_group(group)
    first = parser.parse(text)
    with pytest.raises(TextError):
        parser.parse(text.replace(b"lv00050 {", b"lv00051 {"))
    with pytest.raises(TextError):
        parser.parse(text[: len(text) // 2])
    again = parser.parse(text)
    assert all(again.lvs[name] is lv for name, lv in first.lvs.items())


# -- what is no metadata ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"seqno = ", b"seqno = -"),
        (b"seqno = ", b'seqno = "1"\nx = '),
        (b"extent_size = ", b"extent = "),
        (b'id = "', b'id = ["'),
        (b"pe_count = ", b"pe_counted = "),
        (b"segment_count = 1", b"segment_count = 2"),
        (b"segment_count = 1", b"segment_count = 999999999999999999"),
        (b"physical_volumes {", b"physical_volumes = 3\nx {"),
        (b"plain {", b"striped {"),
        (b"odd {", b"odd { }\nother {"),
        (b"status = [", b"status = [1, "),
        (b"extent_count = 8", b"extent_count = 1.5"),
        (b"start_extent = ", b"start_extent = 99999999999999999999999999"),
        (b"version = 1", b"version = 2"),
        (b"Text Format", b"Binary Format"),
        (b"\0", b"}\0"),
    ],
)
def test_what_is_wrong_is_refused(old: bytes, new: bytes) -> None:
    assert old in ODD
    with pytest.raises(TextError):
        parse_group(ODD.replace(old, new))


@given(st.integers(0, len(ODD) - 1), st.binary(max_size=6), st.integers(0, 40))
@settings(max_examples=400, deadline=2000)
def test_a_damaged_text_is_read_or_refused(place: int, garbage: bytes, cut: int) -> None:
    text = ODD[:place] + garbage + ODD[place + cut :]
    parser = IncrementalParser()
    parser.parse(ODD)
    try:
        found = parser.parse(text)
    except TextError:
        return
    assert found == parse_group(text)


MARKS = [b"{", b"}", b"[", b"]", b"=", b",", b'"', b"'", b"\\", b"#", b"\n", b" ", b"\0", b"\xff"]
WORDS = [b"a", b"1", b"-1", b"1.5", b'"x"', b"logical_volumes {\n", b"segment1 {\n", b"}\n}\n"]
FRAGMENTS = st.sampled_from([*MARKS, *WORDS, b"id = "])


@given(st.lists(FRAGMENTS, max_size=60).map(b"".join) | st.binary(max_size=200))
@example(b"x {\nlogical_volumes {\n")
@example(b"\nlogical_volumes {\n}\n")
@example(b"")
@settings(max_examples=400, deadline=2000)
def test_garbage_is_refused(text: bytes) -> None:
    with pytest.raises(TextError):
        parse_group(text)


def test_a_large_text_that_matches_nearly_ends_soon() -> None:
    """No regular expression may try again and again."""
    body = b'id = "' + b"x" * 38 + b'"\nstatus = [' + b'"a", ' * 200_000
    with pytest.raises(TextError):
        parse_group(b"vg {\nlogical_volumes {\n\nlv {\n" + body)
