# SPDX-License-Identifier: GPL-2.0-or-later
"""Image streams over HTTP: an engine stores and fetches its OVF_STORE this way.

PUT / with Content-Length answers 200 and a Task-Id once the bytes are written.  GET / with
`Range: bytes=0-N` answers 206, Content-Range and a Task-Id.  Both name the image by the headers
Storage-Pool-Id, Storage-Domain-Id, Image-Id and, optionally, Volume-Id.  The bytes are moved in
the domain's lane, a piece at a time, so that memory stays bounded whatever the image's size.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.errors import AgentError
from vdsm_storage.rpc.fair import Lanes

log = logging.getLogger("rpc.streams")

PIECE = 1024 * 1024
MAX_QUEUED = 4 * PIECE  # bytes that came and are not written yet
STEP_SECONDS = 120.0  # for one piece
REQUIRED = ("storage-pool-id", "storage-domain-id", "image-id")
_RANGE = re.compile(r"bytes=0-(\d{1,15})")

T = TypeVar("T")


class Upload(Protocol):
    """Calls may block; they come one after the other, in the domain's lane."""

    @property
    def task_id(self) -> str: ...

    def write(self, data: bytes) -> None: ...

    def finish(self) -> None:
        """All bytes came."""

    def abort(self) -> None:
        """The peer went away, or a write failed."""


class Download(Protocol):
    """Calls may block; they come one after the other, in the domain's lane."""

    length: int  # bytes that will be read, at most what was asked for

    @property
    def task_id(self) -> str: ...

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, never empty before `length` bytes were read."""

    def close(self) -> None: ...


class Streams(Protocol):
    """What the storage side gives.  `headers` have lower-case names, `length` is in bytes."""

    def open_upload(self, headers: Mapping[str, str], length: int) -> Upload: ...

    def open_download(self, headers: Mapping[str, str], length: int) -> Download: ...


class StreamError(Exception):
    """A request that cannot be served, with the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Connection(Protocol):
    """rpc.http.HttpSession, as far as it is used here."""

    def reply(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None
    ) -> None: ...

    def begin(
        self, status: int, length: int, kind: str, headers: Mapping[str, str] | None = None
    ) -> None: ...

    def data(self, body: bytes) -> None: ...

    def finish(self) -> None: ...

    def failed(self, message: str, code: int) -> None: ...

    def abort(self, why: str) -> None: ...

    def advance(self) -> None: ...


class Transfer:
    """One PUT or GET of an image, between the event loop and the lane."""

    def __init__(
        self,
        connection: Connection,
        streams: Streams,
        lanes: Lanes,
        headers: Mapping[str, str],
        upload: bool,
    ) -> None:
        """Raises StreamError when a header is missing or unusable."""
        missing = [name for name in REQUIRED if not headers.get(name)]
        if missing:
            raise StreamError(400, f"header {missing[0]} is missing")
        self._connection = connection
        self._streams = streams
        self._lanes = lanes
        self._headers = headers
        self._upload = upload
        self._length = _upload_length(headers) if upload else _download_length(headers)
        self._pieces: asyncio.Queue[bytes] = asyncio.Queue()
        self._queued = 0
        self._room = asyncio.Event()
        self._room.set()
        self._task: asyncio.Task[None] | None = None

    @property
    def full(self) -> bool:
        return self._queued >= MAX_QUEUED

    def start(self) -> None:
        work = self._receive() if self._upload else self._deliver()
        self._task = asyncio.get_running_loop().create_task(self._run(work))

    def write(self, data: bytes) -> None:
        """A piece of the body came."""
        if self._upload:
            self._queued += len(data)
            self._pieces.put_nowait(data)

    def end(self) -> None:
        """The whole body came."""
        self._pieces.put_nowait(b"")

    def lost(self) -> None:
        """The peer is gone."""
        if self._task is not None:
            self._task.cancel()

    def pause(self) -> None:
        """The peer reads slowly."""
        self._room.clear()

    def resume(self) -> None:
        self._room.set()

    async def _run(self, work: Any) -> None:
        try:
            await work
        except asyncio.CancelledError:
            raise
        except AgentError as error:
            self._connection.failed(error.message, error.code)
        except Exception as error:  # root of a task
            log.exception("an image stream failed")
            self._connection.failed(f"{type(error).__name__}: {error}", 100)

    async def _receive(self) -> None:
        upload = await self._step(
            lambda: self._streams.open_upload(self._headers, self._length)
        )
        done = False
        try:
            while data := await self._pieces.get():
                await self._step(lambda data=data: upload.write(data))  # type: ignore[misc]
                was_full = self.full
                self._queued -= len(data)
                if was_full and not self.full:
                    self._connection.advance()
            await self._step(upload.finish)
            done = True
        finally:
            if not done:
                self._lanes.submit(self._key, upload.abort, STEP_SECONDS)
        self._connection.reply(200, b"", {"task-id": upload.task_id})

    async def _deliver(self) -> None:
        download = await self._step(
            lambda: self._streams.open_download(self._headers, self._length)
        )
        try:
            left = download.length
            headers = {
                "task-id": download.task_id,
                "content-range": f"bytes 0-{max(0, left - 1)}/*",
            }
            self._connection.begin(206, left, "application/octet-stream", headers)
            while left:
                size = min(PIECE, left)
                data = await self._step(lambda size=size: download.read(size))  # type: ignore[misc]
                left -= len(data)
                self._connection.data(data)
                await self._room.wait()
        finally:
            self._lanes.submit(self._key, download.close, STEP_SECONDS)
        self._connection.finish()

    @property
    def _key(self) -> str:
        """A domain's lane; what names none, and fails later, gets into no other lane."""
        domain = self._headers["storage-domain-id"].lower()
        return domain if is_uuid(domain) else ":streams"

    async def _step(self, call: Callable[[], T]) -> T:
        future = self._lanes.submit(self._key, call, STEP_SECONDS)
        result: T = await asyncio.wait_for(asyncio.wrap_future(future), STEP_SECONDS)
        return result


def _upload_length(headers: Mapping[str, str]) -> int:
    if "content-length" not in headers:
        raise StreamError(411, "header content-length is missing")
    return int(headers["content-length"])  # h11 has checked that it is a number


def _download_length(headers: Mapping[str, str]) -> int:
    if "range" not in headers:
        raise StreamError(400, "header range is missing; bytes=0-N is served")
    match = _RANGE.fullmatch(headers["range"].strip())
    if match is None:
        raise StreamError(416, f"range {headers['range'][:40]!r} is not served; bytes=0-N is")
    return int(match[1]) + 1
