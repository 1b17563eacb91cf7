# SPDX-License-Identifier: GPL-2.0-or-later
"""What the chapters of make demo with guests in them have in common: a libvirtd and an agent of
their own, which leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt

from functional.demo import CheckFailedError, check, say, title
from functional.guests.libvirtd import Libvirtd
from functional.lab.guest import why_not
from functional.processes import AgentProcess, leftovers
from functional.vm_lab import VmLab
from functional.world import World
from vdsm_storage.rpc.client import RemoteError


@contextlib.contextmanager
def lab(
    agent: AgentProcess, libvirtd: Libvirtd, storage: Callable[[], World]
) -> Iterator[VmLab]:
    """Both are started, and stopped in order unless a check fails."""
    libvirtd.start()
    try:
        agent.start()
        made = VmLab(libvirtd, storage())
        try:
            made.wait_libvirt()
            yield made
        finally:
            made.close()
        title("Stop")
        check("the agent ends cleanly on SIGTERM", agent.stop() == "")
    finally:
        if agent.alive():
            agent.kill()
        libvirtd.stop()


def run_chapter(what: str, chapter: Callable[[Path], None]) -> int:
    """In a directory of its own, which stays if it fails; the exit code."""
    if reason := why_not():
        say(f"no guest can run here: {reason}")
        return 1
    libvirt.registerErrorHandler(lambda *_: None, None)  # they are raised as well
    directory = Path(tempfile.mkdtemp(prefix="vd", dir=os.environ.get("TMPDIR", "/var/tmp")))
    directory.chmod(0o755)
    try:
        chapter(directory)
        check("no process, mount or loop device is left", leftovers(directory) == [])
    except (CheckFailedError, RemoteError, AssertionError) as error:
        say(f"\nThe chapter on {what} failed: {error}")
        say(f"The agent's log: {directory}/agent/agent.log")
        return 1
    shutil.rmtree(directory)
    return 0
