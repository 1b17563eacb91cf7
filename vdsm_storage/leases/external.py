# SPDX-License-Identifier: GPL-2.0-or-later
"""External leases: those of virtual machines and of jobs on volumes that other storage holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vdsm_storage.base.clock import Clock
from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.errors import (
    GenerationMismatch,
    JobStatusMismatch,
    LeaseExists,
    LeasesIndexFull,
    LeasesUnsupported,
    NoSuchLease,
    SanlockLVBError,
)
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request
from vdsm_storage.leases import index as ix
from vdsm_storage.leases import job_metadata as jm
from vdsm_storage.leases.job_metadata import JobMetadata
from vdsm_storage.leases.lease import Leases
from vdsm_storage.leases.model import ClusterLock, Geometry, LeaseSpec
from vdsm_storage.leases.slots import Slots

CREATE = "lease.create"
DELETE = "lease.delete"
REBUILD = "lease.rebuild"


class LeaseDomain(Protocol):
    """What this module needs of a storage domain.  `xleases_path` is None where there are none."""

    @property
    def id(self) -> str: ...

    @property
    def xleases_path(self) -> str | None: ...

    @property
    def geometry(self) -> Geometry: ...

    @property
    def lock(self) -> ClusterLock: ...


@dataclass(frozen=True)
class LeaseRef:
    """A lease by its domain and its id, both UUIDs."""

    sd_id: str
    lease_id: str

    def params(self) -> dict[str, Any]:
        return {"sd_id": self.sd_id, "lease_id": self.lease_id}


@dataclass(frozen=True)
class Hosting:
    """What the host gives: how a task is started, and the UUID of the hardware."""

    start_task: Callable[[Request], str]
    hardware_id: Callable[[], str]


class ExternalLeases:
    """`find` gives a domain by UUID (358 if there is none).

    `lock_timeout`: seconds to wait for the domain's lock and for a lease that is to be deleted.
    """

    def __init__(
        self,
        leases: Leases,
        find: Callable[[str], LeaseDomain],
        locks: Locks,
        clock: Clock,
        lock_timeout: float,
        hosting: Hosting,
    ) -> None:
        self._leases = leases
        self._find = find
        self._locks = locks
        self._clock = clock
        self._timeout = lock_timeout
        self._start_task = hosting.start_task
        self._hardware_id = hosting.hardware_id

    def kinds(self) -> list[Kind]:
        return [
            Kind(
                CREATE,
                ("chosen", "written", "indexed"),
                self._create,
                self._recover_create,
                self._revert_create,
            ),
            Kind(DELETE, ("found", "unindexed", "cleared"), self._delete, self._recover_delete),
            Kind(REBUILD, ("scanned", "rebuilt"), self._rebuild, self._recover_rebuild),
        ]

    # -- asking ------------------------------------------------------------------------------

    def check_domain(self, sd_id: str) -> LeaseDomain:
        """The domain; raises LeasesUnsupported (350) where it has no external leases."""
        domain = self._find(sd_id)
        self._slots(domain)
        return domain

    def all(self, sd_id: str) -> dict[str, dict[str, Any]]:
        """Every lease: {"offset": bytes, "updating": bool}."""
        slots = self._slots(self._find(sd_id))
        alignment = slots.geometry.alignment
        return {
            record.lease: {
                "offset": ix.lease_offset(record.number, alignment),
                "updating": record.updating,
            }
            for record in slots.load().records
        }

    def spec(self, ref: LeaseRef) -> LeaseSpec:
        """Where the lease is.  Raises NoSuchLease (936)."""
        slots = self._slots(self._find(ref.sd_id))
        record = slots.load().find(ref.lease_id)
        if record is None or record.updating:
            raise NoSuchLease(lease=ref.lease_id, domain=ref.sd_id)
        return slots.spec(record.number, ref.lease_id)

    def metadata(self, ref: LeaseRef) -> JobMetadata | None:
        """What the lease says of its job; as of the last release while somebody holds it."""
        spec = self.spec(ref)
        return self._decode(spec, self._leases.read_data(spec))

    def status(self, ref: LeaseRef) -> dict[str, Any]:
        """Owners, version and job, as Lease.status answers."""
        state = self._leases.state(self.spec(ref))
        found: dict[str, Any] = {"owners": list(state.owners), "version": state.version}
        metadata = self.metadata(ref)
        if metadata is not None:
            found["metadata"] = metadata.as_dict()
        return found

    def info(self, ref: LeaseRef) -> dict[str, Any]:
        """sd_id, lease_id, path, offset, as Lease.info answers.  Raises 936."""
        spec = self.spec(ref)
        return {**ref.params(), "path": spec.path, "offset": spec.offset}

    # -- starting tasks ----------------------------------------------------------------------

    def start_create(self, ref: LeaseRef, metadata: Mapping[str, Any] | None) -> str:
        """Returns the task.  Raises 350, 654."""
        params = ref.params()
        if metadata:
            given = jm.from_request(metadata, self._now(), self._hardware_id())
            params["metadata"] = given.as_dict()
        return self._start(ref.sd_id, Request(CREATE, params, [ref.sd_id], "addLease", ref.sd_id))

    def start_delete(self, ref: LeaseRef) -> str:
        """Returns the task.  Raises 350, 654, 936."""
        self.spec(ref)
        request = Request(DELETE, ref.params(), [ref.sd_id], "removeLease", ref.sd_id)
        return self._start(ref.sd_id, request)

    def start_rebuild(self, sd_id: str) -> str:
        """Returns the task.  Raises 350, 654."""
        return self._start(
            sd_id, Request(REBUILD, {"sd_id": sd_id}, [sd_id], "rebuildLeases", sd_id)
        )

    def _start(self, sd_id: str, request: Request) -> str:
        """The lock is held meanwhile: a caller learns at once that another host has it (654)."""
        with self.check_domain(sd_id).lock.held(self._timeout):
            return self._start_task(request)

    # -- jobs --------------------------------------------------------------------------------

    def fence(self, ref: LeaseRef, given: Mapping[str, Any]) -> None:
        """Keep the job of the generation `given` from ever starting.

        Raises 651 while it runs, GenerationMismatch (911), JobStatusMismatch (912).
        """
        expected = jm.from_request(given, self._now(), self._hardware_id())
        spec = self.spec(ref)
        with self._leases.held(spec, self._timeout, lvb=True):
            found = self._checked(spec, expected)
            self._leases.set_data(spec, found.ended(jm.FENCED, self._now()).encode())

    @contextlib.contextmanager
    def job(self, ref: LeaseRef, job_id: str, generation: int) -> Iterator[None]:
        """Hold the lease while the job runs; it then tells whether the job succeeded.

        Raises 911, 912 when the engine asked for another generation or fenced the job.
        """
        spec = self.spec(ref)
        expected = JobMetadata(job_id, generation, jm.PENDING)
        with self._leases.held(spec, self._timeout, lvb=True):
            found = self._checked(spec, expected)
            status = jm.FAILED
            try:
                yield
                status = jm.SUCCEEDED
            finally:
                self._leases.set_data(spec, found.ended(status, self._now()).encode())

    def _checked(self, spec: LeaseSpec, expected: JobMetadata) -> JobMetadata:
        found = self._decode(spec, self._leases.get_data(spec))
        if found is None or found.job_id != expected.job_id:
            raise JobStatusMismatch(
                lease=spec.resource,
                job=expected.job_id,
                status="unknown to it" if found is None else f"of job {found.job_id}",
                expected=expected.job_status,
            )
        if found.generation != expected.generation:
            raise GenerationMismatch(
                volume=spec.resource, actual=found.generation, requested=expected.generation
            )
        if found.job_status != expected.job_status:
            raise JobStatusMismatch(
                lease=spec.resource,
                job=expected.job_id,
                status=found.job_status,
                expected=expected.job_status,
            )
        return found

    # -- changing ----------------------------------------------------------------------------

    def _create(self, op: Operation) -> None:
        ref = _ref(op)
        with self._guard(ref.sd_id) as slots:
            index = slots.load()
            record = index.find(ref.lease_id)
            if record is not None and not record.updating:
                raise LeaseExists(lease=ref.lease_id, domain=ref.sd_id)
            number = record.number if record is not None else index.first_free()
            if number is None:
                raise LeasesIndexFull(domain=ref.sd_id, limit=ix.RECORDS)
            op.record(number=number)
            op.step("chosen")
            spec = slots.spec(number, ref.lease_id)
            slots.fence()
            self._leases.write(spec)
            if op.params.get("metadata"):
                metadata = jm.from_request(op.params["metadata"], self._now(), "")
                with self._leases.held(spec, self._timeout, lvb=True):
                    self._leases.set_data(spec, metadata.encode())
            op.step("written")
            slots.set(number, ref.lease_id)
            op.step("indexed", abortable=False)

    def _recover_create(self, op: Operation) -> bool:
        number = op.facts.get("number")
        if number is None:
            return False
        ref = _ref(op)
        with self._guard(ref.sd_id) as slots:
            record = slots.load().find(ref.lease_id)
            if record is not None and record.number == number and not record.updating:
                return True
            self._clear_if_free(slots, number)
            return False

    def _revert_create(self, op: Operation) -> None:
        ref = _ref(op)
        with self._guard(ref.sd_id) as slots:
            record = slots.load().find(ref.lease_id)
            if record is not None and record.number == op.facts["number"]:
                self._unindex(slots, record)
            self._clear_if_free(slots, op.facts["number"])

    def _delete(self, op: Operation) -> None:
        ref = _ref(op)
        with self._guard(ref.sd_id) as slots:
            record = slots.load().find(ref.lease_id)
            if record is None:
                raise NoSuchLease(lease=ref.lease_id, domain=ref.sd_id)
            op.record(number=record.number)
            op.step("found")
            self._unindex(slots, record)
            op.step("unindexed", abortable=False)
            slots.fence()
            self._leases.clear(slots.spec(record.number, ref.lease_id))
            op.step("cleared", abortable=False)

    def _unindex(self, slots: Slots, record: ix.Record) -> None:
        """Take a lease out of the index while nobody else has it.  Raises 651."""
        if record.updating:
            slots.set(record.number, "")
            return
        with self._leases.held(slots.spec(record.number, record.lease), self._timeout):
            slots.set(record.number, "")

    def _recover_delete(self, op: Operation) -> bool:
        number = op.facts.get("number")
        if number is None:
            return False
        ref = _ref(op)
        with self._guard(ref.sd_id) as slots:
            if slots.load().find(ref.lease_id) is not None:
                return False
            self._clear_if_free(slots, number)
            return True

    def _clear_if_free(self, slots: Slots, number: int) -> None:
        """Clear the lease at a slot that the index does not name."""
        if all(record.number != number for record in slots.load().records):
            slots.fence()
            self._leases.clear(slots.spec(number, ""))

    def _rebuild(self, op: Operation) -> None:
        with self._guard(str(op.params["sd_id"])) as slots:
            found = tuple(slots.scan())
            op.step("scanned")
            slots.write(ix.Index(slots.lockspace, self._now(), found))
            op.step("rebuilt", abortable=False)

    def _recover_rebuild(self, op: Operation) -> bool:
        """An index that can be read is as good as it was or rebuilt; another is rebuilt."""
        if op.cancel.requested:
            return False
        with self._guard(str(op.params["sd_id"])) as slots:
            slots.write(ix.Index(slots.lockspace, self._now(), tuple(slots.scan())))
        return True

    # -- inside ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _guard(self, sd_id: str) -> Iterator[Slots]:
        domain = self._find(sd_id)
        slots = self._slots(domain)
        locks = [Lock("00_storage", sd_id, exclusive=False), Lock("05_xleases", sd_id)]
        with self._locks.held(locks, self._timeout), domain.lock.held(self._timeout):
            yield slots

    @staticmethod
    def _slots(domain: LeaseDomain) -> Slots:
        if domain.xleases_path is None:
            raise LeasesUnsupported(
                domain=domain.id, reason="its type or its format, below 4, does not have any"
            )
        return Slots(domain.xleases_path, domain.id, domain.geometry, domain.lock.verify)

    @staticmethod
    def _decode(spec: LeaseSpec, data: bytes) -> JobMetadata | None:
        try:
            return jm.decode(data)
        except ValueError as error:
            raise SanlockLVBError(
                resource=spec.resource,
                lockspace=spec.lockspace,
                path=spec.path,
                offset=spec.offset,
                reason=f"not to be understood: {error}",
            ) from error

    def _now(self) -> int:
        return int(self._clock.time())


def _ref(op: Operation) -> LeaseRef:
    return LeaseRef(str(op.params["sd_id"]), str(op.params["lease_id"]))
