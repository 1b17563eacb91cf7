# SPDX-License-Identifier: GPL-2.0-or-later
"""LUNs as sparse files, and what lies on them, looked at by other means than the agent's."""

from __future__ import annotations

import json
import os
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path

from functional.block_hosts import BareLvm
from functional.checker.group import Group, read_group
from functional.standin import loops

GIB = 1024**3


class Luns:
    """LUNs under the names that engines know them by, as multipath makes them: links below /dev.

    `pattern` is what the agent's configuration says of them.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        number = zlib.crc32(os.fsencode(directory))
        self._names = Path(f"/dev/vdsm-storage-luns-{number:08x}")
        self._names.mkdir()
        self.pattern = f"{self._names}/*"
        self.paths: list[str] = []
        self.bare = BareLvm(directory / "bare-lvm", ())
        self.bare.devices = self.paths

    def make(self, guid: str, size: int = 20 * GIB) -> str:
        file = self.directory / guid
        with file.open("wb") as new:
            new.truncate(size)
        argv = ["losetup", "--find", "--show", str(file)]
        device = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout
        path = self._names / guid
        path.symlink_to(device.strip())
        self.paths.append(str(path))
        return str(path)

    def close(self) -> None:
        for path in self.paths:
            loops.detach_patiently(os.path.realpath(path), 10.0)
            os.unlink(path)
        self._names.rmdir()

    # -- what others see -----------------------------------------------------------------------

    def report(self, command: str, fields: Sequence[str], name: str) -> list[dict[str, str]]:
        """The rows of `lvs`, `vgs` or `pvs` of one group; devices have their names in it."""
        which = () if command == "pvs" else (name,)
        options = ("--reportformat", "json", "--units", "b", "--nosuffix")
        text = self.bare.run(command, *options, "-o", ",".join(fields), *which)
        for path in self.paths:
            for end in ('"', "("):
                text = text.replace(os.path.realpath(path) + end, path + end)
        found: list[dict[str, str]] = json.loads(text)["report"][0][command[:2]]
        return [row for row in found if row["vg_name"] == name]

    def text(self, name: str) -> str:
        """The metadata as text, as `vgcfgbackup` writes it."""
        path = self.directory / f"{name}.text"
        self.bare.run("vgcfgbackup", "--file", str(path), name)
        return path.read_text()

    def group(self, name: str) -> Group:
        """Read by the parser of the checker; both copies of the metadata are sound and equal."""
        problems: list[str] = []
        found = read_group(self.paths, name, problems)
        assert problems == []
        assert found is not None
        return found
