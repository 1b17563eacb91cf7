# SPDX-License-Identifier: GPL-2.0-or-later
"""Live merges that have not ended, as statistics show them."""

from __future__ import annotations

import threading
from typing import Any

from vdsm_storage.host.libvirt_blockjobs import BlockJob
from vdsm_storage.jobs import journal as j
from vdsm_storage.jobs.operation import Operation
from vdsm_storage.jobs.runner import Runner, Running
from vdsm_storage.vms.merge_request import KIND


class MergeJobs:
    """One whose metadata could not be written yet has not ended."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._lock = threading.Lock()
        self._seen: dict[str, BlockJob] = {}  # by operation, what was last seen

    def saw(self, op: Operation, job: BlockJob) -> None:
        with self._lock:
            self._seen[op.id] = job

    def forget(self, op: Operation) -> None:
        with self._lock:
            self._seen.pop(op.id, None)

    def of(self, vm: str) -> dict[str, dict[str, Any]]:
        """{job: facts}."""
        found = {}
        for running in self.at_work(vm):
            with self._lock:
                seen = self._seen.get(running.entry.id)
            found[running.entry.id] = {
                "id": running.entry.id,
                "jobType": "block",
                "blockJobType": "commit",
                "cur": str(seen.cur if seen else 0),
                "end": str(seen.end if seen else 0),
                "bandwidth": seen.bandwidth if seen else running.operation.pace.limit,
                "imgUUID": running.entry.params["image"],
            }
        return found

    def images_of(self, vm: str) -> set[str]:
        """Those that merges are about, not yet begun ones included."""
        return {str(running.entry.params["image"]) for running in self.at_work(vm)}

    def at_work(self, vm: str) -> list[Running]:
        return [
            running
            for running in self._runner.all(j.JOB)
            if running.entry.kind == KIND
            and running.entry.params["vm"] == vm
            and (running.interrupted or not running.done.is_set())
        ]
