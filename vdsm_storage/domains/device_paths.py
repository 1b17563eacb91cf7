# SPDX-License-Identifier: GPL-2.0-or-later
"""The block devices on which volume groups may be, and their names."""

from __future__ import annotations

import glob
import os

from vdsm_storage.errors import InaccessiblePhysDev


class DevicePaths:
    """`patterns` are paths with wildcards, separated by commas."""

    def __init__(self, patterns: str) -> None:
        self._patterns = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]

    def candidates(self) -> list[str]:
        return sorted({path for pattern in self._patterns for path in glob.glob(pattern)})

    def find(self, guid: str) -> str:
        """The path of the device that engines call `guid`.  Raises 606."""
        for path in self.candidates():
            if os.path.basename(path) == guid:
                return path
        raise InaccessiblePhysDev(devices=guid)
