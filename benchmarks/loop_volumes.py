# SPDX-License-Identifier: GPL-2.0-or-later
"""Active volumes as devices of the kernel, for block_scale.py and extend.py, where the kernel has
no device-mapper.

A loop device on the LUN, from one byte to another, is what a linear target of device-mapper is:
the kernel alone moves the data, and a new size is one ioctl.  It can have one piece only, so
volumes must lie, and grow, in one piece.  (The stand-in of functional/ can have any, but its data
go through an interpreter, which would be measured instead of the agent: nothing can write at full
speed there, and sanlock waits for who does.)  Run as a program it is an agent with such volumes:

    benchmarks/loop_volumes.py --pieces DIRECTORY <what vdsm-storaged takes>
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from functional.standin import loops
from functional.standin.activation import places
from vdsm_storage import __main__ as program
from vdsm_storage.agent import Agent
from vdsm_storage.errors import (
    CannotActivateLogicalVolume,
    CannotDeactivateLogicalVolume,
    LogicalVolumeRefreshError,
)
from vdsm_storage.lvm.activation import ActiveLv, GroupView
from vdsm_storage.lvm.model import VolumeGroup

PATIENCE = 1.0  # seconds that a device may still be open by a program that ends
AT_ONCE = 100  # devices


class Pieces:
    """Fulfils lvm.activation.Activation.  What is active is in `directory`, as links to devices."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(exist_ok=True)
        self._dev = loops.below_dev(str(directory))
        with contextlib.suppress(FileExistsError):
            os.symlink(directory, self._dev)

    def path(self, vg: str, lv: str) -> str:
        return os.path.join(self._dev, vg, lv)

    def activate(self, group: GroupView, lvs: Sequence[str]) -> None:
        vg, devices = group.read(), group.devices()
        os.makedirs(self._directory / vg.name, exist_ok=True)
        for lv in lvs:
            link = self._directory / vg.name / lv
            if link.is_symlink():
                continue
            try:
                link.symlink_to(loops.attach(*piece(vg, devices, lv)))
            except (OSError, KeyError, ValueError) as error:
                why = f"{error!r}"
                raise CannotActivateLogicalVolume(vg=vg.name, lv=lv, reason=why) from error

    def deactivate(self, group: GroupView, lvs: Sequence[str]) -> None:
        for lv in lvs:
            link = self._directory / group.name / lv
            if not link.is_symlink():
                continue
            try:
                loops.detach_patiently(os.readlink(link), PATIENCE)
            except OSError as error:
                raise CannotDeactivateLogicalVolume(vg=group.name, lv=lv, reason=error) from error
            link.unlink()

    def refresh(self, group: GroupView, lvs: Sequence[str]) -> None:
        """A loop device waits 20 ms for a grace period of the kernel, which one of device-mapper
        need not: they wait together."""
        vg, devices = group.read(), group.devices()

        def one(lv: str) -> None:
            try:
                self.resize(vg.name, lv, piece(vg, devices, lv)[2])
            except (OSError, KeyError, ValueError) as error:
                why = f"{error!r}"
                raise LogicalVolumeRefreshError(vg=vg.name, lv=lv, reason=why) from error

        if len(lvs) == 1:
            one(lvs[0])
        elif lvs:
            with ThreadPoolExecutor(min(AT_ONCE, len(lvs)), "refresh") as pool:
                list(pool.map(one, lvs))

    def resize(self, vg: str, lv: str, size: int) -> None:
        loops.limit(os.readlink(self._directory / vg / lv), size)

    def active(self, vg: str, lvs: Sequence[str] = ()) -> Mapping[str, ActiveLv]:
        """As device-mapper's: known ones by their names."""
        directory = self._directory / vg
        links = {lv: directory / lv for lv in lvs}
        if not lvs or not all(map(os.path.lexists, links.values())):
            links = {}
            with contextlib.suppress(FileNotFoundError):
                links = {link.name: directory / link.name for link in os.scandir(directory)}
        return {lv: ActiveLv(_bytes_of(link)) for lv, link in links.items()}

    def close(self) -> list[str]:
        """What was still in use."""
        left = []
        for link in self._directory.glob("*/*"):
            device = os.readlink(link)
            try:
                loops.detach_patiently(device, PATIENCE)
            except OSError as error:
                left.append(f"{link.name}: {error}")
                loops.release(device)
        os.unlink(self._dev)
        return left


def _bytes_of(link: Path) -> int:
    sectors = Path(f"/sys/block/{os.path.basename(os.readlink(link))}/size").read_text()
    return int(sectors) * 512


def piece(vg: VolumeGroup, devices: Mapping[str, str], lv: str) -> tuple[str, int, int]:
    """Device, offset and length; ValueError for a volume of several pieces."""
    (found,) = places(vg, devices, lv)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--pieces", type=Path, required=True)
    options, rest = parser.parse_known_args()
    return program.main(rest, functools.partial(Agent, activation=Pieces(options.pieces)))


if __name__ == "__main__":
    sys.exit(main())
