# SPDX-License-Identifier: GPL-2.0-or-later
"""Volume leases that the store lets a real sanlock write, compared with VDSM's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.domains.file_store import FileStore
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.store import NewVolume
from vdsm_storage.leases.lease import Leases
from vdsm_storage.leases.local_lock import FileLock
from vdsm_storage.leases.model import Geometry

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "file-domain" / "posix-v5"
MIB = 1024 * 1024


@pytest.fixture
def posix(sanlock: Sanlock, tmp_path: Path) -> FileStore:
    infos = json.loads((GOLDEN / "3-volume-info.json").read_text())
    sd_id = next(iter(infos.values()))["domain"]
    os.makedirs(tmp_path / sd_id / "images")
    (tmp_path / "lock").touch()
    clock = SystemClock()
    lock = FileLock(sd_id, str(tmp_path / "lock"), clock)
    leases = Leases(sanlock, clock)
    return FileStore(str(tmp_path / sd_id), sd_id, 5, Geometry(), lock, leases, None)


@pytest.mark.sanlock
def test_lease_bytes(posix: FileStore) -> None:
    for entry in json.loads((GOLDEN / "3-volume-files.json").read_text()).values():
        image, volume = entry["input"]["img"], entry["input"]["vol"]
        posix.make(NewVolume(image, volume, MIB, False, True))
        spec = posix.lease(image, volume)
        assert spec is not None
        status = os.stat(spec.path)
        assert (status.st_size, status.st_mode & 0o777) == (entry["lease_file_size"], 0o660)
        golden = bytes.fromhex(entry["lease_first_1024_bytes_hex"])
        with open(spec.path, "rb") as file:
            assert file.read(len(golden)) == golden


@pytest.mark.sanlock
def test_leases_come_and_go_with_their_volumes(posix: FileStore, sanlock: Sanlock) -> None:
    image, volume, into = new_uuid(), new_uuid(), new_uuid()
    for _ in range(2):  # again after a crash
        posix.make(NewVolume(image, volume, MIB, False, True))
    metadata = VolumeMetadata(posix.id, image, MIB, "RAW", "SPARSE", "SHARED", "DATA")
    posix.publish(image, volume, metadata)
    spec = posix.lease(image, volume)
    assert spec is not None
    state = Leases(sanlock, SystemClock()).state(spec)
    assert (state.owners, state.version) == ((), None)
    posix.share(image, volume, into)
    assert os.path.samefile(f"{posix.root}/images/{into}/{volume}.lease", spec.path)
    posix.unmake(into, volume)
    posix.unmake(image, volume)
    assert os.listdir(f"{posix.root}/images") == []
