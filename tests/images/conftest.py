# SPDX-License-Identifier: GPL-2.0-or-later
"""A local domain's directory with real qemu-img, and operations run on it as the agent does."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.locks import Locks
from vdsm_storage.base.uuids import BLANK, new_uuid
from vdsm_storage.domains.file_store import FileStore
from vdsm_storage.errors import CommandError, StorageDomainDoesNotExist
from vdsm_storage.host.qemu_img import Image, NewImage, QemuImg
from vdsm_storage.host.virt_sparsify import VirtSparsify
from vdsm_storage.images import metadata as md
from vdsm_storage.images.bitmaps import Bitmaps
from vdsm_storage.images.copy import Copying
from vdsm_storage.images.guard import Guard, VolumeRef
from vdsm_storage.images.merge import Merging
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.sparsify import Sparsifying
from vdsm_storage.images.store import NewVolume
from vdsm_storage.images.update import Updating
from vdsm_storage.jobs.journal import JOB, Journal
from vdsm_storage.jobs.operation import CrashPoints, Kind
from vdsm_storage.jobs.runner import Request, Runner, Running
from vdsm_storage.leases.model import Geometry, LeaseSpec, LeaseState

MIB = 1024 * 1024
FORMATS = {md.COW: "qcow2", md.RAW: "raw"}


class OneHostLock:
    """The lock of a domain that nobody else sees."""

    def __init__(self) -> None:
        self.holds = 0

    @contextlib.contextmanager
    def held(self, timeout: float) -> Iterator[None]:
        self.holds += 1
        try:
            yield
        finally:
            self.holds -= 1

    def acquire(self, timeout: float) -> None:
        self.holds += 1

    def release(self) -> None:
        self.holds -= 1

    def is_held(self) -> bool:
        return self.holds > 0

    def verify(self) -> None:
        pass

    def inquire(self) -> LeaseState:
        return LeaseState((), None)


class NoLeases:
    """Local directories have none."""

    @contextlib.contextmanager
    def held(self, spec: LeaseSpec, timeout: float) -> Iterator[None]:
        raise AssertionError(f"{spec} on a local domain")
        yield


class DataLab:
    """Domains below one directory; `volume()` makes a volume at once, `run()` runs an operation."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = SystemClock()
        self.qemu_img = QemuImg()
        self.stores: dict[str, FileStore] = {}
        self.locks = Locks(self.clock)
        self.guard = Guard(self.find_store, self.locks, NoLeases(), 5.0)
        self.lanes = Lanes(self.clock, 4, 100)
        self.kinds: list[Kind] = []

    def find_store(self, sd_id: str) -> FileStore:
        if sd_id not in self.stores:
            raise StorageDomainDoesNotExist(domain=sd_id)
        return self.stores[sd_id]

    def domain(self, version: int = 5, root: Path | None = None) -> FileStore:
        sd_id = new_uuid()
        path = (root or self.root) / sd_id
        os.makedirs(path / "images")
        store = FileStore(str(path), sd_id, version, Geometry(), OneHostLock(), None)
        self.stores[sd_id] = store
        return store

    # -- volumes -----------------------------------------------------------------------------

    def volume(
        self,
        store: FileStore,
        *,
        image: str | None = None,
        parent: VolumeRef | None = None,
        size: int = 2 * MIB,
        cow: bool = True,
        preallocated: bool = False,
        voltype: str = md.LEAF,
        legality: str = md.LEGAL,
    ) -> VolumeRef:
        """Make and publish a volume; a parent in the same image becomes INTERNAL."""
        image = parent.image if parent else image or new_uuid()
        ref = VolumeRef(store.id, image, new_uuid())
        path = store.make(NewVolume(image, ref.volume, size, preallocated, not cow))
        if cow:
            backing_format = None
            if parent is not None:
                above = store.load(image, parent.volume)
                backing_format = FORMATS[above.format]
                if above.voltype == md.LEAF:
                    store.save(image, parent.volume, above.with_(voltype=md.INTERNAL))
            self.qemu_img.create(
                NewImage(
                    path,
                    "qcow2",
                    size,
                    "1.1" if store.version > 3 else "0.10",
                    parent.volume if parent else None,
                    backing_format,
                )
            )
        metadata = VolumeMetadata(
            domain=store.id,
            image=image,
            capacity=size,
            format=md.COW if cow else md.RAW,
            type=md.PREALLOCATED if preallocated else md.SPARSE,
            voltype=voltype,
            disktype="DATA",
            parent=parent.volume if parent else BLANK,
            legality=legality,
            ctime=1700000000,
        )
        store.publish(image, ref.volume, metadata)
        return ref

    def chain(
        self, store: FileStore, depth: int, *, raw_base: bool = True, size: int = 2 * MIB
    ) -> list[VolumeRef]:
        """A chain whose layers each write their own MiB-quarter and all write the first block."""
        refs = [self.volume(store, cow=not raw_base, size=size)]
        while len(refs) < depth:
            refs.append(self.volume(store, parent=refs[-1], size=size))
        for number, ref in enumerate(refs):
            self.write(ref, 0, 65536, number + 1)
            self.write(ref, (number + 1) * 131072, 65536, 0x40 + number)
        return refs

    def path(self, ref: VolumeRef) -> str:
        return self.find_store(ref.domain).path(ref.image, ref.volume)

    def metadata(self, ref: VolumeRef) -> VolumeMetadata:
        return self.find_store(ref.domain).load(ref.image, ref.volume)

    def format(self, ref: VolumeRef) -> str:
        return FORMATS[self.metadata(ref).format]

    def io(self, ref: VolumeRef, command: str) -> None:
        """Let qemu-io write as a guest would."""
        argv = ["qemu-io", "-f", self.format(ref), "-c", command, self.path(ref)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
        assert "rror" not in done.stdout + done.stderr, done.stdout + done.stderr

    def write(self, ref: VolumeRef, offset: int, length: int, pattern: int) -> None:
        self.io(ref, f"write -q -P {pattern} {offset} {length}")

    def wait_free(self, ref: VolumeRef) -> None:
        """A program that was killed keeps its locks until its last writes are through."""
        image = Image(self.path(ref), self.format(ref))
        for _ in range(1000):
            try:
                self.qemu_img.info_untrusted(image)
                return
            except CommandError:
                time.sleep(0.02)
        raise AssertionError(f"{ref} is still locked")

    def checksum(self, ref: VolumeRef) -> str:
        """Of what a guest sees, read by another tool than the one under test."""
        raw = str(self.root / f"{new_uuid()}.raw")
        convert = ["qemu-img", "dd", "-f", self.format(ref), "-O", "raw", "bs=1M"]
        subprocess.run([*convert, f"if={self.path(ref)}", f"of={raw}"], check=True, timeout=60)
        with open(raw, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        os.unlink(raw)
        return digest

    # -- operations --------------------------------------------------------------------------

    def runner(self, crash: str | None = None) -> Runner:
        runner = Runner(
            Journal(str(self.root / "journal")),
            self.lanes,
            self.clock,
            CrashPoints(crash),
            lambda entry, fraction: None,
        )
        runner.add_kinds(self.kinds)
        return runner

    def run(self, request: Request) -> object:
        """Run to the end in this thread; the error is raised."""
        return self.runner().run(request)

    def job(self, request: Request, runner: Runner | None = None) -> Running:
        """Run as a job and wait for its end; the entry tells how it went."""
        runner = runner or self.runner()
        job_id = new_uuid()
        runner.start_job(job_id, request)
        running = runner.get(job_id, JOB)
        assert running is not None
        assert running.done.wait(60)
        return running

    def crash(self, request: Request, point: str) -> Running:
        """Die by SIGKILL at `point` in a child process, then recover as a restart does."""
        job_id = new_uuid()
        child = os.fork()
        if child == 0:
            try:
                self.lanes = Lanes(self.clock, 4, 100)  # the parent's threads are not here
                runner = self.runner(point)
                runner.start_job(job_id, request)
                running = runner.get(job_id, JOB)
                assert running is not None
                running.done.wait(60)
            finally:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9, f"{point} was not reached"
        return self.restarted(job_id)

    def kill(self, request: Request, when: Callable[[], bool]) -> Running:
        """kill -9 in the middle of a step, as soon as `when()`; then recover."""
        job_id = new_uuid()
        child = os.fork()
        if child == 0:
            try:
                self.lanes = Lanes(self.clock, 4, 100)
                runner = self.runner()
                runner.start_job(job_id, request)
                running = runner.get(job_id, JOB)
                assert running is not None
                running.done.wait(60)
            finally:
                os._exit(7)
        while not when() and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9, "it had ended before"
        return self.restarted(job_id)

    def restarted(self, job_id: str) -> Running:
        """The job as a new process finds it in the journal and recovers it."""
        runner = self.runner()
        runner.load()
        runner.recover_domains(lambda domain: domain in self.stores)
        running = runner.get(job_id, JOB)
        assert running is not None
        assert running.done.is_set()
        return running

    def points(self, kind: str) -> list[str]:
        """The crash points of one kind."""
        steps = next(k.steps for k in self.kinds if k.name == kind)
        return [f"{kind}:{step}" for step in steps]

    def leftovers(self, store: FileStore) -> list[str]:
        """Files in images that no published volume accounts for."""
        extra = []
        for image in store.images():
            known = store.volumes(image)
            allowed = {f"{v}{suffix}" for v in known for suffix in ("", ".meta", ".lease")}
            folder = f"{store.root}/images/{image}"
            extra += [f"{image}/{name}" for name in os.listdir(folder) if name not in allowed]
        return extra


@pytest.fixture
def datalab(tmp_path: Path) -> Iterator[DataLab]:
    lab = DataLab(tmp_path)
    parts = (
        Copying(lab.guard, lab.qemu_img),
        Updating(lab.guard, lab.qemu_img),
        Bitmaps(lab.guard, lab.qemu_img),
        Merging(lab.guard, lab.qemu_img, 5.0),
        Sparsifying(lab.guard, lab.qemu_img, VirtSparsify(), 5.0),
    )
    lab.kinds = [kind for part in parts for kind in part.kinds()]
    yield lab
    lab.lanes.close()


@pytest.fixture
def small_fs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    image, folder = tmp_path / "small.img", tmp_path / "small"
    with open(image, "wb") as file:
        file.truncate(32 * MIB)
    folder.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True, timeout=60)
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=60)
