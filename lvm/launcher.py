# SPDX-License-Identifier: GPL-2.0-or-later
"""Starting lvm's commands sooner.

A command that changes little takes lvm ten milliseconds, and more than one of them goes before it
begins: making a process, and setpriv, which sees that it dies with the agent.  So a shell that has
all that behind it stands ready, and becomes the next command when it is told which.
"""

from __future__ import annotations

import logging
import os
import queue
import shlex
import threading
from typing import Final

from vdsm_storage.base import run
from vdsm_storage.base.run import Command, Process
from vdsm_storage.errors import CommandError

PIPE: Final = -1  # as subprocess has it
LONGEST: Final = 32 * 1024  # bytes of a command; a pipe takes more of them at once
SHELL: Final = Command(["sh"], timeout=0.0)

log = logging.getLogger("lvm.launcher")


class Launcher:
    """For any number of threads; the first command is started as any other program is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ordered = False  # a shell is there, or about to be
        self._orders: queue.SimpleQueue[bool] = queue.SimpleQueue()  # False: no more
        self._ready: queue.SimpleQueue[Process] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, command: Command) -> Process:
        """The command, without input or limits of its own.  Raises CommandError."""
        shell = self._take()
        try:
            if shell is not None:
                if _become(shell, command):
                    return shell
                _end(shell)
            return run.start(command)
        finally:
            # Not before: to make a process keeps this one's threads waiting for a millisecond.
            self._order(taken=shell is not None)

    def close(self) -> None:
        """No more shells; without this, the last one ends with the process."""
        with self._lock:
            self._ordered = True
            thread = self._thread
        self._orders.put(False)
        if thread is not None:
            thread.join()
        while not self._ready.empty():
            _end(self._ready.get())

    def _take(self) -> Process | None:
        with self._lock:
            return None if self._ready.empty() else self._ready.get()

    def _order(self, *, taken: bool) -> None:
        """Another shell, in place of one that was taken, or the first."""
        with self._lock:
            if taken or not self._ordered:
                self._ordered = True
                self._orders.put(True)
            if self._thread is None:
                # Children die with the thread that started them: this one stays.
                self._thread = threading.Thread(target=self._keep, name="launcher", daemon=True)
                self._thread.start()

    def _keep(self) -> None:
        while self._orders.get():
            try:
                self._ready.put(run.start(SHELL, PIPE))
            except CommandError as error:
                log.warning("%s", error)
                with self._lock:
                    self._ordered = False


def _become(shell: Process, command: Command) -> bool:
    """False when the shell cannot: it was killed, or the command is too long for it."""
    names = (f"export {key}={shlex.quote(value)}; " for key, value in (command.env or {}).items())
    # In brackets: if this process dies while it writes, nothing is begun of what is cut off.
    script = f"{{ {''.join(names)}exec {shlex.join(command.argv)} </dev/null; }}\n".encode()
    if len(script) > LONGEST:
        return False
    assert shell.stdin is not None
    try:
        os.write(shell.stdin.fileno(), script)
    except BrokenPipeError:
        return False
    shell.stdin.close()
    shell.stdin = None
    return True


def _end(shell: Process) -> None:
    shell.kill()
    shell.communicate()
