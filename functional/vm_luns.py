# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs whose disks are volumes on LUNs, by a stand-in for device-mapper; and another host."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from functional.engine.host import FCP, StorageServer
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess
from functional.vm_lab import PATIENCE, VmLab, vm_lab
from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.rpc.client import Client

StartAgent = Callable[..., AgentProcess]
MakeStandIn = Callable[..., StandInProcess]


@contextlib.contextmanager
def luns_lab(
    workdir: Path, start_agent: StartAgent, make_standin: MakeStandIn, luns: list[str],
    **settings: str,
) -> Iterator[VmLab]:  # fmt: skip
    """A domain on each of two LUNs."""
    standin = make_standin(sync=False)

    def agent(_name: str, **more: Any) -> AgentProcess:
        return start_agent("block", standin=standin, **_devices(luns), **more)

    places = [StorageServer(FCP, devices=(lun,)) for lun in luns]
    with vm_lab(workdir / "b", agent, lambda _: places.pop(), **settings) as one:
        yield one


def _devices(luns: list[str]) -> dict[str, str]:
    return {"lvm__devices": ",".join(luns), "sanlock__io_timeout": "1"}


def standin_of(lab: VmLab) -> StandInProcess:
    assert lab.agent.standin is not None
    return lab.agent.standin


def active(lab: VmLab) -> set[str]:
    """The volumes of the first domain that this host has activated."""
    return {lv for lv in standin_of(lab).active(lab.world.main) if is_uuid(lv)}


@contextlib.contextmanager
def other_host(lab: VmLab, start_agent: StartAgent, make_standin: MakeStandIn) -> Iterator[Client]:
    """Another host of the pool, which may become its manager."""
    world = lab.world
    luns = [device for place in world.places.values() for device in place.devices]
    standin = make_standin("manager", False)
    agent = start_agent("manager", tls=False, standin=standin, **_devices(luns))
    client = Client.dev(str(agent.dir), timeout=PATIENCE)
    client.call("StoragePool.connect", {
        "storagepoolID": world.pool, "hostID": 2, "scsiKey": world.pool, "masterSdUUID": world.main,
        "masterVersion": world.version, "domainDict": dict.fromkeys(world.attached, "active"),
    })  # fmt: skip

    def usable() -> bool:
        found = client.call("Host.getStats", {})["storageDomains"]
        return all(found.get(d, {}).get("acquired") for d in world.attached)

    lab.wait(usable, "the manager to have its host id")
    yield client
    client.close()
    agent.stop()


@contextlib.contextmanager
def managing(lab: VmLab, client: Client) -> Iterator[None]:
    """The other host is the pool's manager."""
    pool = {"storagepoolID": lab.world.pool}
    started = {**pool, "prevID": -1, "prevLver": "-1", "enableScsiFencing": "false",
               "maxHostID": 250, "domVersion": "5"}  # fmt: skip
    assert task(client, "StoragePool.spmStart", **started) == 0
    try:
        yield
    finally:
        client.call("StoragePool.spmStop", pool)


def task(client: Client, verb: str, **params: Any) -> int:
    """0, or the number of its error."""
    name = client.call(verb, params)
    while (found := client.call("Task.getStatus", {"taskID": name}))["taskState"] != "finished":
        time.sleep(0.05)
    client.call("Task.clear", {"taskID": name})
    return int(found["code"])
