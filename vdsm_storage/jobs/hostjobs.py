# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs as engines read them (Host.getJobs).

An ended job stays visible for a while, over restarts too, and then goes by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from vdsm_storage.base.clock import Clock
from vdsm_storage.errors import JobNotActive, JobNotDone, NoSuchJob, UnsupportedOperation
from vdsm_storage.jobs import journal as j
from vdsm_storage.jobs.journal import Entry
from vdsm_storage.jobs.runner import SUCCESS, Runner, Running

STORAGE: Final = "storage"
VIRT: Final = "virt"  # on running VMs
_STATUSES: Final = {
    j.INIT: "pending",
    j.RUNNING: "running",
    j.ABORTING: "aborting",
    j.CLEANING: "running",
}


class Jobs:
    """The jobs of `runner`; an ended one is kept for `keep` seconds."""

    def __init__(self, runner: Runner, clock: Clock, keep: float) -> None:
        self._runner = runner
        self._clock = clock
        self._keep = keep

    def get(
        self, job_type: str | None = None, job_ids: Sequence[str] = ()
    ) -> dict[str, dict[str, Any]]:
        """{job: info} of all jobs, or those asked for; a job that is unknown is left out."""
        self._drop_old()
        wanted = set(job_ids)
        return {
            running.entry.id: self.describe(running.entry, running.operation.fraction)
            for running in self._runner.all(j.JOB)
            if (not wanted or running.entry.id in wanted)
            and job_type in (None, type_of(running.entry))
        }

    @staticmethod
    def describe(entry: Entry, fraction: float | None) -> dict[str, Any]:
        """One job: id, job_type, status, description, progress (percent, a float), error.

        Progress is left out before it is known, error as long as there is none: engines take
        neither null nor an integer for it.
        """
        found: dict[str, Any] = {
            "id": entry.id,
            "job_type": type_of(entry),
            "status": status_of(entry),
            "description": entry.description or entry.verb,
        }
        if found["status"] == "done":
            found["progress"] = 100.0
        elif fraction is not None:
            found["progress"] = round(fraction * 100.0, 1)
        if entry.error is not None and found["status"] == "failed":
            found["error"] = {
                "code": int(entry.error["code"]),
                "message": str(entry.error["message"]),
            }
        return found

    def has(self, job: str) -> bool:
        return self._runner.get(job, j.JOB) is not None

    def abort(self, job: str) -> None:
        """Ask a job to stop.  Raises NoSuchJob (66), JobNotActive (84)."""
        running = self._find(job)
        if running.entry.state not in (j.INIT, j.RUNNING, j.ABORTING):
            raise JobNotActive(job=job, status=status_of(running.entry))
        self._runner.stop(running)

    def limit(self, job: str, bandwidth: int) -> None:
        """MiB a second that a job or a task may move from now on, 0 for no limit.

        Raises NoSuchJob (66), JobNotActive (84), UnsupportedOperation (2009).
        """
        running = self._runner.get(job, j.JOB) or self._runner.get(job, j.TASK)
        if running is None:
            raise NoSuchJob(job=job)
        entry = running.entry
        if entry.state not in (j.INIT, j.RUNNING):
            raise JobNotActive(job=job, status=status_of(entry))
        if not self._runner.kinds[entry.kind].work:
            raise UnsupportedOperation(
                operation=f"A limit for {entry.verb} ({job})", reason="it copies or merges nothing"
            )
        running.operation.limit(bandwidth)

    def delete(self, job: str) -> None:
        """Forget a job that has ended.  Raises NoSuchJob (66), JobNotDone (68)."""
        running = self._find(job)
        if running.entry.state != j.FINISHED:
            raise JobNotDone(job=job, status=status_of(running.entry))
        self._drop(running)

    def _find(self, job: str) -> Running:
        running = self._runner.get(job, j.JOB)
        if running is None:
            raise NoSuchJob(job=job)
        return running

    def _drop_old(self) -> None:
        oldest = self._clock.time() - self._keep
        for running in self._runner.all(j.JOB):
            ended = running.entry.ended
            if running.entry.state == j.FINISHED and ended is not None and ended < oldest:
                self._drop(running)

    def _drop(self, running: Running) -> None:
        if running.interrupted:
            self._runner.demote(running)  # something is left of it: taken back one day
        else:
            self._runner.forget(running.entry.id)


def type_of(entry: Entry) -> str:
    """As engines call it: kinds of operations on running VMs are named `vm.…`."""
    return VIRT if entry.kind.startswith("vm.") else STORAGE


def status_of(entry: Entry) -> str:
    """pending, running, aborting; done, aborted or failed at the end."""
    if entry.state == j.CLEANING and entry.aborted:
        return "aborting"
    if entry.state != j.FINISHED:
        return _STATUSES[entry.state]
    if entry.outcome == SUCCESS:
        return "done"
    return "aborted" if entry.aborted else "failed"
