# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast operations may go: what is usual, what was asked for, what was said last."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.errors import AgentError
from vdsm_storage.jobs.hostjobs import Jobs
from vdsm_storage.jobs.journal import JOB, TASK, Journal
from vdsm_storage.jobs.operation import COPYING, CrashPoints, Kind, Operation
from vdsm_storage.jobs.runner import Request, Runner

USUAL = 7


class Bench:
    """Operations that wait until they are let go."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.go = threading.Event()
        self.lanes = Lanes(SystemClock())
        self.runner = self.start()
        self.jobs = Jobs(self.runner, SystemClock(), 3600)

    def start(self) -> Runner:
        """As the next agent would."""
        journal, clock = Journal(str(self.directory)), SystemClock()
        runner = Runner(journal, self.lanes, clock, CrashPoints(), lambda *_: None)

        def run(_op: Operation) -> None:
            self.go.wait(20)

        copying = Kind("copying", (), run, lambda op: False, work=COPYING)
        runner.add_kinds([copying, Kind("other", (), run, lambda op: False)], {"copy": USUAL})
        runner.load()
        return runner

    def job(self, kind: str = "copying", **params: Any) -> str:
        job = new_uuid()
        self.runner.start_job(job, Request(kind, params, [], "copy"))
        return job

    def pace(self, entry: str, family: str = JOB, runner: Runner | None = None) -> int:
        found = (runner or self.runner).get(entry, family)
        assert found is not None
        return found.operation.pace.limit

    def refused(self, job: str) -> int:
        with pytest.raises(AgentError) as caught:
            self.jobs.limit(job, 1)
        return caught.value.code


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    one = Bench(tmp_path)
    yield one
    one.go.set()
    one.lanes.close()


def test_usual_asked_for_and_said_last(bench: Bench) -> None:
    usual, asked = bench.job(), bench.job(bandwidth=3)
    assert (bench.pace(usual), bench.pace(asked), bench.pace(bench.job(bandwidth=0))) == (7, 3, 7)
    bench.jobs.limit(usual, 9)
    bench.jobs.limit(asked, 0)
    assert (bench.pace(usual), bench.pace(asked)) == (9, 0)
    later = bench.start()
    assert (bench.pace(usual, runner=later), bench.pace(asked, runner=later)) == (9, 0)


def test_tasks_too(bench: Bench) -> None:
    task = bench.runner.start_task(Request("copying", {}, [], "copy"))
    bench.jobs.limit(task, 2)
    assert bench.pace(task, TASK) == 2


def test_what_has_no_limit(bench: Bench) -> None:
    job = bench.job()
    assert bench.refused(bench.job("other")) == 2009
    assert bench.refused(new_uuid()) == 66
    bench.go.set()
    found = bench.runner.get(job, JOB)
    assert found is not None
    assert found.done.wait(10)
    assert bench.refused(job) == 84
