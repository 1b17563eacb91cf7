# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains of format 3 and 4 are opened read-write, and upgraded to format 5."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.domains.conftest import World, wait_for
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.domains.domain import Domain
from vdsm_storage.errors import UnsupportedDomainVersion, VersionTooAdvanced
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.store import NewVolume
from vdsm_storage.jobs import journal


def volume(domain: Domain, shared_into: str | None = None) -> tuple[str, str]:
    image, name = new_uuid(), new_uuid()
    metadata = VolumeMetadata(
        domain.id, image, 1024 * 1024, "RAW", "SPARSE", "LEAF", "DATA",
        description="with = and ü", ctime=1700000000, generation=7,
    )  # fmt: skip
    domain.store.make(NewVolume(image, name, 4096, preallocated=False, raw=True))
    domain.store.publish(image, name, metadata)
    if shared_into:
        domain.store.share(image, name, shared_into)
    return image, name


def upgraded(world: World, pool: str, version: int = 5) -> None:
    world.services.upgrades.start(pool, version)
    jobs = world.runner.all(journal.JOB)
    assert jobs
    for job in jobs:
        assert job.done.wait(60)
        assert job.entry.outcome == "success", job.entry.error


@pytest.mark.parametrize("version", [3, 4])
def test_local(world: World, data: str, version: int) -> None:
    world.connect(data)
    sd_id = world.domain(data, version=version)
    pool = world.pool(sd_id)
    domain = world.services.registry.get(sd_id)
    shared_into = new_uuid()
    image, name = volume(domain, shared_into)
    before = domain.store.load(image, name)
    meta = Path(domain.path) / "images" / image / f"{name}.meta"
    assert "SIZE=2048" in meta.read_text()
    upgraded(world, pool)
    text = meta.read_text()
    assert "CAP=1048576" in text
    assert "SEQ=0" in text
    assert "GEN=7" in text
    assert "SIZE=" not in text
    assert "MTIME" not in text
    assert domain.store.load(image, name) == before
    assert (meta.parent.parent / shared_into / meta.name).stat().st_ino == meta.stat().st_ino
    found = domain.metadata()
    assert (found.version, domain.version, domain.store.version) == (5, 5, 5)
    assert found.values["ALIGNMENT"] == "1048576"
    assert not (Path(domain.path) / "dom_md" / "xleases").exists()
    wait_for(lambda: world.health.storage_domains()[sd_id]["version"] == 5)
    world.services.upgrades.start(pool, 5)  # nothing left to do
    assert len(world.runner.all(journal.JOB)) == 1


def test_refused(world: World, data: str) -> None:
    world.connect(data)
    pool = world.pool(world.domain(data))
    with pytest.raises(VersionTooAdvanced) as error:
        world.services.upgrades.start(pool, 4)
    assert error.value.code == 395
    with pytest.raises(UnsupportedDomainVersion):
        world.services.upgrades.start(pool, 6)


def test_the_manager_upgrades(world: World, data: str) -> None:
    """spmStart names the version that the engine expects."""
    world.connect(data)
    sd_id = world.domain(data, version=4)
    pool = world.pool(sd_id)
    assert world.task(world.services.spm.start(pool, 5)).outcome == "success"
    wait_for(lambda: world.services.registry.get(sd_id).version == 5)


@pytest.mark.slow
@pytest.mark.sanlock
def test_posix_gets_its_external_leases(shared_world: World, data: str) -> None:
    world = shared_world
    world.bind(data)
    sd_id = world.domain(data, "POSIXFS", version=3)
    domain = world.services.registry.get(sd_id)
    xleases = Path(domain.path) / "dom_md" / "xleases"
    assert not xleases.exists()
    assert domain.xleases_path is None
    pool = world.pool(sd_id)
    wait_for(lambda: world.health.usable(sd_id))
    upgraded(world, pool)
    assert xleases.stat().st_size == 1024 * 1024 + 253952
    assert xleases.stat().st_mode & 0o7777 == 0o660
    assert domain.xleases_path == str(xleases)
    assert world.services.dump(sd_id, True)["xleases"] == {}


def test_an_old_domain_joins_a_new_pool(world: World, data: str, tmp_path: Path) -> None:
    """Activated in a pool of version 5, it is upgraded in the background."""
    (tmp_path / "old").mkdir()
    world.connect(data)
    world.connect(str(tmp_path / "old"))
    pool, old = world.pool(world.domain(data)), world.domain(str(tmp_path / "old"), version=4)
    world.services.members.attach(old, pool)
    world.services.members.activate(old, pool)
    wait_for(lambda: world.services.registry.get(old).version == 5)
    assert world.services.registry.get(old).metadata().version == 5  # on the storage, too
