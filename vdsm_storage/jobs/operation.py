# SPDX-License-Identifier: GPL-2.0-or-later
"""A multi-step operation as its author writes it.

A `Kind` says how one sort of operation runs and how it is recovered:

    Kind("volume.create", steps=("made", "published"), run=..., recover=...)

`run(op)` does the work, calling `op.step("made")` between steps and `op.record(key=value)` before
it does something that undoing must know.  `recover(op)` is called after run failed or after a
restart; it looks at the storage and at `op.facts`, and either completes the operation (returns
True) or takes everything back (returns False).  It is idempotent: it may die and be called again.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.pace import Pace
from vdsm_storage.jobs.journal import Entry, Journal

COPYING: Final = "copy"  # sorts of work on data whose pace can be limited
MERGING: Final = "merge"


class StillGoing(Exception):  # noqa: N818 - what it is, not that it is one
    """From `recover`: what was begun before the restart goes on by itself; ask again later."""


class CrashPoints:
    """Kills this process at one named point (`kind:step`), for tests.  Unarmed in production.

    A point may carry a count: `volume.create:made:3` dies when it is reached the third time.  With
    `stop ` before it the process is stopped there, until somebody continues it.
    """

    def __init__(self, armed: str | None = None) -> None:
        how, _, point = (armed or "").rpartition(" ")
        self._signal = signal.SIGSTOP if how == "stop" else signal.SIGKILL
        parts = point.split(":")
        self._point = ":".join(parts[:2]) if armed else None
        self._left = int(parts[2]) if len(parts) > 2 else 1

    def reach(self, point: str) -> None:
        if self._point == point:
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), self._signal)


class SuspendedError(Exception):
    """The agent ends, and the operation goes on with the next one: nothing is taken back."""


class Operation:
    """What the author of an operation has in hand while it runs or is recovered."""

    def __init__(self, kind: Kind, entry: Entry, journal: Journal, crash: CrashPoints) -> None:
        self._kind = kind
        self._entry = entry
        self._journal = journal
        self._crash = crash
        self._lock = threading.Lock()  # of the entry's file
        self._forgotten = False
        self._progress: float | None = None
        self.suspended = False  # by `suspend`
        self.cancel = Cancel()
        # As it was told last, as it was asked for, as is usual.
        wanted = entry.facts.get("bandwidth", entry.params.get("bandwidth") or kind.bandwidth)
        self.pace = Pace(int(wanted))

    @property
    def id(self) -> str:
        return self._entry.id

    @property
    def params(self) -> Mapping[str, Any]:
        """What the operation was asked to do: JSON values only."""
        return self._entry.params

    @property
    def facts(self) -> Mapping[str, Any]:
        """What `record` has kept, also from before a restart."""
        return self._entry.facts

    @property
    def fraction(self) -> float | None:
        """0.0 to 1.0, or None before the first report."""
        return self._progress

    def step(self, name: str, *, abortable: bool = True) -> None:
        """A boundary between two steps: a crash point, and a place where a stop is obeyed.

        `abortable=False` once the operation must go on to its end.  Raises ActionStopped.
        """
        if name not in self._kind.steps:
            raise LookupError(f"{self._kind.name} does not declare the step {name}")
        self._crash.reach(f"{self._kind.name}:{name}")
        if abortable:
            self.check()

    def suspend(self) -> None:
        """Let it end where it is, as if the agent had died: for kinds that can be resumed."""
        self.suspended = True
        self.cancel.event.set()

    def check(self) -> None:
        """Raises ActionStopped once a stop was asked for, SuspendedError when the agent ends."""
        if self.suspended:
            raise SuspendedError
        self.cancel.check()

    def record(self, **facts: Any) -> None:
        """Keep facts that recovery needs; durable when it returns."""
        with self._lock:
            self._entry.facts.update(facts)
            self._save()

    def begin(self) -> None:
        """Keep the entry before anything is done; durable when it returns.  Raises OSError."""
        self._journal.add(self._entry)

    def save(self) -> None:
        """Keep the entry as it is; durable when it returns.  Raises OSError."""
        with self._lock:
            self._save()

    def _save(self) -> None:
        if not self._forgotten:  # its caller may know its end, and clear it, before that is written
            self._journal.save(self._entry)

    def forget(self) -> None:
        """Drop the entry for good, after whoever writes it now."""
        with self._lock:
            self._forgotten = True
            self._journal.remove(self._entry)

    def describe(self, text: str) -> None:
        """What callers see beside state and progress, from now on."""
        with self._lock:
            self._entry.description = text

    def limit(self, bandwidth: int) -> None:
        """MiB a second from now on, 0 for no limit; also after a restart."""
        self.record(bandwidth=bandwidth)
        self.pace.limit = bandwidth

    def progress(self, fraction: float) -> None:
        """Report how far the work is, 0.0 to 1.0.  Cheap; call it as often as you like."""
        self._progress = min(1.0, max(0.0, fraction))

    def progress_of(self, number: int, count: int) -> Callable[[float], None]:
        """`progress` for one of `count` equal parts, the first of which has the number 0."""
        return lambda fraction: self.progress((number + fraction) / count)


@dataclass(frozen=True)
class Kind:
    """One sort of operation; see the module's text.

    `revert` takes back a finished operation (Task.revert); None where that makes no sense.
    `resume` goes on with one that did not fail when the agent ended, for as long as that takes:
    for work that goes on without the agent.  Such an operation outlives a restart of the agent.
    `work` of a kind that keeps to `op.pace` says which limit is usual for it; the MiB a second are
    `bandwidth` then, 0 for none.
    """

    name: str
    steps: tuple[str, ...]
    run: Callable[[Operation], Any]
    recover: Callable[[Operation], bool]
    revert: Callable[[Operation], None] | None = None
    resume: Callable[[Operation], Any] | None = None
    work: str = ""
    bandwidth: int = 0
