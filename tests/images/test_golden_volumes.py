# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes made here compared with those that VDSM made from the same requests."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vdsm_storage.base.locks import Locks
from vdsm_storage.base.uuids import BLANK
from vdsm_storage.config import Config
from vdsm_storage.domains.file_store import FileStore
from vdsm_storage.images import metadata as md
from vdsm_storage.images.create import NewVolumeRequest
from vdsm_storage.images.images import Images
from vdsm_storage.images.volumes import Volumes
from vdsm_storage.jobs.runner import Request
from vdsm_storage.leases.model import Geometry, LeaseSpec, LeaseState

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "file-domain"
VERSIONS = {"local-v4": 4, "local-v5": 5, "nfs-v3": 3, "nfs-v4": 4, "posix-v5": 5}


class FreeLeases:
    """Lease files of the right size for domains that have leases; what sanlock writes into them
    is compared in tests/leases."""

    def write(self, spec: LeaseSpec) -> None:
        with open(spec.path, "r+b") as file:
            file.write(bytes(spec.geometry.alignment))

    def state(self, spec: LeaseSpec) -> LeaseState:
        return LeaseState((), None)


def read(kind: str, name: str) -> Any:
    return json.loads((GOLDEN / kind / name).read_text())


class Replay:
    """The golden requests of one domain, run on an empty domain of the same UUID."""

    def __init__(self, datalab: Any, kind: str) -> None:
        self.kind = kind
        self.lab = datalab
        infos = read(kind, "3-volume-info.json")
        self.domain = next(iter(infos.values()))["domain"]
        leases = None if kind.startswith("local") else FreeLeases()
        root = datalab.root / "mnt" / self.domain
        os.makedirs(root / "images", mode=0o755)
        lock = datalab.domain().lock
        geometry = Geometry()
        self.store = FileStore(
            str(root), self.domain, VERSIONS[kind], geometry, lock, leases, None
        )
        datalab.stores[self.domain] = self.store
        self.volumes = Volumes(
            datalab.find_store,
            datalab.qemu_img,
            FreeLeases(),
            Locks(datalab.clock),
            Config(),
            datalab.runner(),
        )
        datalab.kinds += self.volumes.kinds()
        self.images = Images(self.volumes, str(datalab.root / "run"))

    def run(self) -> None:
        files = read(self.kind, "3-volume-files.json")
        infos = read(self.kind, "3-volume-info.json")
        for entry in files.values():
            given = entry["input"]
            request = NewVolumeRequest(
                domain=self.domain,
                image=given["img"],
                volume=given["vol"],
                capacity=given["cap"],
                format=given["f"],
                type=given["a"],
                disktype="DATA",
                description=given["desc"],
                parent_image=given.get("si", BLANK),
                parent=given.get("sv", BLANK),
                sequence=given["seq"],
                ctime=int(infos[given["vol"]]["ctime"]),
            )
            self.lab.run(
                Request("volume.create", request.as_params(), [self.domain], "createVolume")
            )
            if given.get("share"):
                metadata = self.store.load(given["img"], given["vol"])
                self.store.save(given["img"], given["vol"], metadata.with_(voltype=md.SHARED))


@pytest.fixture(params=sorted(VERSIONS))
def replay(request: pytest.FixtureRequest, datalab: Any) -> Replay:
    replay = Replay(datalab, request.param)
    replay.run()
    return replay


def listing(root: str, below: str) -> list[dict[str, object]]:
    found = []
    for folder, directories, files in os.walk(os.path.join(root, below)):
        for name in [*directories, *files]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            entry: dict[str, object] = {"path": os.path.relpath(path, root)}
            entry["type"] = "dir" if stat.S_ISDIR(status.st_mode) else "file"
            entry["mode"] = f"{stat.S_IMODE(status.st_mode):04o}"
            if entry["type"] == "file":
                entry["size"] = status.st_size
                entry["allocated"] = status.st_blocks * 512
                entry["links"] = status.st_nlink
            found.append(entry)
    return sorted(found, key=lambda entry: str(entry["path"]))


def test_files_modes_sizes_and_links(replay: Replay) -> None:
    golden = [
        entry
        for entry in read(replay.kind, "3-volumes.listing.json")
        if entry["path"].startswith("images/")
    ]
    assert listing(replay.store.root, "images") == golden


def test_metadata_bytes(replay: Replay) -> None:
    for number, entry in enumerate(read(replay.kind, "3-volume-files.json").values()):
        given = entry["input"]
        meta = Path(replay.store.root, "images", given["img"], given["vol"] + ".meta")
        golden = (GOLDEN / replay.kind / f"3-vol{number}.meta").read_bytes()
        assert meta.read_bytes() == golden


def test_volume_info(replay: Replay) -> None:
    infos = read(replay.kind, "3-volume-info.json")
    for volume, golden in infos.items():
        image = golden["image"]
        info = replay.volumes.info(replay.domain, image, volume)
        if "lease" in golden:
            golden["lease"]["path"] = f"{replay.store.root}/images/{image}/{volume}.lease"
        assert info == golden
        size = replay.volumes.size(replay.domain, image, volume)
        assert size == {key: golden[key] for key in ("apparentsize", "truesize")}


def test_headers_and_what_qemu_says(replay: Replay) -> None:
    for entry in read(replay.kind, "3-volume-files.json").values():
        given, golden = entry["input"], entry["qemu-img-info"]
        path = replay.store.path(given["img"], given["vol"])
        header = bytes.fromhex(entry["first_512_bytes_hex"])
        with open(path, "rb") as file:
            assert file.read(len(header)) == header
        kind = "qcow2" if given["f"] == "COW" else "raw"
        done = subprocess.run(
            ["qemu-img", "info", "--output=json", "-f", kind, path],
            capture_output=True,
            check=True,
            timeout=60,
        )
        info = json.loads(done.stdout)
        for key in ("filename", "full-backing-filename"):
            golden.pop(key, None)
            info.pop(key, None)
        assert info == golden


def test_all_volumes(replay: Replay) -> None:
    golden = read(replay.kind, "3-all-volumes.json")
    found = replay.store.all_volumes()
    assert {volume: sorted(images) for volume, images in found.items()} == {
        volume: sorted(entry["imgs"]) for volume, entry in golden.items()
    }
    assert sorted(replay.store.images()) == sorted(
        {image for entry in golden.values() for image in entry["imgs"]}
    )


def test_marking_for_deletion(replay: Replay) -> None:
    golden = read(replay.kind, "6-delete-marked.listing.json")
    image = next(e["path"] for e in golden if e["type"] == "dir").removeprefix("images/_remove_me_")
    assert image in replay.store.images()
    volumes = replay.store.volumes(image)
    replay.store.mark_removed(image)
    assert listing(replay.store.root, "images/_remove_me_" + image) == [
        entry for entry in golden if entry["type"] == "file"
    ]
    assert image not in replay.store.images()
    assert replay.store.volumes(image) == []
    assert replay.store.removed_images() == {image: volumes}
    replay.store.purge(image)
    assert replay.store.removed_images() == {}
    assert not [name for name in os.listdir(f"{replay.store.root}/images") if "remove" in name]


def test_prepare_gives_the_real_path_and_a_run_link(replay: Replay) -> None:
    files = read(replay.kind, "3-volume-files.json")
    given = files["vol1"]["input"]
    path = replay.store.path(given["img"], given["vol"])
    os.chmod(path, 0o600)
    answer = replay.images.prepare(replay.domain, given["img"], given["vol"])
    assert answer == {"path": path}
    link = replay.lab.root / "run" / replay.domain / given["img"]
    assert os.path.realpath(link / given["vol"]) == os.path.realpath(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    replay.images.prepare(replay.domain, given["img"], given["vol"])
    replay.images.teardown(replay.domain, given["img"])
    replay.images.teardown(replay.domain, given["img"])
    assert not link.parent.exists()


def test_metadata_of_a_used_template_stays_one_file(replay: Replay) -> None:
    template = read(replay.kind, "3-volume-files.json")["vol3"]["input"]
    child = read(replay.kind, "3-volume-files.json")["vol4"]["input"]
    metadata = replay.store.load(template["img"], template["vol"])
    replay.store.save(template["img"], template["vol"], metadata.with_(description="one"))
    assert replay.store.load(child["img"], template["vol"]).description == "one"
    replay.store.save(child["img"], template["vol"], metadata.with_(description="two"))
    assert replay.store.load(template["img"], template["vol"]).description == "two"
    for image in (template["img"], child["img"]):
        meta = Path(replay.store.root, "images", image, template["vol"] + ".meta")
        assert meta.stat().st_nlink == 2
