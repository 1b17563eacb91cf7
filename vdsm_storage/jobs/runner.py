# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs operations: as tasks and jobs in lanes, or in the caller's thread; recovers them all.

A task or job whose process died is recovered when the domains that it needs are there again
(`recover_domains`).  Until then it is shown as running, because nobody knows yet how it ends.
What failed and could not be taken back (its storage was gone) is tried again in the same way.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.errors import ActionStopped, AgentError, JobExists, TaskAborted, agent_error
from vdsm_storage.jobs import journal as j
from vdsm_storage.jobs.journal import Entry, Journal
from vdsm_storage.jobs.operation import (
    CrashPoints,
    Kind,
    Operation,
    StillGoing,
    SuspendedError,
)

log = logging.getLogger("jobs")

RUN_TIMEOUT = 7 * 24 * 3600.0  # seconds that a queued task may wait for its lane
AT_ONCE = 16  # tasks and jobs of one lane; those that change a volume group do it together
SUCCESS = "success"
CLEAN_SUCCESS = "cleanSuccess"  # failed, and taken back
CLEAN_FAILURE = "cleanFailure"  # failed, and something is left of it
REVERTING = "reverting"  # fact of an entry whose operation is being reverted


@dataclass(frozen=True)
class Request:
    """What to run: the kind's name, its params (JSON values), where, and on whose behalf."""

    kind: str
    params: Mapping[str, Any]
    domains: Sequence[str]
    verb: str
    lane: str = ":host"
    description: str = ""


@dataclass
class Running:
    """An entry and, while it runs or waits for recovery, its operation."""

    entry: Entry
    operation: Operation
    interrupted: bool = False  # waits for its domains in order to be recovered
    done: threading.Event = field(default_factory=threading.Event)


class Runner:
    """`kinds` is the explicit table of what can run (agent.py builds it).

    `on_change(entry, fraction)` is told of every state change, from the thread that made it.
    """

    def __init__(
        self,
        journal: Journal,
        lanes: Lanes,
        clock: Clock,
        crash: CrashPoints,
        on_change: Callable[[Entry, float | None], None],
    ) -> None:
        self._journal = journal
        self._lanes = lanes
        self._clock = clock
        self._crash = crash
        self._on_change = on_change
        self._kinds: dict[str, Kind] = {}
        self._lock = threading.Lock()
        self._running: dict[str, Running] = {}

    def add_kinds(self, kinds: Sequence[Kind], limits: Mapping[str, int] | None = None) -> None:
        """Part of the wiring: called before load() and before any request.  `limits` are MiB a
        second by sorts of work, 0 for none."""
        for each in kinds:
            kind = replace(each, bandwidth=(limits or {}).get(each.work, each.bandwidth))
            if kind.name in self._kinds:
                raise ValueError(f"operation kind {kind.name} is defined twice")
            self._kinds[kind.name] = kind

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return self._kinds

    # -- starting ----------------------------------------------------------------------------

    def run(self, request: Request) -> Any:
        """Run in this thread and return the result; journaled, and gone from the journal after."""
        running = self._register(j.CALL, new_uuid(), request)
        try:
            return self._execute(running)
        finally:
            if not running.interrupted:
                self.forget(running.entry.id)

    def start_task(self, request: Request) -> str:
        """Start a task in its lane; returns its id at once."""
        running = self._register(j.TASK, new_uuid(), request)
        self._submit(running, request.lane)
        return running.entry.id

    def start_job(self, job_id: str, request: Request) -> None:
        """Start a job under the id that the caller chose.  Raises JobExists."""
        running = self._register(j.JOB, job_id, request)
        self._submit(running, request.lane)

    def _register(self, family: str, entry_id: str, request: Request) -> Running:
        kind = self._kinds[request.kind]
        entry = Entry(
            id=entry_id,
            family=family,
            kind=request.kind,
            verb=request.verb,
            params=dict(request.params),
            domains=list(request.domains),
            description=request.description,
            created=self._clock.time(),
        )
        running = Running(entry, Operation(kind, entry, self._journal, self._crash))
        with self._lock:
            if entry_id in self._running:
                raise JobExists(job=entry_id)
            self._running[entry_id] = running
        try:
            running.operation.begin()
        except OSError:
            with self._lock:
                del self._running[entry_id]
            raise
        return running

    def _submit(self, running: Running, lane: str, *, again: bool = False) -> None:
        def work() -> None:
            try:
                self._execute(running, again=again)
            except Exception as error:  # noqa: BLE001 - root of the task; the entry holds it
                log.warning("%s %s ended: %s", running.entry.verb, running.entry.id, error)
            if running.entry.family == j.CALL and not running.interrupted:
                self.forget(running.entry.id)  # its caller is gone

        try:
            self._lanes.submit(f"task {lane}", work, RUN_TIMEOUT, AT_ONCE)
        except AgentError:
            if again:
                running.interrupted = True
            else:
                self.forget(running.entry.id)
            raise

    # -- running -----------------------------------------------------------------------------

    def _execute(self, running: Running, *, again: bool = False) -> Any:
        """`again`: it was begun by an agent that is no more."""
        entry, operation = running.entry, running.operation
        kind = self._kinds[entry.kind]
        work = kind.resume if again and kind.resume is not None else kind.run
        self._change(running, j.RUNNING, durable=False)
        try:
            operation.check()
            result = work(operation)
        except Exception as error:
            # What waits for a stop alone takes the end of the agent for one.
            if operation.suspended and isinstance(error, SuspendedError | ActionStopped):
                log.info("%s %s goes on when the agent is back", entry.verb, entry.id)
                running.interrupted = True
                running.done.set()
            else:
                self._failed(running, error)
            raise
        self._finish(running, SUCCESS, result)
        return result

    def _failed(self, running: Running, error: Exception) -> None:
        """Take back what a failed run left; remember the first error."""
        entry = running.entry
        if isinstance(error, ActionStopped):
            entry.aborted = True
            log.info("%s %s was stopped", entry.verb, entry.id)
            if entry.family == j.TASK:
                error = TaskAborted(task=entry.id)
        else:
            log.exception("%s %s failed", entry.verb, entry.id)
        known = agent_error(error)
        code = known.code if known is not None else 100
        entry.error = {"code": code, "message": str(known or error)}
        self._change(running, j.CLEANING)
        try:
            self._kinds[entry.kind].recover(running.operation)
        except Exception:
            log.exception(
                "%s %s could not be taken back; tried again when its storage works",
                entry.verb,
                entry.id,
            )
            running.interrupted = True
            self._finish(running, CLEAN_FAILURE, None)
        else:
            self._finish(running, CLEAN_SUCCESS, None)

    def _finish(self, running: Running, outcome: str, result: Any) -> None:
        entry = running.entry
        entry.outcome = outcome
        entry.result = result
        entry.ended = self._clock.time()
        self._change(running, j.FINISHED, durable=entry.family != j.CALL or running.interrupted)
        running.done.set()

    def _change(self, running: Running, state: str, durable: bool = True) -> None:
        """Told before it is written: a restart that knows only the intent looks at the storage and
        comes to the same end."""
        running.entry.state = state
        if running.entry.family != j.CALL:
            self._on_change(running.entry, running.operation.fraction)
        if durable:
            try:
                running.operation.save()
            except OSError as error:
                log.error("%s %s is %s: %s", running.entry.verb, running.entry.id, state, error)

    # -- after a restart ---------------------------------------------------------------------

    def load(self) -> None:
        """Read the journal; entries that were running wait for their domains."""
        for entry in self._journal.load():
            kind = self._kinds.get(entry.kind)
            if kind is None:
                log.error("Entry %s is of the unknown kind %s: left alone", entry.id, entry.kind)
                continue
            running = Running(entry, Operation(kind, entry, self._journal, self._crash))
            running.interrupted = entry.state != j.FINISHED or entry.outcome == CLEAN_FAILURE
            if entry.state == j.FINISHED:
                running.done.set()
            elif entry.state == j.INIT:
                entry.state = j.RUNNING
            with self._lock:
                self._running[entry.id] = running

    def interrupted(self) -> list[Entry]:
        """What still waits for its domains."""
        with self._lock:
            return [r.entry for r in self._running.values() if r.interrupted]

    def recover_domains(self, usable: Callable[[str], bool]) -> None:
        """Recover, oldest first, every interrupted entry all of whose domains are `usable`."""
        with self._lock:
            waiting = [r for r in self._running.values() if r.interrupted]
        for running in sorted(waiting, key=lambda r: r.entry.created):
            if all(usable(domain) for domain in running.entry.domains):
                self._recover(running)

    def _recover(self, running: Running) -> None:
        entry = running.entry
        with self._lock:
            if not running.interrupted:
                return
            running.interrupted = False
        if self._kinds[entry.kind].resume is not None and entry.state == j.RUNNING:
            log.info("%s %s goes on (%s)", entry.verb, entry.id, entry.kind)
            self._submit(running, f"resumed {entry.id}", again=True)
            return
        log.info("Recovering %s %s (%s)", entry.verb, entry.id, entry.kind)
        try:
            completed = self._recover_kind(running)
        except StillGoing as going:
            log.info("%s %s goes on: %s", entry.verb, entry.id, going)
            running.interrupted = True
            return
        except Exception:
            log.exception("Recovery of %s %s failed; it is tried again", entry.verb, entry.id)
            running.interrupted = True
            return
        if entry.family == j.CALL:
            self.forget(entry.id)
        elif completed:
            entry.error = None
            self._finish(running, SUCCESS, entry.facts.get("result"))
        else:
            if entry.error is None:
                message = f"{entry.verb} was interrupted by a restart of the agent and taken back"
                entry.error = {"code": 411 if entry.aborted else 100, "message": message}
            self._finish(running, CLEAN_SUCCESS, None)

    def _recover_kind(self, running: Running) -> bool:
        kind = self._kinds[running.entry.kind]
        if running.entry.facts.get(REVERTING) and kind.revert is not None:
            kind.revert(running.operation)
            return False
        return kind.recover(running.operation)

    # -- looking -----------------------------------------------------------------------------

    def get(self, entry_id: str, family: str) -> Running | None:
        with self._lock:
            running = self._running.get(entry_id)
        return running if running is not None and running.entry.family == family else None

    def all(self, family: str) -> list[Running]:
        with self._lock:
            return [r for r in self._running.values() if r.entry.family == family]

    def busy(self, domain: str) -> int:
        """How many operations on the domain are at work, or about to be."""
        with self._lock:
            return sum(
                domain in r.entry.domains and not r.interrupted and not r.done.is_set()
                for r in self._running.values()
            )

    def idle(self, domain: str) -> bool:
        """Whether nothing is at work on the domain, and nothing waits to be recovered there."""
        with self._lock:
            return not any(
                domain in r.entry.domains and (r.interrupted or not r.done.is_set())
                for r in self._running.values()
            )

    def stop(self, running: Running) -> None:
        """Ask it to stop; it ends at its next step."""
        if running.entry.state in (j.INIT, j.RUNNING):
            running.entry.aborted = True
            if not running.interrupted:
                self._change(running, j.ABORTING, durable=False)
            running.operation.cancel.request()

    def stop_domains(self, domains: Collection[str]) -> None:
        """Ask everything to stop that works on one of `domains`."""
        with self._lock:
            running = [r for r in self._running.values() if not r.done.is_set()]
        for each in running:
            if not each.interrupted and not set(each.entry.domains).isdisjoint(domains):
                log.warning("Stopping %s %s", each.entry.verb, each.entry.id)
                self.stop(each)

    def stop_all(self, timeout: float) -> None:
        """Ask everything to stop and wait `timeout` seconds in all; what goes on, has not begun or
        can be resumed, is recovered after the next start."""
        with self._lock:
            running = [r for r in self._running.values() if not r.done.is_set()]
        active = [r for r in running if not r.interrupted and r.entry.state != j.INIT]
        for each in active:
            if self._kinds[each.entry.kind].resume is not None:
                each.operation.suspend()
            else:
                self.stop(each)
        deadline = Deadline(self._clock, timeout)
        for each in active:
            if not each.done.wait(deadline.left()):
                log.warning("%s %s goes on at the end", each.entry.verb, each.entry.id)

    def can_revert(self, running: Running) -> bool:
        return self._kinds[running.entry.kind].revert is not None

    def revert(self, running: Running) -> None:
        """Take a finished operation back, in this thread.  The caller checked that it can be.

        A crash meanwhile is recovered by doing it again.
        """
        revert = self._kinds[running.entry.kind].revert
        if revert is None:
            raise ValueError(f"{running.entry.kind} cannot be reverted")
        entry = running.entry
        entry.facts[REVERTING] = True
        entry.state = j.CLEANING
        running.operation.save()
        try:
            revert(running.operation)
        except BaseException:
            del entry.facts[REVERTING]
            self._change(running, j.FINISHED)
            raise
        entry.error = {"code": 411, "message": f"{entry.verb} was taken back by Task.revert"}
        entry.outcome = CLEAN_SUCCESS
        self._change(running, j.FINISHED)

    def demote(self, running: Running) -> None:
        """Show it no more, and still take it back when its storage works."""
        running.entry.family = j.CALL
        running.operation.save()

    def forget(self, entry_id: str) -> None:
        """Drop an entry from memory and disk."""
        with self._lock:
            running = self._running.pop(entry_id, None)
        if running is not None:
            running.operation.forget()
