# SPDX-License-Identifier: GPL-2.0-or-later
"""Block domains in this process: real LVM on loop devices, a stand-in for device-mapper, leases."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from functional.block_hosts import UNREADY
from functional.luns import Luns
from functional.standin.activation import StandIn
from functional.standin.process import StandInProcess
from tests.domains.conftest import build
from vdsm_storage.base.uuids import BLANK
from vdsm_storage.domains.block import BlockDomain
from vdsm_storage.host.qemu_img import QemuImg
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.images import metadata as md
from vdsm_storage.images.create import NewVolumeRequest
from vdsm_storage.images.images import Images
from vdsm_storage.images.volumes import Volumes
from vdsm_storage.jobs.runner import Request
from vdsm_storage.leases.external import ExternalLeases, Hosting


@contextmanager
def workdir() -> Iterator[Path]:
    """Short, because sockets are below it; not on a tmpfs, because of direct I/O."""
    path = Path(tempfile.mkdtemp(prefix="b", dir=os.environ.get("TMPDIR", "/var/tmp")))
    try:
        yield path
    finally:
        shutil.rmtree(path)


class BlockHost:
    """The storage half of an agent, with images.  Built again on the same `root` it is the next
    life of that agent, unless the first one was closed."""

    def __init__(
        self, root: Path, sanlock: Sanlock | None, luns: Luns, standin: StandInProcess
    ) -> None:
        self.luns = luns
        self.activation = StandIn(standin.socket)
        self.world = build(root, sanlock, devices=luns.pattern, activation=self.activation)
        self.services = self.world.services
        base, find = self.world.base, self.services.registry.find_store
        runner, leases = base.runner, self.world.leases
        qemu = QemuImg()
        self.volumes = Volumes(find, qemu, leases, base.locks, base.config, runner)
        self.images = Images(self.volumes, str(root / "run" / "storage"))
        hosting = Hosting(runner.start_task, lambda: BLANK)
        get = self.services.registry.get
        self.leases = ExternalLeases(leases, get, base.locks, base.clock, 15.0, hosting)
        for part in (self.volumes, self.leases):
            runner.add_kinds(part.kinds())

    def domain(self, sd_id: str) -> BlockDomain:
        found = self.services.registry.get(sd_id)
        assert isinstance(found, BlockDomain)
        return found

    def make_group(self, name: str, luns: Sequence[str] | None = None) -> str:
        """As LVMVolumeGroup.create makes it, on all LUNs or on these; its UUID."""
        return self.services.groups.create(name, luns or self.luns.paths, [UNREADY], False)

    def run(self, kind: str, params: dict[str, Any]) -> None:
        """An operation on one domain, in this thread."""
        self.world.runner.run(Request(kind, params, [params["domain"]], kind))

    def create(self, request: NewVolumeRequest) -> None:
        self.run("volume.create", request.as_params())

    def make_template(self, domain: str, image: str, volume: str) -> None:
        store = self.domain(domain).store
        with store.lock.held(15.0):
            store.save(image, volume, store.load(image, volume).with_(voltype=md.SHARED))

    def task(self, task_id: str) -> None:
        entry = self.world.task(task_id)
        assert entry.outcome == "success", entry.error

    def close(self) -> None:
        self.world.close()


class HostMaker:
    """`host(name)` is a running host; each has its own stand-in for device-mapper."""

    def __init__(self, directory: Path, sanlock: Sanlock | None, luns: Luns) -> None:
        self.directory = directory
        self.luns = luns
        self.sanlock = sanlock
        self.standins: dict[str, StandInProcess] = {}
        self._hosts: list[BlockHost] = []

    def standin(self, name: str) -> StandInProcess:
        if name not in self.standins:
            made = StandInProcess(self.directory / f"dm-{name}", sync=False)
            made.start()
            self.standins[name] = made
        return self.standins[name]

    def host(self, name: str) -> BlockHost:
        root = self.directory / name
        made = BlockHost(root, self.sanlock, self.luns, self.standin(name))
        self._hosts.append(made)
        return made

    def end(self, host: BlockHost) -> None:
        """Its clean end."""
        self._hosts.remove(host)
        host.close()

    def close(self) -> None:
        for host in self._hosts:
            host.close()
        left = [text for standin in self.standins.values() for text in standin.stop()]
        assert left == []


@contextmanager
def block_hosts(directory: Path, sanlock: Sanlock | None) -> Iterator[HostMaker]:
    """LUNs and hosts, all gone at the end."""
    luns = Luns(directory)
    maker = HostMaker(directory, sanlock, luns)
    try:
        yield maker
    finally:
        maker.close()
        luns.close()
