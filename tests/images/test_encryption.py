# SPDX-License-Identifier: GPL-2.0-or-later
"""Raw volumes that are LUKS containers: what the metadata say, and what is taken for one.  The rest
is in functional/test_luks.py and test_luks_raw.py."""

from __future__ import annotations

import struct

import pytest

from vdsm_storage.images import luks
from vdsm_storage.images import metadata as md
from vdsm_storage.images.create import NewVolumeRequest
from vdsm_storage.images.layers import qemu_format

ID = "11111111-1111-1111-1111-111111111111"


def metadata(form: str) -> md.VolumeMetadata:
    return md.VolumeMetadata(ID, ID, 2**20, form, md.PREALLOCATED, md.LEAF, "DATA", description="d")


@pytest.mark.parametrize(
    ("form", "secret", "stored"),
    [
        (md.RAW, None, md.RAW),
        (md.RAW, ID, md.LUKS),
        (md.COW, None, md.COW),
        (md.COW, ID, md.COW),
    ],
)
def test_format_that_is_stored(form: str, secret: str | None, stored: str) -> None:
    request = NewVolumeRequest(ID, ID, ID, 2**20, form, md.PREALLOCATED, "DATA", secret=secret)
    assert request.stored_format == stored


@pytest.mark.parametrize(
    ("form", "raw", "overhead", "qemu", "known"),
    [
        (md.RAW, True, 0, "raw", "RAW"),
        (md.LUKS, True, luks.PAYLOAD, "luks", "RAW"),
        (md.COW, False, 0, "qcow2", "COW"),
    ],
)
def test_what_follows_from_it(form: str, raw: bool, overhead: int, qemu: str, known: str) -> None:
    found = metadata(form)
    assert (found.is_raw, found.overhead, qemu_format(found)) == (raw, overhead, qemu)
    assert found.as_dump()["format"] == known
    assert md.parse(found.encode(5)).as_dump()["format"] == known


@pytest.mark.parametrize("version", [3, 5])
def test_the_storage_says_it_and_others_keep_it(version: int) -> None:
    """As hosts do that know two words only: they keep the text of what they do not change."""
    text = metadata(md.LUKS).encode(version)
    assert b"\nFORMAT=LUKS\n" in text
    again = md.decode(text.replace(b"DESCRIPTION=d\n", b"DESCRIPTION=another\n"))
    assert again == metadata(md.LUKS).with_(description="another")


def header(magic: bytes = b"LUKS\xba\xbe", version: int = 1, sector: int = 4040) -> bytes:
    return struct.pack(">6sH96xI", magic, version, sector).ljust(4096, b"\0")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (header(), None),
        (header(version=2), "no LUKS header"),
        (header(magic=b"QFI\xfb\0\0"), "no LUKS header"),
        (bytes(4096), "no LUKS header"),
        (header(sector=4096), "data begin at 2097152"),
        (header()[:100], "100 bytes"),
    ],
)
def test_a_container_is_one_of_ours_or_none(data: bytes, said: str | None) -> None:
    found = luks.problem(data)
    assert (found is None) == (said is None)
    assert said is None or said in str(found)
