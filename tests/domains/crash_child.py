# SPDX-License-Identifier: GPL-2.0-or-later
"""A life of the agent's storage half that ends at the crash point in VDSM_STORAGE_CRASH.

    crash_child.py ROOT KIND DATA_ONE DATA_TWO DOMAIN_ONE DOMAIN_TWO
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.domains.conftest import World, build
from vdsm_storage.domains import lifecycle, masters, spm, upgrade
from vdsm_storage.domains.masters import NewPool
from vdsm_storage.jobs import journal


def main() -> None:
    root, kind, one, two, first, second = sys.argv[1:]
    world = build(Path(root), None)
    world.connect(one)
    world.connect(two)
    act(world, kind, (one, two), (first, second))
    world.close()
    print("survived")


def act(world: World, kind: str, paths: tuple[str, str], ids: tuple[str, str]) -> None:
    world.domain(paths[0], id=ids[0], version=4 if kind == upgrade.UPGRADE else 5)
    if kind == lifecycle.CREATE:
        return
    world.domain(paths[1], id=ids[1])
    if kind == lifecycle.FORMAT:
        world.services.lifecycle.format(ids[0], False, None)
        return
    pool = world.pool(*ids, connect=kind != masters.RECONSTRUCT)
    if kind == masters.RECONSTRUCT:
        new = NewPool(pool, "x", ids[1], 2, [ids[1], ids[0]], host_id=1)
        world.services.masters.reconstruct(new)
    elif kind == masters.SWITCH:
        world.task(world.services.start_switch(pool, ids[0], ids[1], 2))
    elif kind == masters.DESTROY:
        world.services.destroy(pool)
    elif kind == upgrade.UPGRADE:
        world.services.upgrades.start(pool, 5)
        for job in world.runner.all(journal.JOB):
            job.done.wait(30)
    elif kind == spm.START:
        world.task(world.services.spm.start(pool))


if __name__ == "__main__":
    main()
