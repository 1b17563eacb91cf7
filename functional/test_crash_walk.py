# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 of the whole agent at every named step of every kind of operation on files.

After a restart the operation is complete or was never there, nothing half made is left, and what
was not done can be done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest

from functional import scenarios
from functional.engine.host import StorageServer
from functional.processes import AgentProcess
from functional.scenarios import LEASED, SHARED
from functional.walk import STEPS, Scenario, points, round_points, walk
from functional.world import World, new_id


def create_domain(w: World) -> Scenario:
    return Scenario(lambda: w.create_domain(w.second), lambda: w.exists(w.second))


def format_domain(w: World) -> Scenario:
    w.create_domain(w.second)
    return Scenario(lambda: w.format_domain(w.second), lambda: not w.exists(w.second))


def create_pool(w: World) -> Scenario:
    w.disconnect_pool()
    w.create_domain(w.second)
    w.attached = []
    w.main, w.second = w.second, w.main
    return scenarios.create_pool(w, [w.main])


def reconstruct(w: World) -> Scenario:
    w.disconnect_pool()
    return scenarios.reconstruct(w)


# Kinds that need a world of their own: they change which domains or pool there are.
FRESH: Mapping[str, Callable[[World], Scenario]] = {
    "domain.create": create_domain,
    "domain.format": format_domain,
    "domain.upgrade": lambda w: scenarios.upgrade_domain(w, w.second),
    "pool.create": create_pool,
    "pool.reconstruct": reconstruct,
    "pool.switch_master": scenarios.switch_master,
    "pool.destroy": scenarios.destroy_pool,
    "spm.start": scenarios.start_spm,
}
UNATTACHED = {"domain.create", "domain.format", "domain.upgrade", "pool.create"}


def test_every_kind_has_a_scenario() -> None:
    elsewhere = ("block.", "vm.")  # test_crash_walk_block.py, test_vm_snapshot.py
    here = {kind for kind in STEPS if not kind.startswith(elsewhere)}
    assert {*FRESH, *SHARED, *LEASED} == here


@pytest.fixture(scope="module")
def local_world(
    start_agent: Callable[..., AgentProcess], make_server: Callable[[str], StorageServer]
) -> World:
    return World(start_agent("walk"), [make_server("local"), make_server("local")], attach=True)


@pytest.fixture(scope="module")
def leased_world(
    start_agent: Callable[..., AgentProcess], make_server: Callable[[str], StorageServer]
) -> World:
    return World(start_agent("leased"), [make_server("bind"), make_server("bind")], attach=False)


@pytest.fixture
def fresh_agent(start_agent: Callable[..., AgentProcess]) -> Iterator[AgentProcess]:
    agent = start_agent(f"fresh-{new_id()[:8]}")
    yield agent
    assert agent.stop() == ""


@pytest.mark.parametrize(("kind", "step", "then"), round_points(SHARED))
def test_local_domain(local_world: World, kind: str, step: str, then: str) -> None:
    assert walk(local_world, kind, step, SHARED[kind], then)


@pytest.mark.parametrize(("kind", "step", "then"), round_points(LEASED))
def test_domain_with_leases(leased_world: World, kind: str, step: str, then: str) -> None:
    assert walk(leased_world, kind, step, LEASED[kind], then)


@pytest.mark.parametrize(("kind", "step"), points(FRESH))
def test_pools_and_domains(
    fresh_agent: AgentProcess,
    make_server: Callable[[str], StorageServer],
    kind: str,
    step: str,
) -> None:
    servers = [make_server("local"), make_server("local")]
    assert walk(World(fresh_agent, servers, kind not in UNATTACHED), kind, step, FRESH[kind])
