# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 of the whole agent at every named step of every kind of operation on LUNs.

As on files (test_crash_walk.py).  One agent, with a stand-in for device-mapper that outlives it,
walks through all of them; after each death functional/checker looks at the LUNs.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from functional import scenarios
from functional.backends import is_blank
from functional.checker.tags import UNREADY
from functional.engine.host import FCP, StorageServer
from functional.processes import AgentProcess
from functional.scenarios import LEASED, SHARED
from functional.standin.process import StandInProcess
from functional.walk import MAPPED, STEPS, Scenario, points, round_points, walk
from functional.world import World, new_id

GIB = 1024**3
SPARE = 16  # LUNs for domains that come and go
# Kinds of files alone, and of running VMs (test_vm_merge.py, test_vm_snapshot.py).
FILES_ONLY = {"domain.create", "domain.format", "vm.merge", "vm.snapshot"}
VIRT_SPARSIFY = "#!/bin/sh\nexit 0\n"  # one that finds nothing to give back


class BlockWorld(World):
    """`spare` LUNs are free; `made` domains are in no pool."""

    def __init__(self, agent: AgentProcess, luns: list[str]) -> None:
        servers = [StorageServer(FCP, devices=(lun,)) for lun in luns[:2]]
        self.spare = luns[2:]
        self.made: list[str] = []
        super().__init__(agent, servers, attach=True)

    def place(self, count: int = 1) -> str:
        """A name for a domain to be made on spare LUNs."""
        domain = new_id()
        luns = tuple(self.spare.pop() for _ in range(count))
        self.places[domain] = StorageServer(FCP, devices=luns)
        return domain

    def need_pool(self) -> None:
        if not self.attached:
            self.attached = [self.main, self.second]
            self.pool, self.version = new_id(), 1
            self.create_pool()
            self.join_pool()

    def join_pool(self) -> None:
        self.attached = [self.main, self.second]
        self.connect_pool()
        self.settle()

    def need_free_domains(self) -> None:
        if self.attached:
            self.destroy_pool()
            self.attached = []

    def swap(self) -> None:
        """The second domain is the master now."""
        self.main, self.second = self.second, self.main
        self.version += 1


# -- domains ---------------------------------------------------------------------------------


def create_domain(w: BlockWorld) -> Scenario:
    domain = w.place()
    group = w.create_group(domain)

    def whole() -> None:
        """Or a group without volumes that no host takes for a domain."""
        storage = w.storage(domain)
        if w.exists(domain):
            storage.check_idle()
            return
        assert storage.special() == {}
        assert storage.group().tags == [UNREADY]
        assert w.agent.standin is not None
        assert w.agent.standin.active(domain) == {}

    return Scenario(
        lambda: w.create_domain(domain, group=group),
        lambda: w.exists(domain),
        whole,
        lambda: w.made.append(domain),
    )


def format_domain(w: BlockWorld) -> Scenario:
    if not w.made:
        w.made.append(w.place())
        w.create_domain(w.made[0])
    domain = w.made.pop()

    def whole_or_gone() -> None:
        storage = w.storage(domain)
        if not storage.gone():
            storage.check_idle()

    return Scenario(
        lambda: w.format_domain(domain), lambda: not w.exists(domain), whole_or_gone
    )


def extend_domain(w: BlockWorld) -> Scenario:
    """The second domain of the pool, by a LUN."""
    new, old = w.spare.pop(), w.places[w.second]
    where = {"storagedomainID": w.second, "storagepoolID": w.pool}
    larger = StorageServer(FCP, devices=(*old.devices, new))

    def act() -> None:
        w.places[w.second] = larger
        w.call("StorageDomain.extend", **where, devlist=larger.guids[-1:], force=False)

    return Scenario(act, lambda: len(w.storage(w.second).group().pvs) == len(larger.devices))


def resize_domain(w: BlockWorld) -> Scenario:
    """One of its LUNs grew."""
    device = w.places[w.second].devices[-1]
    name = Path(device).name
    backing = Path(f"/sys/block/{name}/loop/backing_file").read_text().strip()
    os.truncate(backing, os.path.getsize(backing) + GIB)
    subprocess.run(["losetup", "--set-capacity", device], check=True, timeout=60)
    where = {"storagedomainID": w.second, "storagepoolID": w.pool}
    extents = sum(pv.pe_count for pv in w.storage(w.second).group().pvs.values())

    def done() -> bool:
        return sum(pv.pe_count for pv in w.storage(w.second).group().pvs.values()) > extents

    return Scenario(lambda: w.call("StorageDomain.resizePV", **where, guid=name), done)


def reduce_domain(w: BlockWorld) -> Scenario:
    """Of a domain in no pool, an empty LUN."""
    domain = w.place(2)
    w.create_domain(domain)
    device = w.places[domain].devices[-1]
    params = {"sd_id": domain, "guid": Path(device).name}

    def sound() -> None:
        left = tuple(lun for lun in w.places[domain].devices if not is_blank(lun))
        w.places[domain] = StorageServer(FCP, devices=left)
        w.storage(domain).check_idle()

    return Scenario(
        lambda: w.job("SDM.reduce_domain", reduce_params=params),
        lambda: is_blank(device),
        sound,
    )


# -- pools -----------------------------------------------------------------------------------


def create_pool(w: BlockWorld) -> Scenario:
    w.need_free_domains()
    made = scenarios.create_pool(w, [w.main, w.second])
    return made._replace(after=w.join_pool)


def reconstruct(w: BlockWorld) -> Scenario:
    w.disconnect_pool()
    made = scenarios.reconstruct(w)

    def after() -> None:
        w.swap()
        w.join_pool()

    return made._replace(after=after)


def upgrade_domain(w: BlockWorld) -> Scenario:
    domain = w.place()
    made = scenarios.upgrade_domain(w, domain)
    return made._replace(check=lambda: w.storage(domain).check_idle())


BLOCK: Mapping[str, Callable[[BlockWorld], Scenario]] = {
    "block.create": create_domain,
    "block.format": format_domain,
    "block.extend": extend_domain,
    "block.resize": resize_domain,
    "block.reduce": reduce_domain,
    "domain.upgrade": upgrade_domain,
    "spm.start": lambda w: scenarios.start_spm(w)._replace(
        after=lambda: w.call("StoragePool.spmStop", storagepoolID=w.pool)
    ),
    "pool.switch_master": lambda w: scenarios.switch_master(w)._replace(after=w.swap),
    "pool.reconstruct": reconstruct,
    "pool.destroy": scenarios.destroy_pool,
    "pool.create": create_pool,
}


def test_every_kind_has_a_scenario() -> None:
    """Those of running VMs are in test_vm_snapshot.py and the like, those that need device-mapper
    in lab_tests/test_block_moves.py."""
    here = {kind for kind in STEPS if not kind.startswith("vm.")}
    assert {*SHARED, *LEASED, *BLOCK, *MAPPED} == here - FILES_ONLY


@pytest.fixture(scope="module")
def world(
    start_agent: Callable[..., AgentProcess],
    make_standin: Callable[..., StandInProcess],
    make_luns: Callable[..., list[str]],
    workdir: Path,
) -> Iterator[BlockWorld]:
    luns = make_luns(2) + make_luns(SPARE, 8 * GIB)
    tool = workdir / "bin" / "virt-sparsify"
    tool.parent.mkdir()
    tool.write_text(VIRT_SPARSIFY)
    tool.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
        # No I/O waits for a disk here: sanlock may be in a hurry.
        settings = {"lvm__devices": ",".join(luns)}
        agent = start_agent("walk", standin=make_standin(sync=False), **settings)
        yield BlockWorld(agent, luns)


@pytest.mark.parametrize(("kind", "step", "then"), round_points({**SHARED, **LEASED}))
def test_volumes_and_leases(world: BlockWorld, kind: str, step: str, then: str) -> None:
    world.need_pool()
    assert walk(world, kind, step, SHARED.get(kind) or LEASED[kind], then)
    world.clear()


@pytest.mark.parametrize(("kind", "step"), points(BLOCK))
def test_pools_and_domains(world: BlockWorld, kind: str, step: str) -> None:
    if kind != "pool.create":
        world.need_pool()
    assert walk(world, kind, step, lambda w: BLOCK[kind](world))
