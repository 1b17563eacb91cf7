# SPDX-License-Identifier: GPL-2.0-or-later
"""A life of the agent's storage half that ends while it upgrades a block domain, at the crash
point in VDSM_STORAGE_CRASH.  It uses the sanlock daemon of the environment.

    block_crash_child.py ROOT DEVICES STAND-IN DOMAIN POOL
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from functional.standin.activation import StandIn
from tests.domains.conftest import build, wait_for
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.jobs import journal


def main() -> None:
    root, devices, standin, sd_id, pool = sys.argv[1:]
    sanlock = Sanlock(os.environ["SANLOCK_RUN_DIR"], io_timeout=1)
    world = build(Path(root), sanlock, devices=devices, activation=StandIn(standin))
    world.attach(pool, sd_id)
    wait_for(lambda: world.health.usable(sd_id))
    world.services.upgrades.start(pool, 5)
    for job in world.runner.all(journal.JOB):
        job.done.wait(60)
    world.close()
    print("survived")


if __name__ == "__main__":
    main()
