# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that runs one operation of three steps, or recovers what a killed one left.

    walker.py DIRECTORY run [POINT]     start the task and wait for it; POINT kills the process
    walker.py DIRECTORY recover [POINT] load the journal and recover; prints the tasks' statuses

The operation makes the files a, b and c below DIRECTORY; taking it back removes them.  From the
file c on it counts as done.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.jobs.hostjobs import Jobs
from vdsm_storage.jobs.journal import Journal
from vdsm_storage.jobs.operation import CrashPoints, Kind, Operation
from vdsm_storage.jobs.runner import Request, Runner
from vdsm_storage.jobs.tasks import Tasks

FILES = ("a", "b", "c")
JOB_ID = "11111111-2222-3333-4444-555555555555"


class Work:
    """The kind `files`, with a crash point inside its recovery and its revert as well."""

    def __init__(self, directory: Path, crash: CrashPoints) -> None:
        self.directory = directory
        self.crash = crash

    def kind(self) -> Kind:
        return Kind("files", FILES, self.run, self.recover, self.revert)

    def run(self, op: Operation) -> str:
        op.record(names=list(FILES))
        for name in FILES:
            (self.directory / name).touch()
            op.step(name)
        return "three files"

    def recover(self, op: Operation) -> bool:
        if (self.directory / "c").exists():
            return True
        self.revert(op)
        return False

    def revert(self, op: Operation) -> None:
        for name in reversed(op.facts.get("names", [])):
            (self.directory / name).unlink(missing_ok=True)
            self.crash.reach(f"undo:{name}")


def main() -> int:
    directory, what = Path(sys.argv[1]), sys.argv[2]
    crash = CrashPoints(sys.argv[3] if len(sys.argv) > 3 else None)
    clock = SystemClock()
    lanes = Lanes(clock)
    journal = Journal(str(directory / "journal"))
    runner = Runner(journal, lanes, clock, crash, lambda entry, fraction: None)
    runner.add_kinds([Work(directory, crash).kind()])
    runner.load()
    runner.recover_domains(lambda domain: True)
    tasks = Tasks(runner)
    request = Request("files", {}, ["d"], "createVolume")
    if what == "run":
        task = runner.start_task(request)
        runner.start_job(JOB_ID, request)
        for running in (*runner.all("task"), *runner.all("job")):
            running.done.wait(20)
        assert tasks.status(task)["taskState"] == "finished"
    elif what == "revert":
        for task in tasks.statuses():
            tasks.revert(task)
    json.dump({"tasks": tasks.statuses(), "jobs": Jobs(runner, clock, 60).get()}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
