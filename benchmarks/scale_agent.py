# SPDX-License-Identifier: GPL-2.0-or-later
"""For block_scale.py: an agent that has a block domain in use, as the pool manager of an engine.

The agent is the product's own process, on device-mapper; where the kernel has none, loop devices
take its place (loop_volumes.py).
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import loop_volumes
from benchmarks.loop_volumes import Pieces
from benchmarks.scale_group import BLANK, EXTENT, Bench, Volume
from functional.processes import AgentProcess
from vdsm_storage.domains.block_slots import slot_offset
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.lvm.activation import Activation, DeviceMapper
from vdsm_storage.rpc.client import Client, Pending

RAW, COW = 5, 4
PATIENCE = 120.0  # seconds
UNREADY = "RHAT_storage_domain_UNREADY"
DEVICE_MAPPER = Path("/dev/mapper/control")


class Domain:
    """The domain in the volume group of `bench`, served by the agent of `process`."""

    def __init__(self, bench: Bench, process: AgentProcess, activation: Activation) -> None:
        self.bench, self.process, self.activation = bench, process, activation
        self.client = Client.dev(str(process.dir), timeout=300.0)
        self.id, self.pool = bench.name, str(uuid.uuid4())
        self.client.subscribe()

    def make(self) -> None:
        """The domain and its pool."""
        vg = self.bench.create([UNREADY])
        self.call("StorageDomain.create", {
            "storagedomainID": self.id, "domainType": 3, "typeArgs": vg, "name": "scale",
            "domainClass": 1, "version": "5", "blockSize": 512, "maxHosts": 250})
        self.call("StoragePool.create", {
            "storagepoolID": self.pool, "name": "scale", "masterSdUUID": self.id,
            "masterVersion": 1, "domainList": [self.id], "lockRenewalIntervalSec": 5,
            "leaseTimeSec": 60, "ioOpTimeoutSec": 10, "leaseRetries": 3})
        self.call("StoragePool.connect", {
            "storagepoolID": self.pool, "hostID": 1, "scsiKey": self.pool,
            "masterSdUUID": self.id, "masterVersion": 1, "domainDict": {self.id: "active"}})
        self._wait(self._usable)

    def manage(self) -> None:
        """The role of pool manager."""
        self.wall(lambda: [self.client.submit("StoragePool.spmStart", {
            "storagepoolID": self.pool, "prevID": -1, "prevLver": "-1",
            "enableScsiFencing": "false", "maxHostID": 250, "domVersion": "5"})])

    def _usable(self) -> bool:
        found = self.call("Host.getStats", {})["storageDomains"].get(self.id)
        return bool(found and found["valid"] and found["acquired"])

    @staticmethod
    def _wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise SystemExit("the domain does not become usable")
            time.sleep(0.1)

    def close(self) -> None:
        self.client.close()

    # -- verbs -------------------------------------------------------------------------------

    def call(self, verb: str, params: dict[str, Any]) -> Any:
        return self.client.call(verb, params)

    def wall(self, start: Callable[[], Sequence[Pending]]) -> float:
        """Seconds until this has been told that all tasks that `start` asks for have ended; they
        are cleared then.

        Before that the agent has seen what another lvm has changed.
        """
        self.see_changes()
        began = time.perf_counter()
        tasks = [str(pending.result(PATIENCE)) for pending in start()]
        self._ended({f"|tasks|status|{task}" for task in tasks})
        took = time.perf_counter() - began
        for task in tasks:
            self.call("Task.clear", {"taskID": task})
        return took

    def _ended(self, events: set[str]) -> None:
        """Asking again and again would take the CPU that lvm needs."""
        while events:
            for event, status in self.client.events(PATIENCE):
                if event in events and status["taskState"] == "finished":
                    if status["code"]:
                        raise SystemExit(f"a task failed: {status}")
                    events.remove(event)
                    break
            else:
                raise SystemExit("a task does not end, or the agent died")

    def see_changes(self) -> None:
        self.call("StorageDomain.getImages", {"storagedomainID": self.id})

    def ids(self, image: str, volume: str) -> dict[str, str]:
        return {
            "storagepoolID": self.pool, "storagedomainID": self.id,
            "imageID": image, "volumeID": volume,
        }  # fmt: skip

    def create(self, kind: int) -> Pending:
        """Ask for a volume of one extent in an image of its own."""
        initial = {"initialSize": str(EXTENT)} if kind == COW else {}
        return self.client.submit("Volume.create", {
            **self.ids(str(uuid.uuid4()), str(uuid.uuid4())), "size": str(EXTENT),
            "volFormat": kind, "preallocate": 1 if kind == RAW else 2, "diskType": "DATA",
            "desc": "", "srcImgUUID": BLANK, "srcVolUUID": BLANK, **initial})

    def extend(self, volume: Volume, size: int) -> Pending:
        return self.client.submit(
            "Volume.extendSize", {**self.ids(volume.image, volume.name), "newSize": str(size)}
        )

    # -- around them -------------------------------------------------------------------------

    def write_slots(self, volumes: Sequence[Volume]) -> None:
        """The metadata of raw volumes of one extent, where the format wants it."""
        path = self.activation.path(self.id, "metadata")
        with open(path, "r+b", buffering=0) as file:
            for volume in volumes:
                if volume.slot is not None:
                    metadata = VolumeMetadata(
                        domain=self.id, image=volume.image, capacity=EXTENT, format="RAW",
                        type="PREALLOCATED", voltype="LEAF", disktype="DATA", ctime=1700000000,
                    )  # fmt: skip
                    file.seek(slot_offset(volume.slot, 5))
                    file.write(metadata.encode_slot(5, volume.name))
            os.fsync(file.fileno())

    def rss(self) -> int:
        """Resident bytes of the agent."""
        assert self.process.process is not None
        status = Path(f"/proc/{self.process.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024


@contextlib.contextmanager
def domain_in_use(bench: Bench) -> Iterator[Domain]:
    """An agent with an empty domain in the group of `bench`, which it makes; it is the pool's
    manager."""
    with _activation(bench) as (make, activation):
        process = make(bench.directory / "agent", False, settings_for(bench))
        with served(bench, process, activation) as domain:
            domain.manage()
            yield domain


def settings_for(bench: Bench) -> dict[str, str]:
    return {
        "lvm__devices": bench.device, "rpc__check_replies": "false",
        "storage__monitor_interval": "10",
    }  # fmt: skip


@contextlib.contextmanager
def served(bench: Bench, process: AgentProcess, activation: Activation) -> Iterator[Domain]:
    """The same by an agent that is started here and has no role: it takes the lease when it needs
    it."""
    try:
        process.start()
        domain = Domain(bench, process, activation)
        try:
            domain.make()
            yield domain
        finally:
            domain.close()
    finally:
        if wrong := process.stop():
            print(wrong)


class _LoopAgent(AgentProcess):
    """An agent whose active volumes are loop devices."""

    def _program(self) -> list[str]:
        return [sys.executable, "-P", loop_volumes.__file__, "--pieces", str(pieces_of(self.dir))]


def pieces_of(agent: Path) -> Path:
    """Where an agent's volumes are."""
    return agent.with_name("pieces")


@contextlib.contextmanager
def _activation(bench: Bench) -> Iterator[tuple[type[AgentProcess], Activation]]:
    if kernel_maps():
        yield AgentProcess, DeviceMapper(bench.ours)
        return
    volumes = Pieces(pieces_of(bench.directory / "agent"))
    try:
        yield _LoopAgent, volumes
    finally:
        if left := volumes.close():
            print(left, file=sys.stderr)


def kernel_maps() -> bool:
    """Whether the kernel has device-mapper; the file may be there without it."""
    try:
        DEVICE_MAPPER.open("rb").close()
    except OSError:
        return False
    return True
