# SPDX-License-Identifier: GPL-2.0-or-later
"""Multipath maps: what sysfs, device-mapper and multipathd say of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.san_tree import GIB, SanTree, golden_tree
from vdsm_storage.host import multipath as module
from vdsm_storage.host.device_mapper import Target, parse_targets
from vdsm_storage.host.multipath import Multipath, parse_busy, parse_status

DATA = Path(__file__).parent.parent / "data/multipath"
FIRST, SECOND = "360014052d05b1f3670a40e0ae4637e4f", "36001405692aa9c0a9d1407ab8d7bd06c"


def status(line: str) -> list[tuple[str, bool]]:
    start, length, kind, text = line.split(" ", 3)
    return list(parse_status(Target(int(start), int(length), kind, text)))


def test_status_of_device_mapper() -> None:
    good, failed, empty = (DATA / "dm-status-6.1.txt").read_text().splitlines()
    assert status(good) == [("8:0", True), ("8:32", True)]
    assert status(failed) == [("8:16", False), ("8:48", False)]
    assert status(empty) == []


def test_two_groups_and_other_selectors() -> None:
    line = "0 1 multipath 2 0 1 1 alua 2 1 A 0 1 0 8:16 A 0 E 1 x 2 2 8:32 F 1 0 1 65:0 A 0 0 1"
    assert status(line) == [("8:16", True), ("8:32", False), ("65:0", True)]
    assert status("0 1 linear 8:0 0") == []


@given(st.text(max_size=80))
def test_status_of_anything(text: str) -> None:
    paths = list(parse_status(Target(0, 1, "multipath", text)))
    assert {device for device, _ in paths} <= set(text.split())


def test_busy() -> None:
    text = (DATA / "show-status-0.9.4.txt").read_text()
    assert parse_busy(text) is False
    assert parse_busy(text.replace("False", "True")) is True
    assert parse_busy("fail\n") is None


def test_maps(tmp_path: Path) -> None:
    tree = golden_tree(tmp_path)
    tree.block("dm-2", "253:2", GIB)  # a logical volume
    tree.write("/sys/block/dm-2/dm/name", "vg-lv")
    tree.write("/sys/block/dm-2/dm/uuid", "LVM-x")
    tree.link("/sys/block/sda/holders/dm-2", "/sys/block/dm-2")
    multipath = Multipath(tree.files, tree.dm)
    assert multipath.names() == {SECOND: "dm-0", FIRST: "dm-1"}
    first, second = multipath.maps()
    assert (first.name, first.kernel, first.path) == (FIRST, "dm-1", f"/dev/mapper/{FIRST}")
    assert [path.device for path in first.paths] == ["sdd", "sdc"]  # multipath's order
    assert second.working == second.paths
    assert (multipath.map_of("sda"), multipath.map_of("sdz")) == ("dm-0", None)


def test_health_names_what_is_not_well(tmp_path: Path) -> None:
    tree = golden_tree(tmp_path)
    multipath = Multipath(tree.files, tree.dm)
    assert multipath.health() == {}
    tree.states(FIRST, {"8:48": False, "8:32": True})
    assert multipath.health() == {FIRST: {"valid_paths": 1, "failed_paths": ["8:48"]}}
    tree.states(FIRST, {"8:48": False, "8:32": False})
    assert multipath.health() == {FIRST: {"valid_paths": 0, "failed_paths": ["8:48", "8:32"]}}
    tree.end_session(1)
    tree.end_session(2)
    tree.states(SECOND, {})
    assert multipath.health()[SECOND] == {"valid_paths": 0, "failed_paths": []}


def test_map_grows_when_all_its_paths_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = golden_tree(tmp_path)
    multipath = Multipath(tree.files, tree.dm)
    ran: list[list[str]] = []
    monkeypatch.setattr(module, "run", lambda command: ran.append(list(command.argv)))
    tree.write("/sys/block/sdc/size", str(21 * GIB // 512))
    assert multipath.resize_grown() == []
    tree.write("/sys/block/sdd/size", str(21 * GIB // 512))
    assert multipath.resize_grown(lambda name: name == SECOND) == []
    assert multipath.resize_grown() == [FIRST]
    assert ran == [["multipathd", "resize", "map", FIRST]]


def test_targets_of_the_kernels_answer() -> None:
    """Two targets, as a call of DM_TABLE_STATUS gave them."""

    def target(following: int, kind: bytes, text: bytes) -> bytes:
        head = (0).to_bytes(8, "little") + (8).to_bytes(8, "little") + bytes(4)
        return head + following.to_bytes(4, "little") + kind.ljust(16, b"\0") + text

    first = target(56, b"linear", b"8:0 0\0").ljust(56, b"\0")
    found = parse_targets(first + target(0, b"multipath", b"2 0 0 0 0 0 \0"), 2)
    assert [(one.type, one.parameters) for one in found] == [
        ("linear", "8:0 0"),
        ("multipath", "2 0 0 0 0 0"),
    ]


def test_a_map_in_the_making(tmp_path: Path) -> None:
    tree = SanTree(tmp_path)
    tree.disk("sda", "8:0", "platform/host0/target0:0:0/0:0:0:0")
    tree.map(FIRST, "dm-0", {"sda": "8:0"})
    tree.dm.targets.clear()
    (one,) = Multipath(tree.files, tree.dm).maps()
    assert [(path.device, path.active) for path in one.paths] == [("sda", False)]
