# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's end of the control channel: starts commands that the host asks for.

Copied into the guest and run by its system Python: nothing but the standard library here.

One JSON object a line, over a virtio-serial port.  From the host:

    {"id": 7, "argv": ["lvs"], "cwd": "/", "env": {"A": "b"}}    start a command
    {"id": 7, "signal": 9}                                       to its process group

To the host:

    {"hello": 12.3}                      once; the seconds that the guest is up
    {"id": 7, "pid": 311}                it runs; or {"id": 7, "error": "…"}
    {"id": 7, "out": "…"}                what it wrote, bytes as Latin-1; `err` for standard error
    {"id": 7, "rc": 0}                   its exit code, or minus the signal; always the last one

A command's daemons keep its pipes open; it is over when the process itself ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

PORT = "lab.control"
CHUNK = 65536
DRAIN = 0.2  # seconds: what a command wrote last is read for so long after its end


def find_port(timeout: float = 60.0) -> str:
    """The character device of the port with our name."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        for name in Path("/sys/class/virtio-ports").glob("*/name"):
            if name.read_text().strip() == PORT:
                return f"/dev/{name.parent.name}"
        time.sleep(0.1)
    raise SystemExit("no control port")


class Channel:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.lock = threading.Lock()

    def send(self, **message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self.lock:
            while data:
                data = data[os.write(self.fd, data) :]

    def lines(self) -> Iterator[bytes]:
        pending = b""
        while True:
            data = os.read(self.fd, CHUNK)
            if not data:  # the host's end is closed: nobody wants this guest any more
                return
            *complete, pending = (pending + data).split(b"\n")
            yield from complete


class Command:
    def __init__(self, channel: Channel, request: dict[str, Any]) -> None:
        self.channel = channel
        self.id = request["id"]
        self.process = subprocess.Popen(
            request["argv"],
            cwd=request.get("cwd") or "/",
            env={**os.environ, **request.get("env", {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.channel.send(id=self.id, pid=self.process.pid)

    def follow(self, forget: Callable[[int], object]) -> None:
        readers = [
            threading.Thread(target=self.read, args=(name, pipe), daemon=True)
            for name, pipe in (("out", self.process.stdout), ("err", self.process.stderr))
        ]
        for reader in readers:
            reader.start()
        code = self.process.wait()
        for reader in readers:
            reader.join(DRAIN)
        forget(self.id)
        self.channel.send(id=self.id, rc=code)

    def read(self, name: str, pipe: IO[bytes]) -> None:
        while data := os.read(pipe.fileno(), CHUNK):
            self.channel.send(id=self.id, **{name: data.decode("latin-1")})
        pipe.close()

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def serve(channel: Channel) -> None:
    commands: dict[int, Command] = {}
    for line in channel.lines():
        request = json.loads(line)
        if "signal" in request:
            if command := commands.get(request["id"]):
                command.signal(request["signal"])
            continue
        try:
            command = commands[request["id"]] = Command(channel, request)
        except OSError as error:
            channel.send(id=request["id"], error=str(error))
            channel.send(id=request["id"], rc=127)
            continue
        threading.Thread(target=command.follow, args=(commands.pop,), daemon=True).start()


def main() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    channel = Channel(os.open(find_port(), os.O_RDWR))
    channel.send(hello=float(Path("/proc/uptime").read_text().split()[0]))
    serve(channel)
    Path("/proc/sysrq-trigger").write_text("o")


if __name__ == "__main__":
    main()
