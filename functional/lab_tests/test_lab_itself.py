# SPDX-License-Identifier: GPL-2.0-or-later
"""What the other tests here rely on is really there."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from functional.lab.inner.dm import Layer, Loops
from functional.lab.inner.io import BLOCK, read, write
from functional.lab.inner.lio import Target, cut
from functional.lab.inner.tool import run, succeeds, wait_for
from functional.processes import AgentProcess
from vdsm_storage.rpc.client import Client

pytestmark = pytest.mark.dm

MIB = 1024**2
GIB = 1024**3
ONES = b"\1" * BLOCK
TWOS = b"\2" * BLOCK


# -- device-mapper


@pytest.fixture
def device(loops: Loops, layer: Callable[[str], Layer]) -> Layer:
    return layer(loops.make(64 * MIB))


def test_linear_is_the_device_below(device: Layer) -> None:
    write(device.path, ONES, MIB)
    assert read(device.device, MIB) == ONES
    assert run("blockdev", "--getsize64", device.path).strip() == str(64 * MIB)


def test_slow_device_takes_its_time(device: Layer) -> None:
    device.slow(read_ms=700, write_ms=0)
    write(device.path, ONES)
    started = time.monotonic()
    assert read(device.path) == ONES
    assert time.monotonic() - started >= 0.7


def test_failing_device_gives_errors_until_it_is_healed(device: Layer) -> None:
    write(device.path, ONES)
    device.fail()
    with pytest.raises(OSError, match="Input/output error"):
        read(device.path)
    device.heal()
    assert read(device.path) == ONES


def test_failing_range_leaves_the_rest_alone(device: Layer) -> None:
    device.fail_range(MIB, MIB)
    assert read(device.path, 0) == bytes(BLOCK)
    assert read(device.path, 2 * MIB) == bytes(BLOCK)
    with pytest.raises(OSError, match="Input/output error"):
        read(device.path, 2 * MIB - BLOCK)


def test_failing_writes_leave_reads_alone(device: Layer) -> None:
    device.fail_writes()
    with pytest.raises(OSError, match="Input/output error"):
        write(device.path, ONES)
    assert read(device.path) == bytes(BLOCK)


def test_lost_writes_are_answered_as_done(device: Layer) -> None:
    write(device.path, ONES)
    device.lose_writes()
    write(device.path, TWOS)
    device.heal()
    assert read(device.path) == ONES


def test_hanging_device_answers_when_it_is_healed(device: Layer) -> None:
    answers: list[bytes] = []
    device.hang()
    reader = threading.Thread(target=lambda: answers.append(read(device.path)))
    reader.start()
    reader.join(1)
    assert answers == []
    device.heal()
    reader.join(30)
    assert answers == [bytes(BLOCK)]


def test_device_of_large_sectors(loops: Loops, layer: Callable[[str], Layer]) -> None:
    large = layer(loops.make(64 * MIB, sector=4096))
    assert run("blockdev", "--getss", large.path).strip() == "4096"


# -- LVM


def test_lvm_with_extents_of_128_mib(loops: Loops) -> None:
    first, second = loops.make(20 * GIB), loops.make(10 * GIB)
    name = f"lab-{os.getpid()}"
    metadata = ("--metadatasize", "128m", "--metadatacopies", "2", "--dataalignment", "128m")
    run("pvcreate", *metadata, first, second)
    run("vgcreate", "--physicalextentsize", "128m", name, first)
    try:
        run("lvcreate", "-ay", "--wipesignatures", "y", "--yes", "-L", "1g", "-n", "one", name)
        path = f"/dev/{name}/one"
        assert run("blockdev", "--getsize64", path).strip() == str(GIB)
        run("vgextend", name, second)
        # As another host does it: the mapping here does not change until it is told.
        run("lvextend", "--driverloaded", "n", "-L", "2g", f"{name}/one")
        assert run("blockdev", "--getsize64", path).strip() == str(GIB)
        run("lvchange", "--refresh", f"{name}/one")
        assert run("blockdev", "--getsize64", path).strip() == str(2 * GIB)
        write(path, ONES, 2 * GIB - BLOCK)
        run("lvchange", "-an", f"{name}/one")
        assert not os.path.exists(path)
    finally:
        run("vgremove", "--force", name)


# -- iSCSI and multipath

PORTALS = ("127.0.0.2", "127.0.0.3")


@contextlib.contextmanager
def logged_in(target: Target, portals: tuple[str, ...]) -> Iterator[None]:
    for portal in portals:
        run("iscsiadm", "-m", "discovery", "-t", "st", "-p", portal)
    run("iscsiadm", "-m", "node", "-T", target.iqn, "--login")
    try:
        yield
    finally:
        run("iscsiadm", "-m", "node", "-T", target.iqn, "--logout")
        run("iscsiadm", "-m", "node", "-T", target.iqn, "--op", "delete")


def paths(wwid: str) -> list[str]:
    """The states of a map's paths, as multipathd sees them."""
    return run("multipathd", "show", "paths", "raw", "format", "%w %t").split(f"{wwid} ")[1:]


@pytest.mark.iscsi
@pytest.mark.multipath
def test_iscsi_over_two_portals_is_one_map(
    loops: Loops, target: Callable[..., Target], multipathd: None
) -> None:
    disk = loops.make(4 * GIB)
    array = target(portals=PORTALS)
    lun = array.add_lun(disk)
    path = f"/dev/mapper/{lun.wwid}"
    with logged_in(array, PORTALS):
        wait_for("the map", lambda: os.path.exists(path))
        wait_for("two paths", lambda: [p.split()[0] for p in paths(lun.wwid)] == ["active"] * 2)
        write(path, ONES, MIB)
        assert read(disk, MIB) == ONES
        # One portal goes away: the map lives on with the other.
        array.portal_down(PORTALS[1])
        wait_for("a path less", lambda: "failed" in " ".join(paths(lun.wwid)))
        write(path, TWOS, MIB)
        array.portal_up(PORTALS[1])
        wait_for("it is back", lambda: "failed" not in " ".join(paths(lun.wwid)))
        with cut(PORTALS[1]):
            wait_for("a path less", lambda: "failed" in " ".join(paths(lun.wwid)))
        wait_for("it is back", lambda: "failed" not in " ".join(paths(lun.wwid)))
        # The LUN grows.
        loops.grow(disk, 6 * GIB)
        run("iscsiadm", "-m", "session", "-R")
        run("multipathd", "resize", "map", lun.wwid)
        assert run("blockdev", "--getsize64", path).strip() == str(6 * GIB)
        run("multipath", "-f", lun.wwid)


@pytest.mark.iscsi
def test_chap_lets_in_who_knows_the_password(
    loops: Loops, target: Callable[..., Target], iscsid: None
) -> None:
    array = target(chap=("someone", "a-good-secret"))
    array.add_lun(loops.make(GIB))
    node = ("iscsiadm", "-m", "node", "-T", array.iqn)
    run("iscsiadm", "-m", "discovery", "-t", "st", "-p", "127.0.0.2")
    assert not succeeds(*node, "--login")
    for name, value in (("authmethod", "CHAP"), ("username", "someone"), ("password", "wrong")):
        run(*node, "--op", "update", "-n", f"node.session.auth.{name}", "-v", value)
    assert not succeeds(*node, "--login")
    run(*node, "--op", "update", "-n", "node.session.auth.password", "-v", "a-good-secret")
    run(*node, "--login")
    run(*node, "--logout")
    run(*node, "--op", "delete")


# -- the agent


def test_agent_answers(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path / "agent", tls=True, settings={})
    agent.start()
    try:
        with Client.dev(str(agent.dir), timeout=60) as client:
            client.call("Host.ping2", {})
    finally:
        assert agent.stop() == ""
