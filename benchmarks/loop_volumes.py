# SPDX-License-Identifier: GPL-2.0-or-later
"""For block_scale.py, on a kernel without device-mapper: each active volume is a loop device on its
part of the group's device.

The kernel itself maps the volume's bytes so, as device-mapper does.  The stand-in of the tests maps
them in a Python process, which would be measured instead of the agent.  Volumes of several segments
have no such device.  Run as a program it is an agent with such volumes:

    benchmarks/loop_volumes.py --volumes DIRECTORY <what vdsm-storaged takes>
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from functional.standin import loops
from functional.standin.activation import places
from vdsm_storage import __main__ as program
from vdsm_storage.agent import Agent
from vdsm_storage.errors import CannotActivateLogicalVolume, CannotDeactivateLogicalVolume
from vdsm_storage.lvm.activation import SECTOR, ActiveLv, GroupView

PATIENCE = 1.0  # seconds that a device may still be open by a program that ends


class LoopVolumes:
    """Fulfils lvm.activation.Activation.  The links to the devices are below /dev, where the agent
    follows links; their names follow from `directory`.
    """

    def __init__(self, directory: str) -> None:
        self._dev = loops.below_dev(directory)

    def path(self, vg: str, lv: str) -> str:
        return f"{self._dev}/{vg}/{lv}"

    def activate(self, group: GroupView, lvs: Sequence[str]) -> None:
        vg, devices = group.read(), group.devices()
        os.makedirs(f"{self._dev}/{vg.name}", exist_ok=True)
        for lv in lvs:
            link = self.path(vg.name, lv)
            if os.path.exists(link):
                continue
            first, *more = places(vg, devices, lv)
            if more:
                reason = "it has several segments"
                raise CannotActivateLogicalVolume(vg=vg.name, lv=lv, reason=reason)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(link)  # to a device that is gone
            os.symlink(loops.attach(*first), link)

    def deactivate(self, group: GroupView, lvs: Sequence[str]) -> None:
        for lv in lvs:
            link = self.path(group.name, lv)
            with contextlib.suppress(FileNotFoundError):
                try:
                    loops.detach_patiently(os.readlink(link), PATIENCE)
                except OSError as error:
                    raise CannotDeactivateLogicalVolume(
                        vg=group.name, lv=lv, reason=error.strerror
                    ) from error
                os.unlink(link)

    def refresh(self, group: GroupView, lvs: Sequence[str]) -> None:
        vg, devices = group.read(), group.devices()
        for lv in lvs:
            ((_, _, size),) = places(vg, devices, lv)
            loops.limit(os.readlink(self.path(vg.name, lv)), size)

    def active(self, vg: str) -> Mapping[str, ActiveLv]:
        """From sysfs, as with device-mapper."""
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for lv in os.listdir(f"{self._dev}/{vg}"):
                name = os.path.basename(os.readlink(self.path(vg, lv)))
                with open(f"/sys/block/{name}/size") as file:
                    found[lv] = ActiveLv(int(file.read()) * SECTOR)
        return found

    def clear(self) -> None:
        """Take away all that there is, at the end."""
        for root, _, names in os.walk(self._dev, topdown=False):
            for name in names:
                loops.release(os.readlink(os.path.join(root, name)))
                os.unlink(os.path.join(root, name))
            os.rmdir(root)


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--volumes", required=True)
    options, rest = parser.parse_known_args()
    make_agent = functools.partial(Agent, activation=LoopVolumes(options.volumes))
    return program.main(rest, make_agent)


if __name__ == "__main__":
    sys.exit(main())
