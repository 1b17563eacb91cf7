# SPDX-License-Identifier: GPL-2.0-or-later
"""The block devices on which volume groups may be: multipath maps, and what is configured.

Engines call a device by its GUID, which is the base name of its path.
"""

from __future__ import annotations

import glob
import os
import stat
from dataclasses import dataclass

from vdsm_storage.errors import InaccessiblePhysDev
from vdsm_storage.host.multipath import DIRECTORY, Multipath


@dataclass(frozen=True)
class Candidate:
    """`kernel` is the kernel's name (dm-3, vdb); `is_map`: a multipath map."""

    path: str
    kernel: str
    is_map: bool

    @property
    def guid(self) -> str:
        return os.path.basename(self.path)


class Candidates:
    """`patterns` are paths with wildcards, separated by commas: other devices than maps."""

    def __init__(self, multipath: Multipath, patterns: str) -> None:
        self._multipath = multipath
        self._patterns = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]

    def all(self) -> list[Candidate]:
        """Every device once.  A disk that is a path of a map is no candidate: its map is."""
        maps = sorted(self._multipath.names().items())
        found = [Candidate(f"{DIRECTORY}/{name}", kernel, True) for name, kernel in maps]
        seen = {candidate.kernel for candidate in found}
        for path in sorted({path for pattern in self._patterns for path in glob.glob(pattern)}):
            kernel = kernel_name(path)
            if kernel and kernel not in seen and self._multipath.map_of(kernel) is None:
                seen.add(kernel)
                found.append(Candidate(path, kernel, False))
        return found

    def candidates(self) -> list[str]:
        """The paths alone."""
        return [candidate.path for candidate in self.all()]

    def find(self, guid: str) -> str:
        """The path of the device that engines call `guid`.  Raises InaccessiblePhysDev (606)."""
        name = os.path.basename(guid)
        for candidate in self.all():
            if candidate.guid == name:
                return candidate.path
        raise InaccessiblePhysDev(devices=guid)


def kernel_name(path: str) -> str:
    """The kernel's name of a block device; "" for what is none."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    if not stat.S_ISBLK(status.st_mode):
        return ""
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return os.path.basename(os.path.realpath(f"/sys/dev/block/{number}"))
