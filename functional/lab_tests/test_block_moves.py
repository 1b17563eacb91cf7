# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 of the agent while it moves a domain's data from one LUN to another: at every named
step, and while pvmove is at work.

The rest of the walk through all steps needs no device-mapper (functional/test_crash_walk_block.py).
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import PurePath

import pytest

from functional.backends import BlockBackend
from functional.checker.group import EXTENT
from functional.engine.host import FCP, NO_UUID, StorageServer
from functional.lab.inner.dm import Layer, Loops
from functional.lab.inner.tool import run, succeeds, wait_for
from functional.processes import AgentProcess
from functional.walk import MAPPED, Scenario, round_points, walk
from functional.world import COW, RAW, World, new_id

pytestmark = [pytest.mark.dm, pytest.mark.slow, pytest.mark.timeout(600)]

GIB, MIB = 1024**3, 1024**2
SPILL = 12  # extents: more than what the special volumes leave of the first LUN
SAMPLES = (0, 63 * MIB, 127 * MIB)  # of each extent; a MiB there


class MoveWorld(World):
    """The second domain, in use nowhere, has data on two of its three LUNs."""

    def __init__(self, agent: AgentProcess, main: Layer, luns: Sequence[Layer]) -> None:
        self.luns = {layer.name: layer for layer in luns}
        servers = [
            StorageServer(FCP, devices=tuple(layer.path for layer in layers))
            for layers in ([main], luns)
        ]
        super().__init__(agent, servers, attach=True)
        self.image = new_id()
        self.base = self._filled(RAW, "raw", SPILL * EXTENT)
        self.top = self._filled(COW, "qcow2", EXTENT // 2)
        where = {"storagedomainID": self.second, "storagepoolID": self.pool}
        self.call("StorageDomain.deactivate", **where, masterSdUUID=NO_UUID, masterVersion=1)
        self.attached = [self.main]
        self.wait(self._left, "the host id to go")

    def _left(self) -> bool:
        return self.second not in self.call("Host.getStats")["storageDomains"]

    def _filled(self, fmt: int, name: str, length: int) -> str:
        """A volume with other bytes in each of the places that are looked at."""
        more = {"srcImgUUID": self.image, "srcVolUUID": self.base} if fmt == COW else {}
        size = str(SPILL * EXTENT)
        volume = self.create(self.image, domain=self.second, volFormat=fmt, size=size, **more)
        ids = self.ids(self.image, volume, self.second)
        path = self.call("Image.prepare", **ids)["path"]
        places = (n + at for n in range(0, length, EXTENT) for at in SAMPLES if n + at < length)
        words = [f"write -P {n + 1 + fmt} {place} 1M" for n, place in enumerate(places)]
        run("qemu-io", "-f", name, "-n", *(w for word in words for w in ("-c", word)), path)
        self.call("Image.teardown", **ids)
        return volume

    # -- what there is ---------------------------------------------------------------------------

    def look(self) -> BlockBackend:
        """Past the page cache: device-mapper writes below it."""
        for layer in self.luns.values():
            run("blockdev", "--flushbufs", layer.path)
        storage = self.storage(self.second)
        assert isinstance(storage, BlockBackend)
        return storage

    def content(self) -> dict[str, object]:
        """What must stay: the domain's metadata, each volume's size, tags and bytes."""
        storage = self.look()
        group = storage.group()
        found: dict[str, object] = {
            lv.name: (lv.extents, lv.tags, lv.status) for lv in group.lvs.values()
        }
        for volume in (self.base, self.top):
            places = (n * EXTENT + at for n in range(group.lvs[volume].extents) for at in SAMPLES)
            sums = [zlib.crc32(group.read(volume, place, MIB)) for place in places]
            found[f"bytes of {volume}"] = sums
        return found | {"metadata": storage.metadata(), "group": group.tags}

    def extents(self) -> dict[str, int]:
        """How many of each LUN volumes have; not of the one with the metadata."""
        group = self.look().group()
        found = dict.fromkeys(group.pvs, 0)
        for lv in group.lvs.values():
            for segment in lv.segments:
                found[segment.pv] += segment.count
        del found[group.lvs["metadata"].segments[0].pv]
        return {PurePath(group.pvs[pv].device).name: count for pv, count in found.items()}

    def check_nothing_moves(self) -> None:
        """For the installed lvm, for the kernel, and for functional/checker, which sees, among
        other things, that no extent is in two volumes."""
        devices = ",".join(layer.path for layer in self.luns.values())
        argv = ("lvs", "-a", "--noheadings", "-o", "lv_name", "--devices", devices)
        listed = run(*argv, self.second)
        assert "pvmove" not in listed
        assert "pvmove" not in run("dmsetup", "ls")
        assert not succeeds("pgrep", "pvmove")
        self.look().check_idle()


class Move:
    """From the one LUN that has data to the empty one."""

    def __init__(self, world: MoveWorld) -> None:
        self.world = world
        extents = world.extents()
        self.source, self.target = sorted(extents, key=lambda name: -extents[name])
        assert extents[self.source] > 1
        assert extents[self.target] == 0
        self.params = {
            "sd_id": world.second, "src_guid": self.source, "dst_guids": [self.target],
        }  # fmt: skip
        self.content = world.content()
        self.job = ""

    def start(self) -> None:
        self.job = new_id()
        self.world.call("SDM.move_domain_device", job_id=self.job, move_params=self.params)

    def act(self) -> None:
        self.job = new_id()
        self.world.job("SDM.move_domain_device", self.job, move_params=self.params)

    def done(self) -> bool:
        return self.world.extents()[self.source] == 0

    def check(self) -> None:
        """All is there, wherever; and the job says truly whether it was moved."""
        assert self.world.content() == self.content
        self.world.check_nothing_moves()
        status = self.world.call("Host.getJobs", job_ids=[self.job])[self.job]["status"]
        assert status == ("done" if self.done() else "failed")

    def scenario(self) -> Scenario:
        return Scenario(self.act, self.done, self.check)


@pytest.fixture(scope="module")
def world(loops: Loops, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MoveWorld]:
    settings = {"lvm__devices": "/dev/mapper/lun-*", "storage__lock_timeout": "20"}
    agent = AgentProcess(tmp_path_factory.mktemp("moves") / "agent", False, settings)
    stopped: list[str] = []
    with contextlib.ExitStack() as stack:
        sizes = (6, 6, 4, 4)
        layers = [
            stack.enter_context(Layer(loops.make(size * GIB), f"lun-{n}"))
            for n, size in enumerate(sizes)
        ]
        stack.callback(lambda: stopped.append(agent.stop()))
        agent.start()
        made = MoveWorld(agent, layers[0], layers[1:])
        stack.callback(lambda: made.client.close())
        yield made
    assert stopped == [""]


@pytest.mark.parametrize(("kind", "step", "then"), round_points(MAPPED))
def test_death_at_a_step(world: MoveWorld, kind: str, step: str, then: str) -> None:
    assert walk(world, kind, step, lambda _: Move(world).scenario(), then)


def test_death_while_data_moves(world: MoveWorld) -> None:
    """What had been moved stays moved, the rest is where it was; then it is moved, too."""
    if world.armed:
        world.restart()
    move = Move(world)
    layer = world.luns[move.target]
    layer.slow(0, 30)
    move.start()
    wait_for("the move to begin", lambda: "pvmove" in run("dmsetup", "ls"), 120)
    world.restart()
    layer.heal()
    move.check()
    assert not move.done()
    move.act()
    move.check()
    assert move.done()
