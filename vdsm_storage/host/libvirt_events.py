# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt's event loop, in a thread of its own; it also carries the signs of life.

libvirt knows one loop a process, and wants it before the first connection is opened.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

import libvirt

END: float = 5.0  # seconds for the loop to notice that it shall end


class EventLoop:
    """Started once a process, before any connection; `stop` when there is none any more."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._pipe = (-1, -1)

    def start(self) -> None:
        """Nothing happens when it runs already."""
        if self._thread is not None:
            return
        # Errors are raised; the library would print them to stderr as well.
        libvirt.registerErrorHandler(lambda *_: None, None)
        libvirt.virEventRegisterDefaultImpl()
        self._pipe = os.pipe()
        readable = libvirt.VIR_EVENT_HANDLE_READABLE
        libvirt.virEventAddHandle(self._pipe[0], readable, self._woken, None)
        self._thread = threading.Thread(target=self._run, name="libvirt events", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """It cannot be started again: libvirt keeps the first loop for good."""
        if self._thread is None or self._stopped:
            return
        self._stopped = True
        os.write(self._pipe[1], b".")
        self._thread.join(END)

    def _run(self) -> None:
        while not self._stopped:
            # An error here is of one handler; the loop goes on with the others.
            with contextlib.suppress(libvirt.libvirtError):
                libvirt.virEventRunDefaultImpl()

    def _woken(self, _watch: int, fd: int, _events: int, _opaque: Any) -> None:
        os.read(fd, 1)
