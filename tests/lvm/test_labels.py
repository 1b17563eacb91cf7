# SPDX-License-Identifier: GPL-2.0-or-later
"""Labels, metadata headers and texts, read from real physical volumes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lvm.conftest import LoopDevices, LvmTool
from vdsm_storage.lvm.labels import (
    Area,
    HeaderDamaged,
    HeaderReader,
    Label,
    LabelDamaged,
    TextDamaged,
    checksum,
    find_label,
    free_bytes,
    parse_header,
    read_header,
    read_label,
    read_text,
    text_bytes,
)
from vdsm_storage.lvm.report import parse_report

PV_FIELDS = "pv_uuid,dev_size,pv_mda_count,pv_mda_used_count,pv_mda_size,pv_mda_free"


def patch(device: str, offset: int, data: bytes) -> None:
    with open(device, "r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)
        os.fsync(file.fileno())


def flip(device: str, offset: int) -> None:
    with open(device, "rb", buffering=0) as file:
        file.seek(offset)
        old = file.read(1)
    patch(device, offset, bytes([old[0] ^ 0x20]))


def label_of(device: str) -> Label:
    label = read_label(device)
    assert label is not None
    return label


def text_of(device: str, area: Area) -> bytes:
    location = read_header(device, area).location
    assert location is not None
    return read_text(device, area, location)


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("copies", ["1", "2"])
def test_label_is_what_pvs_reports(
    loops: LoopDevices, lvm: LvmTool, sector: int, copies: str
) -> None:
    (device,) = loops(sector=sector)
    lvm("pvcreate", "--metadatasize", "2m", "--metadatacopies", copies, device)
    label = label_of(device)
    output = lvm("pvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", PV_FIELDS)
    (row,) = parse_report(output.encode())["pv"]
    assert label.device == device
    assert (label.pv_uuid, label.size) == (row["pv_uuid"], int(row["dev_size"]))
    assert len(label.areas) == int(row["pv_mda_count"]) == int(copies)
    assert min(area.size for area in label.areas) == int(row["pv_mda_size"])
    for area in label.areas:
        header = read_header(device, area)
        assert (header.ignored, header.location) == (False, None)


@pytest.mark.parametrize("sector", [512, 4096])
def test_text_is_what_lvm_wrote(loops: LoopDevices, lvm: LvmTool, sector: int) -> None:
    one, two = loops(2, sector=sector)
    lvm.make_group("vg", [one, two])
    lvm.create("vg", "some", tags=["hello"])
    for area in label_of(one).areas:
        assert not read_header(one, area).ignored
        text = text_of(one, area)
        assert text.startswith(b"vg {\n")
        assert text.endswith(b"\n\0")
        assert b'tags = ["hello"]' in text
    assert all(read_header(two, area).ignored for area in label_of(two).areas)


def test_header_changes_with_each_commit_and_with_nothing_else(
    loops: LoopDevices, lvm: LvmTool
) -> None:
    (device,) = loops()
    lvm.make_group("vg", [device])
    reader = HeaderReader(device, label_of(device).areas)
    seen = reader.read()
    lvm("vgs", "vg")
    lvm("pvs")
    assert reader.read() == seen
    for number in range(3):
        lvm("vgchange", "--addtag", f"t{number}", "vg")
        now = reader.read()
        assert all(a != b for a, b in zip(now, seen, strict=True))
        seen = now


def test_text_that_wraps_around_its_area(loops: LoopDevices, lvm: LvmTool) -> None:
    """Each commit writes behind the one before: a small area comes round soon."""
    (device,) = loops()
    lvm("pvcreate", "--metadatasize", "32k", "--dataalignment", "4k", device)
    lvm("vgcreate", "-s", "1m", "vg", device)
    (area,) = label_of(device).areas
    wrapped = 0
    for number in range(40):
        lvm("vgchange", "--addtag", f"t{number}", "vg")
        location = read_header(device, area).location
        assert location is not None
        wrapped += location.offset + location.size > area.size
        assert f'"t{number}"'.encode() in text_of(device, area)
    assert wrapped


def test_free_bytes_are_what_lvm_calls_free(loops: LoopDevices, lvm: LvmTool) -> None:
    (device,) = loops()
    lvm.make_group("vg", [device])
    smallest = min(label_of(device).areas, key=lambda area: area.size)
    for number in range(12):
        lvm("vgchange", "--addtag", f"{'x' * 50}{number}", "vg")
        output = lvm("pvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", PV_FIELDS)
        free = int(parse_report(output.encode())["pv"][0]["pv_mda_free"])
        size = len(text_of(device, smallest))
        assert free_bytes(smallest.size, size) == free
        assert 0 <= text_bytes(smallest.size, free) - size < 512


@pytest.mark.parametrize("sector", [0, 2, 3])
def test_label_in_other_sectors(loops: LoopDevices, lvm: LvmTool, sector: int) -> None:
    (device,) = loops()
    lvm("pvcreate", "--labelsector", str(sector), device)
    assert label_of(device).areas


def test_no_label(loops: LoopDevices, tmp_path: Path) -> None:
    (device,) = loops()
    assert find_label(device) is None
    with pytest.raises(FileNotFoundError):
        read_label(str(tmp_path / "nothing"))


def test_label_of_other_type_is_none(loops: LoopDevices, lvm: LvmTool) -> None:
    (device,) = loops()
    lvm("pvcreate", device)
    patch(device, 512 + 24, b"LVM1 001")
    assert find_label(device) is None


@pytest.mark.parametrize("offset", [8, 16, 20, 40, 75, 400])
def test_damaged_label(loops: LoopDevices, lvm: LvmTool, offset: int) -> None:
    (device,) = loops()
    lvm("pvcreate", device)
    flip(device, 512 + offset)
    assert read_label(device) is None
    with pytest.raises(LabelDamaged, match=device):
        find_label(device)


def test_label_whose_lists_do_not_end(loops: LoopDevices, lvm: LvmTool) -> None:
    (device,) = loops()
    lvm("pvcreate", device)
    with open(device, "rb") as file:
        file.seek(512)
        sector = bytearray(file.read(512))
    sector[32 + 40 :] = b"\1" * (512 - 72)
    sector[16:20] = checksum(bytes(sector[20:])).to_bytes(4, "little")
    patch(device, 512, sector)
    with pytest.raises(LabelDamaged):
        find_label(device)


@pytest.mark.parametrize("offset", [0, 5, 20, 25, 33, 45, 60, 511])
def test_damaged_header(loops: LoopDevices, lvm: LvmTool, offset: int) -> None:
    (device,) = loops()
    lvm.make_group("vg", [device])
    first, second = label_of(device).areas
    flip(device, first.offset + offset)
    with pytest.raises(HeaderDamaged, match=device):
        read_header(device, first)
    assert read_header(device, second).location is not None


def test_damaged_text(loops: LoopDevices, lvm: LvmTool) -> None:
    (device,) = loops()
    lvm.make_group("vg", [device])
    area = label_of(device).areas[1]
    location = read_header(device, area).location
    assert location is not None
    for place in (0, location.size // 2, location.size - 1):
        flip(device, area.offset + location.offset + place)
        with pytest.raises(TextDamaged, match=device):
            read_text(device, area, location)
        flip(device, area.offset + location.offset + place)
    assert read_text(device, area, location)


def test_device_that_ends_early(tmp_path: Path) -> None:
    """A LUN that was made smaller: its second area is beyond its end."""
    short = tmp_path / "short"
    short.write_bytes(bytes(4096))
    area = Area(1 << 30, 1 << 20)
    with pytest.raises(HeaderDamaged, match="beyond the end"):
        read_header(str(short), area)


@given(st.binary(max_size=600), st.booleans())
def test_any_bytes_as_header(raw: bytes, mended: bool) -> None:
    """Nothing but HeaderDamaged, also where the checksum is right."""
    if mended and len(raw) >= 512:
        body = b" LVM2 x[5A%r0N*>" + (1).to_bytes(4, "little") + raw[20:508]
        raw = checksum(body).to_bytes(4, "little") + body
    area = Area(4096, 1 << 20)
    try:
        parse_header(raw, area, "/dev/x")
    except HeaderDamaged:
        return


@given(st.integers(0, 1 << 64), st.integers(0, 1 << 64), st.integers(0, 1 << 21))
def test_location_is_inside_its_area(offset: int, size: int, area_size: int) -> None:
    slot = (offset % (1 << 64)).to_bytes(8, "little") + (size % (1 << 64)).to_bytes(8, "little")
    place = (4096).to_bytes(8, "little") + area_size.to_bytes(8, "little")
    body = b" LVM2 x[5A%r0N*>" + (1).to_bytes(4, "little") + place + slot
    body += bytes(508 - len(body))
    area = Area(4096, area_size)
    try:
        header = parse_header(checksum(body).to_bytes(4, "little") + body, area, "/dev/x")
    except HeaderDamaged:
        return
    if header.location is not None:
        assert 512 <= header.location.offset < area_size
        assert 0 < header.location.size <= area_size - 512
