# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's end of the control channel; inside.py is the guest's and says what is sent."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import shlex
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from functional.lab.errors import CommandTimeoutError, GuestGoneError

SEND = 30  # seconds that a stopped guest may leave a message unread before sending fails
KILLED = 30.0  # seconds that a killed command may need to be gone
Listener = Callable[[bytes], None]


@dataclass(frozen=True)
class Result:
    argv: Sequence[str]
    rc: int
    out: str
    err: str

    @property
    def output(self) -> str:
        return self.out + self.err

    def check(self) -> Result:
        assert self.rc == 0, f"{shlex.join(self.argv)} ended with {self.rc}:\n{self.output}"
        return self


class Command:
    """One that runs in the guest."""

    def __init__(self, channel: Channel, number: int, argv: Sequence[str]) -> None:
        self.argv = tuple(argv)
        self.received: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._channel = channel
        self._number = number
        self._parts: dict[str, list[bytes]] = {"out": [], "err": []}
        self._result: Result | None = None

    def wait(self, timeout: float, listener: Listener = lambda _: None) -> Result:
        """`listener` gets what it writes as it comes.

        Raises CommandTimeoutError, and lets it run on, and GuestGoneError.
        """
        end = time.monotonic() + timeout
        while self._result is None:
            try:
                message = self.received.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                name = shlex.join(self.argv)
                raise CommandTimeoutError(
                    f"{name} runs for {timeout:g} s:\n{self.output()}"
                ) from None
            if message is None:
                raise GuestGoneError(f"the guest ended under {shlex.join(self.argv)}")
            self._take(message, listener)
        return self._result

    def ended(self) -> bool:
        """Without waiting.  Raises GuestGoneError."""
        with contextlib.suppress(CommandTimeoutError):
            self.wait(0)
        return self._result is not None

    def output(self) -> str:
        """What it had written when ended() or wait() last looked."""
        return "".join(_text(parts) for parts in self._parts.values())

    def signal(self, number: int) -> None:
        """To the command and its children."""
        self._channel.send({"id": self._number, "signal": number})

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait(KILLED)

    def _take(self, message: dict[str, Any], listener: Listener) -> None:
        for name, parts in self._parts.items():
            if name in message:
                data = message[name].encode("latin-1")
                parts.append(data)
                listener(data)
        if "error" in message:
            self._parts["err"].append(message["error"].encode())
        if "rc" in message:
            out, err = (_text(parts) for parts in self._parts.values())
            self._result = Result(self.argv, message["rc"], out, err)


class Channel:
    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND, 0))
        self.uptime = 0.0  # the guest's, when it was ready
        self._socket = connection
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._commands: dict[int, Command] = {}
        self._ready = threading.Event()
        self._closed = False
        self._reader = threading.Thread(target=self._read, name="lab-channel", daemon=True)
        self._reader.start()

    def wait_ready(self, timeout: float) -> bool:
        """False if the guest is not up by then; at once when it ended."""
        return self._ready.wait(timeout) and not self._closed

    def start(self, argv: Sequence[str], cwd: str, env: dict[str, str]) -> Command:
        with self._lock:
            if self._closed:
                raise GuestGoneError("the guest is not there any more")
            number = next(self._numbers)
            command = self._commands[number] = Command(self, number, argv)
        self.send({"id": number, "argv": list(argv), "cwd": cwd, "env": env})
        return command

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        try:
            with self._lock:
                self._socket.sendall(data)
        except OSError as error:
            raise GuestGoneError(f"the guest takes no message: {error}") from error

    def close(self) -> None:
        """Only when QEMU has ended."""
        self._reader.join()
        self._socket.close()

    def _read(self) -> None:
        for line in self._lines():
            message = json.loads(line)
            if "hello" in message:
                self.uptime = message["hello"]
                self._ready.set()
                continue
            command = self._commands.get(message["id"])
            if command is not None:
                command.received.put(message)
            if "rc" in message:
                self._commands.pop(message["id"], None)
        with self._lock:
            self._closed = True
            left = list(self._commands.values())
        for command in left:
            command.received.put(None)
        self._ready.set()

    def _lines(self) -> Iterator[bytes]:
        pending = b""
        while True:
            try:
                data = self._socket.recv(65536)
            except ConnectionResetError:
                return
            if not data:
                return
            *complete, pending = (pending + data).split(b"\n")
            yield from complete


def _text(parts: list[bytes]) -> str:
    return b"".join(parts).decode(errors="replace")
