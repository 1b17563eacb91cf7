# SPDX-License-Identifier: GPL-2.0-or-later
"""New file domains against the listings, metadata and replies of other hosts."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.domains.conftest import GOLDEN, World
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.owner import Owner
from vdsm_storage.base.units import MIB
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.domains import layout, masters
from vdsm_storage.domains import metadata as md
from vdsm_storage.domains.connection import normalise
from vdsm_storage.domains.domain import SUPPORTED_VERSIONS
from vdsm_storage.domains.file import read_metadata
from vdsm_storage.domains.layout import NewDomain
from vdsm_storage.domains.leasing import DomainLeasing
from vdsm_storage.domains.lifecycle import BUILT_TYPES
from vdsm_storage.domains.posix import FILE_TYPES
from vdsm_storage.errors import (
    AgentError,
    InvalidName,
    NoSpaceForDomain,
    StorageDomainAccessError,
    StorageDomainAlreadyExists,
    StorageDomainBlockSizeMismatch,
    StorageDomainClassError,
    StorageDomainDescriptionTooLong,
    StorageDomainDoesNotExist,
    StorageDomainLayoutError,
    StorageDomainNotEmpty,
    StorageDomainNotMounted,
    StorageDomainPermission,
    StorageDomainTypeError,
    UnsupportedDomainVersion,
)
from vdsm_storage.host import facts
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.leases.lease import Leases
from vdsm_storage.leases.lockspace import Lockspaces
from vdsm_storage.leases.model import Geometry

INPUTS = json.loads((GOLDEN / "file-domain-inputs.json").read_text())
OWNER = Owner(os.geteuid(), os.getegid())


def golden(name: str, file: str) -> Any:
    text = (GOLDEN / "file-domain" / name / file).read_bytes()
    return json.loads(text) if file.endswith(".json") else text


def listing(root: Path) -> list[dict[str, Any]]:
    """What is in a domain's directory, in the form of the samples."""
    found = []
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        entry: dict[str, Any] = {
            "path": str(path.relative_to(root)),
            "type": "dir" if path.is_dir() else "file",
            "mode": f"{status.st_mode & 0o7777:04o}",
        }
        if path.is_file():
            entry |= {"size": status.st_size, "links": status.st_nlink}
        found.append(entry)
    return found


def without_allocation(sample: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Allocated sizes depend on the file system."""
    return sorted(
        ({k: v for k, v in entry.items() if k != "allocated"} for entry in sample),
        key=lambda entry: entry["path"],
    )


def make(root: Path, name: str, leasing: DomainLeasing | None) -> NewDomain:
    given = INPUTS[f"file-domain/{name}/2-pool-created.metadata"]
    geometry = Geometry(
        given["block_size"], layout.alignment(given["block_size"], given["max_hosts"])
    )
    new = NewDomain(
        given["sd_uuid"],
        FILE_TYPES[given["type"]],
        given["name"],
        given["version"],
        normalise(given["remote_path"]),
        geometry,
    )
    layout.make_directories(str(root), OWNER)
    layout.make_special_files(str(root), new, OWNER, leasing)
    layout.write_metadata(str(root), new, OWNER)
    return new


@pytest.fixture
def leasing(sanlock: Sanlock) -> DomainLeasing:
    clock = SystemClock()
    return DomainLeasing(Lockspaces(sanlock, clock), Leases(sanlock, clock), clock)


@pytest.mark.parametrize("name", ["local-v4", "local-v5", "local-a1M-v5-4k", "local-a8M-v5-4k"])
def test_local_is_golden(tmp_path: Path, name: str) -> None:
    old = os.umask(0o077)  # the modes do not depend on it
    try:
        make(tmp_path / "dom", name, None)
    finally:
        os.umask(old)
    check_created(tmp_path / "dom", name)


@pytest.mark.sanlock
@pytest.mark.parametrize("name", ["posix-v5", "nfs-v3", "nfs-v4"])
def test_shared_is_golden(tmp_path: Path, name: str, leasing: DomainLeasing) -> None:
    new = make(tmp_path / "dom", name, leasing)
    check_created(tmp_path / "dom", name)
    dom_md = tmp_path / "dom" / "dom_md"
    ids = (dom_md / "ids").read_bytes()
    assert ids[:4].hex() == "10202112"
    lease = (dom_md / "leases").read_bytes()[MIB : MIB + 1024]
    assert new.id.encode() in lease[:512]
    assert b"SDM" in lease[:512]


def test_shared_leases_are_golden(tmp_path: Path, leasing: DomainLeasing) -> None:
    """Byte for byte, but for what holds the I/O time-out and checksums over it."""
    make(tmp_path / "dom", "posix-v5", leasing)
    lease = (tmp_path / "dom" / "dom_md" / "leases").read_bytes()[MIB : MIB + 152]
    assert lease == golden("posix-v5", "1-leases@1048576.bin")[:152]
    ids = (tmp_path / "dom" / "dom_md" / "ids").read_bytes()[:152]
    assert ids == golden("posix-v5", "1-ids@0.bin")[:152]


def check_created(root: Path, name: str) -> None:
    assert listing(root) == without_allocation(golden(name, "1-created.listing.json"))
    text = (root / "dom_md" / "metadata").read_bytes()
    assert text == golden(name, "1-unattached.metadata")
    given = INPUTS[f"file-domain/{name}/2-pool-created.metadata"]
    params = {
        "id": given["pool"],
        "name": given["pool_name"],
        "master": given["sd_uuid"],
        "master_version": given["master_version"],
        "domains": [given["sd_uuid"]],
        "lease": [0, 0, 0, 0],
    }
    attached = md.DomainMetadata(md.decode(text)).with_changes(masters.master_metadata(params))
    assert md.encode(attached.values) == golden(name, "2-pool-created.metadata")


def test_lease_numbers_of_the_caller_leave_the_policy_alone() -> None:
    params = {"id": "p", "name": "n", "master": "d", "master_version": 3, "domains": ["d"]}
    changes = masters.master_metadata({**params, "lease": [7, 60, 10, 3]})
    assert "LOCKPOLICY" not in changes
    assert changes["LOCKRENEWALINTERVALSEC"] == "7"


# -- through the service ---------------------------------------------------------------------


def test_info_and_stats(world: World, data: str) -> None:
    mount = world.connect(data + "/")  # a slash at the end is not part of the path
    sd_id = world.domain(data, name="Döm local 5")
    domain = world.services.registry.get(sd_id)
    expected = golden("local-v5", "1-sd-info.json") | {"uuid": sd_id, "remotePath": data}
    assert domain.info() == expected
    assert list(domain.info()) == list(expected)
    stats = domain.stats()
    sample = golden("local-v5", "1-sd-stats.json")
    assert {k: type(v) for k, v in stats.items()} == {k: type(v) for k, v in sample.items()}
    assert stats["disktotal"].isdigit()
    assert os.listdir(mount) == [sd_id]


@pytest.mark.parametrize("version", [3, 4, 5])
def test_versions(world: World, data: str, version: int) -> None:
    world.connect(data)
    sd_id = world.domain(data, version=version)
    found = world.services.registry.get(sd_id)
    assert (found.version, found.store.version) == (version, version)
    assert ("BLOCK_SIZE" in found.metadata().values) == (version == 5)
    assert found.info()["block_size"] == 512


def test_exists_not_empty_not_connected(world: World, data: str, tmp_path: Path) -> None:
    with pytest.raises(StorageDomainNotMounted) as error:
        world.domain(data)
    assert error.value.code == 360
    world.connect(data)
    sd_id = world.domain(data)
    with pytest.raises(StorageDomainAlreadyExists) as exists:
        world.domain(data, id=sd_id)
    assert exists.value.code == 365
    with pytest.raises(StorageDomainNotEmpty) as full:
        world.domain(data)
    assert full.value.code == 361
    assert sd_id in full.value.message


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"kind": "NFS"}, StorageDomainTypeError),
        ({"klass": "Iso"}, StorageDomainClassError),
        ({"version": 2}, UnsupportedDomainVersion),
        ({"name": "x" * 51}, StorageDomainDescriptionTooLong),
        ({"name": "a\nVERSION=3"}, InvalidName),
        ({"block_size": 1024}, StorageDomainBlockSizeMismatch),
        ({"block_size": 4096, "version": 4}, StorageDomainBlockSizeMismatch),
    ],
)
def test_refused(world: World, data: str, more: dict[str, Any], error: type[AgentError]) -> None:
    world.connect(data)
    with pytest.raises(error):
        world.domain(data, **more)
    assert os.listdir(data) == []


def test_name_of_fifty_wide_characters(world: World, data: str) -> None:
    world.connect(data)
    sd_id = world.domain(data, name="漢" * 50)
    assert world.services.registry.get(sd_id).info()["name"] == "漢" * 50


def test_full_is_not_forbidden(world: World, tmp_path: Path) -> None:
    """A full file system answers "no space", a read-only one "no permission"."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], check=True)
    try:
        world.connect(str(mount))
        (mount / "filler").write_bytes(bytes(64 * 1024))
        with pytest.raises(NoSpaceForDomain) as error:
            world.domain(str(mount))
        assert error.value.code == 397
        assert os.listdir(mount) == ["filler"]
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        with pytest.raises(StorageDomainPermission) as forbidden:
            world.domain(str(mount))
        assert forbidden.value.code == 385
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.fixture
def four_k(tmp_path: Path) -> Iterator[Path]:
    """A directory on storage with sectors of 4096 bytes."""
    image, mount = tmp_path / "4k.img", tmp_path / "4k"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(512 * MIB)
    out = subprocess.run(
        ["losetup", "--find", "--show", "--sector-size", "4096", str(image)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    device = out.stdout.strip()
    try:
        subprocess.run(["mkfs.xfs", "-q", "-s", "size=4096", device], check=True)
        subprocess.run(["mount", device, str(mount)], check=True)
        yield mount
        subprocess.run(["umount", str(mount)], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_sectors_of_4096(world: World, four_k: Path) -> None:
    world.connect(str(four_k))
    with pytest.raises(StorageDomainBlockSizeMismatch) as error:
        world.domain(str(four_k), block_size=512)
    assert error.value.code == 348
    sd_id = world.domain(str(four_k), block_size=0, max_hosts=2000)
    info = world.services.registry.get(sd_id).info()
    assert (info["block_size"], info["alignment"]) == (4096, 8 * MIB)


def test_alignments() -> None:
    assert [layout.alignment(4096, n) // MIB for n in (1, 250, 251, 500, 1000, 1001, 2000)] == [
        1, 1, 2, 2, 4, 8, 8,
    ]  # fmt: skip
    assert layout.alignment(512, 2000) == MIB


# -- reading what others made ----------------------------------------------------------------


def test_a_link_is_no_domain(world: World, data: str, tmp_path: Path) -> None:
    world.connect(data)
    elsewhere = tmp_path / "elsewhere"
    make(elsewhere, "local-v5", None)
    sd_id = golden("local-v5", "1-sd-info.json")["uuid"]
    os.symlink(elsewhere, os.path.join(data, sd_id))
    with pytest.raises(StorageDomainLayoutError):
        world.services.registry.get(sd_id)
    with pytest.raises(StorageDomainDoesNotExist):
        read_metadata(os.path.join(data, new_uuid()), "x")


def test_a_renamed_directory_is_no_domain(world: World, data: str) -> None:
    world.connect(data)
    other = new_uuid()
    make(Path(data) / other, "local-v5", None)
    with pytest.raises(StorageDomainLayoutError):
        world.services.registry.get(other)


@pytest.mark.parametrize("name", ["../x", "", "A" * 36, "/etc"])
def test_names_that_are_no_uuids(world: World, data: str, name: str) -> None:
    world.connect(data)
    with pytest.raises(StorageDomainDoesNotExist):
        world.services.registry.get(name)


def test_file_stats(world: World, data: str) -> None:
    world.connect(data)
    domain = world.services.registry.get(world.domain(data))
    assert domain.file_stats("*", False) == {}
    iso = Path(domain.path) / "images" / "11111111-1111-1111-1111-111111111111"
    iso.mkdir()
    (iso / "Boot.ISO").write_bytes(b"x" * 5)
    (iso / "other.img").write_bytes(b"")
    os.symlink("/etc/passwd", iso / "link.iso")
    found = domain.file_stats("*.iso", False)
    assert list(found) == ["Boot.ISO"]
    assert (found["Boot.ISO"]["size"], found["Boot.ISO"]["status"]) == (5, 0)
    assert domain.file_stats("*.iso", True) == {}


def test_validate(world: World, data: str) -> None:
    """A domain that cannot be written to, or has lost its images, is not fit for use."""
    world.connect(data)
    domain = world.services.registry.get(world.domain(data))
    domain.self_test()
    images = Path(domain.path) / "images"
    images.rename(images.with_name("away"))
    with pytest.raises(StorageDomainDoesNotExist):
        domain.self_test()
    images.with_name("away").rename(images)
    subprocess.run(["mount", "--bind", data, data], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", data], check=True)
        with pytest.raises(StorageDomainAccessError) as error:
            domain.self_test()
        assert error.value.code == 379
        assert "read-only" in error.value.message
    finally:
        subprocess.run(["umount", data], check=True)
    domain.self_test()


def test_what_the_host_says_it_can(world: World, data: str) -> None:
    """Capabilities name the versions and sectors that domains really may have."""
    assert facts.DOMAIN_VERSIONS == SUPPORTED_VERSIONS
    for name in BUILT_TYPES:
        sizes = tuple(size for size in facts.BLOCK_SIZES[name] if size)
        assert sizes == FILE_TYPES[name].block_sizes


def test_format(world: World, data: str) -> None:
    world.connect(data)
    sd_id = world.domain(data)
    world.services.lifecycle.format(sd_id, False, None)
    assert os.listdir(data) == []
    with pytest.raises(StorageDomainDoesNotExist):
        world.services.lifecycle.format(sd_id, False, None)
