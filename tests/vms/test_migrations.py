# SPDX-License-Identifier: GPL-2.0-or-later
"""What is known of VMs that move, how it is asked for, and a schedule for those that do not end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest

from vdsm_storage.base.secret import Secret
from vdsm_storage.errors import MigrationError, MigrationInProgress, MigrationNotInProgress
from vdsm_storage.host.libvirt_migration import LibvirtMigration, Progress, Way
from vdsm_storage.rpc import peer
from vdsm_storage.vms import migrate_request
from vdsm_storage.vms.departing import Convergence
from vdsm_storage.vms.migrate_request import Routes
from vdsm_storage.vms.migrations import KEPT, Migrations

ROUTES = Routes("qemu+tls://{host}/system", "tcp://{host}")


class Asked:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def __call__(self, name: str, verb: str, _params: Mapping[str, Any], _timeout: float) -> str:
        self.calls.append((name, verb))
        return "answer"


def test_destination_is_known_while_it_moves() -> None:
    asked = Asked()
    migrations = Migrations(asked)
    assert migrations.destination_of("vm") is None
    migrations.begin("vm", "there:1")
    destination = migrations.destination_of("vm")
    assert destination is not None
    assert destination.call("VM.refresh_disk", {}, 1.0) == "answer"
    assert asked.calls == [("there:1", "VM.refresh_disk")]
    assert migrations.leaving("vm")
    assert migrations.count() == 1
    with pytest.raises(MigrationInProgress, match="there:1"):
        migrations.begin("vm", "elsewhere")
    migrations.ended("vm", None)
    assert migrations.destination_of("vm") is None
    assert migrations.count() == 0


def test_it_is_sent_when_libvirt_is_told_to() -> None:
    """Not while it waits for its turn."""
    migrations = Migrations(Asked())
    migrations.send("vm")
    assert not migrations.sending("vm")
    migrations.begin("vm", "there")
    assert not migrations.sending("vm")
    migrations.send("vm")
    assert migrations.sending("vm")
    assert migrations.sent("vm", 40)
    assert migrations.sending("vm")
    migrations.ended("vm", MigrationError(vm="vm", reason="it stays"))
    assert not migrations.sending("vm")
    migrations.send("vm")
    assert not migrations.sending("vm")
    migrations.begin("vm", "there")
    assert not migrations.sending("vm")


def test_status() -> None:
    migrations = Migrations(Asked())
    with pytest.raises(MigrationNotInProgress):
        migrations.status("vm")
    migrations.begin("vm", "there")
    assert migrations.sent("vm", 40)
    assert not migrations.sent("vm", 40)
    assert migrations.percent("vm") == 40
    migrations.stood_still("vm", 123)
    migrations.stood_still("other", 9)
    migrations.ended("vm", None)
    found = migrations.status("vm")
    assert (found.going, found.percent, found.downtime) == (False, 100, 123)
    assert migrations.percent("vm") is None
    migrations.begin("vm", "there")
    error = MigrationError(vm="vm", reason="so")
    migrations.ended("vm", error)
    assert migrations.status("vm").error is error
    assert migrations.status("vm").downtime == 0


def test_turns() -> None:
    migrations = Migrations(Asked())
    for vm in ("one", "two", "three"):
        migrations.begin(vm, "there")
    assert [migrations.ahead(vm) for vm in ("one", "two", "three", "no")] == [0, 1, 2, 0]
    migrations.sent("two", 50)
    migrations.ended("one", None)
    migrations.begin("one", "there")  # it is asked for anew, and is the last
    assert [migrations.ahead(vm) for vm in ("one", "two", "three")] == [2, 0, 1]
    asked = migrate_request.parse("vm", {"dst": "x:1", "outgoingLimit": 2}, ROUTES)
    assert (asked.outgoing, asked.limit) == (2, 0)


def test_old_ones_are_forgotten() -> None:
    migrations = Migrations(Asked())
    migrations.begin("goes", "there")
    for number in range(KEPT + 5):
        migrations.begin(f"vm{number}", "there")
        migrations.ended(f"vm{number}", None)
    assert migrations.leaving("goes")
    with pytest.raises(MigrationNotInProgress):
        migrations.status("vm0")
    migrations.status(f"vm{KEPT + 4}")


@pytest.mark.parametrize(
    ("dst", "uri", "data", "where"),
    [
        ("host-2:54321", "qemu+tls://host-2/system", "tcp://host-2", ("host-2", 54321)),
        ("host-2", "qemu+tls://host-2/system", "tcp://host-2", ("host-2", 54321)),
        ("[fd00::2]:54322", "qemu+tls://[fd00::2]/system", "tcp://[fd00::2]", ("fd00::2", 54322)),
        ("[fd00::2]", "qemu+tls://[fd00::2]/system", "tcp://[fd00::2]", ("fd00::2", 54321)),
    ],
)
def test_where_to(dst: str, uri: str, data: str, where: tuple[str, int]) -> None:
    asked = migrate_request.parse("vm", {"dst": dst}, ROUTES)
    assert (asked.way.uri, asked.way.data) == (uri, data)
    assert peer.split(asked.peer) == where


def test_data_has_a_way_of_its_own() -> None:
    asked = migrate_request.parse(
        "vm", {"dst": "host-2:1", "dstqemu": "fd00::9", "maxBandwidth": 7, "parallel": 3}, ROUTES
    )
    assert asked.way.data == "tcp://[fd00::9]"
    params = asked.way.params("<domain/>")
    assert 7 in params.values()
    assert 3 in params.values()
    assert asked.way.flags != Way("a", "b").flags


@pytest.mark.parametrize("params", [{}, {"dst": ""}, {"dst": "x:1", "mode": "file"}])
def test_bad_requests(params: dict[str, Any]) -> None:
    with pytest.raises(MigrationError):
        migrate_request.parse("vm", params, ROUTES)


def test_secrets_are_sent_as_what_they_are() -> None:
    told = {"secrets": [{"password": Secret("value")}], "n": 1}
    assert "value" not in repr(told)
    assert peer.plain(told) == {"secrets": [{"password": "value"}], "n": 1}


class Done:
    def __init__(self) -> None:
        self.done: list[str] = []

    def allow_downtime(self, _vm: str, milliseconds: int) -> None:
        self.done.append(f"downtime {milliseconds}")

    def abort_job(self, _vm: str) -> None:
        self.done.append("abort")


def test_schedule_of_an_engine() -> None:
    schedule = {
        "init": [{"name": "setDowntime", "params": ["100"]}],
        "stalling": [
            {"limit": 1, "action": {"name": "setDowntime", "params": ["150"]}},
            {"limit": 2, "action": {"name": "postcopy", "params": []}},
            {"limit": -1, "action": {"name": "abort", "params": []}},
        ],
    }
    done = Done()
    convergence = Convergence(cast("LibvirtMigration", done), "vm", schedule)
    convergence.look(Progress(100, 90, 1))
    assert done.done == ["downtime 100"]
    for number in range(2, 6):  # each round leaves less
        convergence.look(Progress(100, 90 - 10 * number, number))
    assert done.done == ["downtime 100"]
    expected = [[], ["downtime 150"], [], ["abort"], []]
    for number, more in enumerate(expected, start=6):
        before = len(done.done)
        convergence.look(Progress(100, 95, number))
        convergence.look(Progress(100, 93, number))  # a look in the same round
        assert done.done[before:] == more, number
    quiet = Convergence(cast("LibvirtMigration", done), "vm", None)
    quiet.look(Progress(0, 0, 1))
    assert Progress(0, 0, 1).percent == 0
