# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that are kept to a pace which they know nothing of."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.pace import MIB, Pace, Throttle, bytes_moved
from vdsm_storage.base.run import Command, run
from vdsm_storage.errors import ActionStopped

# About a hundred MiB a second.
WRITER = """
import time
for _ in range({mib}):
    open("/dev/null", "wb").write(bytes(1 << 20))
    time.sleep(0.01)
"""


class Process:
    """One that would move data, as a throttle sees it."""

    def __init__(self) -> None:
        self.moved = 0
        self.stopped = False

    def send(self, _pid: int, number: int) -> None:
        self.stopped = number == signal.SIGSTOP


def throttle(pace: Pace) -> tuple[Process, Throttle]:
    process = Process()
    return process, Throttle(pace, 1, lambda _pid: process.moved, process.send)


def test_it_stands_still_until_it_has_paid() -> None:
    pace = Pace(10)
    process, one = throttle(pace)
    process.moved = 5 * MIB  # half a second's
    assert one.tick() > 0
    assert process.stopped
    pace.limit = 1000
    time.sleep(0.01)
    one.tick()
    assert not process.stopped


def test_without_a_limit_it_goes_on() -> None:
    pace = Pace()
    process, one = throttle(pace)
    process.moved = 500 * MIB
    one.tick()
    assert not process.stopped
    pace.limit = 1
    process.moved += 3 * MIB
    one.tick()
    assert process.stopped
    pace.limit = 0
    one.tick()
    assert not process.stopped
    process.moved += 300 * MIB
    one.tick()
    pace.limit = 1
    one.tick()  # what it did without one does not count
    assert not process.stopped


def test_nothing_is_saved_up() -> None:
    process, one = throttle(Pace(10))
    time.sleep(0.3)
    one.tick()
    process.moved = 2 * MIB  # two tenths of a second's; one tenth is allowed at once
    one.tick()
    assert process.stopped
    one.release()
    assert not process.stopped


def test_a_program_keeps_to_it() -> None:
    mib, limit = 20, 20
    argv = [sys.executable, "-c", WRITER.format(mib=mib)]
    assert run(Command(argv, timeout=60, pace=Pace(limit))).seconds > 0.7 * mib / limit


def test_bytes_of_a_process() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.write(bytes(3 * MIB))
        process.stdin.flush()
        end = time.monotonic() + 20
        while bytes_moved(process.pid) < 3 * MIB and time.monotonic() < end:
            time.sleep(0.01)
        assert 3 * MIB <= bytes_moved(process.pid) < 4 * MIB
        process.stdin.close()
    assert bytes_moved(process.pid) == 0


def test_one_that_stands_still_can_be_stopped() -> None:
    cancel = Cancel()
    timer = threading.Timer(0.5, cancel.request)
    timer.start()
    argv = [sys.executable, "-c", WRITER.format(mib=300)]
    started = time.monotonic()
    with pytest.raises(ActionStopped):
        run(Command(argv, timeout=60, cancel=cancel, pace=Pace(1)))
    assert time.monotonic() - started < 20
    timer.join()
