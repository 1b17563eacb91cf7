# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.errors import (
    ActionStopped,
    JobExists,
    JobNotActive,
    JobNotDone,
    NoSuchJob,
    TaskNotFinished,
    TaskNotRevertible,
    TaskUnknown,
    VolumeDoesNotExist,
)
from vdsm_storage.jobs.hostjobs import Jobs
from vdsm_storage.jobs.journal import JOB, TASK, Entry, Journal
from vdsm_storage.jobs.operation import CrashPoints, Kind, Operation
from vdsm_storage.jobs.runner import Request, Runner, Running
from vdsm_storage.jobs.tasks import Tasks

ENGINE_STATES = {"unknown", "init", "running", "finished", "aborting", "cleaning"}
ENGINE_RESULTS = {"success", "failure", "cleanSuccess", "cleanFailure", "unknown"}


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def wait(self, event: threading.Event, timeout: float) -> bool:
        return event.wait(min(timeout, 10))


class Bench:
    """A runner whose kind `work` does what the test says."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = Clock()
        self.lanes = Lanes(self.clock)
        self.do: Callable[[Operation], Any] = lambda op: None
        self.undo: Callable[[Operation], bool] = lambda op: False
        self.reverted: list[str] = []
        self.changes: list[tuple[str, float | None]] = []
        self.restart()

    def restart(self) -> None:
        """What the next process would see."""
        self.runner = Runner(
            Journal(str(self.directory)), self.lanes, self.clock, CrashPoints(), self._changed
        )
        steps = ("one", "two")
        self.runner.add_kinds(
            [
                Kind("work", steps, lambda op: self.do(op), lambda op: self.undo(op)),
                Kind(
                    "undoable",
                    steps,
                    lambda op: self.do(op),
                    lambda op: self.undo(op),
                    lambda op: self.reverted.append(op.id),
                ),
            ]
        )
        self.runner.load()
        self.tasks = Tasks(self.runner)
        self.jobs = Jobs(self.runner, self.clock, keep=3600)

    def _changed(self, entry: Entry, fraction: float | None) -> None:
        self.changes.append((entry.state, fraction))

    def request(self, kind: str = "work") -> Request:
        return Request(kind, {"size": 1}, ["domain"], "createVolume", description="make it")

    def task(self, kind: str = "work") -> str:
        return self.runner.start_task(self.request(kind))

    def job(self) -> str:
        job = new_uuid()
        self.runner.start_job(job, self.request())
        return job

    def running(self, entry: str, family: str) -> Running:
        found = self.runner.get(entry, family)
        assert found is not None
        return found

    def ended(self, entry: str, family: str = TASK) -> None:
        assert self.running(entry, family).done.wait(10)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.lanes.close()


def fail(op: Operation) -> None:
    raise VolumeDoesNotExist(volume="v", image="i", domain="d")


def broken(op: Operation) -> bool:
    raise OSError("the storage is gone")


def test_how_many_are_at_work(bench: Bench) -> None:
    go = threading.Event()
    bench.do = lambda op: go.wait(10)
    tasks = [bench.task() for _ in range(12)]
    assert (bench.runner.busy("domain"), bench.runner.busy("another")) == (12, 0)
    go.set()
    for task in tasks:
        bench.ended(task)
    assert bench.runner.busy("domain") == 0


def test_cleared_while_its_end_is_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller is told the end before that is on disk; nothing of it comes back."""
    writing, go = threading.Event(), threading.Event()
    save = Journal.save

    def slowly(self: Journal, entry: Entry) -> None:
        if entry.state == "finished":
            writing.set()
            assert go.wait(10)
        save(self, entry)

    monkeypatch.setattr(Journal, "save", slowly)
    task = bench.task()
    assert writing.wait(10)
    assert bench.changes[-1] == ("finished", None)
    assert bench.tasks.status(task)["taskState"] == "finished"
    running = bench.running(task, TASK)
    clearing = threading.Thread(target=bench.tasks.clear, args=(task,))
    clearing.start()
    clearing.join(0.3)
    go.set()
    clearing.join(10)
    assert running.done.wait(10)
    assert list(bench.directory.iterdir()) == []


def test_a_task_from_start_to_clear(bench: Bench) -> None:
    go = threading.Event()
    bench.do = lambda op: go.wait(10) and "result"
    task = bench.task()
    status = bench.tasks.status(task)
    assert status["taskState"] in ("init", "running")
    assert (status["taskResult"], status["code"]) == ("", 0)
    with pytest.raises(TaskNotFinished):
        bench.tasks.clear(task)
    go.set()
    bench.ended(task)
    assert bench.tasks.statuses() == {
        task: {
            "taskID": task,
            "taskState": "finished",
            "taskResult": "success",
            "code": 0,
            "message": "done",
        }
    }
    assert bench.tasks.infos() == {task: {"id": task, "verb": "createVolume"}}
    assert bench.tasks.details()[task]["state"] == "finished"
    bench.tasks.clear(task)
    assert bench.tasks.statuses() == {}
    assert os.listdir(bench.directory) == []
    for ask in (bench.tasks.status, bench.tasks.info, bench.tasks.clear, bench.tasks.stop):
        with pytest.raises(TaskUnknown):
            ask(task)


def test_a_task_that_fails_says_why_and_is_taken_back(bench: Bench) -> None:
    bench.do = fail
    task = bench.task()
    bench.ended(task)
    status = bench.tasks.status(task)
    assert (status["taskState"], status["taskResult"]) == ("finished", "cleanSuccess")
    assert status["code"] == 201
    assert "v" in status["message"]
    bench.restart()
    assert bench.tasks.status(task) == status


def test_what_could_not_be_taken_back_is_tried_again(bench: Bench) -> None:
    bench.do, bench.undo = fail, broken
    task = bench.task()
    bench.ended(task)
    assert bench.tasks.status(task)["taskResult"] == "cleanFailure"
    bench.restart()
    assert bench.tasks.status(task)["taskResult"] == "cleanFailure"
    bench.undo = lambda op: False
    bench.runner.recover_domains(lambda domain: False)
    assert bench.tasks.status(task)["taskResult"] == "cleanFailure"
    bench.runner.recover_domains(lambda domain: domain == "domain")
    status = bench.tasks.status(task)
    assert (status["taskResult"], status["code"]) == ("cleanSuccess", 201)


def test_a_cleared_task_is_still_taken_back(bench: Bench) -> None:
    bench.do, bench.undo = fail, broken
    task = bench.task()
    bench.ended(task)
    bench.tasks.clear(task)
    assert bench.tasks.statuses() == {}
    bench.restart()
    assert bench.tasks.statuses() == {}
    undone = []
    bench.undo = lambda op: bool(undone.append(op.id))
    bench.runner.recover_domains(lambda domain: True)
    assert undone == [task]
    assert os.listdir(bench.directory) == []


def test_a_call_whose_clean_up_failed_is_kept(bench: Bench) -> None:
    bench.do, bench.undo = fail, broken
    with pytest.raises(VolumeDoesNotExist):
        bench.runner.run(bench.request())
    assert len(os.listdir(bench.directory)) == 1
    bench.undo = lambda op: False
    bench.restart()
    bench.runner.recover_domains(lambda domain: True)
    assert os.listdir(bench.directory) == []


def test_a_call_leaves_nothing(bench: Bench) -> None:
    bench.do = lambda op: 42
    assert bench.runner.run(bench.request()) == 42
    assert os.listdir(bench.directory) == []
    assert bench.changes == []


def test_stop_ends_a_task_at_its_next_step(bench: Bench) -> None:
    started, go = threading.Event(), threading.Event()

    def work(op: Operation) -> None:
        started.set()
        go.wait(10)
        op.step("one")

    bench.do = work
    task = bench.task()
    assert started.wait(10)
    bench.tasks.stop(task)
    assert bench.tasks.status(task)["taskState"] == "aborting"
    go.set()
    bench.ended(task)
    status = bench.tasks.status(task)
    assert (status["taskResult"], status["code"]) == ("cleanSuccess", 411)
    bench.tasks.stop(task)  # nothing to do any more


def test_revert(bench: Bench) -> None:
    task = bench.task("undoable")
    bench.ended(task)
    bench.tasks.revert(task)
    assert bench.reverted == [task]
    bench.tasks.revert(task)
    assert bench.reverted == [task]
    status = bench.tasks.status(task)
    assert (status["taskState"], status["taskResult"]) == ("finished", "cleanSuccess")


def test_what_cannot_be_reverted(bench: Bench) -> None:
    task = bench.task()
    bench.ended(task)
    with pytest.raises(TaskNotRevertible) as error:
        bench.tasks.revert(task)
    assert error.value.code == 410


def test_a_revert_that_fails_leaves_the_task_as_it_was(bench: Bench) -> None:
    task = bench.task("undoable")
    bench.ended(task)
    kind = bench.runner.kinds["undoable"]

    def revert(op: Operation) -> None:
        raise OSError("no")

    object.__setattr__(kind, "revert", revert)
    with pytest.raises(OSError, match="no"):
        bench.tasks.revert(task)
    assert bench.tasks.status(task)["taskResult"] == "success"


def test_an_interrupted_task_is_shown_as_running(bench: Bench) -> None:
    go = threading.Event()
    bench.do = lambda op: go.wait(10)
    task = bench.task()
    bench.restart()
    assert bench.tasks.status(task)["taskState"] == "running"
    assert [entry.id for entry in bench.runner.interrupted()] == [task]
    bench.undo = lambda op: True
    bench.runner.recover_domains(lambda domain: True)
    assert bench.tasks.status(task)["taskResult"] == "success"
    go.set()


def test_a_journal_that_cannot_be_read(bench: Bench) -> None:
    task = bench.task()
    bench.ended(task)
    damaged = bench.directory / f"{new_uuid()}.json"
    damaged.write_text("{ half")
    (bench.directory / f"{new_uuid()}.json.new").write_text("cut off")
    (bench.directory / f"{new_uuid()}.json").touch()  # of what never began
    (bench.directory / f"{new_uuid()}.json").write_bytes(bytes(700))
    bench.restart()
    assert list(bench.tasks.statuses()) == [task]
    assert sorted(os.listdir(bench.directory)) == sorted([f"{task}.json", damaged.name + ".bad"])


def test_what_cannot_be_kept_does_not_begin(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[str] = []
    bench.do = lambda op: began.append(op.id)

    def fails(fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="full"):
        bench.task()
    monkeypatch.undo()
    assert (began, bench.tasks.statuses(), os.listdir(bench.directory)) == ([], {}, [])
    bench.ended(task := bench.task())
    assert began == [task]


def test_many_at_once(bench: Bench) -> None:
    bench.do = lambda op: op.progress(0.5)
    tasks = [bench.task() for _ in range(60)]
    jobs = [bench.job() for _ in range(60)]
    for task in tasks:
        bench.ended(task)
    for job in jobs:
        bench.ended(job, JOB)
    assert {s["taskResult"] for s in bench.tasks.statuses().values()} == {"success"}
    assert {j["status"] for j in bench.jobs.get().values()} == {"done"}
    bench.restart()
    assert len(bench.tasks.statuses()) == 60
    assert len(bench.jobs.get()) == 60


def test_stop_all_takes_everything_back(bench: Bench) -> None:
    started = threading.Event()

    def work(op: Operation) -> None:
        started.set()
        op.cancel.event.wait(10)
        op.step("one")

    bench.do = work
    task = bench.task()
    assert started.wait(10)
    bench.runner.stop_all(10)
    assert bench.tasks.status(task)["taskState"] == "finished"


def test_a_job_as_engines_read_it(bench: Bench) -> None:
    reported, go = threading.Event(), threading.Event()

    def work(op: Operation) -> None:
        reported.wait(10)
        op.progress(0.25)
        go.set()
        reported.clear()
        reported.wait(10)

    bench.do = work
    job = bench.job()
    info = bench.jobs.get("storage", [job])[job]
    assert info["status"] in ("pending", "running")
    assert "progress" not in info
    assert "error" not in info
    assert info["job_type"] == "storage"
    assert info["description"] == "make it"
    reported.set()
    assert go.wait(10)
    progress = bench.jobs.get()[job]["progress"]
    assert isinstance(progress, float)
    assert progress == 25.0
    with pytest.raises(JobExists):
        bench.runner.start_job(job, bench.request())
    with pytest.raises(JobNotDone):
        bench.jobs.delete(job)
    reported.set()
    bench.ended(job, JOB)
    assert bench.jobs.get()[job]["status"] == "done"
    assert bench.jobs.get("virt") == {}
    assert bench.jobs.get("storage", [new_uuid()]) == {}
    with pytest.raises(JobNotActive):
        bench.jobs.abort(job)


def test_a_job_that_fails(bench: Bench) -> None:
    bench.do = fail
    job = bench.job()
    bench.ended(job, JOB)
    info = bench.jobs.get()[job]
    assert info["status"] == "failed"
    assert info["error"]["code"] == 201
    bench.jobs.delete(job)
    with pytest.raises(NoSuchJob):
        bench.jobs.abort(job)


def test_a_job_that_is_aborted(bench: Bench) -> None:
    def work(op: Operation) -> None:
        op.cancel.event.wait(10)
        raise ActionStopped()

    bench.do = work
    job = bench.job()
    bench.jobs.abort(job)
    bench.ended(job, JOB)
    assert bench.jobs.get()[job]["status"] == "aborted"


def test_ended_jobs_go_by_themselves(bench: Bench) -> None:
    job = bench.job()
    bench.ended(job, JOB)
    bench.clock.now += 3599
    bench.restart()
    assert list(bench.jobs.get()) == [job]
    bench.clock.now += 2
    assert bench.jobs.get() == {}
    assert os.listdir(bench.directory) == []


def test_only_words_that_engines_know(bench: Bench) -> None:
    def work(op: Operation) -> None:
        op.step("one")
        fail(op)

    bench.do = work
    task = bench.task()
    bench.ended(task)
    assert {state for state, _ in bench.changes} <= ENGINE_STATES
    assert bench.tasks.status(task)["taskResult"] in ENGINE_RESULTS


def test_a_step_that_was_not_declared(bench: Bench) -> None:
    bench.do = lambda op: op.step("three")
    with pytest.raises(LookupError, match="three"):
        bench.runner.run(bench.request())
