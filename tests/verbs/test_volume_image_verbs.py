# SPDX-License-Identifier: GPL-2.0-or-later
"""Verbs of Volume and Image as engines send them, on a real local domain, replies checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.locks import Locks
from vdsm_storage.base.uuids import BLANK, new_uuid
from vdsm_storage.config import Config
from vdsm_storage.domains.file_store import FileStore
from vdsm_storage.errors import AgentError, StorageDomainDoesNotExist
from vdsm_storage.host.qemu_img import QemuImg
from vdsm_storage.images.data import Data
from vdsm_storage.images.images import Images
from vdsm_storage.images.volumes import Volumes
from vdsm_storage.jobs.journal import TASK, Journal
from vdsm_storage.jobs.operation import CrashPoints
from vdsm_storage.jobs.runner import Runner
from vdsm_storage.leases.local_lock import FileLock
from vdsm_storage.leases.model import Geometry
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.normalise import Checker
from vdsm_storage.verbs import image, volume

VERBS = {**volume.VERBS, **image.VERBS}
POOL = new_uuid()
GIB = 1024**3


class Client:
    """Calls verbs with the shapes that engines use, and checks what is answered."""

    def __init__(self, root: Path) -> None:
        clock, self.domain = SystemClock(), new_uuid()
        os.makedirs(root / self.domain / "images")
        (root / "lock").touch()
        lock = FileLock(self.domain, str(root / "lock"), clock)
        store = FileStore(str(root / self.domain), self.domain, 5, Geometry(), lock, None)
        self.store = store

        def find(sd_id: str) -> FileStore:
            if sd_id != self.domain:
                raise StorageDomainDoesNotExist(domain=sd_id)
            return store

        self.lanes = Lanes(clock)
        journal = Journal(str(root / "journal"))
        self.runner = Runner(journal, self.lanes, clock, CrashPoints(), lambda e, f: None)
        locks, qemu, config = Locks(clock), QemuImg(), Config()
        volumes = Volumes(find, qemu, None, locks, config, self.runner)
        data = Data(find, qemu, None, locks, config, self.runner)
        self.runner.add_kinds([*volumes.kinds(), *data.kinds()])
        services = SimpleNamespace(
            volumes=volumes, data=data, images=Images(volumes, str(root / "run"))
        )
        self.context = SimpleNamespace(services=services)
        self.checker = Checker(Schema(), strict=True)

    def call(self, verb: str, **params: Any) -> Any:
        values = self.checker.check_params(verb, params).values
        result = VERBS[verb].function(self.context, **values)
        result = True if result is None else result
        assert self.checker.reply_problems(verb, result) == []
        return result

    def task(self, verb: str, **params: Any) -> None:
        running = self.runner.get(self.call(verb, **params), TASK)
        assert running is not None
        assert running.done.wait(30)
        assert running.entry.outcome == "success", running.entry.error

    def names(self, image_id: str, volume_id: str | None = None) -> dict[str, str]:
        names = {"storagepoolID": POOL, "storagedomainID": self.domain, "imageID": image_id}
        return {**names, "volumeID": volume_id} if volume_id else names

    def create(self, image_id: str, **changes: Any) -> str:
        params = {
            **self.names(image_id, new_uuid()),
            "size": str(GIB),
            "volFormat": 4,
            "preallocate": 2,
            "diskType": "DATA",
            "desc": '{"DiskAlias":"d","DiskDescription":""}',
            "srcImgUUID": BLANK,
            "srcVolUUID": BLANK,
            "sequence": 1,
            "addBitmaps": False,
            "legal": True,
            **changes,
        }
        self.task("Volume.create", **params)
        return str(params["volumeID"])


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    client = Client(tmp_path)
    yield client
    client.lanes.close()


def test_life_of_a_disk(client: Client) -> None:
    disk = new_uuid()
    base = client.create(disk, volFormat=5)
    leaf = client.create(disk, srcImgUUID=disk, srcVolUUID=base, sequence=2)
    info = client.call("Volume.getInfo", **client.names(disk, leaf))
    assert (info["parent"], info["sequence"], info["capacity"]) == (base, 2, str(GIB))
    client.task("Volume.extendSize", **client.names(disk, leaf), newSize=str(2 * GIB))
    info = client.call("Volume.getInfo", **client.names(disk, leaf))
    assert info["capacity"] == str(2 * GIB)
    qemu = client.call("Volume.getQemuImageInfo", **client.names(disk, leaf))
    assert (qemu["backingfile"], qemu["compat"], qemu["virtualsize"]) == (base, "1.1", 2 * GIB)
    measured = client.call("Volume.measure", **client.names(disk, leaf), dstVolFormat=4)
    assert measured["required"] > 0
    prepared = client.call("Image.prepare", **client.names(disk, leaf), allowIllegal=False)
    assert prepared["path"].endswith(f"/{disk}/{leaf}")
    client.call("Volume.setDescription", **client.names(disk, leaf), description="new")
    client.call("Volume.setLegality", **client.names(disk, leaf), legality="ILLEGAL")
    with pytest.raises(AgentError) as caught:
        client.call("Image.prepare", **client.names(disk, leaf))
    assert caught.value.code == 227
    client.call("Volume.setLegality", **client.names(disk, leaf), legality="LEGAL")
    client.call("Volume.refresh", **client.names(disk, leaf))
    assert client.call("Volume.getSize", **client.names(disk, base))["apparentsize"] == str(GIB)
    assert sorted(client.call("Image.getVolumes", **client.names(disk))) == sorted([base, leaf])
    chain = client.call("Image.reconcileVolumeChain", **client.names(disk), leafVolID=leaf)
    assert chain == [base, leaf]
    client.call("Volume.verify_untrusted", **client.names(disk, leaf))
    client.call("Image.teardown", **client.names(disk))
    client.task(
        "Image.deleteVolumes",
        **client.names(disk),
        volumeList=[leaf],
        postZero="false",
        force="false",
    )
    assert client.call("Volume.getInfo", **client.names(disk, base))["voltype"] == "LEAF"
    client.task("Image.delete", **client.names(disk), postZero="false", force="false")
    with pytest.raises(AgentError) as caught:
        client.call("Image.delete", **client.names(disk), postZero="false", force="false")
    assert caught.value.code == 268
    assert os.listdir(f"{client.store.root}/images") == []


def test_a_template_and_a_disk_from_it(client: Client) -> None:
    disk, template, derived = new_uuid(), new_uuid(), new_uuid()
    source = client.create(disk, volFormat=5, size=str(1024**2))
    template_volume = new_uuid()
    client.task(
        "Volume.copy",
        **client.names(disk, source),
        dstSdUUID=client.domain,
        dstImgUUID=template,
        dstVolUUID=template_volume,
        desc="",
        volType=6,
        volFormat=4,
        preallocate=2,
        postZero="false",
        force="false",
    )
    leaf = client.create(
        derived, srcImgUUID=template, srcVolUUID=template_volume, size=str(1024**2)
    )
    volumes = client.call("Image.getVolumes", **client.names(derived))
    assert sorted(volumes) == sorted([template_volume, leaf])
    with pytest.raises(AgentError) as caught:
        client.call("Image.delete", **client.names(template), postZero=False, force=False)
    assert caught.value.code == 223
    client.task("Image.delete", **client.names(derived), postZero=False, force=False)
    client.task("Image.delete", **client.names(template), postZero=False, force=False)


@pytest.mark.parametrize(
    ("verb", "code", "extra"),
    [
        ("Volume.getInfo", 201, {}),
        ("Volume.getSize", 201, {}),
        ("Volume.getQemuImageInfo", 201, {}),
        ("Volume.refresh", 201, {}),
        ("Volume.setLegality", 201, {"legality": "LEGAL"}),
        ("Volume.setDescription", 201, {"description": ""}),
        ("Volume.extendSize", 201, {"newSize": "1"}),
        ("Volume.delete", 201, {"postZero": "false", "force": "false"}),
        ("Image.prepare", 201, {}),
    ],
)
def test_volumes_that_are_not_there(
    client: Client, verb: str, code: int, extra: dict[str, Any]
) -> None:
    with pytest.raises(AgentError) as caught:
        client.call(verb, **client.names(new_uuid(), new_uuid()), **extra)
    assert caught.value.code == code


def test_a_domain_that_is_not_there(client: Client) -> None:
    params = {**client.names(new_uuid(), new_uuid()), "storagedomainID": new_uuid()}
    with pytest.raises(AgentError) as caught:
        client.call("Volume.getInfo", **params)
    assert caught.value.code == 358


def test_create_answers_refusals_at_once(client: Client) -> None:
    disk = new_uuid()
    made = client.create(disk)
    for changes, code in (
        ({"volumeID": made}, 212),
        ({"srcImgUUID": disk, "srcVolUUID": made, "size": "4096"}, 1000),
        ({"srcImgUUID": disk, "srcVolUUID": new_uuid()}, 201),
        ({"srcImgUUID": disk, "srcVolUUID": made, "volFormat": 5}, 202),
    ):
        with pytest.raises(AgentError) as caught:
            client.create(disk, **changes)
        assert caught.value.code == code
    assert client.runner.all(TASK)[1:] == []
