# SPDX-License-Identifier: GPL-2.0-or-later
"""Several guests that share disks and a network, as the hypervisors of one data center do.

    with cluster(2, shared=(50 * GIB,)) as (a, b):
        a.run("vgcreate", "vg", "/dev/vdb").check()
        b.run("vgs").check()                # sees it: the disk is one and the same
        b.run("ping", "-c1", a.address)     # 10.77.0.1, 10.77.0.2 …
        a.kill()

Each guest may be killed, paused and booted again by itself; the others notice nothing but silence.
A disk that shall hang or fail for one guest only gets a layer in it (inner/dm.py).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from functional.lab.guest import Guest, Settings, blank_disk, say
from functional.lab.image import image
from functional.lab.places import places

NAMES = ("a", "b", "c")
NETWORK = "10.77.0"
FRAME = 65536


@contextlib.contextmanager
def cluster(
    count: int,
    shared: Sequence[int] = (),
    forward: Sequence[int] = (),
    memory: int = 1024,
    sector: int = 512,
) -> Iterator[Sequence[Guest]]:
    """Guests that are ready, with shared disks of these sizes in bytes as /dev/vdb, /dev/vdc …"""
    made = image(say)
    with contextlib.ExitStack() as stack:
        stack.enter_context(places(count))
        base = os.environ.get("TMPDIR", "/var/tmp")
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="disks.", dir=base))
        disks = [
            blank_disk(Path(scratch) / f"disk{number}", size, shared=True, sector=sector)
            for number, size in enumerate(shared)
        ]
        hub = stack.enter_context(Hub(count))
        guests = []
        for number, name in enumerate(NAMES[:count]):
            address = f"{NETWORK}.{number + 1}/24"
            settings = Settings(name, memory, disks, forward, address)
            guests.append(stack.enter_context(Guest(settings, made, hub.ports[number])))
        for guest in guests:
            guest.boot()
        for guest in guests:
            guest.wait_ready()
        yield guests


class Hub:
    """A network of guests: each frame that one sends goes to all the others.

    A guest's end is a datagram socket, one frame a datagram; it stays open here too, so that the
    guest can be booted again.  For a guest that does not read, frames are lost, as on any wire.
    """

    def __init__(self, count: int) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(count)]
        self.ports = [theirs for _, theirs in pairs]
        self._ours = [ours for ours, _ in pairs]
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._forward, name="lab-hub", daemon=True)

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        self._thread.join()
        for one in (*self._ours, *self.ports, self._stopped):
            one.close()

    def _forward(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._stopped, selectors.EVENT_READ)
            for one in self._ours:
                one.setblocking(False)
                selector.register(one, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._stopped:
                        return
                    assert isinstance(key.fileobj, socket.socket)
                    self._pass_on(key.fileobj)

    def _pass_on(self, source: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            frame = source.recv(FRAME)
            for one in self._ours:
                if one is not source:
                    with contextlib.suppress(BlockingIOError):
                        one.send(frame)
