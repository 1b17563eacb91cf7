# SPDX-License-Identifier: GPL-2.0-or-later
"""The other hosts' side of a mailbox, written from the description of the format alone.

It shares no code with the product and keeps its own ideas of bytes: what both sides get wrong in
the same way would not be found otherwise.  Its host and its manager look for *changes* between two
reads, as VDSM's do, and its manager answers from several threads.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import struct
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

MIB = 1024 * 1024
TICK = 0.05  # seconds; VDSM's are 0.5


def pack_uuid(text: str) -> bytes:
    return bytes.fromhex(text.replace("-", ""))[::-1]


def unpack_uuid(data: bytes) -> str:
    return str(uuid.UUID(bytes=data[::-1]))


def message(domain: str, volume: str, mib: int) -> bytes:
    return b"1xtnd" + pack_uuid(domain) + pack_uuid(volume) + f"{mib:016x}".encode() + b"0" * 11


def pwrite(path: str, data: bytes, offset: int) -> None:
    fd = _open(path, os.O_RDWR)
    try:
        with mmap.mmap(-1, len(data)) as aligned:
            aligned.write(data)
            assert os.pwrite(fd, aligned, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def pread(path: str, length: int, offset: int) -> bytes:
    fd = _open(path, os.O_RDONLY)
    try:
        with mmap.mmap(-1, -(-length // 4096) * 4096) as aligned:
            count = os.preadv(fd, [aligned], offset)
            return aligned[: min(count, length)]
    finally:
        os.close(fd)


def _open(path: str, flags: int) -> int:
    """A device is read past the page cache: other hosts write to it."""
    device = stat.S_ISBLK(os.stat(path).st_mode)
    return os.open(path, flags | (os.O_DIRECT if device else 0))


class _Thread:
    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def kill(self) -> None:
        """End without a word, as a process that is killed."""
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stop.wait(TICK):
            self.turn()

    def turn(self) -> None:
        raise NotImplementedError


class OtherHost(_Thread):
    """`request` and `results`: {volume: size in MiB that the manager told}.

    Without `events` it is as VDSM was before there were any.
    """

    def __init__(self, inbox: str, outbox: str, host: int, events: bool = True) -> None:
        super().__init__()
        self.inbox, self.outbox, self.host, self.events = inbox, outbox, host, events
        self.active: dict[int, bytes] = {}
        self.mail = bytearray(4096)
        self.results: dict[str, int] = {}
        self.lock = threading.Lock()
        pwrite(inbox, bytes(4096), host * 4096)
        self.incoming = pread(outbox, 4096, host * 4096)

    def request(self, domain: str, volume: str, mib: int) -> None:
        with self.lock:
            slot = next(n for n in range(63) if n not in self.active)
            self.active[slot] = message(domain, volume, mib)
            self.mail[slot * 64 : slot * 64 + 64] = self.active[slot]
            self.send()

    def send(self) -> None:
        body = bytes(self.mail[:4092])
        pwrite(self.inbox, body + struct.pack("<l", sum(body)), self.host * 4096)
        if self.events:
            pwrite(self.inbox, (b"\0evt" + uuid.uuid4().bytes).ljust(4096, b"\0"), 0)

    def turn(self) -> None:
        with self.lock:
            if not self.active:
                return
            new = pread(self.outbox, 4096, self.host * 4096)
            changed = False
            for slot, asked in list(self.active.items()):
                at = slice(slot * 64, slot * 64 + 64)
                if new[at][:1] in (b"\0", b"0") or new[at] == self.incoming[at]:
                    continue
                if new[at] == b"\1" * 64:
                    if self.mail[at] == b"\1" * 64:
                        del self.active[slot]
                        self.mail[at] = bytes(64)
                        changed = True
                elif new[at][:37] == asked[:37]:
                    self.results[unpack_uuid(asked[21:37])] = int(new[at][37:53], 16)
                    self.mail[at] = b"\1" * 64
                    changed = True
            self.incoming = new
            if changed:
                self.send()


class OtherManager(_Thread):
    """Calls `extend(domain, volume, mib)` in five threads; what it raises is a failure."""

    def __init__(
        self, inbox: str, outbox: str, extend: Callable[[str, str, int], object], hosts: int = 250
    ) -> None:
        super().__init__()
        self.inbox, self.outbox, self.hosts, self.extend = inbox, outbox, hosts, extend
        self.incoming = bytes(hosts * 4096)
        self.outgoing = bytearray(hosts * 4096)
        self.event = b""
        self.next_all = 0.0
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(5)
        pwrite(outbox, bytes(self.outgoing), 0)

    def kill(self) -> None:
        super().kill()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def turn(self) -> None:
        event = pread(self.inbox, 20, 0)
        if event == self.event and time.monotonic() < self.next_all:
            return
        self.event, self.next_all = event, time.monotonic() + 4 * TICK
        new = pread(self.inbox, self.hosts * 4096, 0)
        send = False
        for host in range(self.hosts):
            block = new[host * 4096 : host * 4096 + 4096]
            old = self.incoming[host * 4096 : host * 4096 + 4096]
            (stored,) = struct.unpack("<l", block[4092:])
            if block == old or stored == 0:
                continue
            if stored != sum(block[:4092]):
                continue
            for slot in range(63):
                at = slice(slot * 64, slot * 64 + 64)
                if block[at][:1] in (b"\0", b"0") or block[at] == old[at]:
                    continue
                if block[at] == b"\1" * 64:
                    with self.lock:
                        start = host * 4096 + slot * 64
                        self.outgoing[start : start + 64] = b"\1" * 64
                    send = True
                elif block[at][1:5] == b"xtnd":
                    with contextlib.suppress(RuntimeError):  # killed meanwhile
                        self.pool.submit(self.serve, host, slot, block[at])
        self.incoming = new
        if send:
            self.send()

    def serve(self, host: int, slot: int, asked: bytes) -> None:
        size = asked[37:53]
        try:
            self.extend(unpack_uuid(asked[5:21]), unpack_uuid(asked[21:37]), int(size, 16))
        except OSError:
            size = b"0" * 16
        if self._stop.is_set():
            return
        with self.lock:
            start = host * 4096 + slot * 64
            self.outgoing[start : start + 64] = asked[:37] + size + asked[53:]
        self.send()

    def send(self) -> None:
        with self.lock:
            pwrite(self.outbox, bytes(self.outgoing), 0)
