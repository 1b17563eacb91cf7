# SPDX-License-Identifier: GPL-2.0-or-later
"""Storage connections: links for local directories, real mounts for POSIX file systems."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.domains.conftest import GOLDEN, World, build, wait_for
from vdsm_storage.base.owner import Owner
from vdsm_storage.base.uuids import BLANK
from vdsm_storage.domains.connection import Connection, normalise, parse
from vdsm_storage.errors import ConnectionInvalid, ConnectionTypeUnsupported
from vdsm_storage.host.mount import Mounts, check_options, check_spec, parse_mountinfo

EMPTY = {"port": "", "iqn": "", "user": "", "password": "", "ipv6_enabled": "false"}


def status(world: World, kind: str, connection: str, **more: str) -> int:
    params = {"id": BLANK, "connection": connection, **EMPTY, **more}
    answer = world.services.connections.connect(kind, [params])
    assert [one["id"] for one in answer] == [BLANK]
    return int(answer[0]["status"])


def disconnect(world: World, kind: str, connection: str, **more: str) -> int:
    params = {"id": BLANK, "connection": connection, **EMPTY, **more}
    return int(world.services.connections.disconnect(kind, [params])[0]["status"])


def mounted(path: str) -> bool:
    return Mounts(10.0).find(path) is not None


# -- names and checks ------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("file-domain/*/mountpoint.json")))
def test_golden_directories(path: Path) -> None:
    sample = json.loads(path.read_text())
    found = Connection("X", normalise(sample["remote_path"]))
    assert found.directory == os.path.basename(sample["mount_directory"])


@given(st.text(min_size=1, max_size=80), st.text(max_size=20), st.text(max_size=40))
def test_any_connection_is_refused_or_safe(spec: str, vfs_type: str, options: str) -> None:
    for kind in ("LOCALFS", "POSIXFS"):
        params = {"connection": spec, "vfs_type": vfs_type, "mnt_options": options}
        try:
            found = parse(kind, params)
        except ConnectionInvalid:
            continue
        assert "/" not in found.directory
        assert found.directory not in (".", "..", "")
        assert found.spec.isprintable() or not any(ord(c) < 32 for c in found.spec)
        assert parse(kind, {**params, "connection": found.spec}) == found


@pytest.mark.parametrize(
    "options", ["remount", "a,suid", "dev", "user=x", "x-mount.mkdir", "shared", "password=abc",
                "a b", "a\nb", "helper=evil", "-o", "secret=abc", "rbind"],
)  # fmt: skip
def test_options_that_smuggle(options: str) -> None:
    with pytest.raises(ConnectionInvalid) as error:
        check_options(options)
    assert error.value.code == 453
    assert "abc" not in error.value.message


def test_options_that_are_fine() -> None:
    text = "noatime,backup-volfile-servers=b:c,secretfile=/etc/x,uid=36,vers=4.2,name=a.b"
    assert check_options(f" {text}, ,") == text.split(",")


@pytest.mark.parametrize(
    ("spec", "vfs_type"),
    [("", "ext4"), ("-o", "ext4"), ("/a\nb", "ext4"), ("/a/../b", "ext4"), ("name", "ext4"),
     ("/a", ""), ("/a", "proc"), ("/a", "ext4,x"), ("/a", "-t"), ("/" + "x" * 2000, "ext4")],
)  # fmt: skip
def test_specs_that_are_refused(spec: str, vfs_type: str) -> None:
    with pytest.raises(ConnectionInvalid):
        check_spec(spec, vfs_type)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("/a//b/", "/a/b"), ("srv:/x/", "srv:/x"), ("[fe80::1]:/x//y", "[fe80::1]:/x/y"),
     ("a:6789,b:6789:/", "a:6789,b:6789:/"), ("user@host:", "user@host:")],
)  # fmt: skip
def test_normalised(spec: str, expected: str) -> None:
    assert normalise(spec) == expected


def test_mountinfo() -> None:
    text = (
        "36 35 98:0 /dir /mnt/a\\040b rw,nosuid shared:1 - ext4 /dev/sdb1 rw\n"
        "37 35 0:5 / /mnt rw - fuse.x /a\\134b rw\nnonsense\n"
    )
    first, second = parse_mountinfo(text)
    assert (first.target, first.root, first.source) == ("/mnt/a b", "/dir", "/dev/sdb1")
    assert (second.source, second.fstype) == ("/a\\b", "fuse.x")


@given(st.text(max_size=200))
def test_mountinfo_of_anything(text: str) -> None:
    assert len(parse_mountinfo(text)) <= len(text.splitlines())


# -- local directories -----------------------------------------------------------------------


def test_local(world: World, data: str) -> None:
    assert status(world, "LOCALFS", data) == 0
    assert status(world, "LOCALFS", data + "/") == 0
    path = world.services.connections.find(data, "LOCALFS")
    assert path is not None
    assert os.readlink(path) == data
    assert disconnect(world, "LOCALFS", data) == 0
    assert not os.path.lexists(path)
    assert disconnect(world, "LOCALFS", data) == 0


def test_local_that_is_not_there(world: World, tmp_path: Path) -> None:
    assert status(world, "LOCALFS", str(tmp_path / "no")) == 453
    (tmp_path / "file").write_text("x")
    assert status(world, "LOCALFS", str(tmp_path / "file")) == 453
    assert status(world, "LOCALFS", "relative") == 453
    assert status(world, "LOCALFS", "/") == 453


def test_names_that_collide(world: World, tmp_path: Path) -> None:
    """/a/_b and /a_/b have the same name below mnt: the second is told so."""
    one, two = tmp_path / "a" / "_b", tmp_path / "a_" / "b"
    for path in (one, two):
        path.mkdir(parents=True)
    assert status(world, "LOCALFS", str(one)) == 0
    assert status(world, "LOCALFS", str(two)) == 477


def test_one_bad_among_good(world: World, data: str) -> None:
    params = [{"id": "1", "connection": "/no"}, {"id": "2", "connection": data},
              {"id": "3", "connection": ""}]  # fmt: skip
    answer = world.services.connections.connect("LOCALFS", params)
    assert answer == [
        {"id": "1", "status": 453}, {"id": "2", "status": 0}, {"id": "3", "status": 453},
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["NFS", "GLUSTERFS", "ISCSI", "FCP", "CIFS"])
def test_types_that_are_not_built(world: World, kind: str) -> None:
    assert status(world, kind, "x:/y") == ConnectionTypeUnsupported.code


# -- mounts ----------------------------------------------------------------------------------


@pytest.mark.mount
def test_file_system_in_a_file(world: World, image: tuple[str, str]) -> None:
    spec, kind = image
    assert status(world, "POSIXFS", spec, vfs_type=kind, mnt_options="noatime") == 0
    path = world.services.connections.find(spec, "POSIXFS")
    assert path is not None
    point = Mounts(10.0).find(path)
    assert point is not None
    assert {"noatime", "nosuid", "nodev"} <= set(point.options)
    assert status(world, "POSIXFS", spec, vfs_type=kind) == 0
    assert len([p for p in Mounts(10.0).points() if p.target == path]) == 1
    world.services.connections.disconnect("POSIXFS", [{"connection": spec, "vfs_type": kind}])
    assert not mounted(path)
    assert not os.path.lexists(path)
    assert spec not in subprocess.run(["losetup", "-a"], capture_output=True, text=True).stdout


@pytest.mark.mount
def test_bind(world: World, data: str) -> None:
    path = world.bind(data)
    assert os.path.samefile(path, data)
    point = Mounts(10.0).find(path)
    assert point is not None
    assert {"nosuid", "nodev"} <= set(point.options)
    options = {"vfs_type": "none", "mnt_options": "bind"}
    assert disconnect(world, "POSIXFS", data, **options) == 0
    assert not mounted(path)


@pytest.mark.mount
def test_mount_fails(world: World, tmp_path: Path) -> None:
    (tmp_path / "empty.img").write_bytes(bytes(1024 * 1024))
    spec = str(tmp_path / "empty.img")
    assert status(world, "POSIXFS", spec, vfs_type="ext4") == 477
    assert status(world, "POSIXFS", "/no/such/device", vfs_type="ext4") == 477
    assert status(world, "POSIXFS", spec, vfs_type="nosuchfs") == 477
    assert status(world, "POSIXFS", spec) == 453
    assert world.services.connections.mounts() == {}
    assert os.listdir(world.root / "data-center" / "mnt") == []


@pytest.mark.mount
def test_a_foreign_mount_is_left_alone(world: World, data: str, tmp_path: Path) -> None:
    path = world.bind(data)
    disconnect(world, "POSIXFS", data, vfs_type="none", mnt_options="bind")
    os.mkdir(path)
    subprocess.run(["mount", "-t", "tmpfs", "other", path], check=True)
    try:
        assert status(world, "POSIXFS", data, vfs_type="none", mnt_options="bind") == 477
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.mount
def test_what_is_in_use_stays(world: World, data: str) -> None:
    path = world.bind(data)
    with open(os.path.join(path, "open"), "w"):
        connections = world.services.connections
        connections.close(timeout=0.5)
        assert mounted(path)
    connections.close(timeout=5.0)
    assert not mounted(path)


@pytest.mark.mount
def test_found_again_after_a_crash(tmp_path: Path, data: str) -> None:
    """The first agent just disappears; the second finds its mount, and the domain on it."""
    other = tmp_path / "local"
    other.mkdir()
    first = build(tmp_path / "agent", None)
    path = first.bind(data)
    first.connect(str(other))
    sd_id = first.domain(str(other))
    pool = first.pool(sd_id)
    first.health.close(5.0)
    second = build(tmp_path / "agent", None)
    try:
        assert second.services.memory.crashed
        second.services.restore()
        assert set(second.services.connections.mounts()) == set(
            first.services.connections.mounts()
        )
        assert len([p for p in Mounts(10.0).points() if p.target == path]) == 1
        wait_for(lambda: second.health.usable(sd_id))
        assert second.services.pools.get(pool).master == sd_id
    finally:
        second.close()
    assert not mounted(path)
    third = build(tmp_path / "agent", None)
    assert not third.services.memory.crashed
    third.services.restore()
    assert third.services.connections.mounts() == {}


def test_found_again_when_its_storage_comes_back(tmp_path: Path, data: str) -> None:
    """After a crash the master's server is away: what is there works, the rest when it comes."""
    other, away = tmp_path / "master", tmp_path / "away"
    other.mkdir()
    first = build(tmp_path / "agent", None)
    first.connect(str(other))
    first.connect(data)
    master, member = first.domain(str(other)), first.domain(data)
    pool = first.pool(master)
    first.services.members.attach(member, pool)
    first.services.members.activate(member, pool)
    first.health.close(5.0)
    other.rename(away)
    second = build(tmp_path / "agent", None)
    try:
        services = second.services
        assert not services.restore()
        assert services.pools.get(pool).active == sorted((master, member))
        wait_for(lambda: second.health.usable(member))
        wait_for(lambda: second.health.storage_domains()[master]["code"] == 358)
        away.rename(other)
        assert services.restore()
        wait_for(lambda: second.health.usable(master))
        assert services.restore()
    finally:
        second.close()


def test_a_master_that_is_away_at_the_start(tmp_path: Path, data: str) -> None:
    first = build(tmp_path / "agent", None)
    first.connect(data)
    sd_id = first.domain(data)
    pool = first.pool(sd_id)
    first.health.close(5.0)
    root, away = Path(data) / sd_id, Path(data) / "away"
    root.rename(away)
    second = build(tmp_path / "agent", None)
    try:
        assert second.services.restore()
        assert second.services.pools.get(pool).master == sd_id
        away.rename(root)
        wait_for(lambda: second.health.usable(sd_id))
    finally:
        second.close()


def test_what_the_engine_let_go_is_not_restored(tmp_path: Path, data: str) -> None:
    """A disconnection counts also for what could not be connected again yet."""
    first = build(tmp_path / "agent", None)
    first.connect(data)
    sd_id = first.domain(data)
    pool = first.pool(sd_id)
    first.health.close(5.0)
    away = Path(data).with_name("away")
    Path(data).rename(away)
    second = build(tmp_path / "agent", None)
    try:
        services = second.services
        assert not services.restore()
        services.pools.disconnect(pool)
        params = {"id": "a", "connection": data}
        assert services.connections.disconnect("LOCALFS", [params])[0]["status"] == 0
        away.rename(data)
        assert services.restore()
        assert services.connections.mounts() == {}
        assert services.pools.connected() is None
    finally:
        second.close()


def test_nothing_is_restored_after_a_reboot(tmp_path: Path, data: str) -> None:
    first = build(tmp_path / "agent", None)
    first.connect(data)
    state = tmp_path / "agent" / "state" / "remembered.json"
    record = json.loads(state.read_text())
    assert record["clean"] is False
    state.write_text(json.dumps({**record, "boot_id": "another"}))
    assert not build(tmp_path / "agent", None).services.memory.crashed
    state.write_text("{ torn")
    assert not build(tmp_path / "agent", None).services.memory.crashed
    first.close()


def test_who_can_use_a_directory(tmp_path: Path) -> None:
    mounts, nobody = Mounts(10.0), Owner(65534, 65534)
    parent = tmp_path / "p"
    parent.mkdir()
    for path in (tmp_path, *tmp_path.parents):
        path.chmod(0o755)
        if path.name.startswith("pytest-of"):  # what is above it belongs to everybody
            break
    parent.chmod(0o700)
    assert "no permission" in str(mounts.unusable_by(str(parent), nobody))
    parent.chmod(0o777)
    assert mounts.unusable_by(str(parent), nobody) is None
    assert mounts.unusable_by(str(tmp_path / "no"), nobody) == "it is no directory"
    assert mounts.unusable_by(str(parent), Owner(os.geteuid(), os.getegid())) is None
