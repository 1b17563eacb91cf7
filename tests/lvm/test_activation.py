# SPDX-License-Identifier: GPL-2.0-or-later
"""Activation, with a sysfs of our own and an lvm that moves its entries.

The real kernel's part is tested in the laboratory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.lvm.writing import MIB, VG, group_of, volume
from vdsm_storage.base.run import Result
from vdsm_storage.errors import (
    CannotActivateLogicalVolume,
    CannotDeactivateLogicalVolume,
    LogicalVolumeRefreshError,
    LvmCommandError,
)
from vdsm_storage.lvm.activation import ActiveLv, DeviceMapper, split_name
from vdsm_storage.lvm.model import VolumeGroup

LV_UUID = "LVM-" + 64 * "x"
MAJOR = 253


class View:
    name = VG

    def __init__(self) -> None:
        self.model = group_of(volume("a", ("pv0", 0, 3)), volume("b-c", ("pv0", 3, 2)))

    def devices(self) -> Mapping[str, str]:
        return {"uuid-1": "/dev/b", "uuid-0": "/dev/a"}

    def read(self) -> VolumeGroup:
        return self.model


class Kernel:
    """Device-mapper as sysfs and /dev show it, and an lvm that changes it."""

    def __init__(self, directory: Path, view: View) -> None:
        self.sysfs, self.dev, self.view = directory / "sys", directory / "dev", view
        (self.sysfs / "block").mkdir(parents=True)
        (self.sysfs / "dev" / "block").mkdir(parents=True)
        (self.dev / VG).mkdir(parents=True)
        self.ran: list[Sequence[str]] = []
        self.busy: set[str] = set()
        self.works = True
        self.numbers = iter(range(100))
        self.map("mpatha", "mpath-36001405", 10 * MIB)
        self.map("other-a", LV_UUID, 10 * MIB)
        self.map("vg1-root-real", LV_UUID + "-real", 10 * MIB)
        (self.sysfs / "block" / "sda").mkdir()
        (self.sysfs / "block" / "dm-99").mkdir()  # one that is just going

    def map(self, name: str, uuid: str, size: int) -> int:
        """Its minor number."""
        number = next(self.numbers)
        directory = self.sysfs / "block" / f"dm-{number}"
        (self.sysfs / "dev" / "block" / f"{MAJOR}:{number}").symlink_to(directory)
        (directory / "dm").mkdir(parents=True)
        (directory / "dm" / "name").write_text(f"{name}\n")
        (directory / "dm" / "uuid").write_text(f"{uuid}\n")
        (directory / "size").write_text(f"{size // 512}\n")
        return number

    def number(self, path: str) -> int:
        return os.makedev(MAJOR, int(Path(path).read_text()))

    def find(self, name: str) -> Path | None:
        for path in (self.sysfs / "block").glob("dm-*/dm/name"):
            if path.read_text().strip() == name:
                return path.parent.parent
        return None

    def run(self, argv: Sequence[str], devices: Sequence[str], **more: Any) -> Result:
        assert devices == ["/dev/a", "/dev/b"]
        assert more == {"vg": VG, "driver": True}
        assert argv[:4] == ["lvchange", "--yes", "--autobackup", "n"]
        self.ran.append(argv[4:])
        for path in argv[4:]:
            if path.startswith(f"{VG}/") and self.works:
                self.change(argv, path.partition("/")[2])
        if not self.works or (self.busy and "n" in argv[4:6]):
            reason = f"Logical volume {VG}/{next(iter(self.busy), 'a')} in use."
            raise LvmCommandError(command="lvchange", vg=VG, reason=reason)
        return Result(b"", b"", 0.0)

    def change(self, argv: Sequence[str], lv: str) -> None:
        name = f"{VG}-{lv.replace('-', '--')}"
        there = self.find(name)
        size = self.view.model.size_of(lv)
        if "--refresh" in argv:
            assert there is not None
            (there / "size").write_text(f"{size // 512}\n")
        elif argv[5] == "y":
            if there is None:
                (self.dev / VG / lv).write_text(str(self.map(name, LV_UUID, size)))
        elif lv not in self.busy and there is not None:
            shutil.rmtree(there)
            (self.dev / VG / lv).unlink()


@pytest.fixture
def view() -> View:
    return View()


@pytest.fixture
def kernel(tmp_path: Path, view: View) -> Kernel:
    return Kernel(tmp_path, view)


@pytest.fixture
def mapper(kernel: Kernel) -> DeviceMapper:
    return DeviceMapper(
        kernel,  # type: ignore[arg-type]
        str(kernel.sysfs),
        str(kernel.dev),
        kernel.number,
    )


def test_one_command_for_all_and_none_for_what_is_so(
    kernel: Kernel, mapper: DeviceMapper, view: View
) -> None:
    assert mapper.active(VG) == {}
    mapper.activate(view, ["a", "b-c"])
    assert kernel.ran == [["--activate", "y", "--ignoreactivationskip", "vg1/a", "vg1/b-c"]]
    assert mapper.active(VG) == {"a": ActiveLv(3 * MIB), "b-c": ActiveLv(2 * MIB)}
    assert mapper.path(VG, "a") == f"{kernel.dev}/vg1/a"
    mapper.activate(view, ["a"])
    mapper.activate(view, [])
    mapper.deactivate(view, ["nope"])
    assert len(kernel.ran) == 1
    view.model = group_of(volume("a", ("pv0", 0, 9)), volume("b-c", ("pv0", 13, 2)))
    mapper.refresh(view, ["a", "nope"])
    assert kernel.ran[1:] == [["--refresh", "vg1/a"]]
    assert mapper.active(VG)["a"].size == 9 * MIB
    mapper.deactivate(view, ["b-c", "a", "nope"])
    assert kernel.ran[2:] == [["--activate", "n", "vg1/b-c", "vg1/a"]]
    assert mapper.active(VG) == {}
    assert mapper.active("other") == {"a": ActiveLv(10 * MIB)}


def test_known_volumes_are_looked_at_by_their_names(
    kernel: Kernel, mapper: DeviceMapper, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host has thousands of others; links that lead elsewhere, or are gone, deceive nobody."""
    mapper.activate(view, ["a", "b-c"])
    both = mapper.active(VG)

    def listed(path: str) -> list[str]:
        raise AssertionError(f"{path} is listed")

    with monkeypatch.context() as patch:
        patch.setattr("os.listdir", listed)
        assert mapper.active(VG, ["b-c", "a", "a"]) == both
        assert mapper.active(VG, ["a"]) == {"a": both["a"]}
        mapper.refresh(view, ["a"])
        assert kernel.ran[-1] == ["--refresh", "vg1/a"]
        with pytest.raises(AssertionError, match="is listed"):
            mapper.active(VG, ["a", "nope"])
    assert mapper.active(VG, ["a", "nope"]) == both
    link = kernel.dev / VG / "a"
    for number in (0, 98, int((kernel.dev / VG / "b-c").read_text())):  # multipath, none, b-c
        link.write_text(str(number))
        assert mapper.active(VG, ["a"])["a"] == both["a"]
    link.unlink()
    assert mapper.active(VG, ["a"])["a"] == both["a"]
    assert mapper.active("other", ["a"]).keys() == {"a"}


def test_a_volume_that_is_open_stays(kernel: Kernel, mapper: DeviceMapper, view: View) -> None:
    mapper.activate(view, ["a", "b-c"])
    kernel.busy = {"a"}
    with pytest.raises(CannotDeactivateLogicalVolume, match=r"vg1/a .* in use") as caught:
        mapper.deactivate(view, ["a", "b-c"])
    assert caught.value.code == 552
    assert mapper.active(VG).keys() == {"a"}


def test_failures_carry_lvms_words(kernel: Kernel, mapper: DeviceMapper, view: View) -> None:
    mapper.activate(view, ["b-c"])
    kernel.works = False
    with pytest.raises(CannotActivateLogicalVolume, match="vg1/a cannot be activated: Logical"):
        mapper.activate(view, ["b-c", "a"])
    view.model = group_of(volume("b-c", ("pv0", 13, 5)))
    with pytest.raises(LogicalVolumeRefreshError, match="vg1/b-c cannot be refreshed: Logical"):
        mapper.refresh(view, ["b-c"])


def test_a_command_that_fails_after_its_work_is_no_failure(
    kernel: Kernel, mapper: DeviceMapper, view: View
) -> None:
    mapper.activate(view, ["a", "b-c"])
    kernel.busy = {"a"}
    mapper.deactivate(view, ["b-c"])
    assert mapper.active(VG).keys() == {"a"}


@pytest.mark.parametrize(
    ("name", "uuid", "expected"),
    [
        ("vg1-lv1", LV_UUID, ("vg1", "lv1")),
        ("a--b-c--d", LV_UUID, ("a-b", "c-d")),
        ("a---b", LV_UUID, ("a-", "b")),
        ("a----b-c", LV_UUID, ("a--b", "c")),
        (
            "6fd5eb3e--8aa3--4ed4--9d3c--3f4a2f3f7d0b-metadata",
            "LVM-5JoRlcIbHzIiHYsMmnN0GQq4c1kV1ZqhdYx5p4nnNFkKBQ3rMJ3VZUqDPnZ1xX1v",
            ("6fd5eb3e-8aa3-4ed4-9d3c-3f4a2f3f7d0b", "metadata"),
        ),
        ("vg1-pool_tmeta", LV_UUID + "-tmeta", None),
        ("mpatha", "mpath-36001405", None),
        ("nohyphen", LV_UUID, None),
        ("a--b", LV_UUID, None),
    ],
)
def test_names_of_device_mapper(name: str, uuid: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name, uuid) == expected
