# SPDX-License-Identifier: GPL-2.0-or-later
"""Which guests are frozen, or may be: on disk, because whoever froze one must see that it thaws.

A record is written before the guest is told to freeze and goes when it has thawed.  The directory
is one that a boot of the host empties, as it ends the guests; so times are those of the monotonic
clock, which goes on over a restart of the agent.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import asdict, dataclass, replace

from vdsm_storage.base import files
from vdsm_storage.base.uuids import is_uuid

log = logging.getLogger("vms.frozen")

FREEZING = "freezing"  # its agent was told to
FROZEN = "frozen"  # and said that it did; the caller will thaw it
THAWING = "thawing"  # it shall thaw: tried until it does
THAWED = "thawed"  # by the guard, before its caller did: the next snapshot would not be consistent

FREEZE = "VM.freeze"
SNAPSHOT = "VM.snapshot"


@dataclass(frozen=True)
class Record:
    """`since` in seconds of the monotonic clock; `count` file systems were frozen."""

    vm: str
    by: str  # FREEZE or SNAPSHOT
    since: float
    state: str = FREEZING
    count: int = 0


class FrozenVms:
    """`directory` is made if it is missing."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        os.makedirs(directory, mode=0o755, exist_ok=True)
        self._records = {record.vm: record for record in self._load()}

    def get(self, vm: str) -> Record | None:
        with self._lock:
            return self._records.get(vm)

    def all(self) -> list[Record]:
        with self._lock:
            return list(self._records.values())

    def put(self, record: Record) -> None:
        """A kill of the agent does not lose it.  Raises OSError."""
        with self._lock:
            files.write_volatile(self._path(record.vm), json.dumps(asdict(record)).encode(), 0o600)
            self._records[record.vm] = record

    def set_state(self, vm: str, state: str, count: int | None = None) -> None:
        """Nothing happens when there is no record."""
        record = self.get(vm)
        if record is not None:
            self.put(replace(record, state=state, count=record.count if count is None else count))

    def drop(self, vm: str) -> None:
        with self._lock:
            if self._records.pop(vm, None) is not None:
                files.unlink_if_there(self._path(vm))

    def _path(self, vm: str) -> str:
        if not is_uuid(vm):
            raise ValueError(f"{vm!r} is no UUID and cannot name a file")
        return os.path.join(self._directory, vm + ".json")

    def _load(self) -> list[Record]:
        """After a restart of the agent; what was being frozen or thawed then is to be thawed."""
        found = []
        for name in os.listdir(self._directory):
            if not name.endswith(".json") or not is_uuid(name[:-5]):
                continue
            try:
                with open(os.path.join(self._directory, name), "rb") as file:
                    record = Record(**json.load(file))
            except (ValueError, TypeError) as error:
                log.error("%s cannot be read (%s): the guest is thawed", name, error)
                record = Record(vm=name[:-5], by=FREEZE, since=0.0, state=THAWING)
            # The snapshot that froze it has died with the agent.
            if record.state == FREEZING or (record.state == FROZEN and record.by == SNAPSHOT):
                record = replace(record, state=THAWING)
            found.append(record)
        return found
