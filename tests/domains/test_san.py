# SPDX-License-Identifier: GPL-2.0-or-later
"""Which sessions are made, kept and ended.  Real ones are tested in the lab (test_san.py there)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.domains.test_devices import FIRST, SECOND, network
from tests.san_tree import SanTree, golden_tree
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.locks import Locks
from vdsm_storage.base.secret import Secret
from vdsm_storage.domains import remembered, rescan
from vdsm_storage.domains import san as module
from vdsm_storage.domains.remembered import Remembered
from vdsm_storage.domains.rescan import Rescan
from vdsm_storage.domains.san import San, SanBase
from vdsm_storage.errors import (
    AgentError,
    ConnectionTypeUnsupported,
    InvalidParams,
    IscsiAuthFailed,
    MultipathSetupError,
)
from vdsm_storage.host.iscsi import Chap, Iscsi
from vdsm_storage.host.iscsi_sessions import Portal, Session
from vdsm_storage.host.multipath import Multipath

TARGET = "iqn.2020-01.org.example:t1"
PORTALS = ("127.0.0.2", "127.0.0.3")


class FakeIscsi(Iscsi):
    """Makes and ends sessions of a tree."""

    def __init__(self, real: Iscsi, tree: SanTree) -> None:
        self.sessions = real.sessions
        self.tree = tree
        self.number = 2
        self.passwords: list[str] = []
        self.forgotten: list[str] = []
        self.hangs: dict[str, threading.Event] = {}
        self.most = self.now = 0
        self.mutex = threading.Lock()

    def login(self, portal: Portal, chap: Chap) -> None:
        with self.mutex:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            if portal.address in self.hangs:
                self.hangs[portal.address].wait(20)
            if chap.password == Secret("wrong"):
                raise IscsiAuthFailed(target=portal.target, portal=portal.text)
            with self.mutex:
                self.passwords.append(chap.password.reveal())
                self.login_again(portal)
        finally:
            with self.mutex:
                self.now -= 1

    def login_again(self, portal: Portal) -> None:
        if self.sessions.find(portal) is None:
            self.number += 1
            self.tree.session(self.number, portal.address, portal.target)

    def logout(self, session: Session) -> None:
        self.tree.end_session(session.id)

    def forget(self, portal: Portal) -> None:
        self.forgotten.append(portal.address)


@dataclass
class World:
    tree: SanTree
    san: San
    iscsi: FakeIscsi
    memory: Remembered
    multipath: Multipath
    used: dict[str, list[str]] = field(default_factory=dict)
    came: list[int] = field(default_factory=list)
    idle: set[str] = field(default_factory=set)  # devices of a domain that is not in use

    def let_go(self, devices: Sequence[str]) -> None:
        self.tree.dm.opened -= {os.path.basename(path) for path in self.idle.intersection(devices)}

    def connect(self, *portals: dict[str, Any], kind: str = "ISCSI") -> list[int]:
        return [one["status"] for one in self.san.connect(kind, portals)]

    def disconnect(self, *portals: dict[str, Any]) -> list[int]:
        return [one["status"] for one in self.san.disconnect("ISCSI", portals)]

    def sessions(self) -> list[str]:
        return [one.portal.address for one in self.iscsi.sessions.all().values()]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(rescan.udev, "settle", lambda timeout: True)
    monkeypatch.setattr(module, "IN_USE_WAIT", 0.5)
    monkeypatch.setattr(module, "GONE_WAIT", 0.5)
    made = build(tmp_path, tmp_path / "state")
    yield made
    made.san._lanes.close()


def build(root: Path, state: Path, logins: int = 10) -> World:
    tree = golden_tree(root)
    clock, lower = SystemClock(), network(tree)
    iscsi, lanes = FakeIscsi(lower.iscsi, tree), Lanes(SystemClock())
    memory = Remembered(str(state), "boot")
    lower = replace(lower, iscsi=iscsi)
    san = San(
        SanBase(lower, Rescan(lower, lanes, clock), lanes, Locks(clock), memory, clock, logins)
    )
    world = World(tree, san, iscsi, memory, lower.multipath)
    san.watch(lambda: world.used, world.let_go, lambda: world.came.append(1))
    return world


def portal(address: str, **more: Any) -> dict[str, Any]:
    return {"id": f"id of {address}", "connection": address, "iqn": TARGET, "port": "3260", **more}


# -- connecting ----------------------------------------------------------------------------------


def test_each_has_a_status_of_its_own(world: World) -> None:
    asked = [
        portal("192.0.2.1"),
        portal("192.0.2.2", user="bob", password=Secret("wrong")),
        portal("not an address"),
        portal("192.0.2.1"),
    ]
    found = world.san.connect("ISCSI", asked)
    assert [one["id"] for one in found] == [one["id"] for one in asked]
    assert [one["status"] for one in found] == [0, 476, 453, 0]
    assert world.sessions() == [*PORTALS, "192.0.2.1"]
    assert world.came == [1]
    assert world.tree.read("/sys/class/scsi_host/host2/scan") == "- - -"


def test_what_is_remembered_has_no_password(world: World, tmp_path: Path) -> None:
    world.connect(portal("192.0.2.1", user="bob", password=Secret("good secret")))
    assert world.iscsi.passwords == ["good secret"]
    text = (tmp_path / "state/remembered.json").read_text()
    assert "192.0.2.1" in text
    assert "good secret" not in text
    assert "bob" not in text


def test_logins_run_side_by_side_but_not_too_many(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(rescan.udev, "settle", lambda timeout: True)
    world = build(tmp_path, tmp_path / "state", logins=3)
    addresses = [f"192.0.2.{n}" for n in range(1, 9)]
    release = threading.Event()
    world.iscsi.hangs = dict.fromkeys(addresses, release)
    threading.Timer(0.5, release.set).start()
    assert world.connect(*map(portal, addresses)) == [0] * 8
    assert world.iscsi.most == 3
    world.san._lanes.close()


def test_fibre_channel(world: World) -> None:
    world.tree.write("/sys/class/fc_host/host7/port_name", "0x1")
    world.tree.write("/sys/class/scsi_host/host7/scan", "")
    nothing = {"id": "x", "connection": "", "port": "", "iqn": ""}
    assert world.san.connect("FCP", [nothing]) == [{"id": "x", "status": 0}]
    assert world.tree.read("/sys/class/scsi_host/host7/scan") == "- - -"
    assert world.san.disconnect("FCP", [nothing]) == [{"id": "x", "status": 0}]


def test_nothing_asked(world: World) -> None:
    with pytest.raises(InvalidParams):
        world.san.connect("ISCSI", [])
    with pytest.raises(ConnectionTypeUnsupported):
        world.san.connect("NFS", [portal("192.0.2.1")])


def test_nobody_makes_maps(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_running(_: object) -> bool:
        raise MultipathSetupError(reason="it does not run")

    monkeypatch.setattr(Multipath, "is_idle", not_running)
    assert world.connect(portal(PORTALS[0])) == [0]  # all disks have their maps already
    place = world.tree.session(9, "192.0.2.9")
    world.tree.disk("sde", "8:64", f"{place}/8:0:0:0")
    assert world.connect(portal("192.0.2.9")) == [467]


def test_disks_that_multipath_does_not_want_are_waited_for_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Multipath, "is_idle", lambda _: True)
    monkeypatch.setattr(rescan, "QUIET", 0.4)
    place = world.tree.session(9, "192.0.2.9")
    world.tree.disk("sde", "8:64", f"{place}/8:0:0:0")
    for longest in (5.0, 0.3):
        started = time.monotonic()
        assert world.connect(portal("192.0.2.9")) == [0]
        assert time.monotonic() - started < longest


def test_host_that_hangs_in_a_scan_holds_up_nobody_for_long(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    real = world.san._scsi.scan
    monkeypatch.setattr(rescan, "SCAN", 0.3)
    monkeypatch.setattr(
        world.san._scsi, "scan", lambda host: release.wait(20) if host == 0 else real(host)
    )
    for _ in range(3):
        started = time.monotonic()
        assert world.connect(portal(PORTALS[0]), portal(PORTALS[1])) == [0, 0]
        assert time.monotonic() - started < 2
        assert world.tree.read("/sys/class/scsi_host/host1/scan") == "- - -"
    release.set()


# -- disconnecting -------------------------------------------------------------------------------


def test_sessions_end_with_their_maps(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(Multipath, "flush", lambda _, name: flushed.append(name) or True)
    assert world.disconnect(*map(portal, PORTALS), portal("192.0.2.7")) == [0, 0, 0]
    assert world.sessions() == []
    assert sorted(flushed) == [FIRST, SECOND]  # multipathd, which is not here, left them
    assert sorted(world.iscsi.forgotten) == [*PORTALS, "192.0.2.7"]


@pytest.mark.parametrize("device", [FIRST, SECOND])
def test_last_path_of_a_domain_in_use_stays(world: World, device: str) -> None:
    world.used = {"sd1": [f"/dev/mapper/{device}"]}
    assert world.disconnect(portal(PORTALS[0])) == [0]
    assert world.disconnect(portal(PORTALS[1])) == [452]
    assert world.sessions() == [PORTALS[1]]
    world.used = {}
    assert world.disconnect(portal(PORTALS[1])) == [0]


def test_one_of_two_goes_when_both_are_asked_for(world: World) -> None:
    world.used = {"sd1": [f"/dev/mapper/{FIRST}"]}
    assert world.disconnect(*map(portal, PORTALS)) == [0, 452]
    assert world.sessions() == [PORTALS[1]]


def test_a_path_that_has_failed_is_no_other_path(world: World) -> None:
    world.used = {"sd1": [f"/dev/mapper/{FIRST}"]}
    world.tree.states(FIRST, {"8:48": False, "8:32": True})
    assert world.disconnect(portal(PORTALS[0])) == [452]
    assert world.disconnect(portal(PORTALS[1])) == [0]


def test_domain_may_let_go_a_moment_later(world: World) -> None:
    world.used = {"sd1": [f"/dev/mapper/{FIRST}"]}
    threading.Timer(0.2, world.used.clear).start()
    assert world.disconnect(*map(portal, PORTALS)) == [0, 0]


def test_what_a_program_has_open_stays(world: World) -> None:
    world.tree.dm.opened.add(SECOND)
    assert world.disconnect(*map(portal, PORTALS)) == [0, 452]


def test_domain_that_is_not_in_use_lets_go(world: World) -> None:
    world.tree.dm.opened |= {FIRST, SECOND}
    world.idle = {f"/dev/mapper/{FIRST}", f"/dev/mapper/{SECOND}"}
    assert world.disconnect(*map(portal, PORTALS)) == [0, 0]


def test_forgotten_after_disconnect(world: World) -> None:
    world.connect(portal("192.0.2.1"))
    assert world.memory.all(remembered.SESSIONS)
    world.disconnect(portal("192.0.2.1"))
    assert world.memory.all(remembered.SESSIONS) == {}


# -- after a crash -------------------------------------------------------------------------------


def test_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescan.udev, "settle", lambda timeout: True)
    first = build(tmp_path / "a", tmp_path / "state")
    first.connect(portal("192.0.2.1"), portal(PORTALS[0]))
    second = build(tmp_path / "b", tmp_path / "state")
    assert second.memory.crashed
    assert second.san.restore()
    assert second.sessions() == [*PORTALS, "192.0.2.1"]
    assert second.iscsi.passwords == []  # open-iscsi has them
    for world in (first, second):
        world.san._lanes.close()


def test_restored_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescan.udev, "settle", lambda timeout: True)
    first = build(tmp_path / "a", tmp_path / "state")
    first.connect(portal("192.0.2.1"))
    second = build(tmp_path / "b", tmp_path / "state")

    def refuse(portal: Portal) -> None:
        raise AgentError(reason="not now")

    with monkeypatch.context() as context:
        context.setattr(second.iscsi, "login_again", refuse)
        assert not second.san.restore()
    assert second.san.restore()
    for world in (first, second):
        world.san._lanes.close()
