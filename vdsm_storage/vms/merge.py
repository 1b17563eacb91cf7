# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.merge: a volume of a running VM's disk becomes part of the one below it.

    checked   the two are neighbours in the chain, on the storage and in the guest
    extended  base has room for what top brings (block domains)
    started   QEMU copies; for the leaf it keeps both in step from some moment on
    ready     the leaf: top is ILLEGAL, so that nobody starts the VM from it
    pivoted   the leaf: the guest goes on in base
    synced    the volumes' metadata say what QEMU's chain is; top is ILLEGAL, to be deleted

QEMU and libvirt go on without the agent.  So a merge is always carried on by looking: at the chain
in the VM's XML, and at whether its disk still has a job.  A restart looks in the same way.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.base.clock import Clock
from vdsm_storage.base.locks import Lock
from vdsm_storage.errors import (
    ActionStopped,
    AgentError,
    DriveNotFound,
    LibvirtTimeout,
    LibvirtUnavailable,
    MergeFailed,
    NoSuchVM,
    VMIsDown,
)
from vdsm_storage.host.libvirt_model import BlockJob, VmError
from vdsm_storage.host.libvirt_vms import LibvirtVms
from vdsm_storage.images import chain, merge
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member, Subchain
from vdsm_storage.images.store import Store
from vdsm_storage.images.workshop import Workshop
from vdsm_storage.jobs import journal as j
from vdsm_storage.jobs.operation import Kind, Operation, StillGoing
from vdsm_storage.jobs.runner import Request, Runner
from vdsm_storage.vms import metadata
from vdsm_storage.vms.drives import METADATA, Drive
from vdsm_storage.vms.registry import Registry

KIND: Final = "vm.merge"
TURN: Final = 60.0  # seconds to wait for another operation on the VM's disks
LOOK: Final = 0.5  # seconds between two looks at how far it is
PIVOTS: Final = 10  # attempts to end a merge that is ready

log = logging.getLogger("vms.merge")


@dataclass(frozen=True)
class LiveMerge:
    """`leaf` is the volume that the disk has; `bandwidth` in bytes a second, 0 for no limit."""

    vm: str
    domain: str
    image: str
    leaf: str
    base: str
    top: str
    bandwidth: int

    def as_request(self) -> Request:
        return Request(
            kind=KIND,
            params=vars(self),
            domains=[self.domain],
            verb="VM.merge",
            lane=self.vm,
            description=f"Merge volume {self.top} of VM {self.vm} into {self.base}",
        )

    def failed(self, reason: object) -> MergeFailed:
        return MergeFailed(top=self.top, base=self.base, reason=reason)


class Merges:
    """The kind vm.merge."""

    def __init__(
        self, vms: LibvirtVms, registry: Registry, shop: Workshop, runner: Runner, clock: Clock
    ) -> None:
        self._vms = vms
        self._registry = registry
        self._shop = shop
        self._runner = runner
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, BlockJob] = {}  # by job: as it was last looked at
        self._pivots: dict[str, int] = {}  # by job: attempts

    def kinds(self) -> tuple[Kind, ...]:
        steps = ("checked", "extended", "started", "ready", "pivoted", "synced")
        return (Kind(KIND, steps, self._run, self._recover),)

    def start(self, asked: LiveMerge, job: str) -> None:
        """Raises NoSuchVM (1), VMIsDown (6), DriveNotFound (13), MergeFailed (52), 69, 59."""
        self._registry.state(asked.vm)
        self._check(asked)
        self._runner.start_job(job, asked.as_request())

    def jobs(self, vm: str) -> dict[str, dict[str, Any]]:
        """The merges of a VM that have not ended, as VM.getStats tells them."""
        found = {}
        for running in self._runner.all(j.JOB):
            entry = running.entry
            if entry.kind != KIND or entry.params["vm"] != vm or entry.state == j.FINISHED:
                continue
            with self._lock:
                seen = self._seen.get(entry.id, BlockJob(0, 0, entry.params["bandwidth"]))
            found[entry.id] = {
                "id": entry.id,
                "jobType": "block",
                "blockJobType": "commit",
                "imgUUID": entry.params["image"],
                "bandwidth": seen.bandwidth,
                "cur": str(seen.done),
                "end": str(seen.total),
            }
        return found

    # -- forward -----------------------------------------------------------------------------

    def _run(self, op: Operation) -> None:
        asked = LiveMerge(**op.params)
        with self._turn(asked):
            drive, sub = self._check(asked)
            child = sub.child.volume if sub.child is not None else None
            op.record(child=child)
            op.step("checked")
            self._make_room(op, asked, sub)
            op.step("extended")
            self._begin(asked, drive)
        op.step("started", abortable=False)
        try:
            self._follow(op, asked)
        finally:
            with self._lock:
                self._seen.pop(op.id, None)
                self._pivots.pop(op.id, None)

    def _check(self, asked: LiveMerge) -> tuple[Drive, Subchain]:
        drive = self._drive(asked)
        if not drive.is_volume(asked.domain, asked.image, asked.leaf):
            raise DriveNotFound(vm=asked.vm, disk=f"volume {asked.leaf} of image {asked.image}")
        volumes = drive.volumes
        if asked.top not in volumes or asked.base not in volumes[volumes.index(asked.top) + 1 :]:
            raise asked.failed(f"the disk has the chain {', '.join(volumes)}, from the top down")
        try:
            sub = self._subchain(asked, volumes)
        except AgentError as error:
            raise asked.failed(error) from error
        for member in (sub.base, sub.top):
            if member.is_shared or not member.metadata.is_legal:
                raise asked.failed(f"volume {member.volume} is a template, or not legal")
        return drive, sub

    def _subchain(self, asked: LiveMerge, volumes: Sequence[str]) -> Subchain:
        """Above top is what the guest has there: the storage may have volumes of a snapshot that
        failed.  Below it the storage knows as well."""
        store = self._shop.find_store(asked.domain)
        members = chain.walk(store, asked.image, asked.top)
        if members[-2].volume != asked.base:
            raise asked.failed(f"{members[-2].volume} lies between them")
        child = None
        if asked.top != volumes[0]:
            name = volumes[volumes.index(asked.top) - 1]
            child = Member(asked.image, name, store.load(asked.image, name))
        return Subchain(members[:-2], members[-2], members[-1], child)

    def _make_room(self, op: Operation, asked: LiveMerge, sub: Subchain) -> None:
        store = self._shop.find_store(asked.domain)
        if not store.is_block:
            return  # files grow as they are written, by QEMU itself
        capacity = max(sub.base.metadata.capacity, sub.top.metadata.capacity)
        with self._changing(asked):
            merge.make_room(store, self._shop.qemu, sub, capacity, op.progress)
        store.refresh(asked.image, asked.base)

    def _begin(self, asked: LiveMerge, drive: Drive) -> None:
        paths = {path.rpartition("/")[2]: path for path in drive.chain}
        base, top = paths[asked.base], paths[asked.top]
        try:
            active = top == drive.path
            self._vms.commit(asked.vm, drive.name, base, top, asked.bandwidth, active=active)
        except VmError as error:
            raise asked.failed(error.text) from error
        except LibvirtTimeout as error:  # it may have begun
            log.warning("%s: %s", asked.vm, error)

    def _follow(self, op: Operation, asked: LiveMerge) -> None:
        told, waiting = "", threading.Event()  # never set
        while True:
            try:
                if op.cancel.requested:
                    self._stop(asked)
                if self._advance(op, asked):
                    return
            except (LibvirtUnavailable, LibvirtTimeout) as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("Merge %s waits: %s", op.id, error)
            except MergeFailed as error:
                if op.cancel.requested:
                    raise ActionStopped() from error
                raise
            self._clock.wait(waiting, LOOK)

    def _stop(self, asked: LiveMerge) -> None:
        """What has been merged so far does no harm: top still covers it."""
        with contextlib.suppress(VmError):
            self._vms.abort_block_job(asked.vm, self._drive(asked).name)

    def _advance(self, op: Operation, asked: LiveMerge) -> bool:
        """One look, and what it asks for.  True when all is done.

        Raises MergeFailed (52) when nothing goes on any more and top is still there.
        """
        drive = self._drive(asked)
        job = self._job(asked, drive)
        if job is not None:
            self._see(op, job)
            if op.facts["child"] is None and drive.ready and asked.top in drive.volumes:
                self._pivot(op, asked, drive)
            return False
        if asked.top in self._drive(asked).volumes:  # looked at again: it may have ended just now
            raise asked.failed("QEMU ended the merge before it was complete")
        op.step("pivoted", abortable=False)
        self._sync(op, asked)
        op.step("synced", abortable=False)
        return True

    def _see(self, op: Operation, job: BlockJob) -> None:
        with self._lock:
            self._seen[op.id] = job
        if job.total:
            op.progress(job.done / job.total)

    def _pivot(self, op: Operation, asked: LiveMerge, drive: Drive) -> None:
        """Tried again; when that is of no use, the merge is given up."""
        with self._turn(asked):
            self._mark_top(asked, md.ILLEGAL)
            op.step("ready", abortable=False)
            try:
                self._vms.pivot(asked.vm, drive.name)
            except VmError as error:
                with self._lock:
                    count = self._pivots[op.id] = self._pivots.get(op.id, 0) + 1
                log.warning("Merge %s could not be ended, attempt %s: %s", op.id, count, error)
                if count < PIVOTS:
                    return
                self._stop(asked)
                raise asked.failed(error.text) from error
            finally:
                self._registry.changed(asked.vm)

    # -- looking -----------------------------------------------------------------------------

    def _drive(self, asked: LiveMerge) -> Drive:
        """As it is now.  Raises DriveNotFound (13), NoSuchVM (1), VMIsDown (6), 59."""
        for drive in self._registry.definition(asked.vm, fresh=True).drives:
            volume = drive.volume
            if volume is not None and (volume.domain, volume.image) == (asked.domain, asked.image):
                return drive
        raise DriveNotFound(vm=asked.vm, disk=f"volume {asked.leaf} of image {asked.image}")

    def _job(self, asked: LiveMerge, drive: Drive) -> BlockJob | None:
        try:
            return self._vms.block_job(asked.vm, drive.name)
        except VmError as error:
            raise self._registry.gone(asked.vm, error) from error

    # -- the volumes' metadata ---------------------------------------------------------------

    @contextlib.contextmanager
    def _turn(self, asked: LiveMerge) -> Iterator[None]:
        with self._shop.locks.held([Lock("vm_disks", asked.vm)], TURN):
            yield

    @contextlib.contextmanager
    def _changing(self, asked: LiveMerge) -> Iterator[Store]:
        with (
            self._shop.images(asked.domain, asked.image) as store,
            store.lock.held(self._shop.lock_timeout),
        ):
            yield store

    def _mark_top(self, asked: LiveMerge, legality: str) -> None:
        with self._changing(asked) as store:
            found = store.load(asked.image, asked.top)
            if found.legality != legality:
                store.save(asked.image, asked.top, found.with_(legality=legality))

    def _sync(self, op: Operation, asked: LiveMerge) -> None:
        """The chain without top.  All of it can be done again."""
        child = op.facts["child"]
        with self._changing(asked) as store:
            if asked.top in store.volumes(asked.image):
                top = store.load(asked.image, asked.top)
                if child is not None:
                    above = store.load(asked.image, child)
                    store.save(asked.image, child, above.with_(parent=asked.base))
                store.save(asked.image, asked.top, top.with_(legality=md.ILLEGAL))
                base = store.load(asked.image, asked.base)
                capacity = max(base.capacity, top.capacity)
                role = md.LEAF if child is None else base.voltype
                changed = base.with_(capacity=capacity, voltype=role)
                store.save(asked.image, asked.base, changed)
            store.release(asked.image, [asked.top])
        if child is None:
            self._tell_metadata(asked)
        self._registry.changed(asked.vm)

    def _tell_metadata(self, asked: LiveMerge) -> None:
        """What engines keep in the VM's metadata: the disk has another volume now."""
        try:
            volumes = {self._drive(asked).name: asked.base}
            xml = self._registry.definition(asked.vm).xml
            changed = metadata.with_volumes(xml, volumes)
            if changed is not None:
                self._vms.set_metadata(asked.vm, changed, metadata.PREFIX, METADATA)
        except (VmError, AgentError) as error:  # the disk itself tells the truth
            log.warning("VM %s: its metadata still names %s: %s", asked.vm, asked.top, error)

    # -- after a failure or a restart --------------------------------------------------------

    def _recover(self, op: Operation) -> bool:
        """Go on with what QEMU goes on with.  When the VM has ended, the headers on the storage
        tell what became of it: Image.reconcileVolumeChain."""
        asked = LiveMerge(**op.params)
        if "child" not in op.facts:
            return False
        try:
            if op.cancel.requested:
                self._stop(asked)
            if self._advance(op, asked):
                return True
        except (NoSuchVM, VMIsDown, DriveNotFound) as error:
            log.warning("Merge %s: %s; its chain is to be reconciled", op.id, error)
            return False
        except MergeFailed as error:
            log.warning("Merge %s: %s", op.id, error)
            self._mark_top(asked, md.LEGAL)
            return False
        raise StillGoing("QEMU merges")
