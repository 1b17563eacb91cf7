# SPDX-License-Identifier: GPL-2.0-or-later
"""The small ext3 file system in which VDSM's pool managers keep their tasks.

This agent keeps nothing there.  It makes the file system with a domain, and sees to it that it is
sound and has its directories before this host calls itself a manager.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Final

from vdsm_storage.base.owner import Owner
from vdsm_storage.base.run import Command, run
from vdsm_storage.errors import AgentError, MasterFsckError, MasterMountError

FSTYPE: Final = "ext3"
_CORRECTED: Final = 1  # e2fsck repaired what it found


class MasterFs:
    """`timeout` in seconds; `directory` is where it is mounted for a moment."""

    def __init__(self, directory: str, owner: Owner, timeout: float) -> None:
        self._directory = directory
        self._owner = owner
        self._timeout = timeout

    def make(self, domain: str, device: str) -> None:
        """As VDSM makes it, byte for byte but for time and ids.  Raises 368."""
        self._run(domain, device, ["mkfs", "-q", "-t", FSTYPE, "-F", "-E", "nodiscard", device])

    def prepare(self, domain: str, device: str, names: Sequence[str]) -> None:
        """Check it, and make the directories `names` in it.  Raises 367, 368."""
        try:
            run(Command(["fsck.ext3", "-p", device], self._timeout, ok=(0, _CORRECTED)))
        except AgentError as error:
            raise MasterFsckError(domain=domain, device=device, reason=error) from error
        os.makedirs(self._directory, mode=0o755, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._directory, prefix="master-") as path:
            options = "rw,nosuid,nodev,noexec,noatime"
            self._run(domain, device, ["mount", "-t", FSTYPE, "-o", options, device, path])
            try:
                self._make_directories(domain, device, path, names)
            finally:
                self._run(domain, device, ["umount", path])

    def _make_directories(
        self, domain: str, device: str, path: str, names: Sequence[str]
    ) -> None:
        try:
            for name in names:
                directory = os.path.join(path, name)
                if not os.path.isdir(directory):
                    os.mkdir(directory, 0o755)
                    self._owner.apply(directory)
        except OSError as error:
            raise MasterMountError(domain=domain, device=device, reason=error) from error

    def _run(self, domain: str, device: str, argv: list[str]) -> None:
        try:
            run(Command(argv, self._timeout))
        except AgentError as error:
            raise MasterMountError(domain=domain, device=device, reason=error) from error
