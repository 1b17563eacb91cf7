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
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.engine.host import LOCALFS, POSIXFS, StorageServer
from functional.outside import Outside
from functional.processes import AgentProcess, leftovers
from functional.standin.process import StandInProcess

GIB = 1024**3
REPORT = 4000  # characters of a failure


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from functional.sharing import Sharing  # xdist takes seconds to import under emulation

    return Sharing(config, log)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What failed when it was run first: the list of reruns does not say."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.section(f"first run of {report.nodeid}", sep="-")
        terminalreporter.line(report.longreprtext[-REPORT:])


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


@pytest.fixture
def outside(workdir: Path) -> Iterator[Outside]:
    """A directory that nobody has any business in."""
    made = Outside(workdir / f"outside-{uuid.uuid4()}")
    yield made
    made.close()


@pytest.fixture(scope="module")
def make_luns(workdir: Path) -> Iterator[Callable[..., list[str]]]:
    """make_luns(count, size) -> loop devices on sparse files: LUNs that every host sees."""
    made: list[str] = []

    def make(count: int, size: int = 20 * GIB) -> list[str]:
        first = len(made)
        for number in range(first, first + count):
            path = workdir / f"lun-{number}"
            with path.open("wb") as file:
                file.truncate(size)
            made.append(_run("losetup", "--find", "--show", "--direct-io=off", str(path)).strip())
        return made[first:]

    yield make
    for loop in made:
        _run("losetup", "--detach", loop)


@pytest.fixture(scope="module")
def make_standin(
    workdir: Path, make_luns: Callable[..., list[str]]
) -> Iterator[Callable[..., StandInProcess]]:
    """make_standin(name, sync=True) -> a running stand-in of device-mapper for one host."""
    started: list[StandInProcess] = []

    def make(name: str = "standin", sync: bool = True) -> StandInProcess:
        standin = StandInProcess(workdir / name, sync)
        standin.start()
        started.append(standin)
        return standin

    yield make
    left = [text for standin in started for text in standin.stop()]
    assert left == []


@pytest.fixture(scope="module")
def start_agent(
    workdir: Path, make_standin: Callable[..., StandInProcess]
) -> Iterator[Callable[..., AgentProcess]]:
    """start_agent(name, tls=True, standin=None, **settings) -> a running agent."""
    started: list[AgentProcess] = []

    def start(
        name: str = "agent",
        tls: bool = True,
        standin: StandInProcess | None = None,
        **settings: str,
    ) -> AgentProcess:
        agent = AgentProcess(workdir / name, tls, settings, standin)
        agent.start()
        started.append(agent)
        return agent

    yield start
    problems = [problem for agent in started if (problem := agent.stop())]
    assert problems == []


@pytest.fixture(scope="module")
def lab(
    workdir: Path, start_agent: Callable[..., AgentProcess], make_server: Callable[[str], Any]
) -> Iterator[Any]:
    """A VmLab on two directories, with default settings: who wants another has its own fixture."""
    from functional.vm_lab import vm_lab  # libvirt takes seconds to import under emulation

    with vm_lab(workdir, start_agent, make_server) as one:
        yield one


@pytest.fixture(scope="module")
def make_server(workdir: Path) -> Iterator[Callable[[str], StorageServer]]:
    """make_server(kind) -> storage that a domain can be made on.

    `local` is a directory, `local-4k` one on a device with sectors of 4096 bytes; `bind` a
    directory as a POSIX file system, `ext4` and `xfs` a device, `fuse` a file system in user space.
    """
    loops: list[str] = []
    mounts: list[str] = []
    numbers = itertools.count()

    def device(path: Path, fs: str, sector: int = 512) -> str:
        _truncate(path)
        loop = ("losetup", "--find", "--show", f"--sector-size={sector}", str(path))
        loops.append(_run(*loop).strip())
        _run(f"mkfs.{fs}", "-q", loops[-1])
        return loops[-1]

    def make(kind: str) -> StorageServer:
        path = workdir / f"storage-{next(numbers)}-{kind}"
        if kind in ("ext4", "xfs"):
            return StorageServer(POSIXFS, device(path, kind), vfs_type=kind)
        if kind == "fuse":
            _truncate(path)
            _run("mkfs.ext4", "-q", str(path))
            return StorageServer(POSIXFS, str(path), vfs_type="fuse.fuse2fs")
        path.mkdir()
        if kind == "bind":
            return StorageServer(POSIXFS, str(path), vfs_type="none", options="bind")
        if kind == "local-4k":
            _run("mount", device(path.with_suffix(".img"), "xfs", 4096), str(path))
            mounts.append(str(path))
        return StorageServer(LOCALFS, str(path))

    yield make
    for mount in mounts:
        _run("umount", mount)
    for loop in loops:
        _run("losetup", "--detach", loop)


def _truncate(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(4 * GIB)


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


def pytest_configure(config: pytest.Config) -> None:
    """Agents are this interpreter's: the virtual environment's."""
    assert Path(sys.executable).with_name("vdsm-storaged").exists()
