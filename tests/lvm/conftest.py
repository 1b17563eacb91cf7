# SPDX-License-Identifier: GPL-2.0-or-later
"""Real LVM on loop devices, its metadata only: nothing is activated, no device-mapper is needed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vdsm_storage.lvm.model import VolumeGroup
from vdsm_storage.lvm.report import FULL, group_from_full_report

LVM_CONF = """\
devices {{ dir="/dev" scan=["/dev"] use_devicesfile=0 obtain_device_list_from_udev=0
  external_device_info_source="none" hints="none" scan_lvs=0 md_component_detection=0
  ignore_suspended_devices=1 }}
global {{ use_aio=0 event_activation=0 use_lvmpolld=0 use_lvmlockd=0 locking_dir="{locks}"
  notify_dbus=0 wait_for_locks=1 prioritise_write_locks=1 }}
backup {{ backup=0 archive=0 }}
activation {{ monitoring=0 udev_sync=1 udev_rules=1 }}
"""
TIMEOUT = 60.0  # seconds for one command


def program(*argv: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=TIMEOUT, env=env, check=False
    )
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout


class LoopDevices:
    """`loops(n, size)` makes n devices of `size` bytes and gives their paths.

    `directory` holds the files behind them.
    """

    def __init__(self, directory: str) -> None:
        self.paths: list[str] = []
        self.directory = directory

    def __call__(self, count: int = 1, size: int = 1 << 30, sector: int = 512) -> list[str]:
        made = [self._make(size, sector) for _ in range(count)]
        self.paths.extend(made)
        return made

    def _make(self, size: int, sector: int) -> str:
        fd, path = tempfile.mkstemp(dir=self.directory, suffix=".img")
        os.truncate(fd, size)
        os.close(fd)
        return program("losetup", "--sector-size", str(sector), "--find", "--show", path).strip()

    def drop(self, path: str) -> None:
        """Take one away before the end."""
        program("losetup", "--detach", path)
        self.paths.remove(path)

    def detach(self) -> None:
        """All of them, whatever happens to one."""
        with contextlib.ExitStack() as stack:
            for path in self.paths:
                stack.callback(program, "losetup", "--detach", path)


class LvmTool:
    """`lvm("lvs", "vg")` runs a command on `devices` (all that `loops` made), gives its output."""

    def __init__(self, system_dir: str, loops: LoopDevices) -> None:
        self.system_dir = system_dir
        self._loops = loops

    def __call__(self, command: str, *args: str, devices: Sequence[str] | None = None) -> str:
        used = self._loops.paths if devices is None else devices
        more = ["--driverloaded", "n", "--devices", ",".join(used)]
        return program("lvm", command, *more, *args, env=self.environment())

    def environment(self) -> dict[str, str]:
        ours = {"LVM_SYSTEM_DIR": self.system_dir, "LVM_SUPPRESS_FD_WARNINGS": "1", "LC_ALL": "C"}
        return {**os.environ, **ours}

    def make_group(self, name: str, devices: Sequence[str], *, mda: str = "1m") -> None:
        """A group as VDSM makes one: two metadata areas a device, used on the first only."""
        areas = ("--metadatasize", mda, "--metadatacopies", "2", "--metadataignore", "y")
        self("pvcreate", *areas, *devices)
        self("pvchange", "--metadataignore", "n", devices[0])
        self("vgcreate", "-s", "1m", "--setautoactivation", "n", name, *devices)

    def create(self, vg: str, lv: str, extents: int = 1, tags: Sequence[str] = ()) -> None:
        added = [word for tag in tags for word in ("--addtag", tag)]
        self("lvcreate", "-an", "-Zn", "-Wn", "-l", str(extents), "-n", lv, *added, vg)

    def report(self, vg: str) -> VolumeGroup:
        """The group as lvm's own report has it."""
        return group_from_full_report(self(*FULL, vg).encode())


def comparable(group: VolumeGroup) -> dict[str, Any]:
    """What metadata and reports both tell of a group: tags sorted, volumes named by uuid."""
    uuids = {name: pv.uuid for name, pv in group.pvs.items()} | {"": ""}
    lvs = {
        lv.name: (
            lv.uuid,
            sorted(lv.tags),
            [(s.start, s.count, uuids[s.pv], s.pv_start) for s in lv.segments],
            lv.visible,
        )
        for lv in group.lvs.values()
    }
    pvs = {
        pv.uuid: (pv.pe_start, pv.pe_count, pv.size, sorted(pv.tags), pv.missing, pv.allocatable)
        for pv in group.pvs.values()
    }
    facts = (group.name, group.uuid, group.seqno, group.extent_size, group.exported)
    sums = (group.used, group.extents, group.free, group.partial)
    return {"facts": facts, "tags": sorted(group.tags), "lvs": lvs, "pvs": pvs, "sums": sums}


@pytest.fixture
def loops() -> Iterator[LoopDevices]:
    with tempfile.TemporaryDirectory(prefix="vdsm-lvm-", dir=_directory()) as directory:
        made = LoopDevices(directory)
        try:
            yield made
        finally:
            made.detach()


@pytest.fixture
def lvm(tmp_path: Path, loops: LoopDevices) -> LvmTool:
    system = tmp_path / "lvm"
    (system / "locks").mkdir(parents=True)
    (system / "lvm.conf").write_text(LVM_CONF.format(locks=system / "locks"))
    return LvmTool(str(system), loops)


def _directory() -> str:
    """Loop devices read past the page cache need a file system, which /tmp may not be."""
    return os.environ.get("TMPDIR", "/var/tmp")
