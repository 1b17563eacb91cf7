# SPDX-License-Identifier: GPL-2.0-or-later
"""The tree of links that engines write into domain XML.

    <data_center>/<pool>/<domain>  -> <data_center>/mnt/<connection>/<domain>
    <data_center>/<pool>/mastersd  -> the same of the master domain
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

from vdsm_storage.base import files

MASTER: Final = "mastersd"


class Links:
    """Links of one host.  `data_center` is /rhev/data-center."""

    def __init__(self, data_center: str) -> None:
        self._root = data_center

    def put(self, pool: str, name: str, target: str) -> None:
        """Make or move a link; never absent in between."""
        directory = os.path.join(self._root, pool)
        os.makedirs(directory, mode=0o755, exist_ok=True)
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError):
            if os.readlink(path) == target:
                return
        new = path + ".new"
        files.unlink_if_there(new)
        os.symlink(target, new)
        os.rename(new, path)

    def keep(self, pool: str, names: set[str]) -> None:
        """Remove every link of the pool but `names`."""
        directory = os.path.join(self._root, pool)
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(directory):
                path = os.path.join(directory, name)
                if name not in names and os.path.islink(path):
                    files.unlink_if_there(path)

    def remove(self, pool: str) -> None:
        """Remove the pool's links and its directory, unless somebody keeps files there."""
        self.keep(pool, set())
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(self._root, pool))
