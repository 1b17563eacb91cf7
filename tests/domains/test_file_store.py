# SPDX-License-Identifier: GPL-2.0-or-later
"""The store on directories: idempotence, space, links that lead astray, and how fast it lists."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.domains.file_store import FileStore
from vdsm_storage.errors import (
    ActionStopped,
    ImageDoesNotExistInSD,
    ImagePathError,
    InvalidParameter,
    MetadataCleared,
    NoSpaceLeftOnDomain,
    VolumeAccessError,
    VolumeAlreadyExists,
    VolumeDoesNotExist,
    VolumeMetadataReadError,
)
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.store import NewVolume
from vdsm_storage.leases.local_lock import FileLock
from vdsm_storage.leases.model import Geometry

MIB = 1024 * 1024


def make_store(root: Path) -> FileStore:
    sd_id = new_uuid()
    os.makedirs(root / sd_id / "images")
    (root / f"{sd_id}.lock").touch()
    lock = FileLock(sd_id, str(root / f"{sd_id}.lock"), SystemClock())
    return FileStore(str(root / sd_id), sd_id, 5, Geometry(), lock, None, None)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return make_store(tmp_path)


@pytest.fixture
def full_store(tmp_path: Path) -> Iterator[FileStore]:
    """A store on a file system of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "small", str(folder)]
    subprocess.run(mount, check=True, timeout=30)
    try:
        yield make_store(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=30)


def metadata(store: FileStore, image: str, **changes: object) -> VolumeMetadata:
    return VolumeMetadata(store.id, image, MIB, "RAW", "SPARSE", "LEAF", "DATA").with_(**changes)


def add(store: FileStore, image: str | None = None, **changes: object) -> tuple[str, str]:
    image, volume = image or new_uuid(), new_uuid()
    store.make(NewVolume(image, volume, MIB, False, True))
    store.publish(image, volume, metadata(store, image, **changes))
    return image, volume


def files(store: FileStore) -> list[str]:
    return sorted(
        os.path.relpath(os.path.join(folder, name), store.root)
        for folder, _, names in os.walk(store.root)
        for name in names
    )


def test_nothing_is_listed_before_it_is_published(store: FileStore) -> None:
    image, volume = new_uuid(), new_uuid()
    path = store.make(NewVolume(image, volume, MIB, False, True))
    assert os.path.getsize(path) == MIB
    assert (store.images(), store.volumes(image), store.all_volumes()) == ([], [], {})
    assert store.has_remains(image, volume)
    with pytest.raises(VolumeDoesNotExist):
        store.load(image, volume)
    store.publish(image, volume, metadata(store, image))
    assert (store.images(), store.volumes(image)) == ([image], [volume])
    assert store.all_volumes() == {volume: [image]}
    assert not store.has_remains(image, volume)
    store.unpublish(image, volume)
    assert store.images() == []
    assert store.has_remains(image, volume)
    for _ in range(2):
        store.unmake(image, volume)
        assert files(store) == []
        assert os.listdir(f"{store.root}/images") == []


def test_make_takes_over_what_a_crash_left(store: FileStore) -> None:
    image, volume = new_uuid(), new_uuid()
    for size in (8 * MIB, 2 * MIB):
        path = store.make(NewVolume(image, volume, size, True, True))
        status = os.stat(path)
        assert status.st_size == size
        assert status.st_blocks * 512 >= size
        assert stat.S_IMODE(status.st_mode) == 0o660


def test_make_never_touches_a_published_volume(store: FileStore) -> None:
    image, volume = add(store)
    Path(store.path(image, volume)).write_bytes(b"data")
    with pytest.raises(VolumeAlreadyExists):
        store.make(NewVolume(image, volume, MIB, False, True))
    assert Path(store.path(image, volume)).read_bytes() == b"data"


def test_no_space_leaves_nothing(full_store: FileStore) -> None:
    image, volume = new_uuid(), new_uuid()
    with pytest.raises(NoSpaceLeftOnDomain) as caught:
        full_store.make(NewVolume(image, volume, 64 * MIB, True, True))
    assert caught.value.code == 397
    assert files(full_store) == []
    image, volume = add(full_store)
    with pytest.raises(NoSpaceLeftOnDomain):
        full_store.resize(image, volume, 64 * MIB, True)
    assert os.path.getsize(full_store.path(image, volume)) == MIB


def test_preallocation_reports_and_can_be_stopped(store: FileStore) -> None:
    image, volume = new_uuid(), new_uuid()
    seen: list[float] = []
    store.make(NewVolume(image, volume, 300 * MIB, True, True), seen.append)
    assert seen == sorted(seen)
    assert len(seen) == 3
    assert seen[-1] == 1.0

    def stop(fraction: float) -> None:
        raise ActionStopped()

    other = new_uuid()
    with pytest.raises(ActionStopped):
        store.make(NewVolume(image, other, 300 * MIB, True, True), stop)
    assert not os.path.exists(store.path(image, other))


def test_sharing_again_and_after_a_crash(store: FileStore) -> None:
    image, volume = add(store, voltype="SHARED")
    into = new_uuid()
    os.makedirs(f"{store.root}/images/{into}")
    data = store.path(image, volume)
    os.link(data, f"{store.root}/images/{into}/{volume}.new")  # a share that was cut off
    for _ in range(2):
        store.share(image, volume, into)
        assert os.stat(data).st_nlink == 2
    assert sorted(store.images_of_volume(volume)) == sorted([image, into])
    assert os.path.samefile(data, store.path(into, volume))
    store.unmake(into, volume)
    assert store.volumes(image) == [volume]
    assert store.images() == [image]
    with pytest.raises(VolumeDoesNotExist):
        store.share(image, new_uuid(), into)


def test_marking_and_purging_again(store: FileStore) -> None:
    image, _ = add(store)
    for _ in range(2):
        store.mark_removed(image)
        assert list(store.removed_images()) == [image]
    add(store, image)  # the same UUID is used again before the purge
    store.mark_removed(image)
    for _ in range(2):
        store.purge(image)
        assert store.removed_images() == {}
    with pytest.raises(ImageDoesNotExistInSD) as caught:
        store.mark_removed(image)
    assert caught.value.code == 268


@pytest.mark.parametrize("text", ["NONE=####\nEOF\n", "", "\0" * 512])
def test_cleared_metadata(store: FileStore, text: str) -> None:
    image, volume = add(store)
    Path(store.root, "images", image, volume + ".meta").write_text(text)
    with pytest.raises(MetadataCleared):
        store.load(image, volume)


def test_damaged_metadata(store: FileStore) -> None:
    image, volume = add(store)
    Path(store.root, "images", image, volume + ".meta").write_bytes(b"\xff" * 100_000)
    with pytest.raises(VolumeMetadataReadError):
        store.load(image, volume)


# -- links that lead out of the domain ---------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_text("SECRET=1\n")
    return folder


def test_a_link_in_the_place_of_data(store: FileStore, secret: Path) -> None:
    image, volume = add(store)
    path = store.path(image, volume)
    os.unlink(path)
    os.symlink(secret / "secret", path)
    for action in (
        lambda: store.path(image, volume),
        lambda: store.resize(image, volume, 5 * MIB, False),
        lambda: store.activate(image, [volume]),
        lambda: store.publish(image, volume, metadata(store, image)),
        lambda: store.share(image, volume, new_uuid()),
    ):
        with pytest.raises(VolumeAccessError) as caught:
            action()
        assert caught.value.code == 209
    assert (secret / "secret").read_text() == "SECRET=1\n"
    store.unmake(image, volume)
    assert (secret / "secret").exists()


def test_a_link_in_the_place_of_metadata(store: FileStore, secret: Path) -> None:
    image, volume = add(store)
    meta = Path(store.root, "images", image, volume + ".meta")
    meta.unlink()
    meta.symlink_to(secret / "secret")
    with pytest.raises(VolumeAccessError):
        store.load(image, volume)
    for name in (".meta", ".meta.new"):
        planted = Path(store.root, "images", image, volume + name)
        planted.unlink(missing_ok=True)
        planted.symlink_to(secret / "secret")
    store.save(image, volume, metadata(store, image, description="mine"))
    assert (secret / "secret").read_text() == "SECRET=1\n"
    assert store.load(image, volume).description == "mine"


def test_a_link_in_the_place_of_an_image(store: FileStore, secret: Path) -> None:
    image, volume = new_uuid(), new_uuid()
    (secret / f"{volume}.meta").write_bytes(metadata(store, image).encode(5))
    (secret / volume).write_bytes(b"x")
    os.symlink(secret, f"{store.root}/images/{image}")
    assert store.images() == []
    assert store.all_volumes() == {}
    for action in (
        lambda: store.volumes(image),
        lambda: store.load(image, volume),
        lambda: store.path(image, volume),
        lambda: store.make(NewVolume(image, new_uuid(), MIB, False, True)),
        lambda: store.unmake(image, volume),
        lambda: store.save(image, volume, metadata(store, image)),
    ):
        with pytest.raises(VolumeAccessError):
            action()
    with pytest.raises(ImagePathError):
        store.mark_removed(image)
    assert sorted(os.listdir(secret)) == sorted(["secret", volume, f"{volume}.meta"])


def test_links_in_the_place_of_the_domain_and_its_images(store: FileStore, secret: Path) -> None:
    os.rmdir(f"{store.root}/images")
    os.symlink(secret, f"{store.root}/images")
    with pytest.raises(VolumeAccessError):
        store.all_volumes()
    os.unlink(f"{store.root}/images")
    os.rmdir(store.root)
    os.symlink(secret, store.root)
    with pytest.raises(VolumeAccessError):
        store.images()


def test_a_fifo_does_not_hang_anyone(store: FileStore) -> None:
    image, volume = add(store)
    for suffix in ("", ".meta"):
        path = f"{store.root}/images/{image}/{volume}{suffix}"
        os.unlink(path)
        os.mkfifo(path)
    with pytest.raises(VolumeAccessError):
        store.load(image, volume)
    with pytest.raises(VolumeAccessError):
        store.path(image, volume)
    store.unmake(image, volume)
    assert files(store) == []


@pytest.mark.parametrize("name", ["../x", "", "A" * 36, "/etc/passwd", "x\0y"])
def test_only_uuids_become_names(store: FileStore, name: str) -> None:
    good = new_uuid()
    for action in (
        lambda: store.load(name, good),
        lambda: store.load(good, name),
        lambda: store.path(good, name),
        lambda: store.make(NewVolume(name, good, MIB, False, True)),
        lambda: store.make(NewVolume(good, name, MIB, False, True)),
        lambda: store.mark_removed(name),
        lambda: store.purge(name),
        lambda: store.volumes(name),
        lambda: store.images_of_volume(name),
        lambda: store.unmake(good, name),
    ):
        with pytest.raises(InvalidParameter):
            action()


# -- listing -----------------------------------------------------------------------------------


def test_listing_is_linear(store: FileStore) -> None:
    """Compared with itself, not with a clock: ten times the volumes, about ten times the time."""

    def grow(count: int) -> None:
        for _ in range(count):
            image, volume = new_uuid(), new_uuid()
            os.mkdir(f"{store.root}/images/{image}")
            for suffix in ("", ".meta"):
                open(f"{store.root}/images/{image}/{volume}{suffix}", "w").close()

    def best() -> float:
        times = []
        for _ in range(5):
            started = time.process_time()  # not the wall's clock: other tests run beside
            store.all_volumes()
            times.append(time.process_time() - started)
        return min(times)

    grow(200)
    few = best()
    grow(1800)
    many = best()
    assert len(store.all_volumes()) == 2000
    assert many < 40 * few
