# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that a VM may write to and that forget it: a snapshot shown to a backup VM, say.

The guest gets a thin qcow2 file on this host upon the volume, which itself is only read; the file
goes with the disk.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection

from vdsm_storage.base import files
from vdsm_storage.base.uuids import is_uuid

log = logging.getLogger("vms.transient")

# Make a qcow2 file: its path, its backing file's path and format ("raw", "qcow2"), bytes.
Overlay = Callable[[str, str, str, int], None]

MODE = 0o660  # as volumes


class Transients:
    """`directory` is made if it is missing: <directory>/<vm>/<volume>."""

    def __init__(self, directory: str, overlay: Overlay) -> None:
        self._directory = directory
        self._overlay = overlay

    def make(self, vm: str, volume: str, backing: str, backing_format: str, size: int) -> str:
        """The file's path; one that was left is replaced.  Raises OSError, CommandError."""
        path = self._path(vm, volume)
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        files.unlink_if_there(path)
        self._overlay(path, backing, backing_format, size)
        os.chmod(path, MODE)
        return path

    def remove(self, vm: str, volume: str) -> None:
        """Nothing happens when there is none."""
        path = self._path(vm, volume)
        files.unlink_if_there(path)
        try:
            os.rmdir(os.path.dirname(path))
        except OSError:  # there is none, or others are left
            return

    def clean(self, keep: Collection[str]) -> None:
        """Remove what was left by VMs other than these: by a boot of the host."""
        if not os.path.isdir(self._directory):
            return
        for vm in os.listdir(self._directory):
            if is_uuid(vm) and vm not in keep:
                log.info("Removing transient disks of VM %s", vm)
                shutil.rmtree(os.path.join(self._directory, vm), ignore_errors=True)

    def _path(self, vm: str, volume: str) -> str:
        if not (is_uuid(vm) and is_uuid(volume)):
            raise ValueError(f"{vm}/{volume} cannot name a file")
        return os.path.join(self._directory, vm, volume)
