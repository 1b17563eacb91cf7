# SPDX-License-Identifier: GPL-2.0-or-later
"""A host whose id cannot be renewed lets go of its leases, and lives on if it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.errors import AcquireLockFailure
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.host.sanlock_daemon import SanlockDaemon
from vdsm_storage.leases.cluster_lock import SanlockClusterLock
from vdsm_storage.leases.lease import Leases

pytestmark = pytest.mark.sanlock


@pytest.fixture
def losable(joined: Any, sanlock_daemon: str, tmp_path: Path) -> Any:
    """Leases of the joined lockspace that look for markers in tmp_path / lost."""
    leases = Leases(Sanlock(sanlock_daemon, 1, str(tmp_path / "lost")), SystemClock())
    yield leases
    leases.lost.close()


def test_operations_end_and_the_last_gives_back(joined: Any, losable: Any, tmp_path: Path) -> None:
    spec = joined.new_lease()
    lock = SanlockClusterLock(losable, spec, SystemClock())
    stale = tmp_path / "lost" / spec.lockspace
    stale.touch()
    told: list[str] = []
    stopped = threading.Event()
    losable.lost.start(lambda sd_id: (told.append(sd_id), stopped.set()))
    lock.acquire(5)  # the pool manager's
    with lock.held(5):
        stale.touch()
        assert stopped.wait(10)
        while lock.is_held():
            stopped.wait(0.01)
        with pytest.raises(AcquireLockFailure, match="could not be renewed"), lock.held(1):
            pass
        assert losable.state(spec).owners == (7,)  # until the operation has ended
    assert losable.state(spec).owners == ()
    lock.release()  # the manager's hold is gone already
    with lock.held(5):
        assert lock.is_held()
    assert told == [spec.lockspace]


def test_the_daemon_dies(tmp_path: Path) -> None:
    """In a process of its own, whose daemon it is: it holds a lease and is told."""
    daemon = SanlockDaemon(str(tmp_path / "run"), 1)
    daemon.start()
    for name in ("ids", "leases"):
        (tmp_path / name).touch()
    process = start(daemon.directory, str(tmp_path), str(tmp_path / "ids"), script=LOSES)
    try:
        assert line(process) == "held"
        os.kill(daemon.pid() or 0, signal.SIGKILL)
        assert line(process) == "let go"
        assert line(process) == "alive"
    finally:
        end(process)
        daemon.stop()


def start(*arguments: str, script: str) -> subprocess.Popen[str]:
    root = Path(__file__).parent.parent.parent
    return subprocess.Popen(
        [sys.executable, "-c", SETUP + script, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(20)
    assert process.stdout is not None
    process.stdout.close()


# What both scripts begin with: they hold a host id and have a lock.
SETUP = """
import sys, threading, time
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.units import MIB
from vdsm_storage.errors import AcquireLockFailure
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.leases.cluster_lock import SanlockClusterLock
from vdsm_storage.leases.lease import Leases
from vdsm_storage.leases.lockspace import Lockspace
from vdsm_storage.leases.model import Geometry, LeaseSpec

run_dir, directory, ids = sys.argv[1:]
clock = SystemClock()
sanlock = Sanlock(run_dir, 1, directory + "/lost")
leases = Leases(sanlock, clock)
sd_id = "11111111-2222-3333-4444-555555555555"
leases.write_lockspace(sd_id, ids, Geometry())
spec = LeaseSpec(sd_id, "SDM", directory + "/leases", MIB)
leases.write(spec)
lockspace = Lockspace(sanlock, sd_id, ids, Geometry(), clock)
lockspace.acquire(1, 60)
lock = SanlockClusterLock(leases, spec, clock)
"""
LOSES = """
stopped = threading.Event()
leases.lost.start(lambda sd_id: stopped.set())
lock.acquire(5)
with lock.held(5):
    print("held", flush=True)
    assert stopped.wait(60)
while lock.is_held() or lockspace.is_held():
    time.sleep(0.1)
print("let go", flush=True)
time.sleep(2)  # sanlock has no reason to kill it
print("alive", flush=True)
"""


@pytest.mark.slow
@pytest.mark.mount
def test_storage_of_the_host_id_dies(sanlock_daemon: str, tmp_path: Path) -> None:
    backing = tmp_path / "ids"
    backing.write_bytes(bytes(1024 * 1024))
    (tmp_path / "leases").touch()
    loop = subprocess.run(
        ["losetup", "-f", "--show", str(backing)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    process = start(sanlock_daemon, str(tmp_path), loop, script=LOSES)
    try:
        assert line(process) == "held"
        os.truncate(backing, 0)  # every renewal is an I/O error from now on
        assert line(process) == "let go"
        assert line(process) == "alive"
        assert process.wait(20) == 0
    finally:
        end(process)
        subprocess.run(["losetup", "-d", loop], check=True)


ASLEEP = """
leases.lost.start(lambda sd_id: None)
lock.verify()  # nobody holds it: nothing is guarded
with lock.held(5):
    lock.verify()
    time.sleep(3)
    lock.verify()
    last = time.monotonic()  # before the word by which the test knows that it may stop us
    print("held", flush=True)
    while (now := time.monotonic()) - last < 5:  # until all of the host stood still
        last = now
    try:
        lock.verify()
    except AcquireLockFailure:
        print("refused", flush=True)
    else:
        print("would write", flush=True)
"""


@pytest.mark.slow
def test_a_host_that_stood_still_does_not_write(tmp_path: Path) -> None:
    """The process and its daemon are stopped past the lease's life: the very first thing that the
    process does afterwards is refused, before the daemon has told it anything."""
    (tmp_path / "leases").touch()
    (tmp_path / "ids").touch()
    daemon = SanlockDaemon(str(tmp_path / "sanlock"), 1)
    daemon.start()
    pid = daemon.pid()
    assert pid is not None
    process = start(str(tmp_path / "sanlock"), str(tmp_path), str(tmp_path / "ids"), script=ASLEEP)
    try:
        assert line(process) == "held"
        for number in (signal.SIGSTOP, signal.SIGCONT):
            os.kill(pid, number)
            os.kill(process.pid, number)
            time.sleep(10 if number == signal.SIGSTOP else 0)
        assert line(process) == "refused"
    finally:
        end(process)
        daemon.stop()
