# SPDX-License-Identifier: GPL-2.0-or-later
"""The jobs and tasks on the data of volumes, as verbs start them."""

from __future__ import annotations

from collections.abc import Callable

from vdsm_storage.base.locks import Locks
from vdsm_storage.config import Config
from vdsm_storage.host.qemu_img import QemuImg
from vdsm_storage.host.virt_sparsify import VirtSparsify
from vdsm_storage.images.bitmaps import Bitmaps
from vdsm_storage.images.copy import Copying
from vdsm_storage.images.guard import Guard, VolumeLeases, VolumeRef
from vdsm_storage.images.measure import measure
from vdsm_storage.images.merge import Merging
from vdsm_storage.images.sparsify import Sparsifying
from vdsm_storage.images.store import Store
from vdsm_storage.images.update import Updating
from vdsm_storage.images.verify import Verifier
from vdsm_storage.jobs.operation import Kind
from vdsm_storage.jobs.runner import Request, Runner


class Data:
    """Needs the domains' stores, qemu-img, leases (any domain's), the process's locks, the runner.

    Wiring: `runner.add_kinds(data.kinds())`.
    """

    def __init__(
        self,
        find_store: Callable[[str], Store],
        qemu_img: QemuImg,
        leases: VolumeLeases,
        locks: Locks,
        config: Config,
        runner: Runner,
    ) -> None:
        self._find_store = find_store
        self._runner = runner
        self._timeout = config.storage.lock_timeout
        self._qemu_img = qemu_img
        self._verifier = Verifier(qemu_img, locks, self._timeout)
        guard = Guard(find_store, locks, leases, self._timeout)
        self._parts = (
            Copying(guard, qemu_img),
            Updating(guard, qemu_img),
            Bitmaps(guard, qemu_img),
            Merging(guard, qemu_img, self._timeout),
            Sparsifying(guard, qemu_img, VirtSparsify(), self._timeout),
        )

    def kinds(self) -> list[Kind]:
        return [kind for part in self._parts for kind in part.kinds()]

    def start_job(self, job_id: str, request: Request) -> None:
        """Start a job that any host may run.  Raises 358 and JobExists (69) at once; whatever else
        is wrong is found in the job."""
        for domain in request.domains:
            self._find_store(domain)
        self._runner.start_job(job_id, request)

    def start_task(self, request: Request) -> str:
        """Start a task of the pool's manager; returns its id.

        The domain's lock is held meanwhile, so that a caller learns at once when another host has
        it.  Raises 358, 654.
        """
        store = self._find_store(request.domains[0])
        with store.lock.held(self._timeout):
            return self._runner.start_task(request)

    def verify(self, ref: VolumeRef) -> None:
        """Raises ImageVerificationError (484) for an upload that no VM may use."""
        self._verifier.verify(self._find_store(ref.domain), ref)

    def measure(
        self, ref: VolumeRef, target_format: str, base: str | None, *, with_backing: bool
    ) -> int:
        """Bytes that a copy of the volume needs; see images.measure."""
        store = self._find_store(ref.domain)
        return measure(
            self._qemu_img, store, ref, target_format, base, with_backing=with_backing
        )
