# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.migrate: a VM moves to another host, with its disks, its leases and its secrets.

The other agent is asked first (VM.migrationCreate): it makes the images usable and has the secrets
before libvirt there starts a QEMU.  Then the two libvirts move the VM between themselves, whatever
becomes of the agents.  So an agent that was restarted goes on with looking, and what counts is
where the VM is.  When it is gone from here its images and secrets are let go; when it stays the
other host is told to let go of its own, and does so by itself when nobody tells it (incoming.py).
"""

from __future__ import annotations

import contextlib
import enum
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Final

from vdsm_storage.base.clock import Deadline
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.errors import (
    ActionStopped,
    AgentError,
    MigrationCancelationFailed,
    MigrationError,
    MigrationNotInProgress,
    NoConnectionToPeer,
    NoSuchVM,
    PeerRefused,
    VMIsDown,
)
from vdsm_storage.host.libvirt_migration import GONE, LibvirtMigration, Way
from vdsm_storage.host.libvirt_model import Change, VmError, VmEvent
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request
from vdsm_storage.vms import migrate_xml
from vdsm_storage.vms.departing import Convergence, Packing, quietly
from vdsm_storage.vms.disk_xml import BadDiskError
from vdsm_storage.vms.keeping import BRIEFLY, DiskTools, Keeping
from vdsm_storage.vms.launches import COMING, Exit, Launches, why_stopped
from vdsm_storage.vms.migrate_request import MigrateRequest
from vdsm_storage.vms.migrations import Destination, Migrations

MIGRATE: Final = "vm.migrate"
BEGIN: Final = 600.0  # seconds that a migration may wait for its thread
AT_ONCE: Final = 200  # VMs; most of them wait for their turn
PREPARE: Final = 160.0  # seconds for the other agent to make the images usable
LET_GO: Final = 90.0  # seconds for it to let go of them
LIMIT: Final = 82  # its answer when too many VMs arrive there
LATER: Final = 1.0  # seconds to the next attempt
LOOK: Final = 0.25  # seconds between two looks
STARTED: Final = 10.0  # seconds for libvirt to begin
CONFIRM: Final = 60.0  # seconds to find out where a VM is that is not here

log = logging.getLogger("vms.migrate")


class _Seen(enum.Enum):
    GONE = "gone"
    STAYS = "stays"
    MOVES = "moves"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Leaving:
    """`publish(method, params)` sends an event; `announce(vm)` tells the state of a VM."""

    libvirt: LibvirtMigration
    migrations: Migrations
    launches: Launches
    lanes: Lanes
    publish: Callable[[str, Mapping[str, object]], None]
    announce: Callable[[str], None]
    frozen: Callable[[str], float | None]  # seconds since a guest was frozen


class Outgoing:
    """`event` is the registry's to call."""

    def __init__(self, tools: DiskTools, keeping: Keeping, leaving: Leaving) -> None:
        self._tools = tools
        self._keeping = keeping
        self._libvirt = leaving.libvirt
        self._migrations = leaving.migrations
        self._launches = leaving.launches
        self._lanes = leaving.lanes
        self._publish = leaving.publish
        self._announce = leaving.announce
        self._packing = Packing(keeping, leaving.libvirt, tools.secrets, leaving.frozen)
        self._never = threading.Event()
        self._going: dict[str, Operation] = {}
        self._ends: dict[str, Mapping[str, Any]] = {}  # what libvirt told of the end of VMs
        self._errors: dict[str, AgentError] = {}  # why VMs stay
        leaving.libvirt.watch_downtimes(self._migrations.stood_still)

    def kinds(self) -> tuple[Kind, ...]:
        steps = ("begun", "prepared", "sent", "ended")
        return (Kind(MIGRATE, steps, self._run, self._recover, resume=self._resume),)

    # -- what callers ask --------------------------------------------------------------------

    def migrate(self, asked: MigrateRequest) -> None:
        """Begin; what comes of it is told by status().

        Raises NoSuchVM (1), VMIsDown (6), MigrationError (12), MigrationInProgress (51), 59.
        """
        vm = asked.vm
        name = self._tools.registry.state(vm).name
        if self._launches.not_yet(vm):
            raise MigrationError(vm=vm, reason=f"it is listed as {self._launches.not_yet(vm)}")
        self._migrations.begin(vm, asked.peer)
        self._ends.pop(vm, None)
        try:
            adopted = self._launches.adopt(vm, name)
            work = self._lanes.submit(
                "migrate", lambda: self._start(asked, adopted=adopted), BEGIN, AT_ONCE
            )
        except (AgentError, OSError) as error:
            self._migrations.ended(vm, MigrationError(vm=vm, reason=error))
            raise
        work.add_done_callback(lambda done: self._done(vm, done))
        self._announce(vm)

    def cancel(self, vm: str) -> None:
        """It stays here.  Raises MigrationNotInProgress (81), MigrationCancelationFailed (47)."""
        if not self._migrations.leaving(vm):
            raise MigrationNotInProgress(vm=vm)
        operation = self._going.get(vm)
        if operation is None:
            raise MigrationCancelationFailed(vm=vm, reason="it has not begun yet; try again")
        operation.cancel.request()
        quietly(lambda: self._libvirt.abort_job(vm))  # else at the next look

    def load(self) -> None:
        """After the journal was read, before libvirt is connected."""
        for entry in self._tools.runner.interrupted():
            if entry.kind == MIGRATE and not self._migrations.leaving(str(entry.params["vm"])):
                self._migrations.begin(str(entry.params["vm"]), str(entry.params["peer"]))

    def event(self, event: VmEvent) -> None:
        if event.change is Change.STOPPED and self._migrations.leaving(event.vm):
            self._ends[event.vm] = event.facts

    # -- the operation -----------------------------------------------------------------------

    def _start(self, asked: MigrateRequest, *, adopted: bool) -> None:
        self._tools.runner.run(
            Request(
                kind=MIGRATE,
                params={
                    "vm": asked.vm, "peer": asked.peer, "limit": asked.limit, "adopted": adopted,
                    "outgoing": asked.outgoing, "way": asdict(asked.way),
                    "schedule": asked.schedule,
                },
                domains=[],
                verb="VM.migrate",
                lane=asked.vm,
                description=f"Move VM {asked.vm} to host {asked.peer}",
            )
        )  # fmt: skip

    def _done(self, vm: str, done: Future[Any]) -> None:
        """In the thread that ran it: should it not have come so far as to say so itself."""
        error = None if done.cancelled() else done.exception()
        operation = self._going.get(vm)
        if error is not None and self._migrations.leaving(vm) and operation is None:
            self._migrations.ended(vm, MigrationError(vm=vm, reason=error))

    def _run(self, op: Operation) -> None:
        vm = str(op.params["vm"])
        self._going[vm] = op
        with self._told(op, vm):
            self._wait_turn(op, vm)
            told = self._packing.pack(vm)
            op.step("begun")
            answer = self._ask(op, told)
            op.step("prepared")
            there = (answer.get("params") or {}).get("xml") if isinstance(answer, dict) else None
            self._migrations.send(vm)
            own = self._libvirt.own_xml(vm)
            op.record(sent=True)
            xml = migrate_xml.arriving(own, there) if there else own
            limits = self._tools.throttles.of(vm)
            call = self._send(op, vm, migrate_xml.with_limits(xml, limits))
            self._begun(vm, call)
            op.step("sent", abortable=False)
            self._follow(op, vm, call)
            op.step("ended", abortable=False)
            self._has_left(vm)

    def _resume(self, op: Operation) -> None:
        vm = str(op.params["vm"])
        self._going[vm] = op
        with self._told(op, vm):
            if not op.facts.get("sent"):
                reason = "the agent was restarted before it was sent"
                raise MigrationError(vm=vm, reason=reason)
            self._migrations.send(vm)
            self._follow(op, vm, None)
            self._has_left(vm)

    @contextlib.contextmanager
    def _told(self, op: Operation, vm: str) -> Iterator[None]:
        """What comes of it is known to whoever asks."""
        error: AgentError | None = None
        try:
            yield
        except ActionStopped:
            if not op.suspended:
                error = MigrationError(vm=vm, reason="it was stopped")
            raise
        except (VmError, BadDiskError) as refused:
            error = MigrationError(vm=vm, reason=refused)
            raise error from refused
        except AgentError as failed:
            error = failed
            raise
        finally:
            if error is not None:
                self._errors[vm] = error

    def _wait_turn(self, op: Operation, vm: str) -> None:
        """Those that were asked for first go first.  Raises ActionStopped."""
        while 0 < int(op.params["outgoing"]) <= self._migrations.ahead(vm):
            self._tools.clock.wait(op.cancel.event, LATER)
            op.check()

    def _ask(self, op: Operation, told: dict[str, Any]) -> Any:
        """The other agent gets ready; waits for its turn there.

        Raises NoConnectionToPeer (10), PeerRefused, ActionStopped.
        """
        vm, limit = str(op.params["vm"]), int(op.params["limit"])
        params = {"vmID": vm, "params": told, "incomingLimit": limit}
        while True:
            try:
                return self._peer(op).call("VM.migrationCreate", params, PREPARE)
            except PeerRefused as error:
                if error.number != LIMIT:
                    raise
            self._tools.clock.wait(op.cancel.event, LATER)
            op.check()

    def _peer(self, op: Operation) -> Destination:
        return self._migrations.at(str(op.params["peer"]))

    def _send(self, op: Operation, vm: str, xml: str) -> Future[Any]:
        way = Way(**op.params["way"])
        log.info("VM %s is sent to %s (%s)", vm, op.params["peer"], way.uri)
        return self._lanes.submit(
            f"send {vm}", lambda: self._libvirt.migrate(vm, xml, way), BEGIN, AT_ONCE
        )

    def _begun(self, vm: str, call: Future[Any]) -> None:
        end = Deadline(self._tools.clock, STARTED)
        while not (call.done() or end.passed()):
            with contextlib.suppress(VmError, AgentError):
                if self._libvirt.migration(vm) is not None:
                    return
            self._tools.clock.wait(self._never, LOOK)

    # -- where it is -------------------------------------------------------------------------

    def _follow(self, op: Operation, vm: str, call: Future[Any] | None) -> None:
        """Until it is on the other host.  Raises MigrationError when it stays, ActionStopped."""
        convergence = Convergence(self._libvirt, vm, op.params["schedule"])
        still = 0  # looks at which it ran here and nothing moved it
        while call is None or not call.done() or call.exception() is not None:
            if op.suspended:
                op.check()
            seen = self._look(op, vm, convergence)
            if seen is _Seen.GONE:
                self._is_gone(op, vm)
                return
            still = still + 1 if seen is _Seen.STAYS else 0
            if still > 1 and (call is None or call.done()):
                op.check()
                raise MigrationError(vm=vm, reason=_why(call))
            self._tools.clock.wait(self._never, LOOK)

    def _look(self, op: Operation, vm: str, convergence: Convergence) -> _Seen:
        try:
            self._tools.registry.state(vm)
            progress = self._libvirt.migration(vm)
        except (NoSuchVM, VMIsDown):
            return _Seen.GONE
        except (VmError, AgentError) as error:  # libvirt is away, or the VM is just ending
            log.info("VM %s: %s", vm, error)
            return _Seen.NOTHING
        if op.cancel.requested and not op.suspended:
            quietly(lambda: self._libvirt.abort_job(vm))
        if progress is None:
            return _Seen.STAYS
        quietly(lambda: convergence.look(progress))
        if self._migrations.sent(vm, progress.percent):
            op.progress(progress.percent / 100)
            self._publish_progress(vm)
        return _Seen.MOVES

    def _is_gone(self, op: Operation, vm: str) -> None:
        """It is not here: was it moved?  Raises MigrationError."""
        end = Deadline(self._tools.clock, CONFIRM)
        while not end.passed():
            facts = self._ends.get(vm)
            if facts is not None:
                if facts.get("detail") == GONE and not facts.get("crashed"):
                    return
                raise MigrationError(vm=vm, reason="it ended here meanwhile")
            try:
                found = self._peer(op).call("VM.getStats", {"vmID": vm}, PREPARE)
            except PeerRefused as error:
                raise MigrationError(vm=vm, reason=f"it ended meanwhile: {error}") from error
            except NoConnectionToPeer as error:
                log.warning("VM %s is not here, and may be on the other host: %s", vm, error)
            else:
                if found[0]["status"] != COMING:
                    return
            if op.suspended:
                op.check()
            self._tools.clock.wait(self._never, LATER)
        log.error("VM %s is not here; whether it is on %s is not known", vm, op.params["peer"])

    def _has_left(self, vm: str) -> None:
        """What this host had for it goes; what cannot go now does later (sweeper.py)."""
        self._going.pop(vm, None)
        self._migrations.ended(vm, None)
        self._launches.down(vm, Exit.MIGRATED, "The VM went to another host")
        self._publish_progress(vm)
        try:
            with self._keeping.turn(vm):
                self._keeping.release_all(vm)
        except AgentError as error:
            log.warning("VM %s: its images are let go later: %s", vm, error)

    def _publish_progress(self, vm: str) -> None:
        found = self._migrations.status(vm)
        told: dict[str, object] = {"progress": found.percent}
        if not found.going:
            told["downtime"] = found.downtime
        self._publish(f"|virt|VM_migration_status|{vm}", {vm: told})

    # -- after a failure or a restart --------------------------------------------------------

    def _recover(self, op: Operation) -> bool:
        """It stays here if it is here; then the other host lets go."""
        vm = str(op.params["vm"])
        here = True
        try:
            self._keeping.settled(vm, BRIEFLY)
        except (NoSuchVM, VMIsDown):
            here = False
        if here:
            self._call_off(op, vm)
        else:
            facts = self._ends.get(vm)
            missing = (Exit.MISSING, "The VM ended while it was moving")
            self._launches.down(vm, *(missing if facts is None else why_stopped(facts)))
        if here and op.params["adopted"]:
            self._launches.drop(vm)
        self._going.pop(vm, None)
        unknown = MigrationError(vm=vm, reason="the agent was restarted meanwhile")
        self._migrations.ended(vm, self._errors.pop(vm, unknown))
        if here:
            self._announce(vm)
        return False

    def _call_off(self, op: Operation, vm: str) -> None:
        """Not by VM.destroy, which would end a VM that runs there after all."""
        try:
            self._peer(op).call("VM.migrateCancel", {"vmID": vm}, LET_GO)
        except (NoConnectionToPeer, PeerRefused) as error:
            log.info("VM %s stays here; the other host: %s", vm, error)


def _why(call: Future[Any] | None) -> str:
    error = call.exception() if call is not None else None
    return str(error) if error is not None else "libvirt stopped while it was being sent"
