# SPDX-License-Identifier: GPL-2.0-or-later
"""Progress bars of tasks and jobs: `vdsm-client tasks --follow`.

A program of its own, because importing rich takes longer than a whole plain call.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vdsm_storage.cli.options import connect, parser
from vdsm_storage.errors import AgentError
from vdsm_storage.rpc.client import Client, NoResponse, RemoteError

ENDED = ("done", "aborted", "failed", "finished")
POLL_SECONDS = 1.0


class View:
    """One bar a task or job; ended ones stay as long as the agent keeps them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}
        self._told = False

    def update(self, rows: Mapping[str, tuple[str, str, float | None]]) -> None:
        """`rows`: id -> (what, state, percent or None when it is not known)."""
        for key, (what, state, percent) in rows.items():
            if key not in self._bars:
                self._bars[key] = self._progress.add_task(what, total=None, state=state)
            total = None if percent is None and state not in ENDED else 100.0
            done = 100.0 if state in ("done", "finished") else percent or 0.0
            self._progress.update(
                self._bars[key], description=what, state=state, total=total, completed=done
            )
        if not rows and not self._told:
            self._told = True
            self._progress.console.print("No task and no job; waiting for one (Ctrl-C ends)")
        for key in set(self._bars) - set(rows):
            self._progress.remove_task(self._bars.pop(key))


def rows_of(
    jobs: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, Mapping[str, Any]],
    verbs: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[str, str, float | None]]:
    """What Host.getJobs, .getAllTasksStatuses and .getAllTasksInfo say, as View shows it."""
    rows: dict[str, tuple[str, str, float | None]] = {}
    for key, job in jobs.items():
        what = str(job.get("description") or job.get("job_type") or "job")
        percent = job.get("progress")
        rows[key] = (
            f"{key[:8]} {what}",
            str(job.get("status", "")),
            None if percent is None else float(percent),
        )
    for key, task in tasks.items():
        state = str(task.get("taskState", ""))
        result = str(task.get("taskResult", ""))
        what = str(verbs.get(key, {}).get("verb", "task"))
        if state == "finished" and result not in ("", "success"):
            state = "failed"
            what += f": {task.get('message', '')}"
        rows[key] = (f"{key[:8]} {what}", state, None)
    return rows


def follow(client: Client, view: View, flow_id: str) -> None:
    """Until interrupted: events make it quick, asking once a second makes it whole."""
    client.subscribe()
    while True:
        try:
            jobs = client.call("Host.getJobs", flow_id=flow_id)
            tasks = client.call("Host.getAllTasksStatuses", flow_id=flow_id)
            verbs = client.call("Host.getAllTasksInfo", flow_id=flow_id)
            view.update(rows_of(jobs, tasks, verbs))
            wait(client, POLL_SECONDS)
        except NoResponse:
            time.sleep(2)


def wait(client: Client, seconds: float) -> None:
    """Until an event of a task or job comes, or for `seconds`."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        for method, _params in client.events(left):
            if method.startswith(("|jobs|", "|tasks|")):
                return
            break


def run(arguments: argparse.Namespace, console: Console) -> int:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    try:
        with connect(arguments) as client, Progress(*columns, console=console) as progress:
            follow(client, View(progress), arguments.flow_id)
    except (RemoteError, AgentError) as error:
        sys.stderr.write(f"vdsm-client: {error.message} (code {error.code})\n")
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    return run(arguments, Console())


if __name__ == "__main__":
    sys.exit(main())
