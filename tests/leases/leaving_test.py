# SPDX-License-Identifier: GPL-2.0-or-later
"""A host id that is given back and asked for again at once: nobody is killed for a lease."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.sanlock

# In a process of its own: the daemon kills who has a lease under a host id that is leaving.
SCRIPT = """
import sys, threading, time
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.units import MIB
from vdsm_storage.errors import AgentError
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.leases.lease import Leases
from vdsm_storage.leases.lockspace import Lockspace
from vdsm_storage.leases.model import Geometry, LeaseSpec

run_dir, directory, sd_id = sys.argv[1:]
clock = SystemClock()
sanlock = Sanlock(run_dir, 1)
leases = Leases(sanlock, clock)
leases.write_lockspace(sd_id, directory + "/ids", Geometry())
spec = LeaseSpec(sd_id, "SDM", directory + "/leases", MIB)
leases.write(spec)
lockspace = Lockspace(sanlock, sd_id, directory + "/ids", Geometry(), clock)
lockspace.acquire(3, 60)
refusals = []

def leave():
    try:
        lockspace.release()
    except AgentError as error:
        refusals.append(error)

leaving = threading.Thread(target=leave)
leaving.start()
while lockspace.is_held() and not refusals:
    time.sleep(0.001)
try:
    leases.acquire(spec, 5)  # somebody who looked a moment ago
except AgentError:
    print("one was refused")
else:  # it came just before the daemon was asked to let the host id go
    leaving.join()
    print("one was refused" if refusals else "a lease while leaving")
    leases.release(spec)
lockspace.acquire(3, 60)  # waits until it is gone, and joins again
leaving.join()
assert lockspace.is_held()
leases.acquire(spec, 5)
time.sleep(2.5)  # the daemon looks once a second
leases.release(spec)
lockspace.release()
print("alive")
"""


def test_release_and_acquire(sanlock_daemon: str, tmp_path: Path) -> None:
    for name in ("ids", "leases"):
        (tmp_path / name).touch()
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, sanlock_daemon, str(tmp_path), tmp_path.name],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=120,
        check=False,
    )
    assert done.stdout.split("\n") == ["one was refused", "alive", ""], done.stderr
