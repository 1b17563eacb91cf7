# SPDX-License-Identifier: GPL-2.0-or-later
"""Operations whose work goes on without the agent: the next one goes on with them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.errors import VolumeDoesNotExist
from vdsm_storage.jobs.hostjobs import Jobs
from vdsm_storage.jobs.journal import JOB, Journal
from vdsm_storage.jobs.operation import CrashPoints, Kind, Operation, SuspendedError
from vdsm_storage.jobs.runner import Request, Runner, Running


class Bench:
    """Its kind `long` can be resumed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lanes = Lanes(SystemClock())
        self.do: Callable[[Operation], Any] = wait
        self.resumed: list[str] = []
        self.undone: list[str] = []
        self.restart()

    def restart(self) -> None:
        """What the next process would see."""
        journal = Journal(str(self.directory))
        clock = SystemClock()
        self.runner = Runner(journal, self.lanes, clock, CrashPoints(), lambda *_: None)
        self.runner.add_kinds(
            [Kind("long", ("one",), lambda op: self.do(op), self._undo, resume=self._resume)]
        )
        self.runner.load()
        self.jobs = Jobs(self.runner, clock, keep=3600)

    def _resume(self, op: Operation) -> None:
        self.resumed.append(op.id)
        self.do(op)

    def _undo(self, op: Operation) -> bool:
        self.undone.append(op.id)
        return False

    def start(self) -> str:
        job = new_uuid()
        self.runner.start_job(job, Request("long", {}, ["domain"], verb="merge"))
        return job

    def running(self, job: str) -> Running:
        found = self.runner.get(job, JOB)
        assert found is not None
        return found

    def status(self, job: str) -> str:
        return str(self.jobs.get(job_ids=[job])[job]["status"])


def begin(op: Operation) -> None:
    op.record(begun=True)


def wait(op: Operation) -> None:
    """Until a stop, or the end of the agent."""
    begin(op)
    op.cancel.event.wait(10)
    op.step("one")
    raise AssertionError("nobody stopped it")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.lanes.close()


def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come")


def begun(bench: Bench, job: str) -> None:
    until(lambda: bench.running(job).entry.facts.get("begun"))


def test_end_of_the_agent_takes_nothing_back(bench: Bench) -> None:
    job = bench.start()
    begun(bench, job)
    bench.runner.stop_all(10)
    assert bench.running(job).done.is_set()
    assert (bench.undone, bench.status(job)) == ([], "running")
    assert bench.runner.interrupted()
    bench.restart()
    assert bench.status(job) == "running"
    bench.do = begin
    bench.runner.recover_domains(lambda _domain: True)
    assert bench.running(job).done.wait(10)
    assert (bench.resumed, bench.undone, bench.status(job)) == ([job], [], "done")


def test_what_waits_for_a_stop_only_takes_nothing_back_either(bench: Bench) -> None:
    def work(op: Operation) -> None:
        begin(op)
        op.cancel.event.wait(10)
        op.cancel.check()

    bench.do = work
    job = bench.start()
    begun(bench, job)
    bench.runner.stop_all(10)
    assert (bench.undone, bench.status(job)) == ([], "running")


def test_resumed_work_holds_up_nothing_else(bench: Bench) -> None:
    job = bench.start()
    begun(bench, job)
    bench.runner.stop_all(10)
    bench.restart()
    bench.runner.recover_domains(lambda _domain: True)  # it does not wait for it
    until(lambda: bench.resumed == [job])
    assert bench.runner.interrupted() == []
    bench.jobs.abort(job)
    assert bench.running(job).done.wait(10)
    assert (bench.undone, bench.status(job)) == ([job], "aborted")


def test_stopped_by_its_caller(bench: Bench) -> None:
    job = bench.start()
    begun(bench, job)
    bench.jobs.abort(job)
    assert bench.running(job).done.wait(10)
    assert (bench.undone, bench.status(job)) == ([job], "aborted")


def test_failed_work_is_not_resumed(bench: Bench) -> None:
    """The agent died while it took that back."""

    def work(op: Operation) -> None:
        begin(op)
        raise VolumeDoesNotExist(volume="v", image="i", domain="d")

    bench.do = work
    job = bench.start()
    assert bench.running(job).done.wait(10)
    entry = bench.running(job).entry
    entry.state, entry.outcome = "cleaning", ""
    Journal(str(bench.directory)).save(entry)
    bench.restart()
    bench.runner.recover_domains(lambda _domain: True)
    assert bench.resumed == []
    assert (bench.undone, bench.status(job)) == ([job, job], "failed")


def test_call_whose_caller_is_gone_leaves_nothing(bench: Bench) -> None:
    """Nobody will ask what came of it."""
    at_work = threading.Event()

    def work(op: Operation) -> None:
        begin(op)
        at_work.set()
        op.cancel.event.wait(10)
        op.check()

    def call() -> None:
        with contextlib.suppress(SuspendedError):
            bench.runner.run(Request("long", {}, ["domain"], verb="VM.migrate"))

    bench.do = work
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    assert at_work.wait(10)
    bench.runner.stop_all(10)
    thread.join(10)
    assert list(bench.directory.glob("*.json"))
    bench.restart()
    bench.do = begin
    bench.runner.recover_domains(lambda _domain: True)
    until(lambda: not list(bench.directory.glob("*.json")))
    assert (len(bench.resumed), bench.undone) == (1, [])
