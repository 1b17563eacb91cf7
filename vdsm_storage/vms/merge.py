# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.merge: a volume of a running VM's disk becomes part of the volume below it.

QEMU does the work, and goes on with it whatever becomes of this agent.  The job here follows it:

    base gets room -> libvirt's block job -> (guest's own layer: marked, pivot) -> metadata

What is the case is read from libvirt's XML and its block job each time, so that an agent that was
restarted goes on where the old one ended, and a libvirtd that was restarted is only waited for.
A merge that fails or is aborted leaves the chain as it was; what it wrote into base is hidden by
the layer above.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.errors import (
    AgentError,
    LibvirtFailure,
    LibvirtTimeout,
    LibvirtUnavailable,
    ResourceTimeout,
)
from vdsm_storage.host.libvirt_blockjobs import BlockJob, Commit, LibvirtBlockJobs
from vdsm_storage.host.libvirt_model import VmError
from vdsm_storage.jobs.operation import MERGING, Kind, Operation, StillGoing
from vdsm_storage.jobs.runner import Runner
from vdsm_storage.vms import metadata
from vdsm_storage.vms.drives import METADATA, Drive
from vdsm_storage.vms.merge_disks import MergedDisks
from vdsm_storage.vms.merge_jobs import MergeJobs
from vdsm_storage.vms.merge_request import KIND, MergeRequest, Standing
from vdsm_storage.vms.merge_storage import MergeStorage
from vdsm_storage.vms.registry import Registry

SLICE: Final = 1.0  # seconds between two looks at whether a merge that waits was stopped
ANSWER: Final = 60.0  # seconds for libvirt to start a merge, or to pivot
STARTS: Final = 3  # attempts to start when libvirt went away meanwhile
LOOK: Final = (0.2, 2.0)  # seconds between two looks at a job, at first and at last
AGAIN: Final = (1.0, 30.0)  # seconds until a pivot that failed is tried again
FAILURES: Final = 5  # of libvirt's in a row: while a VM ends, its QEMU is gone in many ways
MISSED: Final = 3  # looks in a row that find no block job, until it has ended early
STOP: Final = 120.0  # seconds for an aborted job to end

log = logging.getLogger("vms.merge")

T = TypeVar("T")


@dataclass(frozen=True)
class Tools:
    """What a merge works with."""

    jobs: LibvirtBlockJobs
    registry: Registry
    storage: MergeStorage
    runner: Runner
    locks: Locks
    clock: Clock


class Merges:
    """The kind vm.merge."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._disks = MergedDisks(tools.jobs, tools.registry, tools.storage)
        self.jobs = MergeJobs(tools.runner)

    def kinds(self) -> tuple[Kind, ...]:
        steps = ("checked", "extended", "started", "copied", "marked", "pivoted", "synchronised")
        return (
            Kind(KIND, steps, self._run, self._recover, resume=self._run, work=MERGING),
        )

    # -- what callers ask --------------------------------------------------------------------

    def start(self, asked: MergeRequest, job: str) -> None:
        """Start a job under this id, after a look at whether it can be done.

        Raises NoSuchVM (1), VMIsDown (6), ImageFileNotFound (13), UnsupportedDriveType (36),
        MergeFailed (52), JobExists (69), 59.
        """
        self._disks.check(asked)
        for other in self.jobs.at_work(asked.vm):
            params = other.entry.params
            if other.entry.id != job and params["image"] == asked.image:
                raise asked.failed(f"job {other.entry.id} merges volumes of the same disk")
        self._tools.runner.start_job(job, asked.as_request())

    # -- looking -----------------------------------------------------------------------------

    def _standing(self, op: Operation, asked: MergeRequest) -> Standing | None:
        """As the VM has it now; None when the VM has ended.  Waits for a libvirt that is away."""
        return self._patiently(op, lambda: self._look(op, asked))

    def _look(self, op: Operation, asked: MergeRequest) -> Standing | None:
        """The same without patience.  Raises 52, 59."""
        now = self._disks.standing(asked, op.facts["disk"])
        if now is not None and now.job is not None:
            self.jobs.saw(op, now.job)
        return now

    def _patiently(self, op: Operation, look: Callable[[], T]) -> T:
        """Again and again while libvirt cannot be asked, and some times when it fails."""
        pause, failures = LOOK[0], 0
        while True:
            try:
                return look()
            except (LibvirtUnavailable, LibvirtTimeout) as error:
                log.info("Merge %s waits: %s", op.id, error)
            except LibvirtFailure as error:
                failures += 1
                if failures == FAILURES:
                    raise
                log.info("Merge %s looks again: %s", op.id, error)
            op.check()
            self._tools.clock.wait(op.cancel.event, pause)
            op.check()
            pause = min(2 * pause, LOOK[1])

    @contextlib.contextmanager
    def _turn(self, op: Operation, asked: MergeRequest) -> Iterator[None]:
        """No other operation on the VM's disks meanwhile; a snapshot with memory may take long."""
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(
                        self._tools.locks.held([Lock("vm_disks", asked.vm)], SLICE)
                    )
                    break
                except ResourceTimeout:
                    op.check()
            yield

    # -- forward -----------------------------------------------------------------------------

    def _run(self, op: Operation) -> None:
        """From the beginning, or from wherever it is."""
        asked = MergeRequest.from_params(op.params)
        storage = self._tools.storage
        try:
            with storage.held(asked, op.cancel):
                if "disk" not in op.facts:
                    self._begin(op, asked)
                op.step("checked")
                if self._merge(op, asked):
                    op.record(pivoted=True)
                    op.step("pivoted", abortable=False)
                self._see_written(op, asked)
                self._synchronise(op, asked)
                op.step("synchronised", abortable=False)
        finally:
            self.jobs.forget(op)

    def _begin(self, op: Operation, asked: MergeRequest) -> None:
        drive = self._patiently(op, lambda: self._disks.check(asked))
        if self._patiently(op, lambda: self._disks.job(asked.vm, drive.name)) is not None:
            raise asked.failed(f"somebody else's block job is at work on disk {drive.name}")
        volumes = drive.volumes
        op.record(disk=drive.name, child=asked.child(volumes))

    def _merge(self, op: Operation, asked: MergeRequest) -> bool:
        """Until the VM uses base without top.  Returns whether the guest was pivoted to it."""
        active = op.facts["child"] is None
        now = self._standing(op, asked)
        if now is not None and now.job is None and not now.has_merged(asked):
            self._start(op, asked)
        while True:
            now = self._follow(op, asked)
            if now is None:
                self._ended(op, asked)
                return active
            op.step("copied")
            if now.has_merged(asked):
                return active
            if self._pivot(op, asked):
                return True

    def _start(self, op: Operation, asked: MergeRequest) -> None:
        """The room, then the block job."""
        tools = self._tools
        tools.storage.unmark(asked)  # an attempt before a restart may have marked it
        tools.storage.extend(asked, op.facts["child"])
        op.step("extended")
        for _ in range(STARTS):
            with self._turn(op, asked):
                drive = self._patiently(op, lambda: self._disks.check(asked))
                started = self._start_job(op, asked, drive)
            now = self._standing(op, asked)
            if started or now is None or now.job is not None or now.has_merged(asked):
                op.step("started")
                return
        raise asked.failed("libvirt went away whenever it was asked to start")

    def _start_job(self, op: Operation, asked: MergeRequest, drive: Drive) -> bool:
        """False when it is not known whether it started."""
        paths = dict(zip(drive.volumes, drive.chain, strict=False))
        if asked.top not in paths:
            return True
        what = Commit(
            drive.name, paths[asked.base], paths[asked.top], asked.active, op.pace.limit
        )
        try:
            self._tools.jobs.commit(asked.vm, what, ANSWER)
        except VmError as error:
            raise asked.failed(error.text) from error
        except (LibvirtTimeout, LibvirtUnavailable) as error:
            log.warning("Not known yet whether merge of %s started: %s", asked.top, error)
            return False
        return True

    def _follow(self, op: Operation, asked: MergeRequest) -> Standing | None:
        """Until it is merged, or can pivot; None when the VM has ended.

        Raises MergeFailed (52) when the block job ended too early.
        """
        pause, missed = LOOK[0], 0
        while True:
            now = self._standing(op, asked)
            if now is None or now.has_merged(asked) or now.mirror == "yes":
                return now
            if now.job is not None:
                missed = 0
                if now.job.end > 0:
                    op.progress(0.95 * now.job.cur / now.job.end)
                self._keep_pace(op, asked, now.job)
            elif (missed := missed + 1) == MISSED:
                raise asked.failed(
                    "the block job ended early: no space was left, or the storage failed; the"
                    " chain is as it was, merge again when the storage is in order"
                )
            op.check()
            self._tools.clock.wait(op.cancel.event, pause)
            op.check()
            pause = min(1.3 * pause, LOOK[1])

    def _keep_pace(self, op: Operation, asked: MergeRequest, job: BlockJob) -> None:
        """Tell libvirt of a limit that was changed."""
        if job.bandwidth == op.pace.limit:
            return
        try:
            self._tools.jobs.set_bandwidth(asked.vm, op.facts["disk"], op.pace.limit)
        except (VmError, AgentError) as error:  # it may have ended just now
            log.info("Merge %s goes on at its pace: %s", op.id, error)

    def _pivot(self, op: Operation, asked: MergeRequest) -> bool:
        """Let the guest leave its layer.  False when the block job is in another state now."""
        pause = AGAIN[0]
        storage, clock = self._tools.storage, self._tools.clock
        while True:
            with self._turn(op, asked):
                storage.mark(asked)
                op.step("marked", abortable=False)
                failure = self._ask_to_pivot(op, asked)
                now = self._settled(op, asked)
                if now is None:
                    self._ended(op, asked)
                    return True
                if now.has_merged(asked):
                    return True
                storage.unmark(asked)
            if now.mirror != "yes":
                return False
            log.warning("The pivot to %s is tried again: %s", asked.base, failure)
            op.check()
            clock.wait(op.cancel.event, pause)
            op.check()
            pause = min(2 * pause, AGAIN[1])

    def _ask_to_pivot(self, op: Operation, asked: MergeRequest) -> str:
        """What went wrong, as far as it was told."""
        try:
            self._tools.jobs.pivot(asked.vm, op.facts["disk"], ANSWER)
        except VmError as error:
            return error.text
        except (LibvirtTimeout, LibvirtUnavailable) as error:
            return str(error)
        return ""

    def _settled(self, op: Operation, asked: MergeRequest) -> Standing | None:
        """As it stands when libvirt is not at work on it any more: nobody may unmark a leaf that
        the guest might leave yet."""
        while (now := self._standing(op, asked)) is not None and now.is_settling:
            self._tools.clock.wait(threading.Event(), LOOK[0])
        return now

    def _ended(self, op: Operation, asked: MergeRequest) -> None:
        """The VM is gone: what the volumes say.  Raises MergeFailed (52) if it was not merged."""
        if not self._tools.storage.has_merged(asked, op.facts["child"]):
            raise asked.failed("the VM has ended meanwhile; the chain is as it was")

    # -- the end -----------------------------------------------------------------------------

    def _see_written(self, op: Operation, asked: MergeRequest) -> None:
        """Until all is on the storage; nobody may delete top before.

        Raises MergeFailed (52) when the VM ended and left it so.
        """
        pause, never = AGAIN[0], threading.Event()
        while not self._is_written(op, asked):
            if self._standing(op, asked) is None:
                raise asked.failed(f"the VM ended before all was written; keep volume {asked.top}")
            if op.suspended:
                op.check()
            self._tools.clock.wait(never, pause)
            pause = min(2 * pause, AGAIN[1])

    def _is_written(self, op: Operation, asked: MergeRequest) -> bool:
        """QEMU is told to write, if need be.  What the guest itself writes to needs no look: the
        pivot sees to that."""
        storage = self._tools.storage
        if op.facts["child"] is None or storage.is_written(asked):
            return True
        try:
            self._disks.flush_base(asked)
        except AgentError as error:
            log.warning("Merge %s: %s", op.id, error)
        return storage.is_written(asked)

    def _synchronise(self, op: Operation, asked: MergeRequest) -> None:
        """The metadata of the volumes, and what engines keep in the VM's own."""
        self._tools.storage.synchronise(asked, op.facts["child"])
        self._tools.registry.changed(asked.vm)
        if op.facts["child"] is not None:
            return
        try:
            xml = self._tools.registry.definition(asked.vm).xml
            changed = metadata.with_volumes(xml, {op.facts["disk"]: asked.base})
            if changed is not None:
                self._tools.jobs.set_metadata(asked.vm, changed, metadata.PREFIX, METADATA)
        except (VmError, AgentError) as error:  # the disks themselves tell the truth
            log.warning("VM %s: its metadata still names old volumes: %s", asked.vm, error)
        self._tools.registry.changed(asked.vm)

    def _recover(self, op: Operation) -> bool:
        """After a failure or an abort: no block job, and the chain as it was, unless it is merged
        by now."""
        asked = MergeRequest.from_params(op.params)
        if "disk" not in op.facts:
            return False
        with self._tools.storage.held(asked):
            try:
                now = self._stopped(op, asked)
            except (LibvirtTimeout, LibvirtUnavailable) as error:
                raise StillGoing(f"libvirt cannot be asked: {error}") from error
            if now is None:
                child = op.facts["child"]
                merged = op.facts.get("pivoted") or self._tools.storage.has_merged(asked, child)
            else:
                merged = now.has_merged(asked)
            if merged and not self._is_written(op, asked):
                if now is not None:
                    raise StillGoing("not all is written")
                log.error("Merge %s: volume %s has data that base lacks", op.id, asked.top)
                return False
            if merged:
                self._synchronise(op, asked)
            elif op.facts["child"] is None:
                self._tools.storage.unmark(asked)
        return bool(merged)

    def _stopped(self, op: Operation, asked: MergeRequest) -> Standing | None:
        """As it stands without a block job.  Raises 52 if that does not end, 59."""
        end, never = Deadline(self._tools.clock, STOP), threading.Event()
        while not end.passed():
            now = self._look(op, asked)
            if now is None or (now.job is None and not now.is_settling):
                return now
            if not now.is_settling and not now.has_merged(asked):
                try:
                    self._tools.jobs.abort(asked.vm, op.facts["disk"])
                except VmError as error:  # it may have ended just now
                    log.info("Merge %s: %s", op.id, error)
            self._tools.clock.wait(never, LOOK[0])
        raise asked.failed("its block job does not end")
