# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import contextlib
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.units import MIB
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.errors import (
    AcquireLockFailure,
    HostIdConflict,
    LeaseHeldElsewhere,
    ReleaseHostIdFailure,
    ReleaseLockFailure,
    SanlockInquireError,
    SanlockLVBError,
)
from vdsm_storage.host.bounded import BoundedCall
from vdsm_storage.leases.leader import MAGIC, parse_leader
from vdsm_storage.leases.lockspace import Lockspace, Lockspaces
from vdsm_storage.leases.model import Geometry, LeaseSpec, LeaseState
from vdsm_storage.leases.slots import Slots

pytestmark = pytest.mark.sanlock


def test_a_new_lease_is_free(joined: Any) -> None:
    assert joined.leases.state(joined.new_lease()) == LeaseState(owners=(), version=None)


def test_a_held_lease_names_its_owner(joined: Any) -> None:
    spec = joined.new_lease()
    with joined.leases.held(spec, 5):
        assert joined.leases.state(spec) == LeaseState((7,), 1, last_owner=7, last_version=1)
        assert spec.resource in joined.sanlock.held(spec.lockspace)
    assert joined.leases.state(spec) == LeaseState((), None, last_owner=7, last_version=1)
    assert spec.resource not in joined.sanlock.held(spec.lockspace)


def test_a_lease_held_by_this_process_is_refused_after_the_wait(joined: Any) -> None:
    spec = joined.new_lease()
    with joined.leases.held(spec, 5), pytest.raises(LeaseHeldElsewhere) as error:
        joined.leases.acquire(spec, 0.05)
    assert error.value.code == 651
    assert spec.resource in error.value.message


def test_a_lease_is_waited_for(joined: Any) -> None:
    spec = joined.new_lease()
    joined.leases.acquire(spec, 5)
    timer = threading.Timer(0.2, joined.leases.release, (spec,))
    timer.start()
    with joined.leases.held(spec, 20):
        timer.join()
        assert joined.leases.state(spec).owners == (7,)


def test_data_travels_with_the_lease(joined: Any) -> None:
    spec = joined.new_lease()
    with joined.leases.held(spec, 5, lvb=True):
        assert joined.leases.get_data(spec) == bytes(512)
        joined.leases.set_data(spec, b'{"a":1}')
    with joined.leases.held(spec, 5, lvb=True):
        assert joined.leases.get_data(spec) == b'{"a":1}'.ljust(512, b"\0")
        assert joined.leases.read_data(spec) == b'{"a":1}'.ljust(512, b"\0")


def test_a_cleared_lease_cannot_be_taken(joined: Any) -> None:
    spec = joined.new_lease()
    joined.leases.clear(spec)
    with pytest.raises(AcquireLockFailure):
        joined.leases.acquire(spec, 1)
    with pytest.raises(SanlockInquireError):
        joined.leases.state(spec)


def test_releasing_what_is_not_held(joined: Any) -> None:
    with pytest.raises(ReleaseLockFailure) as error:
        joined.leases.release(joined.new_lease())
    assert error.value.code == 660


def test_without_a_host_id_no_lease(joined: Any, tmp_path: Any) -> None:
    spec = LeaseSpec("11111111-2222-3333-4444-555555555555", "SDM", str(tmp_path / "leases"), MIB)
    (tmp_path / "leases").touch()
    joined.leases.write(spec)
    with pytest.raises(AcquireLockFailure, match="no host id on the domain yet"):
        joined.leases.acquire(spec, 1)


def test_host_id_is_not_left_while_a_lease_is_held(joined: Any) -> None:
    with (
        joined.leases.held(joined.new_lease(), 5),
        pytest.raises(ReleaseHostIdFailure) as error,
    ):
        joined.lockspace.release()
    assert error.value.code == 662
    assert joined.lockspace.is_held()


def test_another_agent_finds_the_host_id(joined: Any) -> None:
    path = str(joined.directory / "ids")
    found = Lockspace(joined.sanlock, joined.lockspace.id, path, Geometry(), SystemClock())
    assert not found.is_held()
    found.acquire(7, 0)
    assert found.is_held()
    with pytest.raises(HostIdConflict):
        found.start_acquire(8)


def test_a_host_id_that_was_left_behind(joined: Any, tmp_path: Any) -> None:
    """By an agent that was killed: given back for another one, unless a lease needs it."""
    sd_id, path = tmp_path.name, str(tmp_path / "ids")
    for name in ("ids", "leases"):
        (tmp_path / name).touch()
    joined.leases.write_lockspace(sd_id, path, Geometry())
    spec = LeaseSpec(sd_id, "SDM", str(tmp_path / "leases"), MIB)
    joined.leases.write(spec)
    lives = [Lockspace(joined.sanlock, sd_id, path, Geometry(), SystemClock()) for _ in range(3)]
    lives[0].acquire(3, 60)
    with joined.leases.held(spec, 5), pytest.raises(HostIdConflict):
        lives[1].start_acquire(4)
    lives[2].acquire(4, 60)
    assert lives[2].joined_as() == 4
    leaving = threading.Thread(target=lives[2].release)
    leaving.start()
    time.sleep(0.1)  # the daemon looks once a second
    last = Lockspace(joined.sanlock, sd_id, path, Geometry(), SystemClock())
    last.acquire(4, 60)
    assert last.is_held()
    leaving.join()
    with joined.leases.held(spec, 5):
        pass
    last.release()


def new_lockspace(joined: Any, directory: Any) -> Lockspace:
    path = str(directory / "ids")
    (directory / "ids").touch()
    joined.leases.write_lockspace(directory.name, path, Geometry())
    return Lockspace(joined.sanlock, directory.name, path, Geometry(), SystemClock())


def test_a_host_id_in_use_is_given_back_by_its_user(joined: Any, tmp_path: Any) -> None:
    lockspace = new_lockspace(joined, tmp_path)
    lockspace.acquire(3, 60)
    closed: list[str] = []
    assert lockspace.begin_use()
    lockspace.release(lambda: closed.append("too early"))
    assert lockspace.is_held()
    assert lockspace.unwanted
    lockspace.end_use()
    lockspace.release(lambda: closed.append("by the user"))
    assert closed == ["by the user"]
    assert lockspace.joined_as() is None
    assert not lockspace.begin_use()
    lockspace.acquire(3, 60)
    assert not lockspace.unwanted  # somebody wants it again
    lockspace.release()


def test_another_host_id_waits_for_the_one_that_goes(joined: Any, tmp_path: Any) -> None:
    """As when a pool is destroyed and another made at once."""
    lockspace = new_lockspace(joined, tmp_path)
    lockspace.acquire(3, 60)
    going = threading.Timer(0.5, lockspace.release)
    going.start()
    lockspace.acquire(4, 60)
    assert lockspace.joined_as() == 4
    going.join()
    with pytest.raises(HostIdConflict):  # nobody gives that one back
        lockspace.acquire(5, 1)
    assert lockspace.is_held()
    lockspace.release()


@pytest.fixture
def first_released(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Lockspace, Lockspace], list[float]]:
    """first_released(waiting, other): when the one waits for the first time, the other gives its
    host id back; the times that it waits."""

    def prepare(waiting: Lockspace, other: Lockspace) -> list[float]:
        wait, waited = waiting.wait, []

        def released_first(timeout: float) -> None:
            waited.append(timeout)
            if len(waited) == 1:
                other.release()
            wait(timeout)

        monkeypatch.setattr(waiting, "wait", released_first)
        return waited

    return prepare


def test_the_same_host_id_is_asked_for_while_it_goes(
    joined: Any, tmp_path: Any, first_released: Any
) -> None:
    """It is given back between the question and the wait for the answer."""
    lockspace = new_lockspace(joined, tmp_path)
    lockspace.acquire(3, 60)
    waited = first_released(lockspace, lockspace)
    lockspace.acquire(3, 60)
    assert lockspace.is_held()
    assert len(waited) > 1
    lockspace.release()


def test_an_earlier_life_is_giving_the_same_host_id_back(
    joined: Any, tmp_path: Any, first_released: Any
) -> None:
    """It is gone after it was found held, while that is waited for."""
    earlier = new_lockspace(joined, tmp_path)
    earlier.acquire(3, 60)
    later = Lockspace(joined.sanlock, earlier.id, str(tmp_path / "ids"), Geometry(), SystemClock())
    waited = first_released(later, earlier)
    later.acquire(3, 60)
    assert later.is_held()
    assert len(waited) > 1
    later.release()


def test_leases_with_sectors_of_4096(joined: Any, tmp_path: Any) -> None:
    lockspaces = Lockspaces(joined.sanlock, SystemClock())
    opened = []
    for alignment in (1, 2, 4, 8):
        geometry, sd_id = Geometry(4096, alignment * MIB), new_uuid()
        for name in ("ids", "leases"):
            (tmp_path / f"{name}{alignment}").touch()
        ids = str(tmp_path / f"ids{alignment}")
        joined.leases.write_lockspace(sd_id, ids, geometry)
        spec = LeaseSpec(
            sd_id, "SDM", str(tmp_path / f"leases{alignment}"), geometry.alignment, geometry
        )
        joined.leases.write(spec)
        lockspace = lockspaces.open(sd_id, ids, geometry)
        lockspace.start_acquire(alignment * 250)  # the highest host id of this alignment
        opened.append((lockspace, spec))
    for lockspace, spec in opened:
        lockspace.wait(60)
        with joined.leases.held(spec, 5):
            assert joined.leases.state(spec).owners == (lockspace.host_id,)
        roomy = spec.geometry.alignment == 8 * MIB
        with contextlib.nullcontext() if roomy else pytest.raises(SanlockLVBError):
            joined.leases.acquire(spec, 5, lvb=True)
            joined.leases.set_data(spec, b"data")
            joined.leases.release(spec)
            assert joined.leases.read_data(spec)[:5] == b"data\0"
    lockspaces.release_all()
    assert not any(lockspace.is_held() for lockspace, _ in opened)


@pytest.mark.mount
def test_on_a_device_with_sectors_of_4096(joined: Any, tmp_path: Any) -> None:
    """Lockspace, lease, external leases and their index, all by whole sectors."""
    with (tmp_path / "device").open("wb") as file:
        file.truncate(64 * MIB)
    device = subprocess.run(
        ["losetup", "--find", "--show", "--sector-size", "4096", str(tmp_path / "device")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()
    try:
        geometry, sd_id = Geometry(4096, 8 * MIB), new_uuid()
        joined.leases.write_lockspace(sd_id, device, geometry)
        joined.leases.format_xleases(device, sd_id, geometry)
        slots = Slots(device, sd_id, geometry)
        spec = slots.spec(2, new_uuid())
        joined.leases.write(spec)
        slots.set(2, spec.resource)
        assert [(r.number, r.lease) for r in slots.load().records] == [(2, spec.resource)]
        assert slots.scan() == list(slots.load().records)
        lockspace = Lockspaces(joined.sanlock, SystemClock()).open(sd_id, device, geometry)
        lockspace.acquire(2000, 60)
        with joined.leases.held(spec, 5, lvb=True):
            joined.leases.set_data(spec, b"data")
            assert joined.leases.state(spec).owners == (2000,)
        assert joined.leases.read_data(spec)[:5] == b"data\0"
        lockspace.release()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_a_call_that_hangs_is_left_and_undone() -> None:
    release, undone = threading.Event(), threading.Event()
    turn = threading.Lock()
    with pytest.raises(TimeoutError):
        BoundedCall(release.wait, turn, undone.set).run("test", 0.05)
    never = threading.Event()
    with pytest.raises(TimeoutError):
        BoundedCall(never.set, turn, undone.set).run("test", 0.05)
    release.set()
    assert undone.wait(5)
    BoundedCall(lambda: None, turn, None).run("test", 5)
    assert not never.is_set()


@given(st.binary(max_size=512))
def test_leader_parser_takes_any_bytes(data: bytes) -> None:
    for text in (data, struct.pack("<I", MAGIC) + data):
        found = parse_leader(text)
        assert found is None or text.startswith(struct.pack("<I", MAGIC))
