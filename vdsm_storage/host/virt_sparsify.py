# SPDX-License-Identifier: GPL-2.0-or-later
"""virt-sparsify: trims the file systems inside an image, where the tool is installed."""

from __future__ import annotations

import shutil

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.run import Command, run

PROGRAM = "virt-sparsify"


class VirtSparsify:
    """`timeout` is seconds for one image."""

    def __init__(self, timeout: float = 24 * 3600.0) -> None:
        self._timeout = timeout

    def available(self) -> bool:
        return shutil.which(PROGRAM) is not None

    def in_place(self, path: str, image_format: str, cancel: Cancel) -> None:
        """Discard what the image's file systems do not use.  A stop in between does no harm: the
        image is whole after each discard.  Raises CommandError, CommandTimeout, ActionStopped.
        """
        argv = [PROGRAM, "--machine-readable", "--in-place", "--format", image_format, path]
        env = {"LIBGUESTFS_BACKEND": "direct"}
        run(Command(argv, timeout=self._timeout, cancel=cancel, env=env, on_output=_ignore))


def _ignore(_piece: bytes) -> None:
    """Its output is for people."""
