# SPDX-License-Identifier: GPL-2.0-or-later
"""Which disks can be copied to another volume, and how libvirt is told where to."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from vdsm_storage.errors import AgentError
from vdsm_storage.images import metadata as md
from vdsm_storage.vms.drives import Drive, VolumePath
from vdsm_storage.vms.replica import Replica, check_drive, target_xml

HERE = VolumePath("d1", "image", "volume")
THERE = VolumePath("d2", "image", "volume")
ASKED = Replica("vm", "vda", HERE, THERE)
DRIVE = Drive("vda", "disk", "file", "qcow2", "/x")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"device": "cdrom"}, 36),
        ({"kind": "network"}, 36),
        ({"transient": True}, 36),
        ({"readonly": True}, 36),
        ({"shared": True}, 36),
        ({"leased": True}, 36),
        ({"replica_path": "/y"}, 55),
    ],
    ids=str,
)
def test_what_cannot_be_copied(change: dict[str, object], code: int) -> None:
    check_drive(ASKED, DRIVE)
    with pytest.raises(AgentError) as caught:
        check_drive(ASKED, replace(DRIVE, **change))  # type: ignore[arg-type]
    assert caught.value.code == code
    assert "vda" in str(caught.value)


def test_never_to_its_own_image() -> None:
    with pytest.raises(AgentError, match="same image"):
        check_drive(replace(ASKED, target=replace(HERE, volume="other")), DRIVE)


def test_it_survives_the_journal() -> None:
    asked = replace(ASKED, extend=True)
    request = asked.as_request("kind", "VM.verb")
    assert Replica.from_params({**request.params}) == asked
    assert request.domains == ["d1", "d2"]


def test_xml() -> None:
    disk = ET.fromstring(target_xml("/srv/a & b", md.COW, ""))
    source = disk.find("source")
    assert source is not None
    assert (disk.get("type"), source.get("file")) == ("file", "/srv/a & b")
    assert disk.find("./driver[@type='qcow2']") is not None
    assert source.find("encryption") is None
    disk = ET.fromstring(target_xml("/dev/vg/lv", md.RAW, "key"))
    assert disk.find("./driver[@type='raw']") is not None
    assert disk.find("./source[@dev='/dev/vg/lv']/encryption/secret[@uuid='key']") is not None
