# SPDX-License-Identifier: GPL-2.0-or-later
"""A host of its own: takes a domain's lock again and again and counts in a file under it.

    contender.py RUN_DIR DIRECTORY LOCKSPACE HOST_ID ROUNDS [hang]

It reads a number, waits a moment and writes the number plus one: two holders at once would lose
counts.  With `hang` it takes the lock, says so and never gives it back.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.units import MIB
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.leases.cluster_lock import SanlockClusterLock
from vdsm_storage.leases.lease import Leases
from vdsm_storage.leases.lockspace import Lockspace
from vdsm_storage.leases.model import Geometry, LeaseSpec


def main() -> int:
    run_dir, directory, lockspace_id, host_id, rounds = sys.argv[1:6]
    clock = SystemClock()
    sanlock = Sanlock(run_dir, io_timeout=1)
    ids, leases = f"{directory}/ids", f"{directory}/leases"
    Lockspace(sanlock, lockspace_id, ids, Geometry(), clock).acquire(int(host_id), 60)
    spec = LeaseSpec(lockspace_id, "SDM", leases, MIB)
    lock = SanlockClusterLock(Leases(sanlock, clock), spec, clock)
    print("joined", flush=True)
    if sys.argv[6:] == ["hang"]:
        lock.acquire(60)
        print("held", flush=True)
        time.sleep(600)
    counter = Path(directory) / "counter"
    for _ in range(int(rounds)):
        with lock.held(60):
            seen = int(counter.read_text())
            time.sleep(random.uniform(0, 0.003))
            counter.write_text(str(seen + 1))
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
