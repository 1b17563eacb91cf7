# SPDX-License-Identifier: GPL-2.0-or-later
"""Multipath maps: one device for all paths to a LUN.

What there is comes from sysfs and how the paths are from device-mapper, so that neither needs a
program.  multipathd, which makes the maps, is asked to change them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.base.run import Command, run
from vdsm_storage.errors import AgentError, MultipathSetupError
from vdsm_storage.host.device_mapper import DmInterface, Target
from vdsm_storage.host.kernel_files import KernelFiles

BLOCK: Final = "/sys/block"
DIRECTORY: Final = "/dev/mapper"
_MAP: Final = "mpath-"  # what the uuid of every map begins with
_TARGET: Final = "multipath"
_ACTIVE: Final = "A"
_TIMEOUT: Final = 20.0  # seconds for a command of multipathd's

log = logging.getLogger("host.multipath")


@dataclass(frozen=True)
class Path:
    """`device` is the kernel's name (sdc), `number` major:minor; `active`: it takes I/O."""

    device: str
    number: str
    active: bool


@dataclass(frozen=True)
class Map:
    """`kernel` is the kernel's name (dm-3); the paths are in multipath's own order."""

    name: str
    kernel: str
    paths: tuple[Path, ...]

    @property
    def path(self) -> str:
        return f"{DIRECTORY}/{self.name}"

    @property
    def working(self) -> tuple[Path, ...]:
        return tuple(path for path in self.paths if path.active)


class Multipath:
    """`dm` is asked for the states of paths."""

    def __init__(self, files: KernelFiles, dm: DmInterface) -> None:
        self._files = files
        self._dm = dm

    # -- what is there -----------------------------------------------------------------------

    def names(self) -> dict[str, str]:
        """The kernel's name of every map."""
        found: dict[str, str] = {}
        for kernel in self._files.names(BLOCK):
            if kernel.startswith("dm-"):
                uuid = self._files.text(f"{BLOCK}/{kernel}/dm/uuid")
                name = self._files.text(f"{BLOCK}/{kernel}/dm/name")
                if uuid.startswith(_MAP) and name:
                    found[name] = kernel
        return found

    def maps(self) -> list[Map]:
        """All maps with their paths, by name."""
        return [self._map(name, kernel) for name, kernel in sorted(self.names().items())]

    def map_of(self, disk: str) -> str | None:
        """The kernel's name of the map that a disk is a path of; None for no map."""
        for holder in self._files.names(f"{BLOCK}/{disk}/holders"):
            if self._files.text(f"{BLOCK}/{holder}/dm/uuid").startswith(_MAP):
                return holder
        return None

    def health(self) -> dict[str, dict[str, Any]]:
        """As Host.getStats answers: the maps that have failed paths, or no path at all."""
        return {
            one.name: {
                "valid_paths": len(one.working),
                "failed_paths": [path.number for path in one.paths if not path.active],
            }
            for one in self.maps()
            if len(one.working) < max(1, len(one.paths))
        }

    def is_open(self, name: str) -> bool:
        """Whether somebody uses the map: a volume on it, a mount, a program."""
        try:
            return self._dm.open_count(name) > 0
        except OSError as error:
            log.warning("Map %s: %s", name, error)
            return False

    def _map(self, name: str, kernel: str) -> Map:
        slaves = self._files.names(f"{BLOCK}/{kernel}/slaves")
        devices = {self._files.text(f"{BLOCK}/{slave}/dev"): slave for slave in slaves}
        states = self._states(name)
        # What is not known, in a map that is being made, does not work yet.
        order = [number for number in states if number in devices] or list(devices)
        paths = [Path(devices[number], number, states.get(number, False)) for number in order]
        return Map(name, kernel, tuple(paths))

    def _states(self, name: str) -> dict[str, bool]:
        try:
            targets = self._dm.status(name)
        except OSError as error:
            log.warning("The paths of map %s cannot be told: %s", name, error)
            return {}
        return {number: active for target in targets for number, active in parse_status(target)}

    # -- what is changed ---------------------------------------------------------------------

    def resize_grown(self, names: Callable[[str], bool] = lambda name: True) -> list[str]:
        """Let maps (those that `names` accepts) all of whose paths have grown grow with them; gives
        their names.
        """
        grown = []
        for one in self.maps():
            sizes = {self._size(path.device) for path in one.paths}
            if names(one.name) and len(sizes) == 1 and min(sizes) > self._size(one.kernel):
                self._change("resize", one.name)
                grown.append(one.name)
        return grown

    def flush(self, name: str) -> bool:
        """Remove a map that nobody uses; False if it stays."""
        try:
            run(Command(["multipath", "-f", name], timeout=_TIMEOUT))
        except AgentError as error:
            log.warning("Map %s stays: %s", name, error)
            return False
        return True

    def is_idle(self) -> bool:
        """Whether multipathd has nothing to do.  Raises MultipathSetupError (467)."""
        try:
            result = run(Command(["multipathd", "show", "status"], timeout=_TIMEOUT))
        except AgentError as error:
            raise MultipathSetupError(reason=error) from error
        return parse_busy(result.stdout.decode(errors="replace")) is False

    def _change(self, action: str, name: str) -> None:
        try:
            run(Command(["multipathd", action, "map", name], timeout=_TIMEOUT))
        except AgentError as error:
            log.warning("multipathd %s map %s: %s", action, name, error)

    def _size(self, kernel: str) -> int:
        return self._files.number(f"{BLOCK}/{kernel}/size")


def parse_status(target: Target) -> Iterator[tuple[str, bool]]:
    """(device number, whether it takes I/O) of each path, in the order of the table.

    The parameters of a map with two groups of one path each:

    2 0 1 0 2 1 A 0 1 2 8:16 A 0 0 1 E 0 1 2 8:32 F 1 0 1

    These are lists that begin with their length: features (2: 0 1), arguments of the hardware
    handler (0), groups (2), the number of the present one; then each group: its state (A active,
    E enabled, D disabled), a list of the selector's arguments (0), the number of its paths (1) and
    of values a path (2); then each path: its device, A or F for failed, how often it failed, and
    those values.
    """
    if target.type != _TARGET:
        return
    words = iter(target.parameters.split())
    try:
        _skip(words)  # features
        _skip(words)  # hardware handler
        groups = int(next(words))
        next(words)
        for _ in range(groups):
            next(words)
            _skip(words)
            paths, values = int(next(words)), int(next(words))
            for _ in range(paths):
                number, state = next(words), next(words)
                yield number, state == _ACTIVE
                for _ in range(1 + values):
                    next(words)
    except (StopIteration, ValueError):
        log.warning("multipath's status is not understood: %s", target.parameters)


def _skip(words: Iterator[str]) -> None:
    for _ in range(int(next(words))):
        next(words)


def parse_busy(text: str) -> bool | None:
    """From `multipathd show status`; None when it does not tell:

    path checker states:
    up                  4

    paths: 4
    busy: False
    """
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "busy":
            return value.strip().lower() == "true"
    return None
