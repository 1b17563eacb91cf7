# SPDX-License-Identifier: GPL-2.0-or-later
"""Logging: short stable logger names, and the request's flow id on every line."""

from __future__ import annotations

import contextvars
import logging
import logging.handlers

# The one piece of ambient state: which request the running code works for.  Lanes carry it over.
FLOW: contextvars.ContextVar[str] = contextvars.ContextVar("flow", default="-")

FORMAT = "%(asctime)s %(levelname)-5s (%(threadName)s) [%(name)s] %(flow)s %(message)s"


class _Flow(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.flow = FLOW.get()
        return True


def setup(path: str | None, level: str, size: int, keep: int) -> None:
    """Log to `path` (rotated at `size` bytes, `keep` old files), or to stderr when it is None."""
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler()
    else:
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=size, backupCount=keep)
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.addFilter(_Flow())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
