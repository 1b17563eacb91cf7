# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a program: argv list, always a timeout, cancellable, its stderr in the error.

A child dies with this process (PDEATHSIG through setpriv), so that kill -9 of the agent leaves no
qemu-img writing behind its back.  Memory and CPU limits go through prlimit.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.pace import Pace, Throttle
from vdsm_storage.errors import ActionStopped, CommandError, CommandTimeout

STDERR_KEPT = 4096  # bytes of stderr that go into an error
OUTPUT_LIMIT = 64 * 1024 * 1024  # a program that prints more than this is killed
GRACE = 3.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Limits:
    """Resource limits of a child that reads hostile input."""

    memory: int | None = None  # bytes of address space
    cpu: int | None = None  # seconds


@dataclass(frozen=True)
class Result:
    stdout: bytes
    stderr: bytes
    seconds: float


@dataclass(frozen=True)
class Command:
    """What to run and how long it may take.

    `on_output` gets each piece of stdout as it comes (progress); the output is then not kept.
    `ok` are the exit codes that are no error.  `pace` is how fast it may move data.
    """

    argv: Sequence[str]
    timeout: float
    input: bytes | None = None
    cancel: Cancel | None = None
    on_output: Callable[[bytes], None] | None = None
    env: Mapping[str, str] | None = None
    limits: Limits | None = None
    ok: Sequence[int] = (0,)
    pace: Pace | None = None

    @property
    def program(self) -> str:
        return os.path.basename(self.argv[0])


Process = subprocess.Popen[bytes]


def start(command: Command, stdin: int | None = None) -> Process:
    """Only start it, for `run`; `stdin` as subprocess has it.  Raises CommandError."""
    if stdin is None:
        stdin = subprocess.PIPE if command.input is not None else subprocess.DEVNULL
    try:
        return subprocess.Popen(
            [*_prefix(command.limits), *command.argv],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C", **(command.env or {})},
            process_group=0,
        )
    except OSError as error:
        raise CommandError(
            program=command.program, status="not started", stderr=error.strerror
        ) from error


def run(command: Command, start: Callable[[Command], Process] = start) -> Result:
    """Run to the end.  Raises CommandError, CommandTimeout, or ActionStopped when cancelled."""
    started = time.monotonic()
    if command.cancel is not None:
        command.cancel.check()
    process = start(command)
    forget = _stop_when_cancelled(command.cancel, process)
    throttle = Throttle(command.pace, process.pid) if command.pace is not None else None
    try:
        stdout, stderr = _communicate(process, command, started + command.timeout, throttle)
        _wait(process, command, started + command.timeout)
    except subprocess.TimeoutExpired:
        raise CommandTimeout(
            program=command.program, seconds=command.timeout, stderr="no further output"
        ) from None
    finally:
        forget()
        if throttle is not None:
            throttle.release()
        _kill(process)
    if command.cancel is not None and command.cancel.requested:
        raise ActionStopped()
    if process.returncode not in command.ok:
        raise CommandError(
            program=command.program,
            status=_status(process.returncode),
            stderr=stderr[-STDERR_KEPT:].decode(errors="replace").strip() or "no message",
        )
    return Result(stdout, stderr, time.monotonic() - started)


def _prefix(limits: Limits | None) -> list[str]:
    prefix = ["setpriv", "--pdeathsig", "KILL"]
    if limits is not None:
        prefix.append("prlimit")
        if limits.memory is not None:
            prefix.append(f"--as={limits.memory}")
        if limits.cpu is not None:
            prefix.append(f"--cpu={limits.cpu}")
        prefix.append("--core=0")
    return prefix


def _status(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


def _stop_when_cancelled(
    cancel: Cancel | None, process: Process
) -> Callable[[], None]:
    if cancel is None:
        return lambda: None
    return cancel.on_request(process.terminate)


def _communicate(
    process: Process,
    command: Command,
    deadline: float,
    throttle: Throttle | None,
) -> tuple[bytes, bytes]:
    """Feed stdin and read both outputs until they close; TimeoutExpired at the deadline."""
    kept: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
    feed = memoryview(command.input or b"")
    with selectors.DefaultSelector() as selector:
        assert process.stdout is not None
        assert process.stderr is not None
        selector.register(process.stdout, selectors.EVENT_READ, "stdout")
        selector.register(process.stderr, selectors.EVENT_READ, "stderr")
        if process.stdin is not None:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE, "stdin")
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(command.argv, command.timeout)
            for key, _ in selector.select(_hold_back(throttle, command.cancel, left)):
                if key.data == "stdin":
                    feed = _write(process, feed)
                    if not feed:
                        selector.unregister(key.fileobj)
                        _close_stdin(process)
                    continue
                piece = os.read(key.fd, 65536)
                if not piece:
                    selector.unregister(key.fileobj)
                elif key.data == "stdout" and command.on_output is not None:
                    command.on_output(piece)
                else:
                    kept[key.data] += piece
                    if len(kept[key.data]) > OUTPUT_LIMIT:
                        raise CommandError(
                            program=command.program, status="killed", stderr="it prints without end"
                        )
    return bytes(kept["stdout"]), bytes(kept["stderr"])


def _hold_back(throttle: Throttle | None, cancel: Cancel | None, left: float) -> float:
    """The seconds to wait, `left` at most, until the program is to be looked at again."""
    if throttle is None:
        return left
    if cancel is not None and cancel.requested:
        throttle.release()  # one that stands still would not see that it is to end
        return left
    return min(left, throttle.tick())


def _wait(process: Process, command: Command, deadline: float) -> None:
    """Until it has ended; TimeoutExpired at the deadline.  Popen.wait() would look now and then."""
    pidfd = os.pidfd_open(process.pid)
    try:
        poll = select.poll()  # not select(), which knows 1024 descriptors
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(1000 * max(0.1, deadline - time.monotonic())):
            raise subprocess.TimeoutExpired(command.argv, command.timeout)
    finally:
        os.close(pidfd)
    process.wait()


def _write(process: Process, feed: memoryview) -> memoryview:
    assert process.stdin is not None
    try:
        return feed[os.write(process.stdin.fileno(), feed) :]
    except BlockingIOError:
        return feed
    except BrokenPipeError:  # the program did not want all of it; its exit code tells the rest
        return memoryview(b"")


def _close_stdin(process: Process) -> None:
    assert process.stdin is not None
    try:
        process.stdin.close()
    except BrokenPipeError:
        return


def _signal_group(process: Process, number: signal.Signals) -> None:
    """To the child and its helpers (mount runs mount.TYPE), which are in its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _kill(process: Process) -> None:
    """End a child that still runs, with the helpers that it started; politely first; reap it."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            # One that stays is in the kernel, on dead storage; init reaps it when the I/O returns.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    if process.stdin is not None:
        _close_stdin(process)
