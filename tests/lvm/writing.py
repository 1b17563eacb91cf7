# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of changes share: a real group, and lvm's commands counted."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tests.lvm.conftest import LoopDevices, LvmTool
from vdsm_storage.base.run import Result
from vdsm_storage.errors import AgentError
from vdsm_storage.lvm.archive import Archive
from vdsm_storage.lvm.cache import CachedGroup
from vdsm_storage.lvm.command import Lvm
from vdsm_storage.lvm.group import Group
from vdsm_storage.lvm.model import LogicalVolume, PhysicalVolume, Segment, VolumeGroup
from vdsm_storage.lvm.report import FULL, group_from_full_report

MIB = 1 << 20
VG = "vg1"


class CountedLvm(Lvm):
    """Keeps the argv of each command that ran; `refuse` makes commands of a name fail."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory, 60.0, 10)
        self.ran: list[Sequence[str]] = []
        self.refuse: dict[str, Exception] = {}

    def run(self, argv: Sequence[str], devices: Sequence[str], **more: Any) -> Result:
        self.ran.append(list(argv))
        if error := self.refuse.get(argv[0]):
            raise error
        return super().run(argv, devices, **more)

    def commands(self) -> list[str]:
        return [argv[0] for argv in self.ran]


def open_group(devices: Sequence[str], lvm: Lvm, name: str = VG) -> Group:
    def report(found: Sequence[str]) -> VolumeGroup:
        return group_from_full_report(lvm.run([*FULL, name], found, vg=name).stdout)

    archive = Archive(f"{lvm.directory}/archive")
    return Group(name, CachedGroup(name, lambda: devices, report), lvm, archive)


def made_group(
    loops: LoopDevices, tool: LvmTool, tmp_path: Path, devices: int = 2, size: int = 1 << 30
) -> tuple[Group, CountedLvm]:
    """A group of 1 MiB extents on new loop devices."""
    paths = loops(devices, size)
    tool.make_group(VG, paths)
    lvm = CountedLvm(str(tmp_path / "ours"))
    return open_group(paths, lvm), lvm


def told(tool: LvmTool, name: str = VG, devices: Sequence[str] | None = None) -> VolumeGroup:
    """The group as lvm's own report tells it."""
    return group_from_full_report(tool(*FULL, name, devices=devices).encode())


def check(tool: LvmTool, model: VolumeGroup) -> None:
    """lvm finds the metadata sound, and no extent belongs to two volumes or to none's place."""
    tool("vgck", model.name)
    seen: set[tuple[str, int]] = set()
    for lv in model.lvs.values():
        at = 0
        for s in lv.segments:
            assert s.start == at
            at += s.count
            mine = {(s.pv, s.pv_start + n) for n in range(s.count)}
            assert not mine & seen
            assert s.pv_start + s.count <= model.pvs[s.pv].pe_count
            seen |= mine


def sizes(model: VolumeGroup) -> dict[str, tuple[int, frozenset[str]]]:
    """What callers know of volumes: extents and tags."""
    return {lv.name: (lv.extents, frozenset(lv.tags)) for lv in model.lvs.values()}


def group_of(*lvs: LogicalVolume, pvs: Sequence[int] = (100, 100)) -> VolumeGroup:
    """A model without storage, of 1 MiB extents."""
    volumes = {
        f"pv{n}": PhysicalVolume(f"pv{n}", f"uuid-{n}", f"/dev/{n}", count * MIB, 0, count)
        for n, count in enumerate(pvs)
    }
    return VolumeGroup(VG, "uuid", 7, MIB, ("OLD",), volumes, {lv.name: lv for lv in lvs})


def volume(name: str, *places: tuple[str, int, int], tags: Sequence[str] = ()) -> LogicalVolume:
    """`places`: (physical volume, first extent, extents)."""
    segments, at = [], 0
    for pv, start, count in places:
        segments.append(Segment(at, count, pv, start))
        at += count
    return LogicalVolume(name, f"id-{name}", tuple(tags), tuple(segments))


def side_by_side(*calls: Any) -> list[BaseException | None]:
    """All calls at once, each in a thread; the error of each."""
    errors: list[BaseException | None] = [None] * len(calls)
    begin = threading.Barrier(len(calls))

    def work(number: int) -> None:
        begin.wait()
        try:
            calls[number]()
        except (AgentError, OSError, RuntimeError) as error:
            errors[number] = error

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def at_once(key: str, call: Any, timeout: float) -> Future[Any]:
    """Lanes.submit without lanes."""
    future: Future[Any] = Future()
    try:
        future.set_result(call())
    except (AgentError, OSError) as error:
        future.set_exception(error)
    return future
