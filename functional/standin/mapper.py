# SPDX-License-Identifier: GPL-2.0-or-later
"""The mapping itself: one file for each active volume, laid over its segments on the devices.

    python -m functional.standin.mapper MOUNT-POINT [--no-sync]

Commands come as JSON lines on standard input, an answer each on standard output:

    {"do": "map", "name": NAME, "segments": [[device, offset, length], ...]}   new, or a new mapping
    {"do": "unmap", "name": NAME}
    {"do": "fault", "name": NAME or "*", "device": DEVICE or "*", "mode": "hang" | "error" | "",
     "ops": ["read", "write"]}
    {"do": "drop"}                requests that hang are answered with an error, faults stay
    {"do": "clear"}               all faults are lifted
    {"do": "held"}                how many requests hang

Offsets and lengths are bytes.  A request that hits a fault `hang` is kept until the fault is
lifted, and done then: like a path that comes back.  Devices are read and written through the page
cache of their block device, which all stand-ins of the machine share: what one wrote the others
read at once, and O_DIRECT on the device sees it as well.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import itertools
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from functional.standin import fuse

THREADS: Final = 8
OPERATIONS: Final = {fuse.READ: "read", fuse.WRITE: "write", fuse.FSYNC: "write",
                     fuse.FALLOCATE: "write"}  # fmt: skip


class Segment(NamedTuple):
    device: str
    fd: int
    offset: int
    length: int


class Piece(NamedTuple):
    """A part of a request that lies in one segment; `start` counts from the request's begin."""

    segment: Segment
    offset: int
    start: int
    length: int


class Mapping:
    """A volume's segments in their order."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self._starts = list(itertools.accumulate((s.length for s in segments), initial=0))
        self.size = self._starts[-1]

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """What lies beyond the end is left out."""
        end = min(offset + length, self.size)
        position = offset
        index = bisect.bisect_right(self._starts, offset) - 1
        while position < end:
            segment, inside = self.segments[index], position - self._starts[index]
            count = min(segment.length - inside, end - position)
            yield Piece(segment, segment.offset + inside, position - offset, count)
            position += count
            index += 1


class Fault(NamedTuple):
    mode: str
    ops: frozenset[str]


class Mapper:
    """The files, and the requests that are held back."""

    def __init__(self, sync: bool) -> None:
        self._sync = sync
        self._lock = threading.Lock()
        self._ids = itertools.count(fuse.ROOT + 1)
        self._nodes: dict[str, int] = {}
        self._mappings: dict[int, tuple[str, Mapping]] = {}
        self._devices: dict[str, int] = {}
        self._faults: dict[tuple[str, str], Fault] = {}
        self._held: list[fuse.Request] = []
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.connection: fuse.Connection | None = None

    # -- commands ----------------------------------------------------------------------------

    def command(self, line: str) -> dict[str, Any]:
        request = json.loads(line)
        try:
            return {"ok": True, "result": getattr(self, f"do_{request.pop('do')}")(**request)}
        except OSError as error:
            return {"ok": False, "errno": error.errno or errno.EIO, "error": str(error)}

    def do_map(self, name: str, segments: list[tuple[str, int, int]]) -> int:
        """The size in bytes."""
        mapping = Mapping([Segment(d, self._open(d), o, n) for d, o, n in segments])
        with self._lock:
            number = self._nodes.setdefault(name, 0) or next(self._ids)
            self._nodes[name] = number
            self._mappings[number] = (name, mapping)
        return mapping.size

    def do_unmap(self, name: str) -> None:
        with self._lock:
            number = self._nodes.pop(name, None)
            if number is not None:
                del self._mappings[number]

    def do_fault(self, name: str, device: str, mode: str, ops: list[str]) -> int:
        """How many requests were held back and are done now."""
        with self._lock:
            if mode:
                self._faults[name, device] = Fault(mode, frozenset(ops))
            else:
                self._faults.pop((name, device), None)
        return self._go_on()

    def do_clear(self) -> int:
        with self._lock:
            self._faults.clear()
        return self._go_on()

    def _go_on(self) -> int:
        """What hung and has no reason to any more is done."""
        with self._lock:
            held, self._held = self._held, []
        space = memoryview(bytearray(fuse.MAX_WRITE))
        done = 0
        for request in held:
            if not self.intercept(request):
                assert self.connection is not None
                self.connection.handle(request, space)
                done += 1
        return done

    def do_drop(self) -> int:
        with self._lock:
            held, self._held = self._held, []
        for request in held:
            assert self.connection is not None
            self.connection.fail(request, errno.EIO)
        return len(held)

    def do_held(self) -> int:
        return len(self._held)

    def _open(self, device: str) -> int:
        with self._lock:
            if device not in self._devices:
                self._devices[device] = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            return self._devices[device]

    # -- requests ----------------------------------------------------------------------------

    def intercept(self, request: fuse.Request) -> bool:
        """Whether a fault has it: it is answered, or held back."""
        if not self._faults or request.opcode not in OPERATIONS:
            return False
        with self._lock:
            fault = self._fault(request)
            if fault is None:
                return False
            if fault.mode == "hang":
                self._held.append(request._replace(body=memoryview(bytes(request.body))))
                return True
        assert self.connection is not None
        self.connection.fail(request, errno.EIO)
        return True

    def _fault(self, request: fuse.Request) -> Fault | None:
        name, mapping = self._mappings.get(request.node, ("", None))
        if mapping is None:
            return None
        if request.opcode in (fuse.READ, fuse.WRITE):
            _, offset, size, *_ = fuse.IO_IN.unpack_from(request.body)
            devices = {piece.segment.device for piece in mapping.pieces(offset, size)}
        else:
            devices = {segment.device for segment in mapping.segments}
        for (one, device), fault in self._faults.items():
            hit = one in ("*", name) and (device == "*" or device in devices)
            if hit and OPERATIONS[request.opcode] in fault.ops:
                return fault
        return None

    def nodes(self) -> Sequence[fuse.Node]:
        with self._lock:
            return [fuse.Node(n, name, m.size) for n, (name, m) in self._mappings.items()]

    def _mapping(self, node: int) -> Mapping:
        try:
            return self._mappings[node][1]
        except KeyError:
            raise OSError(errno.ESTALE, "not active any more") from None

    def read(self, node: int, offset: int, buffer: memoryview) -> int:
        total = 0
        for piece in self._mapping(node).pieces(offset, len(buffer)):
            part = buffer[piece.start : piece.start + piece.length]
            count = os.preadv(piece.segment.fd, [part], piece.offset)
            if count != piece.length:
                raise OSError(errno.EIO, "the device is shorter than its mapping")
            total += count
        return total

    def write(self, node: int, offset: int, data: memoryview) -> None:
        mapping = self._mapping(node)
        if offset + len(data) > mapping.size:
            raise OSError(errno.ENOSPC, "beyond the end")
        for piece in mapping.pieces(offset, len(data)):
            part = data[piece.start : piece.start + piece.length]
            if os.pwritev(piece.segment.fd, [part], piece.offset) != piece.length:
                raise OSError(errno.EIO, "the device is shorter than its mapping")

    def sync(self, node: int) -> None:
        if not self._sync:
            return
        for fd in {segment.fd for segment in self._mapping(node).segments}:
            os.fdatasync(fd)

    def allocate(self, node: int, mode: int, offset: int, length: int) -> None:
        """Discard and write zeroes, as the device can."""
        for piece in self._mapping(node).pieces(offset, length):
            arguments = [ctypes.c_long(n) for n in (piece.offset, piece.length)]
            if self._libc.fallocate64(piece.segment.fd, mode, *arguments) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))


def main() -> int:
    mapper = Mapper(sync="--no-sync" not in sys.argv)
    mapper.connection = fuse.Connection(sys.argv[1], mapper, mapper.intercept)
    serving = threading.Thread(target=mapper.connection.serve, args=(THREADS,), daemon=True)
    serving.start()
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        for line in sys.stdin:
            sys.stdout.write(json.dumps(mapper.command(line)) + "\n")
            sys.stdout.flush()
    os._exit(0)  # with the connection, whoever waits for a request gets an error


if __name__ == "__main__":
    sys.exit(main())
