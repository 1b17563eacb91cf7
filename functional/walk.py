# SPDX-License-Identifier: GPL-2.0-or-later
"""The walk through all crash points: every named step of every kind of operation."""

from __future__ import annotations

import itertools
import os
import subprocess
import tempfile
from collections.abc import Callable, Collection
from typing import Any, NamedTuple
from unittest import mock

import pytest

from functional.world import World
from vdsm_storage import config
from vdsm_storage.agent import Agent
from vdsm_storage.rpc.client import RemoteError


def nothing() -> None:
    pass


class Scenario(NamedTuple):
    """`act` starts the operation and waits for its end; `done` tells whether it took effect.

    `check` is what must hold after the recovery, done or not, beside what always must; `after`
    makes the world ready for the next scenario.
    """

    act: Callable[[], object]
    done: Callable[[], bool]
    check: Callable[[], None] = nothing
    after: Callable[[], None] = nothing


def steps() -> dict[str, tuple[str, ...]]:
    """Every kind of operation that the agent knows, and its steps."""
    # The agent would leave in the environment where its sanlock runs: this one runs none.
    with tempfile.TemporaryDirectory() as directory, mock.patch.dict(os.environ):
        agent = Agent(config.dev(config.Config(), directory), dev=False)
        return {kind.name: kind.steps for kind in agent.kinds.values()}


STEPS = steps()


# What scenarios of other kinds do too, what they do before they begin, and what cleans up.
COMMON = ("volume.create", "volume.add_bitmap", "lease.create", "image.delete")


# Kinds that need device-mapper: functional/lab_tests walks through their steps.
MAPPED = ("block.move_device",)


def points(kinds: Collection[str]) -> list[Any]:
    """Parameters `kind` and `step` of a test."""
    return [
        pytest.param(kind, step, id=f"{kind}:{step}") for kind in kinds for step in STEPS[kind]
    ]


def round_points(kinds: Collection[str]) -> list[Any]:
    """Parameters `kind`, `step` and `then` of a test: the first steps of all kinds, the second...

    `then` is the point after this one, which the agent may be armed with when it comes back.
    """
    steps = [(n, kind, step) for kind in kinds for n, step in enumerate(STEPS[kind])]
    row = [(kind, step) for _, kind, step in sorted(steps, key=lambda found: found[0])]
    after = [
        "" if following in (kind, *COMMON) else f"{following}:{step}"
        for (kind, _), (following, step) in itertools.pairwise(row)
    ]
    return [
        pytest.param(kind, step, then, id=f"{kind}:{step}")
        for (kind, step), then in zip(row, [*after, ""], strict=True)
    ]


def walk(
    world: World, kind: str, step: str, prepare: Callable[[World], Scenario], then: str = ""
) -> bool:
    """One point: die there, come back, be complete or as before, and do it again if need be.
    Whether it is done then.

    The agent that comes back dies at `then`: one start less for a walk that goes on there.
    """
    point = f"{kind}:{step}"
    if world.armed not in ("", point):  # a test was left out
        world.restart()
    scenario = prepare(world)
    if world.armed != point:
        world.restart(point)
    try:
        answer = scenario.act()
    except RemoteError as error:  # the connection dies with the agent
        answer = error
    try:
        world.agent.wait_dead()
    except subprocess.TimeoutExpired:
        pytest.fail(f"{kind} did not come to {step}: {answer}")
    world.restart(then)
    world.check()
    scenario.check()
    if not (done := scenario.done()):
        scenario.act()
        done = scenario.done()
        world.check()
        scenario.check()
    scenario.after()
    return done
