# SPDX-License-Identifier: GPL-2.0-or-later
"""The lock of a domain: within a process, between threads, and between hosts."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.units import MIB
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.errors import AcquireLockFailure, SpmStatusError
from vdsm_storage.host.sanlock_daemon import SanlockDaemon
from vdsm_storage.leases import cluster_lock
from vdsm_storage.leases.cluster_lock import CountedLock, SanlockClusterLock
from vdsm_storage.leases.local_lock import FileLock
from vdsm_storage.leases.lockspace import Lockspace
from vdsm_storage.leases.model import Geometry, LeaseSpec

ROOT = Path(__file__).parent.parent.parent
DOMAIN = "11111111-2222-3333-4444-555555555555"


class Contender:
    """A process of contender.py."""

    def __init__(self, *arguments: str) -> None:
        script = Path(__file__).parent / "contender.py"
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def expect(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == word

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def lock(joined: Any) -> SanlockClusterLock:
    return SanlockClusterLock(joined.leases, joined.new_lease(), SystemClock())


@pytest.fixture
def file_lock(tmp_path: Path) -> FileLock:
    (tmp_path / "ids").touch()
    return FileLock(DOMAIN, str(tmp_path / "ids"), SystemClock())


def count_with(lock: CountedLock, holders: int) -> tuple[int, int]:
    """Most holders at once, and holds in all, of many threads that share the lock."""
    inside, most, holds = [0], [0], [0]
    guard = threading.Lock()

    def work() -> None:
        for _ in range(10):
            with lock.held(30):
                assert lock.is_held()
                with guard:
                    inside[0] += 1
                    holds[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                with guard:
                    inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(holders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most[0], holds[0]


@pytest.mark.sanlock
def test_threads_of_a_process_hold_it_together(lock: SanlockClusterLock) -> None:
    most, holds = count_with(lock, 8)
    assert most > 1
    assert holds == 80
    assert not lock.is_held()
    assert lock.inquire().owners == ()


@pytest.mark.sanlock
def test_held_for_long_and_for_short_at_once(lock: SanlockClusterLock) -> None:
    lock.acquire(5)
    with lock.held(0):
        pass
    assert lock.is_held()
    assert lock.inquire().owners == (7,)
    lock.release()
    assert lock.inquire().last_owner == 7
    lock.release()  # one too many does no harm
    assert not lock.is_held()


@pytest.mark.sanlock
def test_who_has_it_is_told(joined: Any, lock: SanlockClusterLock) -> None:
    other = SanlockClusterLock(joined.leases, lock.spec, SystemClock())
    with lock.held(5), pytest.raises(SpmStatusError) as error, other.held(0.1):
        pass
    assert error.value.code == 654
    assert "host id 7" in error.value.message
    assert not other.is_held()
    with other.held(5):
        pass


def test_a_file_lock_is_counted_and_exclusive(file_lock: FileLock, tmp_path: Path) -> None:
    assert count_with(file_lock, 4)[1] == 40
    other = FileLock(DOMAIN, str(tmp_path / "ids"), SystemClock())
    assert other.inquire().owners == ()
    with file_lock.held(1):
        assert other.inquire().owners == (1,)
        with pytest.raises(SpmStatusError), other.held(0.05):
            pass
    with other.held(0):
        pass


def test_a_file_lock_without_its_file(tmp_path: Path) -> None:
    lock = FileLock(DOMAIN, str(tmp_path / "ids"), SystemClock())
    with pytest.raises(AcquireLockFailure), lock.held(1):
        pass
    (tmp_path / "ids").symlink_to("/dev/null")
    with pytest.raises(AcquireLockFailure), lock.held(1):
        pass


@pytest.fixture
def other_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    daemon = SanlockDaemon(str(tmp_path_factory.mktemp("other")), io_timeout=1)
    daemon.start()
    yield daemon.directory
    os.kill(daemon.pid() or 0, signal.SIGKILL)  # it is in a lockspace and would not end
    daemon.stop()


@pytest.mark.sanlock
def test_two_hosts_never_hold_it_together(
    joined: Any, sanlock_daemon: str, other_host: str
) -> None:
    """Both count in one file; then one dies with the lock, and the other gets it."""
    directory = joined.directory / "shared"
    directory.mkdir()
    for name in ("ids", "leases"):
        (directory / name).touch()
    (directory / "counter").write_text("0")
    sd_id = new_uuid()
    spec = LeaseSpec(sd_id, "SDM", str(directory / "leases"), MIB)
    joined.leases.write_lockspace(sd_id, str(directory / "ids"), Geometry())
    joined.leases.write(spec)
    rounds = "60"
    here = Contender(sanlock_daemon, str(directory), sd_id, "1", rounds)
    there = Contender(other_host, str(directory), sd_id, "2", rounds)
    for contender in (here, there):
        contender.expect("joined")
    for contender in (here, there):
        contender.expect("done")
        contender.process.wait(20)
    assert (directory / "counter").read_text() == "120"
    assert joined.leases.state(spec).last_version > 2  # they did take turns

    holder = Contender(other_host, str(directory), sd_id, "2", "0", "hang")
    holder.expect("joined")
    holder.expect("held")
    assert joined.leases.state(spec).owners == (2,)
    lock = SanlockClusterLock(joined.leases, spec, SystemClock())
    with pytest.raises(SpmStatusError, match="host id 2"), lock.held(0.2):
        pass
    holder.kill()  # its daemon lives on and frees what the process had
    with lock.held(30):
        assert joined.leases.state(spec).owners == (1,)
    for contender in (here, there):
        contender.kill()
    lockspace = Lockspace(
        joined.sanlock, sd_id, str(directory / "ids"), Geometry(), SystemClock()
    )
    lockspace.start_acquire(1)
    lockspace.release()


@pytest.mark.sanlock
def test_a_daemon_is_found_again_and_ends(tmp_path: Path) -> None:
    first = SanlockDaemon(str(tmp_path), io_timeout=1)
    pid = first.start()
    again = SanlockDaemon(str(tmp_path), io_timeout=1)
    assert again.start() == pid
    assert os.getsid(pid) != os.getsid(0)  # it does not die with the agent
    again.stop()
    first.stop()
    assert first.pid() is None
    assert first.start() != pid
    os.kill(first.pid() or 0, signal.SIGKILL)
    first.stop()
    assert first.pid() is None


# -- turns of hosts ------------------------------------------------------------------------------


class Switch:
    """A backend of its own that tells when it is taken and given back."""

    def __init__(self) -> None:
        self.log: list[tuple[str, float]] = []

    def acquire(self, timeout: float) -> None:
        self.log.append(("taken", time.monotonic()))

    def release(self) -> None:
        self.log.append(("given back", time.monotonic()))

    def lost(self) -> AcquireLockFailure:
        raise NotImplementedError

    def fresh(self) -> bool:
        return True


def chain(lock: CountedLock, seconds: float) -> list[threading.Thread]:
    """Two threads that take turns without a gap between them; they have begun."""
    end = time.monotonic() + seconds
    begun = threading.Barrier(3)

    def work(first: float) -> None:
        begun.wait()
        time.sleep(first)
        while time.monotonic() < end:
            with lock.held(10):
                time.sleep(0.1)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0.0, 0.05)]
    for thread in threads:
        thread.start()
    begun.wait()
    return threads


def test_operations_in_a_chain_let_other_hosts_have_it() -> None:
    """The lease goes back after the turn, and is left alone for a moment."""
    switch = Switch()
    for thread in chain(CountedLock(DOMAIN, switch, SystemClock(), turn=0.5), 2.0):
        thread.join()
    gaps = [
        taken - given
        for (what, given), (_, taken) in itertools.pairwise(switch.log)
        if what == "given back"
    ]
    assert len(gaps) >= 2
    assert min(gaps) > 0.15


def test_a_manager_keeps_it() -> None:
    switch = Switch()
    lock = CountedLock(DOMAIN, switch, SystemClock(), turn=0.2)
    lock.acquire(1)
    for thread in chain(lock, 1.0):
        thread.join()
    assert [what for what, _ in switch.log] == ["taken"]
    lock.release()


def test_how_long_it_is_held() -> None:
    lock = CountedLock(DOMAIN, Switch(), SystemClock())
    assert lock.held_for() == 0.0
    with lock.held(1):
        time.sleep(0.05)
        with lock.held(1):
            assert 0.05 <= lock.held_for() < 1
    assert lock.held_for() == 0.0
    with lock.held(1):
        assert lock.held_for() < 0.05
        lock.doom()
        assert lock.held_for() == 0.0


def test_one_that_takes_very_long_keeps_nobody_of_its_host_waiting() -> None:
    """After a while the others go on with it.  It may hold it twice itself."""
    lock = CountedLock(DOMAIN, Switch(), SystemClock(), turn=0.2)
    ended = threading.Event()

    def work() -> None:
        with lock.held(1):
            time.sleep(0.4)
            with lock.held(0):  # without waiting
                ended.wait(20)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.5)
    began = time.monotonic()
    with pytest.raises(SpmStatusError, match="another operation here"), lock.held(0.2):
        pass
    with lock.held(10):
        assert time.monotonic() - began < cluster_lock.GRACE + 1
    ended.set()
    thread.join()
    with lock.held(0):
        pass
