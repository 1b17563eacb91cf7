# SPDX-License-Identifier: GPL-2.0-or-later
"""Earlier metadata of volume groups, kept before something is taken away or rewritten.

Files of the form that vgcfgrestore reads: `<vg>_<seqno>.vg`.  They are for a person who must undo
what went wrong; nothing here reads them.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Final

KEPT: Final = 10  # files of one group
KEPT_BYTES: Final = 16 * 1024 * 1024  # of one group, but for the newest file
_NAME: Final = re.compile(r"(.+)_(\d+)\.vg")


class Archive:
    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)

    def keep(self, vg: str, seqno: int, text: bytes) -> str:
        """Write the text, drop what is too old; gives the path.  Not made durable: it is as good
        as the directory, which a reboot may empty.
        """
        path = os.path.join(self._directory, f"{vg}_{seqno}.vg")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            file.write(text.rstrip(b"\0"))
        self._tidy(vg)
        return path

    def kept(self, vg: str) -> list[str]:
        """Paths, the newest first."""
        found = []
        for name in os.listdir(self._directory):
            match = _NAME.fullmatch(name)
            if match is not None and match[1] == vg:
                found.append((int(match[2]), os.path.join(self._directory, name)))
        return [path for _, path in sorted(found, reverse=True)]

    def _tidy(self, vg: str) -> None:
        total = 0
        for number, path in enumerate(self.kept(vg)):
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(path).st_size
                if number >= KEPT or (number and total > KEPT_BYTES):
                    os.unlink(path)
