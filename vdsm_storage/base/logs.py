# SPDX-License-Identifier: GPL-2.0-or-later
"""Logging: short stable logger names, and the request's flow id on every line.

A line costs little, since every verb writes one: no stack is walked for it and the time's text is
made once a second.  The lines of verbs are written at the end of each turn of the event loop.
"""

from __future__ import annotations

import contextvars
import logging
import os
import threading
import time

# The one piece of ambient state: which request the running code works for.  Lanes carry it over.
FLOW: contextvars.ContextVar[str] = contextvars.ContextVar("flow", default="-")

FORMAT = "%(asctime)s %(levelname)-5s (%(threadName)s) [%(name)s] %(flow)s %(message)s"


class _Flow(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.flow = FLOW.get()
        return True


class Times:
    """Text of points in time; the text of a second is made once."""

    def __init__(self) -> None:
        self._last = (-1, "")

    def text(self, now: float) -> str:
        """`2026-01-31 12:34:56,789` for seconds since the epoch."""
        second = int(now)
        last, text = self._last
        if second != last:
            text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
            self._last = (second, text)
        return f"{text},{int((now - second) * 1000):03d}"


class _Formatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__(FORMAT)
        self._times = Times()

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return self._times.text(record.created)


class RotatingLog(logging.Handler):
    """Appends to `path`; past `size` bytes it becomes `path.1`, and so on up to `path.<keep>`."""

    def __init__(self, path: str, size: int, keep: int) -> None:
        super().__init__()
        self._path = path
        self._size = size
        self._keep = keep
        self._fd = -1
        self._written = 0
        self._times = Times()
        self._thread = ""
        self._held: list[tuple[float, int, str, str, str, tuple[object, ...]]] = []
        self._open()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write((self.format(record) + "\n").encode("utf-8", "backslashreplace"))
        except (OSError, ValueError, TypeError):
            self.handleError(record)

    def line(self, name: str, level: int, template: str, facts: tuple[object, ...]) -> None:
        """The same line that a record gives, made by `flush` or before the next record."""
        if not self._thread:
            self._thread = threading.current_thread().name
        self._held.append((time.time(), level, name, FLOW.get(), template, facts))

    def flush(self) -> None:
        if not self._held:
            return
        self.acquire()
        try:
            self._write(b"")
        except OSError:
            pass  # a full disk must not fail a verb
        finally:
            self.release()

    def close(self) -> None:
        self.flush()
        self.acquire()
        try:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
        finally:
            self.release()
        super().close()

    def _write(self, data: bytes) -> None:
        if self._held:
            held, self._held = self._held, []
            lines = [
                f"{self._times.text(when)} {logging.getLevelName(level):5} ({self._thread}) "
                f"[{name}] {flow} {template % facts}\n"
                for when, level, name, flow, template, facts in held
            ]
            data = "".join(lines).encode("utf-8", "backslashreplace") + data
        if self._written and self._written + len(data) > self._size:
            self._rotate()
        os.write(self._fd, data)
        self._written += len(data)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o644)
        self._written = os.fstat(self._fd).st_size

    def _rotate(self) -> None:
        names = [self._path, *(f"{self._path}.{n}" for n in range(1, self._keep + 1))]
        for older, newer in reversed(list(zip(names[1:], names, strict=False))):
            if os.path.exists(newer):
                os.replace(newer, older)
        if self._keep == 0:
            os.unlink(self._path)
        os.close(self._fd)
        self._open()


def line(logger: logging.Logger, level: int, template: str, *facts: object) -> bool:
    """Log at a fraction of a record's cost where only the file hears it.

    For the line that every verb writes, on the event loop only.  The caller has asked
    `isEnabledFor`.  True if `flush` must be called soon to have it written.
    """
    handlers = logging.getLogger().handlers
    if len(handlers) == 1 and isinstance(handlers[0], RotatingLog) and not logger.handlers:
        handlers[0].line(logger.name, level, template, facts)
        return True
    logger.log(level, template, *facts)
    return False


def flush() -> None:
    """Write what `line` holds."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def setup(path: str | None, level: str, size: int, keep: int) -> None:
    """Log to `path` (rotated at `size` bytes, `keep` old files), or to stderr when it is None."""
    # What no line shows is not worked out (the logging module's documented optimisations).
    logging.logProcesses = False
    logging.logMultiprocessing = False
    logging._srcfile = None
    handler = logging.StreamHandler() if path is None else RotatingLog(path, size, keep)
    handler.setFormatter(_Formatter())
    handler.addFilter(_Flow())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
