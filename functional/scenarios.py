# SPDX-License-Identifier: GPL-2.0-or-later
"""One scenario for each kind of operation on volumes and leases: it is begun, it took effect.

For the walks through all crash points, on files and on LUNs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from functional.nbd import NbdServer
from functional.pool_lab import Volume
from functional.walk import Scenario
from functional.world import COW, World, new_id
from vdsm_storage.rpc.client import RemoteError


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
        "dstVolUUID": target[1], "desc": "", "volType": 6, "volFormat": 5,
        "preallocate": w.prealloc,
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
    size = str(2 * w.size)
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
    return NbdServer(w.agent.dir / "run", w.size)


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
        return w.storage(w.main).read(Volume(w.main, image, volume), len(data)) == data

    return Scenario(act, done)


def download(w: World) -> Scenario:
    image = new_id()
    volume = w.create(image, diskType="OVFS")
    w.write(image, volume, "raw", 0)
    got: list[bytes] = []

    def act() -> None:
        host = w.agent.host("walk", 1)
        try:
            got.append(host.get_stream(w.ids(image, volume), 4096)[1])
        except (OSError, EOFError, AssertionError) as error:
            raise RemoteError(-32605, str(error)) from error
        finally:
            host.close()

    return Scenario(act, lambda: got == [b"\x50" * 4096])


# -- pools -----------------------------------------------------------------------------------


def start_spm(w: World) -> Scenario:
    return Scenario(w.start_spm, w.is_spm)


def role(w: World, domain: str) -> str:
    return str(w.info_of(domain)["role"])


def create_pool(w: World, domains: list[str]) -> Scenario:
    """Of free domains, the first of which is `w.main`."""
    w.pool = new_id()

    def act() -> None:
        w.attached = domains
        try:
            w.create_pool()
        finally:
            w.attached = []

    return Scenario(act, lambda: role(w, w.main) == "Master")


def reconstruct(w: World) -> Scenario:
    """With `w.second` as the new master; the pool is disconnected."""
    domains = dict.fromkeys(w.attached, "active")
    w.attached = []
    request = {
        "storagepoolID": w.pool, "hostId": 1, "name": "walk", "masterSdUUID": w.second,
        "masterVersion": w.version + 1, "domainDict": domains,
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
            newMasterUUID=w.second, masterVersion=w.version + 1,
        ),
        lambda: (role(w, w.main), role(w, w.second)) == ("Regular", "Master"),
    )  # fmt: skip


def destroy_pool(w: World) -> Scenario:
    assert w.start_spm() == ""
    domains = w.attached

    def act() -> None:
        w.attached = []
        w.destroy_pool()

    def done() -> bool:
        return all(w.info_of(domain)["pool"] == [] for domain in domains)

    def check() -> None:
        for domain in domains:
            w.storage(domain).check_idle()

    return Scenario(act, done, check)


def upgrade_domain(w: World, domain: str) -> Scenario:
    """A domain of the old format is activated in a pool of the new one."""
    w.create_domain(domain, version="4")
    w.call("StorageDomain.attach", storagedomainID=domain, storagepoolID=w.pool)

    def done() -> bool:
        return bool(w.info_of(domain)["version"] == "5")

    def act() -> None:
        w.call("StorageDomain.activate", storagedomainID=domain, storagepoolID=w.pool)
        w.wait(done, "the upgrade")

    return Scenario(act, done)


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
