# SPDX-License-Identifier: GPL-2.0-or-later
"""Agents as processes of their own, and storage for them; nothing is left behind."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from functional.engine.host import LOCALFS, POSIXFS, StorageServer
from functional.processes import AgentProcess, leftovers

GIB = 1024**3


@pytest.fixture(scope="module")
def workdir() -> Iterator[Path]:
    """Short, because sockets are below it; not on a tmpfs, because of direct I/O."""
    base = os.environ.get("TMPDIR", "/var/tmp")
    path = Path(tempfile.mkdtemp(prefix="e", dir=base))
    yield path
    left = leftovers(path)
    for kind, name, *_ in (line.split() for line in left):
        if kind == "process":  # of a test that failed
            os.kill(int(name), signal.SIGKILL)
        elif kind == "mount":
            subprocess.run(["umount", "--lazy", name], check=False, timeout=30)
    shutil.rmtree(path, ignore_errors=True)
    assert left == []


@pytest.fixture(scope="module")
def start_agent(workdir: Path) -> Iterator[Callable[..., AgentProcess]]:
    """start_agent(name, tls=True, **settings) -> a running agent."""
    started: list[AgentProcess] = []

    def start(name: str = "agent", tls: bool = True, **settings: str) -> AgentProcess:
        agent = AgentProcess(workdir / name, tls, settings)
        agent.start()
        started.append(agent)
        return agent

    yield start
    problems = [problem for agent in started if (problem := agent.stop())]
    assert problems == []


@pytest.fixture(scope="module")
def make_server(workdir: Path) -> Iterator[Callable[[str], StorageServer]]:
    """make_server("local" | "bind" | "ext4") -> storage that a domain can be made on."""
    loops: list[str] = []
    numbers = itertools.count()

    def make(kind: str) -> StorageServer:
        path = workdir / f"storage-{next(numbers)}-{kind}"
        if kind == "ext4":
            with path.open("wb") as file:
                file.truncate(4 * GIB)
            _run("mkfs.ext4", "-q", str(path))
            loops.append(_run("losetup", "--find", "--show", str(path)).strip())
            return StorageServer(POSIXFS, loops[-1], vfs_type="ext4")
        path.mkdir()
        if kind == "local":
            return StorageServer(LOCALFS, str(path))
        return StorageServer(POSIXFS, str(path), vfs_type="none", options="bind")

    yield make
    for loop in loops:
        _run("losetup", "--detach", loop)


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


def pytest_configure(config: pytest.Config) -> None:
    """Agents are this interpreter's: the virtual environment's."""
    assert Path(sys.executable).with_name("vdsm-storaged").exists()
