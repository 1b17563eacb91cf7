# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports of lvm's tools, and the model of a group that they give.

This is the slow way to know a group, for when its metadata is not understood (cache.py), and the
measure of the fast one in tests.  `lvm fullreport` tells all of one group from one read of it:

    {"report": [{
      "vg": [{"vg_name":"vg1", "vg_uuid":"q0RlpD-…", "vg_seqno":"4", "vg_extent_size":"4194304",
              "vg_tags":"RHAT_x", "vg_exported":"", "vg_mda_size":"16777216", …}],
      "pv": [{"pv_name":"/dev/loop5", "pv_uuid":"BWCvvU-…", "pv_pe_count":"503", …}],
      "seg": [{"lv_name":"aa", "lv_uuid":"la4gCw-…", "lv_tags":"IU_x,MD_1", "segtype":"linear",
               "seg_start_pe":"0", "seg_size_pe":"1", "devices":"/dev/loop5(0)"}, …]}]}

What a report does not tell: the order of tags (it sorts them), the names of the physical volumes
inside the group (here they are numbered as they come), the exact size of the text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import orjson

from vdsm_storage.errors import UnexpectedVolumeGroupMetadata
from vdsm_storage.lvm.labels import text_bytes
from vdsm_storage.lvm.model import LogicalVolume, PhysicalVolume, Segment, VolumeGroup

Row = Mapping[str, str]

JSON: Final = ("--reportformat", "json", "--units", "b", "--nosuffix")
VG_FIELDS: Final = (
    "vg_name,vg_uuid,vg_seqno,vg_extent_size,vg_tags,vg_exported,vg_mda_size,vg_mda_free"
)
PV_FIELDS: Final = (
    "vg_name,pv_name,pv_uuid,dev_size,pe_start,pv_pe_count,pv_tags,pv_missing,pv_allocatable"
)
SEG_FIELDS: Final = "lv_name,lv_uuid,lv_tags,segtype,seg_start_pe,seg_size_pe,devices"

VGS: Final = ("vgs", *JSON, "-o", VG_FIELDS)  # then the group's name
LVS: Final = ("lvs", *JSON, "-a", "--segments", "-o", SEG_FIELDS)  # then the group's name
PVS: Final = ("pvs", *JSON, "-o", PV_FIELDS)
FULL: Final = (  # all three of one group at one moment; then the group's name
    "fullreport",
    *JSON,
    "-a",
    *("--configreport", "vg", "-o", VG_FIELDS),
    *("--configreport", "pv", "-o", PV_FIELDS),
    *("--configreport", "seg", "-o", SEG_FIELDS),
    *("--configreport", "lv", "-o", "lv_name"),
    *("--configreport", "pvseg", "-o", "pvseg_start"),
)

_PLACE: Final = re.compile(r"(.+)\((\d+)\)")


def parse_report(text: bytes) -> dict[str, list[Row]]:
    """The rows of each kind ("vg", "pv", "lv", "seg").  Raises ValueError."""
    found: dict[str, list[Row]] = {}
    match orjson.loads(text):
        case {"report": [*reports]} if all(isinstance(report, dict) for report in reports):
            for kind, rows in (item for report in reports for item in report.items()):
                if not isinstance(rows, list) or not all(map(_is_row, rows)):
                    raise ValueError(f"its part {kind} has something else than rows")
                found.setdefault(kind, []).extend(rows)
            return found
    raise ValueError("it is no report")


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and all(isinstance(value, str) for value in row.values())


def group_from_full_report(text: bytes) -> VolumeGroup:
    """The group from the output of FULL.  Raises UnexpectedVolumeGroupMetadata."""
    return group_from_reports(text, text, text)


def group_from_reports(vgs: bytes, lvs: bytes, pvs: bytes) -> VolumeGroup:
    """The group from the outputs of VGS, LVS, PVS.  Raises UnexpectedVolumeGroupMetadata."""
    name = "?"
    try:
        (row,) = parse_report(vgs).get("vg", [])
        name = row["vg_name"]
        rows = [row for row in parse_report(pvs).get("pv", []) if row["vg_name"] == name]
        return _group(row, _pvs(rows), parse_report(lvs).get("seg", []))
    except (ValueError, KeyError) as error:
        raise UnexpectedVolumeGroupMetadata(vg=name, reason=f"lvm's report: {error!r}") from error


def _group(row: Row, pvs: Sequence[PhysicalVolume], segments: Iterable[Row]) -> VolumeGroup:
    return VolumeGroup(
        name=row["vg_name"],
        uuid=row["vg_uuid"],
        seqno=int(row["vg_seqno"]),
        extent_size=int(row["vg_extent_size"]),
        tags=_tags(row["vg_tags"]),
        pvs={pv.name: pv for pv in pvs},
        lvs=_lvs(segments, _names(pvs)),
        exported=bool(row["vg_exported"]),
        text_size=text_bytes(int(row["vg_mda_size"]), int(row["vg_mda_free"])),
    )


def _pvs(rows: Iterable[Row]) -> list[PhysicalVolume]:
    return [
        PhysicalVolume(
            name=f"pv{number}",
            uuid=row["pv_uuid"],
            device=row["pv_name"],
            size=int(row["dev_size"]),
            pe_start=int(row["pe_start"]),
            pe_count=int(row["pv_pe_count"]),
            tags=_tags(row["pv_tags"]),
            missing=bool(row["pv_missing"]),
            allocatable=bool(row["pv_allocatable"]),
        )
        for number, row in enumerate(rows)
    ]


def _names(pvs: Sequence[PhysicalVolume]) -> dict[str, str]:
    """Device -> name.  All that are missing have one device's name, and cannot be told apart."""
    seen = Counter(pv.device for pv in pvs)
    return {pv.device: pv.name for pv in pvs if seen[pv.device] == 1}


def _lvs(rows: Iterable[Row], names: Mapping[str, str]) -> dict[str, LogicalVolume]:
    """The volumes from rows of one segment each, which come in any order."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["lv_name"], []).append(row)
    lvs = (_lv(group, names) for group in grouped.values())
    return {lv.name: lv for lv in lvs}


def _lv(rows: Sequence[Row], names: Mapping[str, str]) -> LogicalVolume:
    name = rows[0]["lv_name"]  # in brackets when it is hidden
    segments = sorted((_segment(row, names) for row in rows), key=lambda segment: segment.start)
    return LogicalVolume(
        name=name.strip("[]"),
        uuid=rows[0]["lv_uuid"],
        tags=_tags(rows[0]["lv_tags"]),
        segments=tuple(segments),
        visible=not name.startswith("["),
    )


def _segment(row: Row, names: Mapping[str, str]) -> Segment:
    place = _PLACE.fullmatch(row["devices"])
    start, count = int(row["seg_start_pe"]), int(row["seg_size_pe"])
    if row["segtype"] != "linear" or place is None or place[1] not in names:
        return Segment(start, count, "", 0)
    return Segment(start, count, names[place[1]], int(place[2]))


def _tags(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()
