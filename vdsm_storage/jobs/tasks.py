# SPDX-License-Identifier: GPL-2.0-or-later
"""Tasks as engines read them (Task.*, Host.getAllTasks*).

A task stays until it is cleared, over restarts too: an engine polls all of them every ten seconds
and clears each one that it has seen finished.
"""

from __future__ import annotations

from typing import Any, Final

from vdsm_storage.errors import TaskNotFinished, TaskNotRevertible, TaskUnknown
from vdsm_storage.jobs import journal as j
from vdsm_storage.jobs.journal import Entry
from vdsm_storage.jobs.runner import SUCCESS, Runner, Running

_TAG: Final = "spm"
_STATES: Final = {
    j.INIT: "init",
    j.RUNNING: "running",
    j.ABORTING: "aborting",
    j.CLEANING: "cleaning",
    j.FINISHED: "finished",
}


class Tasks:
    """The tasks of `runner`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def statuses(self) -> dict[str, dict[str, Any]]:
        """{task: status}, as Host.getAllTasksStatuses answers."""
        return {r.entry.id: status_of(r.entry) for r in self._runner.all(j.TASK)}

    def infos(self) -> dict[str, dict[str, Any]]:
        """{task: {"id", "verb"}}, as Host.getAllTasksInfo answers."""
        return {r.entry.id: _info(r.entry) for r in self._runner.all(j.TASK)}

    def details(self) -> dict[str, dict[str, Any]]:
        """Both together, as Host.getAllTasks answers."""
        return {r.entry.id: _details(r.entry) for r in self._runner.all(j.TASK)}

    def status(self, task: str) -> dict[str, Any]:
        """taskID, taskState, taskResult, code, message.  Raises TaskUnknown (401)."""
        return status_of(self._find(task).entry)

    def info(self, task: str) -> dict[str, Any]:
        """Raises TaskUnknown (401)."""
        return _info(self._find(task).entry)

    def stop(self, task: str) -> None:
        """Ask it to stop; it ends at its next step.  Nothing happens when it has ended."""
        self._runner.stop(self._find(task))

    def clear(self, task: str) -> None:
        """Forget a finished task.  Raises 401, TaskNotFinished (403)."""
        running = self._find(task)
        if running.entry.state != j.FINISHED:
            raise TaskNotFinished(task=task, state=running.entry.state)
        if running.interrupted:
            # Something is left of it: it is no task any more, and still taken back one day.
            self._runner.demote(running)
        else:
            self._runner.forget(task)

    def revert(self, task: str) -> None:
        """Take back what a task that succeeded did.  Raises 401, TaskNotRevertible (410).

        A task that failed was taken back already: nothing is left to do.
        """
        running = self._find(task)
        entry = running.entry
        if entry.state != j.FINISHED:
            raise TaskNotRevertible(
                task=task, state=entry.state, reason="it goes on; stop it instead"
            )
        if entry.outcome != SUCCESS:
            return
        if not self._runner.can_revert(running):
            raise TaskNotRevertible(
                task=task, state="finished", reason=f"{entry.verb} cannot be undone"
            )
        self._runner.revert(running)

    def _find(self, task: str) -> Running:
        running = self._runner.get(task, j.TASK)
        if running is None:
            raise TaskUnknown(task=task)
        return running


def status_of(entry: Entry) -> dict[str, Any]:
    """As Task.getStatus answers."""
    error = entry.error or {}
    ended = entry.state == j.FINISHED
    return {
        "taskID": entry.id,
        "taskState": _STATES[entry.state],
        "taskResult": entry.outcome if ended else "",
        "code": int(error.get("code", 0)),
        "message": str(error.get("message") or ("done" if ended else "running")),
    }


def _info(entry: Entry) -> dict[str, Any]:
    return {"id": entry.id, "verb": entry.verb}


def _details(entry: Entry) -> dict[str, Any]:
    status = status_of(entry)
    return {
        "id": entry.id,
        "verb": entry.verb,
        "tag": _TAG,
        "state": status["taskState"],
        "taskResult": status["taskResult"],
        "code": status["code"],
        "message": status["message"],
    }
