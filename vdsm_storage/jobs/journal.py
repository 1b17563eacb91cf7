# SPDX-License-Identifier: GPL-2.0-or-later
"""What was begun, on disk, so that a restart can finish it or take it back.

One JSON file an entry, replaced atomically.  An entry is written before its operation touches
anything (the intent), whenever the operation records a fact that undoing it needs, and at its end.
An entry that a crash cut off when it was new is of an operation that never began.
Passwords never come here: params hold UUIDs, sizes, names and flags only.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from typing import Any

from vdsm_storage.base import files
from vdsm_storage.base.uuids import is_uuid

log = logging.getLogger("journal")

TASK = "task"  # asked for by an SPM verb, lives until Task.clear
JOB = "job"  # asked for by an SDM verb, shown for an hour after its end
CALL = "call"  # the caller waits for the reply; gone when it has ended

INIT = "init"
RUNNING = "running"
ABORTING = "aborting"
CLEANING = "cleaning"
FINISHED = "finished"


@dataclass
class Entry:
    """One operation.  `domains` are the storage domains that it needs in order to be recovered."""

    id: str
    family: str
    kind: str
    verb: str
    params: dict[str, Any]
    domains: list[str]
    description: str = ""
    state: str = INIT
    facts: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    error: dict[str, Any] | None = None  # {"code": int, "message": str}
    outcome: str = ""  # success, failure, cleanSuccess, cleanFailure; "" while it runs
    created: float = 0.0  # seconds since the epoch
    ended: float | None = None
    aborted: bool = False


class Journal:
    """Entries below `directory` (made if missing, root only)."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)

    def add(self, entry: Entry) -> None:
        """A new one; durable when it returns.  Raises OSError."""
        files.write_new(self._path(entry.id), _data(entry), mode=0o600)

    def save(self, entry: Entry) -> None:
        """Durable when it returns.  Raises OSError."""
        files.write_atomic(self._path(entry.id), _data(entry), mode=0o600)

    def remove(self, entry: Entry) -> None:
        """Forget an entry; nothing happens when it is gone already."""
        if files.unlink_if_there(self._path(entry.id)):
            files.sync_directory(self._directory)

    def load(self) -> list[Entry]:
        """All entries, oldest first.  A file that is no entry is renamed `.bad` and reported."""
        entries = []
        for name in os.listdir(self._directory):
            path = os.path.join(self._directory, name)
            if name.endswith(".new"):
                files.unlink_if_there(path)  # a write that a crash cut off
                continue
            if not name.endswith(".json") or not is_uuid(name[:-5]):
                continue
            try:
                with open(path, "rb") as file:
                    data = file.read()
                if not data.strip(b"\0"):
                    files.unlink_if_there(path)  # cut off before it was all there
                    continue
                entries.append(Entry(**json.loads(data)))
            except (ValueError, TypeError) as error:
                log.error("Journal entry %s cannot be read (%s): kept as %s.bad", name, error, name)
                os.rename(path, path + ".bad")
        return sorted(entries, key=lambda entry: entry.created)

    def _path(self, entry_id: str) -> str:
        if not is_uuid(entry_id):
            raise ValueError(f"{entry_id!r} is no UUID and cannot name a journal entry")
        return os.path.join(self._directory, entry_id + ".json")


def _data(entry: Entry) -> bytes:
    return json.dumps(vars(entry), sort_keys=True).encode()
