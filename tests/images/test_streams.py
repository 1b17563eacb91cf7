# SPDX-License-Identifier: GPL-2.0-or-later
"""Streams into and out of volumes, each a task."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vdsm_storage.base.uuids import BLANK, new_uuid
from vdsm_storage.errors import (
    AgentError,
    ImageDoesNotExistInSD,
    InvalidParameter,
    StorageDomainDoesNotExist,
    StreamFailed,
    StreamTooLong,
    VolumeDoesNotExist,
)
from vdsm_storage.images.guard import VolumeRef
from vdsm_storage.images.streams import ImageStreams
from vdsm_storage.jobs.journal import TASK
from vdsm_storage.jobs.runner import Runner

MIB = 1024 * 1024


class Streaming:
    """One local domain, its streams and their tasks."""

    def __init__(self, lab) -> None:  # type: ignore[no-untyped-def]
        self.lab = lab
        self.store = lab.domain()
        self.runner: Runner = lab.runner()
        self.streams = ImageStreams(lab.find_store, self.runner, lab.locks, 2.0)
        self.runner.add_kinds(self.streams.kinds())
        self.volume: VolumeRef = lab.volume(self.store, cow=False)

    def headers(self, **changes: str) -> dict[str, str]:
        return {
            "storage-pool-id": new_uuid(),
            "storage-domain-id": self.volume.domain,
            "image-id": self.volume.image,
            "volume-id": self.volume.volume,
            **{name.replace("_", "-"): value for name, value in changes.items()},
        }

    def outcome(self, task_id: str) -> tuple[str, int]:
        task = self.runner.get(task_id, TASK)
        assert task is not None
        assert task.done.wait(10)
        return task.entry.outcome, (task.entry.error or {"code": 0})["code"]

    def data(self) -> bytes:
        return Path(self.lab.path(self.volume)).read_bytes()


@pytest.fixture
def streaming(datalab) -> Streaming:  # type: ignore[no-untyped-def]
    return Streaming(datalab)


def test_in_and_out(streaming: Streaming) -> None:
    data = os.urandom(MIB + 12345)
    upload = streaming.streams.open_upload(streaming.headers(), len(data))
    for start in range(0, len(data), 65536):
        upload.write(data[start : start + 65536])
    upload.finish()
    assert streaming.outcome(upload.task_id) == ("success", 0)
    assert streaming.data()[: len(data)] == data
    assert len(streaming.data()) == 2 * MIB  # what was behind it stays

    # Without a volume the image's leaf is meant.
    download = streaming.streams.open_download(streaming.headers(volume_id=""), len(data))
    read = b""
    while len(read) < download.length:
        read += download.read(100_000)
    download.close()
    download.close()
    assert read == data
    assert streaming.outcome(download.task_id) == ("success", 0)


def test_a_download_ends_where_the_volume_ends(streaming: Streaming) -> None:
    download = streaming.streams.open_download(streaming.headers(volume_id=BLANK), 10 * MIB)
    assert download.length == 2 * MIB
    download.close()
    assert streaming.outcome(download.task_id) == ("cleanSuccess", StreamFailed.code)


def test_a_peer_that_goes_away(streaming: Streaming) -> None:
    upload = streaming.streams.open_upload(streaming.headers(), 1000)
    upload.write(b"x" * 500)
    upload.abort()
    assert streaming.outcome(upload.task_id) == ("cleanSuccess", StreamFailed.code)
    with pytest.raises(StreamFailed):
        upload.write(b"x")


def test_a_task_that_is_stopped(streaming: Streaming) -> None:
    upload = streaming.streams.open_upload(streaming.headers(), 1000)
    task = streaming.runner.get(upload.task_id, TASK)
    assert task is not None
    streaming.runner.stop(task)
    assert streaming.outcome(upload.task_id)[0] == "cleanSuccess"
    with pytest.raises(StreamFailed):
        upload.finish()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"image_id": "../../etc"}, InvalidParameter),
        ({"volume_id": "../passwd"}, InvalidParameter),
        ({"storage_pool_id": ""}, InvalidParameter),
        ({"storage_domain_id": new_uuid()}, StorageDomainDoesNotExist),
        ({"volume_id": new_uuid()}, VolumeDoesNotExist),
        ({"image_id": new_uuid(), "volume_id": ""}, ImageDoesNotExistInSD),
    ],
)
def test_refused(streaming: Streaming, changes: dict[str, str], error: type[AgentError]) -> None:
    with pytest.raises(error):
        streaming.streams.open_upload(streaming.headers(**changes), 10)
    with pytest.raises(error):
        streaming.streams.open_download(streaming.headers(**changes), 10)
    assert streaming.runner.all(TASK) == []


def test_more_than_fits(streaming: Streaming) -> None:
    with pytest.raises(StreamTooLong):
        streaming.streams.open_upload(streaming.headers(), 2 * MIB + 1)


def test_a_volume_that_is_a_link_is_not_followed(streaming: Streaming, tmp_path: Path) -> None:
    path = Path(streaming.lab.path(streaming.volume))
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    path.unlink()
    path.symlink_to(secret)
    upload = streaming.streams.open_upload(streaming.headers(), 3)
    assert streaming.outcome(upload.task_id)[0] == "cleanSuccess"
    with pytest.raises(StreamFailed):
        upload.write(b"abc")
    assert secret.read_bytes() == b"secret"
    with pytest.raises((OSError, AgentError)):
        streaming.streams.open_download(streaming.headers(), 3)
