# SPDX-License-Identifier: GPL-2.0-or-later
"""Every verb that goes to storage, to be tried on storage that means harm."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from functional.engine.host import stream_headers
from functional.engine.wire import client_tls
from functional.outside import SECRET, Outside
from functional.pool_lab import (
    BLANK,
    COW,
    MIB,
    Lab,
    Volume,
    bind_server,
    endpoint,
    local_server,
    make_lab,
)
from functional.processes import AgentProcess
from vdsm_storage.rpc.client import RemoteError


@contextlib.contextmanager
def hostile_lab(workdir: Path, start_agent: Callable[..., AgentProcess]) -> Iterator[Lab]:
    """A POSIX domain, the master, and a local one."""
    agent = start_agent(
        "agent", log__level="DEBUG", rpc__check_replies="false", storage__monitor_interval="0.5",
        storage__lock_timeout="5",
    )  # fmt: skip
    made = make_lab(agent)
    (workdir / "posix").mkdir()
    made.add_domain(bind_server(workdir / "posix"))
    made.add_domain(local_server(workdir / "local"))
    yield made
    made.client.close()


def posix(lab: Lab) -> str:
    return next(iter(lab.servers))


def local(lab: Lab) -> str:
    return list(lab.servers)[1]


def stream(
    lab: Lab, method: str, headers: dict[str, str], data: bytes = b"x" * 4096
) -> tuple[int, bytes]:
    context = client_tls(lab.agent.dir / "pki")
    connection = http.client.HTTPSConnection(
        "127.0.0.1", lab.agent.port, timeout=60, context=context
    )
    if method == "GET":
        headers = {**headers, "Range": "bytes=0-4095"}
    try:
        connection.request(method, "/", data if method == "PUT" else None, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def attacks(lab: Lab, where: Volume) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every verb that goes to a volume, the one that deletes it last."""
    ids = lab.ids(where)
    image = {key: ids[key] for key in ("storagepoolID", "storagedomainID", "imageID")}
    other = lab.create(where.domain, 8 * MIB)
    info = {key: value for key, value in endpoint(where).items() if key != "endpoint_type"}
    elsewhere = local(lab) if where.domain == posix(lab) else posix(lab)
    new = {"dstImgUUID": str(uuid.uuid4()), "dstVolUUID": str(uuid.uuid4())}
    for verb, more in (
        ("Image.prepare", {}), ("Volume.getInfo", {}), ("Volume.getSize", {}),
        ("Volume.getQemuImageInfo", {}), ("Volume.verify_untrusted", {}), ("Volume.refresh", {}),
        ("Volume.measure", {"dstVolFormat": 5}), ("Volume.setDescription", {"description": "x"}),
        ("Volume.setLegality", {"legality": "LEGAL"}),
    ):  # fmt: skip
        yield verb, lambda verb=verb, more=more: lab.call(verb, **ids, **more)  # type: ignore[misc]
    domain, leaf = where.domain, where.volume
    yield "Image.getVolumes", lambda: lab.call("Image.getVolumes", **image)
    yield "dump", lambda: lab.call("StorageDomain.dump", sd_id=domain, full=True)
    yield "reconcile", lambda: lab.call("Image.reconcileVolumeChain", **image, leafVolID=leaf)
    yield "extend", lambda: lab.task("Volume.extendSize", **ids, newSize=8 * MIB)
    yield "copy from", lambda: lab.copy(where, other)
    yield "snapshot", lambda: lab.snapshot(where, size=16 * MIB)
    yield "add_bitmap", lambda: lab.job("SDM.add_bitmap", vol_info=info, bitmap="b")
    for name, more in (
        ("update_volume", {"vol_attr": {"description": "y"}}),
        ("amend_volume", {"qcow2_attr": {"compat": "1.1"}}),
    ):
        yield name, lambda name=name, more=more: lab.job(f"SDM.{name}", vol_info=info, **more)  # type: ignore[misc]
    yield "sparsify", lambda: lab.job("SDM.sparsify_volume", vol_info=info)
    yield "reduce", lambda: lab.task("StoragePool.reduceVolume", **ids)
    yield "PUT", lambda: stream(lab, "PUT", stream_headers(ids))
    yield "GET", lambda: stream(lab, "GET", stream_headers(ids))
    yield "move", lambda: lab.task(
        "Image.move", **image, dstSdUUID=elsewhere, operation=1, postZero=False, force=False
    )
    yield "Volume.copy", lambda: lab.task(
        "Volume.copy", **ids, dstSdUUID=where.domain, **new, desc="", volType="LEAF",
        volFormat=COW, preallocate=2, postZero=False, force=False,
    )  # fmt: skip
    yield "copy to", lambda: lab.copy(lab.create(where.domain), where)
    yield "Image.teardown", lambda: lab.call("Image.teardown", **ids)
    yield "delete", lambda: lab.task("Volume.delete", **ids, postZero=False, force=True)
    yield "delete image", lambda: lab.task("Image.delete", **image, postZero=False, force=True)


def run(calls: Iterator[tuple[str, Callable[[], Any]]], outside: Outside) -> dict[str, Any]:
    """What each call answered; none may have touched what is outside, or told of it."""
    answers: dict[str, Any] = {}
    for name, call in calls:
        try:
            answers[name] = call()
        except (RemoteError, AssertionError) as error:
            answers[name] = repr(error)
        assert outside.touched() == [], name
        assert SECRET not in repr(answers[name]), name
    return answers


def plant(path: Path, outside: Outside) -> None:
    """A link to a faithful copy outside, which would do if it were followed."""
    target = outside.path / "copy"
    if path.is_dir():
        shutil.copytree(path, target)
        path.rename(path.with_name(f"{path.name}.away"))
    else:
        shutil.copy(path, target)
        path.unlink()
    path.symlink_to(target)
    outside.file("secret")
    outside.watch()


def domain_attacks(lab: Lab, domain: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    lease = {"sd_id": domain, "lease_id": str(uuid.uuid4())}
    one = {"storagedomainID": domain}
    yield "monitoring", lambda: time.sleep(1.5)
    yield "create", lambda: lab.create(domain)
    yield "getInfo", lambda: lab.call("StorageDomain.getInfo", **one)
    yield "validate", lambda: lab.call("StorageDomain.validate", **one)
    yield "getImages", lambda: lab.call("StorageDomain.getImages", **one)
    yield "setDescription", lambda: lab.call(
        "StorageDomain.setDescription", **one, description="z"
    )
    yield "dump", lambda: lab.call("StorageDomain.dump", sd_id=domain, full=True)
    yield "Lease.create", lambda: lab.task("Lease.create", lease=lease)
    yield "Lease.status", lambda: lab.call("Lease.status", lease=lease)
    yield "rebuild", lambda: lab.task("Lease.rebuild_leases", sd_id=domain)
    yield "getStorageDomains", lambda: lab.call("Host.getStorageDomains")
    pool = {**one, "storagepoolID": lab.pool}
    yield "deactivate", lambda: lab.call(
        "StorageDomain.deactivate", **pool, masterSdUUID=BLANK, masterVersion=0
    )
    yield "activate", lambda: lab.call("StorageDomain.activate", **pool)
    yield "detach", lambda: lab.call("StorageDomain.detach", **pool, force=True)
    yield "format", lambda: lab.call("StorageDomain.format", **one, autoDetach=True)
