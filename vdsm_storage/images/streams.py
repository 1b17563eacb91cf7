# SPDX-License-Identifier: GPL-2.0-or-later
"""The bytes of a volume, in and out as a stream: how engines keep their OVF_STORE.

Each stream is a task, so that an engine finds and clears it like any other.  The stream's peer
sends or takes pieces of bounded size; a task whose peer goes silent fails after a while.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.base.uuids import BLANK, is_uuid, new_uuid
from vdsm_storage.errors import (
    AccessTimeout,
    AgentError,
    ImageDoesNotExistInSD,
    InvalidParameter,
    StreamFailed,
    StreamTooLong,
)
from vdsm_storage.images import guard, layers
from vdsm_storage.images.store import Store
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request, Runner, Running

SILENCE: Final = 120.0  # seconds that a peer may send or take nothing
PIECES: Final = 4  # pieces that may wait to be written
UPLOAD: Final = "stream.upload"
DOWNLOAD: Final = "stream.download"


@dataclass(frozen=True)
class Where:
    domain: str
    image: str
    volume: str


@dataclass
class _Pipe:
    """Between the peer's side and the task.  None in `pieces` is the end, `broken` an early one."""

    pieces: queue.Queue[bytes | None] = field(default_factory=lambda: queue.Queue(PIECES))
    broken: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


class Upload:
    """Pieces from a peer into a volume.  Its methods are called one after the other."""

    def __init__(self, pipe: _Pipe, task: Running) -> None:
        self._pipe = pipe
        self._task = task

    @property
    def task_id(self) -> str:
        return self._task.entry.id

    def write(self, data: bytes) -> None:
        """Raises what the task failed with; AccessTimeout when the storage takes too long."""
        self._put(data)

    def finish(self) -> None:
        """All bytes are on storage when this returns."""
        self._put(None)
        if not self._task.done.wait(SILENCE):
            raise AccessTimeout(what="The volume behind the stream", seconds=SILENCE)
        self._raise_if_failed()

    def abort(self) -> None:
        self._pipe.broken = True
        self._pipe.ended.set()

    def _put(self, piece: bytes | None) -> None:
        waited = 0.0
        while waited < SILENCE:
            if self._task.done.is_set():
                self._raise_if_failed()
                return
            try:
                self._pipe.pieces.put(piece, timeout=1.0)
            except queue.Full:
                waited += 1.0
            else:
                return
        raise AccessTimeout(what="The volume behind the stream", seconds=SILENCE)

    def _raise_if_failed(self) -> None:
        if self._task.entry.error is not None:
            raise StreamFailed(task=self.task_id, reason=self._task.entry.error["message"])


class Download:
    """A volume's bytes for a peer.  `length` is how many there will be."""

    def __init__(
        self, pipe: _Pipe, task: Running, fd: int, length: int, release: Callable[[], None]
    ) -> None:
        self._pipe = pipe
        self._task = task
        self._fd = fd
        self._release = release
        self._done = 0
        self.length = length

    @property
    def task_id(self) -> str:
        return self._task.entry.id

    def read(self, size: int) -> bytes:
        data = os.pread(self._fd, min(size, self.length - self._done), self._done)
        if not data and self._done < self.length:
            raise StreamFailed(task=self.task_id, reason="the volume became shorter")
        self._done += len(data)
        return data

    def close(self) -> None:
        """The stream is over; the task succeeds if every byte was read."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._release()
            self._pipe.broken = self._done < self.length
            self._pipe.ended.set()
            self._task.done.wait(SILENCE)


class ImageStreams:
    """`open_upload` and `open_download` are what rpc.http asks for; headers have lower-case names.

    A stream without a Volume-Id header means the image's leaf.
    """

    def __init__(
        self,
        find_store: Callable[[str], Store],
        runner: Runner,
        locks: Locks,
        lock_timeout: float,
    ) -> None:
        self._find_store = find_store
        self._runner = runner
        self._locks = locks
        self._lock_timeout = lock_timeout
        self._lock = threading.Lock()
        self._pipes: dict[str, _Pipe] = {}

    def kinds(self) -> Sequence[Kind]:
        return (
            Kind(UPLOAD, steps=("locked", "written"), run=self._receive, recover=_recover),
            Kind(DOWNLOAD, steps=("locked",), run=self._deliver, recover=_recover),
        )

    def open_upload(self, headers: Mapping[str, str], length: int) -> Upload:
        """`length` bytes will come.  Raises AgentError when they cannot be taken."""
        store, where = self._where(headers)
        capacity = store.load(where.image, where.volume).capacity
        if length > capacity:
            raise StreamTooLong(length=length, volume=where.volume, capacity=capacity)
        with store.lock.held(self._lock_timeout):  # 654 now, not in a task that nobody reads
            pipe, task = self._start(UPLOAD, "downloadImageFromStream", where)
        return Upload(pipe, task)

    def open_download(self, headers: Mapping[str, str], length: int) -> Download:
        """The first `length` bytes of the volume, or as many as there are."""
        store, where = self._where(headers)
        store.load(where.image, where.volume)
        available = store.sizes(where.image, where.volume).apparent
        fd = -1

        def release() -> None:
            store.deactivate(where.image, [where.volume])

        store.activate(where.image, [where.volume])
        try:
            path = layers.opened(store, store.path(where.image, where.volume))
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            pipe, task = self._start(DOWNLOAD, "uploadImageToStream", where)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            release()
            raise
        return Download(pipe, task, fd, min(length, available), release)

    # -- finding the volume ------------------------------------------------------------------

    def _where(self, headers: Mapping[str, str]) -> tuple[Store, Where]:
        domain = _header(headers, "storage-domain-id")
        image = _header(headers, "image-id")
        _header(headers, "storage-pool-id")
        store = self._find_store(domain)
        volume = headers.get("volume-id", "").lower()
        if volume in ("", BLANK):
            volume = self._leaf(store, image)
        elif not is_uuid(volume):
            raise InvalidParameter(parameter="volume-id", value=volume, reason="no UUID")
        return store, Where(domain, image, volume)

    def _leaf(self, store: Store, image: str) -> str:
        volumes = store.volumes(image)
        parents = {store.load(image, volume).parent for volume in volumes}
        leaves = [volume for volume in volumes if volume not in parents]
        if not leaves:
            raise ImageDoesNotExistInSD(image=image, domain=store.id)
        return leaves[0]

    # -- the task's side ---------------------------------------------------------------------

    def _start(self, kind: str, verb: str, where: Where) -> tuple[_Pipe, Running]:
        name, pipe = new_uuid(), _Pipe()
        with self._lock:
            self._pipes[name] = pipe
        params = {
            "stream": name,
            "domain": where.domain,
            "image": where.image,
            "volume": where.volume,
        }
        try:
            task_id = self._runner.start_task(
                Request(kind, params, [where.domain], verb=verb, lane=where.domain)
            )
        except (AgentError, OSError):
            with self._lock:
                del self._pipes[name]
            raise
        task = self._runner.get(task_id, "task")
        assert task is not None, "a task cannot be cleared before its id is known"
        return pipe, task

    @contextmanager
    def _held(self, op: Operation, exclusive: bool) -> Iterator[_Pipe]:
        domain, image = op.params["domain"], op.params["image"]
        locks = [
            Lock("00_storage", domain, exclusive=False),
            Lock(f"01_img_{domain}", image, exclusive=exclusive),
        ]
        with self._lock:
            pipe = self._pipes.pop(op.params["stream"])
        with self._locks.held(locks, self._lock_timeout):
            yield pipe

    def _receive(self, op: Operation) -> None:
        image, volume = op.params["image"], op.params["volume"]
        store = self._find_store(op.params["domain"])
        with self._held(op, exclusive=True) as pipe, store.lock.held(self._lock_timeout):
            op.step("locked")
            with guard.active(store, image, [volume], prepared=False):
                path = layers.opened(store, store.path(image, volume))
                fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    _write_pieces(op, pipe, fd)
                    os.fsync(fd)
                finally:
                    os.close(fd)
            op.step("written", abortable=False)

    def _deliver(self, op: Operation) -> None:
        with self._held(op, exclusive=False) as pipe:
            op.step("locked")
            forget = op.cancel.on_request(pipe.ended.set)
            try:
                if not pipe.ended.wait(24 * 3600.0):
                    raise AccessTimeout(what="The peer of the stream", seconds=24 * 3600)
            finally:
                forget()
            op.cancel.check()
            if pipe.broken:
                raise StreamFailed(task=op.id, reason="the peer went away before the end")


def _write_pieces(op: Operation, pipe: _Pipe, fd: int) -> None:
    done, silent = 0, 0.0
    while True:
        op.cancel.check()
        if pipe.broken:
            raise StreamFailed(task=op.id, reason="the peer went away before the end")
        if silent >= SILENCE:
            raise AccessTimeout(what="The peer of the stream", seconds=SILENCE)
        try:
            piece = pipe.pieces.get(timeout=0.5)
        except queue.Empty:
            silent += 0.5
            continue
        if piece is None:
            return
        silent = 0.0
        view = memoryview(piece)
        while view:
            count = os.pwrite(fd, view, done)
            done, view = done + count, view[count:]


def _recover(_op: Operation) -> bool:
    """Bytes that were not all written are written again by who sent them; nothing is taken back."""
    return False


def _header(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name, "").lower()
    if not is_uuid(value):
        raise InvalidParameter(parameter=name, value=value, reason="this header must be a UUID")
    return value
