# SPDX-License-Identifier: GPL-2.0-or-later
"""Which volumes this host made usable for which VM: let go when the VM ends, however it does.

On disk, in a directory that a boot of the host empties as it ends the VMs: a VM may end while no
agent looks, and then nobody else knows what it had.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict

from vdsm_storage.base import files
from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.vms.drives import VolumePath

log = logging.getLogger("vms.holdings")


class Holdings:
    """`directory` is made if it is missing.  One file a VM, replaced atomically."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        os.makedirs(directory, mode=0o755, exist_ok=True)
        self._volumes = self._load()

    def vms(self) -> list[str]:
        with self._lock:
            return list(self._volumes)

    def of(self, vm: str) -> Sequence[VolumePath]:
        with self._lock:
            return tuple(self._volumes.get(vm, ()))

    def add(self, vm: str, volume: VolumePath) -> None:
        """Before it is prepared; on disk when it returns.  Raises OSError."""
        with self._lock:
            there = self._volumes.setdefault(vm, [])
            if volume not in there:
                there.append(volume)
                self._save(vm)

    def drop(self, vm: str, volume: VolumePath) -> None:
        """It was let go: the image, so whichever of its volumes was remembered."""
        with self._lock:
            there = self._volumes.get(vm, [])
            left = [v for v in there if (v.domain, v.image) != (volume.domain, volume.image)]
            if len(left) == len(there):
                return
            self._volumes[vm] = left
            self._save(vm)

    def _save(self, vm: str) -> None:
        volumes = self._volumes[vm]
        if volumes:
            text = json.dumps([asdict(volume) for volume in volumes])
            files.write_atomic(self._path(vm), text.encode(), 0o600)
        else:
            del self._volumes[vm]
            files.unlink_if_there(self._path(vm))

    def _path(self, vm: str) -> str:
        if not is_uuid(vm):
            raise ValueError(f"{vm!r} is no UUID and cannot name a file")
        return os.path.join(self._directory, vm + ".json")

    def _load(self) -> dict[str, list[VolumePath]]:
        found = {}
        for name in os.listdir(self._directory):
            if not name.endswith(".json") or not is_uuid(name[:-5]):
                continue
            try:
                with open(os.path.join(self._directory, name), "rb") as file:
                    found[name[:-5]] = [VolumePath(**volume) for volume in json.load(file)]
            except (OSError, ValueError, TypeError) as error:
                log.error("%s cannot be read (%s): what it names stays prepared", name, error)
        return found
