# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 of the whole agent at every named step of every kind of operation.

After a restart the operation is complete or was never there, nothing half made is left, and what
was not done can be done again.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from functional.engine.host import StorageServer
from functional.nbd import NbdServer
from functional.processes import AgentProcess
from functional.world import COW, MIB, World, new_id
from vdsm_storage import config
from vdsm_storage.agent import Agent
from vdsm_storage.rpc.client import RemoteError


class Scenario(NamedTuple):
    """`act` starts the operation and waits for its end; `done` tells whether it took effect."""

    act: Callable[[], object]
    done: Callable[[], bool]


def create_volume(w: World) -> Scenario:
    image = new_id()
    base = w.create(image)
    child = new_id()
    request = w.new_volume(image, child, volFormat=COW, srcImgUUID=image, srcVolUUID=base)
    return Scenario(
        lambda: w.task("Volume.create", **request), lambda: child in w.volumes(image)
    )


def copy_volume(w: World) -> Scenario:
    image, _, top = w.chain()
    target = new_id(), new_id()
    request = {
        **w.ids(image, top), "dstSdUUID": w.main, "dstImgUUID": target[0],
        "dstVolUUID": target[1], "desc": "", "volType": 6, "volFormat": 5, "preallocate": 2,
        "postZero": "false", "force": "false",
    }  # fmt: skip
    return Scenario(lambda: w.task("Volume.copy", **request), lambda: target[0] in w.images())


def delete_volume(w: World) -> Scenario:
    image, _, top = w.chain()
    return Scenario(
        lambda: w.task("Volume.delete", **w.ids(image, top), postZero="false", force="false"),
        lambda: top not in w.volumes(image),
    )


def delete_image(w: World) -> Scenario:
    image, _, _ = w.chain()
    where = {"storagepoolID": w.pool, "storagedomainID": w.main, "imageID": image}
    return Scenario(
        lambda: w.task("Image.delete", **where, postZero="false", force="false"),
        lambda: image not in w.images(),
    )


def extend_volume(w: World) -> Scenario:
    image, _, top = w.chain()
    size = str(16 * MIB)
    return Scenario(
        lambda: w.task("Volume.extendSize", **w.ids(image, top), newSize=size),
        lambda: w.info(image, top)["capacity"] == size,
    )


def move_image(w: World) -> Scenario:
    image, _, _ = w.chain()
    request = {
        "imageID": image, "storagepoolID": w.pool, "storagedomainID": w.main,
        "dstSdUUID": w.second, "operation": 2, "postZero": "false", "force": "false",
    }  # fmt: skip
    return Scenario(
        lambda: w.task("Image.move", **request),
        lambda: image in w.images(w.second) and image not in w.images(),
    )


def clone_structure(w: World) -> Scenario:
    image, _, _ = w.chain()
    request = {
        "imageID": image, "storagepoolID": w.pool, "storagedomainID": w.main,
        "dstSdUUID": w.second,
    }  # fmt: skip
    return Scenario(
        lambda: w.task("Image.cloneStructure", **request), lambda: image in w.images(w.second)
    )


def sync_data(w: World) -> Scenario:
    image, base, top = w.chain()
    request = {
        "imageID": image, "storagepoolID": w.pool, "storagedomainID": w.main,
        "dstSdUUID": w.second,
    }  # fmt: skip
    assert w.task("Image.cloneStructure", **request) == ""

    def done() -> bool:
        infos = [w.info(image, volume, w.second) for volume in (base, top)]
        return all(info["legality"] == "LEGAL" for info in infos)

    return Scenario(lambda: w.task("Image.syncData", **request, syncType="ALL"), done)


def copy_data(w: World) -> Scenario:
    image, _, top = w.chain()
    target = new_id()
    copied = w.create(target)
    generation = w.info(target, copied)["generation"]
    return Scenario(
        lambda: w.job(
            "SDM.copy_data", source=w.div(image, top), destination=w.div(target, copied)
        ),
        lambda: w.info(target, copied)["generation"] == generation + 1,
    )


def nbd(w: World) -> NbdServer:
    """Where the agent looks for NBD sockets."""
    return NbdServer(w.agent.dir / "run", 8 * MIB)


def import_volume(w: World) -> Scenario:
    target = new_id()
    copied = w.create(target)
    generation = w.info(target, copied)["generation"]

    def act() -> None:
        with nbd(w) as server:
            w.job("SDM.copy_data", source=server.endpoint(w.main, new_id(), 0),
                  destination=w.div(target, copied))  # fmt: skip

    return Scenario(act, lambda: w.info(target, copied)["generation"] == generation + 1)


def export_volume(w: World) -> Scenario:
    image, _, top = w.chain()
    leases: list[dict[str, str]] = []

    def act() -> None:
        job = new_id()
        leases.append({"sd_id": w.main, "lease_id": new_id()})
        metadata = {"type": "JOB", "job_id": job, "job_status": "PENDING", "generation": 0}
        assert w.task("Lease.create", lease=leases[-1], metadata=metadata) == ""
        with nbd(w) as server:
            target = server.endpoint(w.main, leases[-1]["lease_id"], 0)
            w.job("SDM.copy_data", job, source=w.div(image, top), destination=target)

    def done() -> bool:
        metadata = w.call("Lease.status", lease=leases[-1])["metadata"]
        return bool(metadata["job_status"] == "SUCCEEDED")

    return Scenario(act, done)


def job_on_volume(verb: str, **params: Any) -> Callable[[World], Scenario]:
    """A job that raises the generation of a qcow2 leaf with a bitmap `old` by one."""

    def prepare(w: World) -> Scenario:
        image, _, top = w.chain()
        if verb not in ("SDM.update_volume", "SDM.sparsify_volume", "SDM.amend_volume"):
            assert w.job("SDM.add_bitmap", vol_info=w.div(image, top), bitmap="old") == ""
        generation = w.info(image, top)["generation"]
        return Scenario(
            lambda: w.job(verb, vol_info=w.div(image, top), **params),
            lambda: w.info(image, top)["generation"] == generation + 1,
        )

    return prepare


def subchain(w: World) -> dict[str, Any]:
    image, base, top = w.chain()
    return {
        "sd_id": w.main, "img_id": image, "base_id": base, "top_id": top,
        "base_generation": w.info(image, base)["generation"],
    }  # fmt: skip


def prepare_merge(w: World) -> Scenario:
    chain = subchain(w)
    image, base = chain["img_id"], chain["base_id"]
    return Scenario(
        lambda: w.task("StoragePool.prepareMerge", storagepoolID=w.pool, subchainInfo=chain),
        lambda: w.info(image, base)["legality"] == "ILLEGAL",
    )


def run_merge(w: World) -> Scenario:
    chain = subchain(w)
    image, base, generation = chain["img_id"], chain["base_id"], chain["base_generation"]
    w.task("StoragePool.prepareMerge", storagepoolID=w.pool, subchainInfo=chain)
    return Scenario(
        lambda: w.job("SDM.merge", subchain_info=chain),
        lambda: w.info(image, base)["generation"] == generation + 1,
    )


def finalize_merge(w: World) -> Scenario:
    chain = subchain(w)
    image, base, top = chain["img_id"], chain["base_id"], chain["top_id"]
    leaf = w.create(image, volFormat=COW, srcImgUUID=image, srcVolUUID=top, sequence=3)
    w.task("StoragePool.prepareMerge", storagepoolID=w.pool, subchainInfo=chain)
    assert w.job("SDM.merge", subchain_info=chain) == ""
    return Scenario(
        lambda: w.task("StoragePool.finalizeMerge", storagepoolID=w.pool, subchainInfo=chain),
        lambda: w.info(image, leaf)["parent"] == base,
    )


def reduce_volume(w: World) -> Scenario:
    image, _, top = w.chain()
    return Scenario(
        lambda: w.task("StoragePool.reduceVolume", **w.ids(image, top), allowActive=True),
        lambda: True,
    )


def lease(w: World) -> dict[str, str]:
    return {"sd_id": w.main, "lease_id": new_id()}


def has_lease(w: World, found: dict[str, str]) -> bool:
    try:
        w.call("Lease.info", lease=found)
    except RemoteError as error:
        if error.code != 936:
            raise
        return False
    return True


def create_lease(w: World) -> Scenario:
    new = lease(w)
    return Scenario(
        lambda: w.task("Lease.create", lease=new, metadata=None), lambda: has_lease(w, new)
    )


def delete_lease(w: World) -> Scenario:
    old = lease(w)
    assert w.task("Lease.create", lease=old, metadata=None) == ""
    return Scenario(lambda: w.task("Lease.delete", lease=old), lambda: not has_lease(w, old))


def rebuild_leases(w: World) -> Scenario:
    old = lease(w)
    assert w.task("Lease.create", lease=old, metadata=None) == ""
    return Scenario(
        lambda: w.task("Lease.rebuild_leases", sd_id=w.main), lambda: has_lease(w, old)
    )


def upload(w: World) -> Scenario:
    image = new_id()
    volume = w.create(image, diskType="OVFS")
    data = b"ovf" * 100_000

    def act() -> None:
        host = w.agent.host("walk", 1)
        try:
            host.put_stream(w.ids(image, volume), data)
        except (OSError, EOFError) as error:
            raise RemoteError(-32605, str(error)) from error
        finally:
            host.close()

    def done() -> bool:
        path = Path(w.servers[0].spec) / w.main / "images" / image / volume
        return path.read_bytes()[: len(data)] == data

    return Scenario(act, done)


def download(w: World) -> Scenario:
    image = new_id()
    volume = w.create(image, diskType="OVFS")
    got: list[bytes] = []

    def act() -> None:
        host = w.agent.host("walk", 1)
        try:
            got.append(host.get_stream(w.ids(image, volume), 4096)[1])
        except (OSError, EOFError, AssertionError) as error:
            raise RemoteError(-32605, str(error)) from error
        finally:
            host.close()

    return Scenario(act, lambda: got == [bytes(4096)])


def start_spm(w: World) -> Scenario:
    def status() -> bool:
        return bool(w.call("StoragePool.getSpmStatus", storagepoolID=w.pool)["spmStatus"] == "SPM")

    return Scenario(
        lambda: w.task(
            "StoragePool.spmStart", storagepoolID=w.pool, prevID=-1, prevLver="-1",
            enableScsiFencing="false", maxHostID=250, domVersion="5",
        ),
        status,
    )  # fmt: skip


def create_domain(w: World) -> Scenario:
    return Scenario(
        lambda: w.create_domain(w.second, w.servers[1]), lambda: w.exists(w.second)
    )


def format_domain(w: World) -> Scenario:
    w.create_domain(w.second, w.servers[1])
    return Scenario(
        lambda: w.call("StorageDomain.format", storagedomainID=w.second, autoDetach=False),
        lambda: not w.exists(w.second),
    )


def role(w: World, domain: str) -> str:
    return str(w.call("StorageDomain.getInfo", storagedomainID=domain)["role"])


def create_pool(w: World) -> Scenario:
    w.call("StoragePool.disconnect", storagepoolID=w.pool, hostID=1, scsiKey=w.pool)
    w.create_domain(w.second, w.servers[1])
    w.attached = []
    w.pool, w.main, w.second = new_id(), w.second, w.main
    w.servers.reverse()

    def act() -> None:
        w.attached = [w.main]
        try:
            w.create_pool()
        finally:
            w.attached = []

    return Scenario(act, lambda: role(w, w.main) == "Master")


def reconstruct(w: World) -> Scenario:
    w.call("StoragePool.disconnect", storagepoolID=w.pool, hostID=1, scsiKey=w.pool)
    w.attached = []
    request = {
        "storagepoolID": w.pool, "hostId": 1, "name": "walk", "masterSdUUID": w.second,
        "masterVersion": 2, "domainDict": {w.main: "active", w.second: "active"},
        "lockRenewalIntervalSec": 5, "leaseTimeSec": 60, "ioOpTimeoutSec": 10, "leaseRetries": 3,
    }  # fmt: skip
    return Scenario(
        lambda: w.call("StoragePool.reconstructMaster", **request),
        lambda: role(w, w.second) == "Master",
    )


def switch_master(w: World) -> Scenario:
    return Scenario(
        lambda: w.task(
            "StoragePool.switchMaster", storagepoolID=w.pool, oldMasterUUID=w.main,
            newMasterUUID=w.second, masterVersion=2,
        ),
        lambda: (role(w, w.main), role(w, w.second)) == ("Regular", "Master"),
    )  # fmt: skip


def destroy_pool(w: World) -> Scenario:
    assert start_spm(w).act() == ""

    def act() -> None:
        if w.call("StoragePool.getSpmStatus", storagepoolID=w.pool)["spmStatus"] != "SPM":
            assert start_spm(w).act() == ""
        w.call("StoragePool.destroy", storagepoolID=w.pool, hostID=1, scsiKey=w.pool)

    def done() -> bool:
        info = w.call("StorageDomain.getInfo", storagedomainID=w.main)
        if info["pool"] == []:
            w.attached = []
        return info["pool"] == []

    return Scenario(act, done)


def upgrade_domain(w: World) -> Scenario:
    """A domain of the old format is activated in a pool of the new one."""
    server = w.servers[1]
    w.call(
        "StorageDomain.create", storagedomainID=w.second, domainType=server.type, version="4",
        typeArgs=server.spec, name="old", domainClass=1, blockSize=512, maxHosts=250,
    )  # fmt: skip
    w.call("StorageDomain.attach", storagedomainID=w.second, storagepoolID=w.pool)

    def done() -> bool:
        info = w.call("StorageDomain.getInfo", storagedomainID=w.second)
        return bool(info["version"] == "5")

    def act() -> None:
        w.call("StorageDomain.activate", storagedomainID=w.second, storagepoolID=w.pool)
        w.wait(done, "the upgrade")

    return Scenario(act, done)


# Kinds that need a world of their own: they change which domains or pool there are.
FRESH: Mapping[str, Callable[[World], Scenario]] = {
    "domain.create": create_domain,
    "domain.format": format_domain,
    "domain.upgrade": upgrade_domain,
    "pool.create": create_pool,
    "pool.reconstruct": reconstruct,
    "pool.switch_master": switch_master,
    "pool.destroy": destroy_pool,
    "spm.start": start_spm,
}
UNATTACHED = {"domain.create", "domain.format", "domain.upgrade", "pool.create"}
SHARED: Mapping[str, Callable[[World], Scenario]] = {
    "volume.create": create_volume,
    "volume.copy": copy_volume,
    "volume.delete": delete_volume,
    "image.delete": delete_image,
    "volume.extend": extend_volume,
    "image.move": move_image,
    "image.clone": clone_structure,
    "image.sync": sync_data,
    "volume.copy_data": copy_data,
    "volume.update": job_on_volume("SDM.update_volume", vol_attr={"description": "new"}),
    "volume.amend": job_on_volume("SDM.amend_volume", qcow2_attr={"compat": "1.1"}),
    "volume.add_bitmap": job_on_volume("SDM.add_bitmap", bitmap="new"),
    "volume.remove_bitmap": job_on_volume("SDM.remove_bitmap", bitmap="old"),
    "volume.clear_bitmaps": job_on_volume("SDM.clear_bitmaps"),
    "volume.sparsify": job_on_volume("SDM.sparsify_volume"),
    "merge.prepare": prepare_merge,
    "merge.run": run_merge,
    "merge.finalize": finalize_merge,
    "volume.reduce": reduce_volume,
    "stream.upload": upload,
    "stream.download": download,
}
LEASED: Mapping[str, Callable[[World], Scenario]] = {
    "lease.create": create_lease,
    "lease.delete": delete_lease,
    "lease.rebuild": rebuild_leases,
    "volume.create": create_volume,
    "volume.copy_data": copy_data,
    "volume.import": import_volume,
    "volume.export": export_volume,
}


def steps() -> dict[str, tuple[str, ...]]:
    """Every kind of operation that the agent knows, and its steps."""
    with tempfile.TemporaryDirectory() as directory:
        agent = Agent(config.dev(config.Config(), directory), dev=False)
        return {kind.name: kind.steps for kind in agent.kinds.values()}


STEPS = steps()


def points(kinds: Mapping[str, object]) -> list[Any]:
    return [
        pytest.param(kind, step, id=f"{kind}:{step}") for kind in kinds for step in STEPS[kind]
    ]


def walk(world: World, kind: str, step: str, prepare: Callable[[World], Scenario]) -> None:
    scenario = prepare(world)
    world.restart(crash_point=f"{kind}:{step}")
    with contextlib.suppress(RemoteError):  # the connection dies with the agent
        scenario.act()
    world.agent.wait_dead()
    world.restart()
    world.check()
    if not scenario.done():
        scenario.act()
        assert scenario.done(), f"{kind} cannot be done after a death at {step}"
        world.check()


def test_every_kind_has_a_scenario() -> None:
    assert {*FRESH, *SHARED, *LEASED} == set(STEPS)


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


@pytest.mark.parametrize(("kind", "step"), points(SHARED))
def test_local_domain(local_world: World, kind: str, step: str) -> None:
    walk(local_world, kind, step, SHARED[kind])


@pytest.mark.parametrize(("kind", "step"), points(LEASED))
def test_domain_with_leases(leased_world: World, kind: str, step: str) -> None:
    walk(leased_world, kind, step, LEASED[kind])


@pytest.mark.parametrize(("kind", "step"), points(FRESH))
def test_pools_and_domains(
    fresh_agent: AgentProcess,
    make_server: Callable[[str], StorageServer],
    kind: str,
    step: str,
) -> None:
    servers = [make_server("local"), make_server("local")]
    walk(World(fresh_agent, servers, kind not in UNATTACHED), kind, step, FRESH[kind])
