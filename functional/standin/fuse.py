# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's FUSE protocol, as much of it as a flat directory of files needs.

Spoken directly, not through libfuse: a request that is held back on purpose must not keep a thread,
or the hanging of one volume would stop all others.  The numbers and layouts are those of
include/uapi/linux/fuse.h, version 7.31.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

MAX_WRITE: Final = 1024 * 1024
ROOT: Final = 1  # the node id of the directory
IN_HEADER: Final = struct.Struct("<IIQQIIIHH")  # len opcode unique nodeid uid gid pid extlen pad
OUT_HEADER: Final = struct.Struct("<IiQ")  # len error unique
INIT_IN: Final = struct.Struct("<IIII")
INIT_OUT: Final = struct.Struct("<IIIIHHIIHHIIH22x")
ATTR: Final = struct.Struct("<6Q10I")
ENTRY: Final = struct.Struct("<4QII")
ATTR_OUT: Final = struct.Struct("<QII")
OPEN_OUT: Final = struct.Struct("<QIi")
IO_IN: Final = struct.Struct("<QQIIQII")  # fh offset size flags lock_owner flags pad
FALLOCATE_IN: Final = struct.Struct("<QQQII")
STATFS_OUT: Final = struct.Struct("<5Q4I24x")
DIRENT: Final = struct.Struct("<QQII")
DATA: Final = IN_HEADER.size + IO_IN.size  # where the data of a WRITE begin

LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE = 1, 2, 3, 4, 14, 15, 16
STATFS, RELEASE, FSYNC, FLUSH, INIT, OPENDIR, READDIR = 17, 18, 20, 25, 26, 27, 28
RELEASEDIR, INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE = 29, 36, 38, 42, 43
SILENT: Final = frozenset({FORGET, BATCH_FORGET, INTERRUPT})  # never answered

# ASYNC_READ, BIG_WRITES, ASYNC_DIO (a loop device keeps many requests going), MAX_PAGES
WANTED: Final = 1 << 0 | 1 << 5 | 1 << 15 | 1 << 22
OPEN_FLAGS: Final = 1 << 0 | 1 << 6  # no page cache; writes side by side
MS_NOSUID, MS_NODEV = 2, 4


class Request(NamedTuple):
    """`body` is what follows the header; it is the reader's buffer, reused for the next request."""

    opcode: int
    unique: int
    node: int
    body: memoryview


class Node(NamedTuple):
    id: int
    name: str
    size: int


class Files(Protocol):
    """What is served.  Methods raise OSError for the error to answer."""

    def nodes(self) -> Sequence[Node]: ...

    def read(self, node: int, offset: int, buffer: memoryview) -> int: ...

    def write(self, node: int, offset: int, data: memoryview) -> None: ...

    def sync(self, node: int) -> None: ...

    def allocate(self, node: int, mode: int, offset: int, length: int) -> None: ...


class Connection:
    """A mounted file system; `intercept` may take a request away to have it answered later."""

    def __init__(self, path: str, files: Files, intercept: Callable[[Request], bool]) -> None:
        self._files = files
        self._intercept = intercept
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        libc = ctypes.CDLL(None, use_errno=True)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other"
        what = [os.fsencode(text) for text in ("standin", path, "fuse.standin")]
        if libc.mount(*what, ctypes.c_ulong(MS_NOSUID | MS_NODEV), options.encode()) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"mounting FUSE: {os.strerror(number)}", path)

    def serve(self, threads: int) -> None:
        """Until it is unmounted."""
        workers = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _work(self) -> None:
        space = memoryview(bytearray(MAX_WRITE + 4096))
        answer = memoryview(bytearray(MAX_WRITE))
        while True:
            try:
                count = os.readv(self._fd, [space])
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue  # the request was withdrawn
                return  # ENODEV: unmounted
            _, opcode, unique, node, *_ = IN_HEADER.unpack_from(space)
            request = Request(opcode, unique, node, space[IN_HEADER.size : count])
            if opcode not in SILENT and not self._intercept(request):
                self.handle(request, answer)

    def handle(self, request: Request, space: memoryview) -> None:
        """Do it and answer it; data that are read go through `space`."""
        try:
            parts = self._do(request, space)
        except OSError as error:
            self.fail(request, error.errno or errno.EIO)
            return
        self._reply(request, 0, *parts)

    def fail(self, request: Request, number: int) -> None:
        self._reply(request, -number)

    def _reply(self, request: Request, error: int, *parts: bytes | memoryview) -> None:
        length = OUT_HEADER.size + sum(len(part) for part in parts)
        header = OUT_HEADER.pack(length, error, request.unique)
        try:
            os.writev(self._fd, [header, *parts])
        except OSError as problem:
            if problem.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits any more
                raise

    def _do(self, request: Request, space: memoryview) -> tuple[bytes | memoryview, ...]:
        opcode, node, body = request.opcode, request.node, request.body
        if opcode == READ:
            _, offset, size, *_ = IO_IN.unpack_from(body)
            return (space[: self._files.read(node, offset, space[:size])],)
        if opcode == WRITE:
            _, offset, size, *_ = IO_IN.unpack_from(body)
            self._files.write(node, offset, body[IO_IN.size : IO_IN.size + size])
            return (struct.pack("<II", size, 0),)
        if opcode == FSYNC:
            self._files.sync(node)
            return ()
        if opcode == FALLOCATE:
            _, offset, length, mode, _ = FALLOCATE_IN.unpack_from(body)
            self._files.allocate(node, mode, offset, length)
            return ()
        return self._names(opcode, node, body)

    def _names(self, opcode: int, node: int, body: memoryview) -> tuple[bytes, ...]:
        """The requests that are not about data."""
        if opcode == INIT:
            return (self._init(body),)
        if opcode == LOOKUP:
            name = os.fsdecode(bytes(body).rstrip(b"\0"))
            found = self._find(lambda one: one.name == name, errno.ENOENT)
            return (ENTRY.pack(found.id, 0, 0, 0, 0, 0), _attributes(found))
        if opcode in (GETATTR, SETATTR):
            return (ATTR_OUT.pack(0, 0, 0), _attributes(self._node(node)))
        if opcode == OPEN:
            self._node(node)
            return (OPEN_OUT.pack(0, OPEN_FLAGS, 0),)
        if opcode == OPENDIR:
            return (OPEN_OUT.pack(0, 0, 0),)
        if opcode == READDIR:
            return (self._entries(body),)
        if opcode == STATFS:
            return (STATFS_OUT.pack(0, 0, 0, 0, 0, 512, 255, 512, 0),)
        if opcode in (RELEASE, RELEASEDIR, FLUSH, DESTROY):
            return ()
        raise OSError(errno.ENOSYS, f"FUSE request {opcode}")

    def _find(self, wanted: Callable[[Node], bool], number: int) -> Node:
        found = next((node for node in self._files.nodes() if wanted(node)), None)
        if found is None:
            raise OSError(number, "no such file")
        return found

    def _node(self, number: int) -> Node:
        if number == ROOT:
            return Node(ROOT, "", 0)
        return self._find(lambda one: one.id == number, errno.ESTALE)

    def _entries(self, body: memoryview) -> bytes:
        _, offset, size, *_ = IO_IN.unpack_from(body)
        answer = b""
        for number, node in enumerate(self._files.nodes()):
            name = os.fsencode(node.name)
            entry = DIRENT.pack(node.id, number + 1, len(name), stat.S_IFREG >> 12) + name
            entry += bytes(-len(entry) % 8)
            if number >= offset:
                if len(answer) + len(entry) > size:
                    break
                answer += entry
        return answer

    @staticmethod
    def _init(body: memoryview) -> bytes:
        _, _, readahead, flags = INIT_IN.unpack_from(body)
        many = 65535  # requests that are held back must not use up what the kernel allows
        pages = MAX_WRITE // 4096
        return INIT_OUT.pack(
            7, 31, readahead, flags & WANTED, many, many, MAX_WRITE, 1, pages, 0, 0, 0, 0
        )


def _attributes(node: Node) -> bytes:
    kind = stat.S_IFDIR | 0o755 if node.id == ROOT else stat.S_IFREG | 0o600
    return ATTR.pack(
        *(node.id, node.size, node.size // 512, 0, 0, 0),
        *(0, 0, 0, kind, 1, 0, 0, 0, 4096, 0),
    )
