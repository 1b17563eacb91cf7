# SPDX-License-Identifier: GPL-2.0-or-later
"""Something small that is done while something longer goes on."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future


@contextlib.contextmanager
def aside(name: str, work: Callable[[], object]) -> Iterator[None]:
    """Do `work` in a thread of its own while the block runs; its end is waited for.

    An error of the block is the one that is raised, else that of the work.
    """
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed on to who waits for it
            done.set_exception(error)

    thread = threading.Thread(
        target=contextvars.copy_context().run, args=(run,), name=name, daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        thread.join()
    done.result()
