# SPDX-License-Identifier: GPL-2.0-or-later
"""What this host was connected to, kept for a restart after a crash.

One JSON file.  After a crash in the same boot the agent connects all of it again by itself, so
that interrupted operations can be recovered.  After a clean stop or a reboot it waits for the
engine.  No passwords are kept here.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from typing import Any, Final

from vdsm_storage.base import files

log = logging.getLogger("remembered")

CONNECTIONS: Final = "connections"
POOLS: Final = "pools"
MONITORED: Final = "monitored"
SESSIONS: Final = "sessions"  # iSCSI
_SECTIONS = (CONNECTIONS, POOLS, MONITORED, SESSIONS)


def boot_id(path: str = "/proc/sys/kernel/random/boot_id") -> str:
    """Changes with every boot of the machine."""
    with open(path, encoding="ascii") as file:
        return file.read().strip()


class Remembered:
    """Sections of records (JSON objects), each under a key.  Every change is durable on return."""

    def __init__(self, directory: str, boot: str) -> None:
        self._path = os.path.join(directory, "remembered.json")
        self._boot = boot
        self._lock = threading.Lock()
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
        self.crashed = self._load()

    def _load(self) -> bool:
        """Take over the last run's records; True if it ended without release() in this boot."""
        try:
            with open(self._path, encoding="utf-8") as file:
                data = json.load(file)
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            log.error("%s cannot be read (%s): waiting for the engine", self._path, error)
            return False
        if data.get("clean", True) or data.get("boot_id") != self._boot:
            return False
        for name in _SECTIONS:
            self._sections[name] = dict(data.get(name, {}))
        return True

    def all(self, section: str) -> dict[str, Any]:
        with self._lock:
            return dict(self._sections[section])

    def put(self, section: str, key: str, record: Any) -> None:
        with self._lock:
            if self._sections[section].get(key) != record:
                self._sections[section][key] = record
                self._save(clean=False)

    def drop(self, section: str, key: str) -> None:
        with self._lock:
            if self._sections[section].pop(key, None) is not None:
                self._save(clean=False)

    def release(self) -> None:
        """The clean stop: the next start waits for the engine."""
        with self._lock:
            self._save(clean=True)

    def _save(self, clean: bool) -> None:
        data = {"boot_id": self._boot, "clean": clean, **self._sections}
        text = json.dumps(data, indent=1, sort_keys=True).encode()
        files.write_atomic(self._path, text, mode=0o600)
