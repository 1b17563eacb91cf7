# SPDX-License-Identifier: GPL-2.0-or-later
"""The connection, with libvirt's own test driver; a real libvirtd is in functional/test_vm_*.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import libvirt as library
import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.config import Libvirt as Settings
from vdsm_storage.errors import LibvirtTimeout, LibvirtUnavailable
from vdsm_storage.host.libvirt import STUCK, Libvirt
from vdsm_storage.host.libvirt_events import EventLoop


@pytest.fixture(scope="module")
def loop() -> EventLoop:
    """One a process: libvirt knows no other."""
    return EventLoop()


@pytest.fixture
def libvirt(loop: EventLoop) -> Iterator[Libvirt]:
    one = Libvirt(Settings(uri="test:///default", retry=0.05), loop, SystemClock())
    yield one
    one.stop()


def test_calls_and_events(libvirt: Libvirt) -> None:
    greeted, events = threading.Event(), []
    libvirt.when_connected(greeted.set)
    libvirt.on_event(
        library.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
        lambda domain, event, _detail: events.append((domain.name(), event)),
    )
    with pytest.raises(LibvirtUnavailable):
        libvirt.call("too early", lambda connection: 1)
    libvirt.start()
    libvirt.wait_tried()
    assert greeted.wait(5)
    assert libvirt.connected
    libvirt.call("stop a VM", lambda connection: connection.lookupByName("test").destroy())
    end = time.monotonic() + 5
    while not events and time.monotonic() < end:
        time.sleep(0.01)
    assert events == [("test", library.VIR_DOMAIN_EVENT_STOPPED)]


def test_what_libvirt_refuses_is_its_own_error(libvirt: Libvirt) -> None:
    libvirt.start()
    libvirt.wait_tried()
    with pytest.raises(library.libvirtError):
        libvirt.call("look up", lambda connection: connection.lookupByName("nobody"))
    assert libvirt.connected


def test_a_handler_that_fails_stops_nothing(libvirt: Libvirt) -> None:
    second = threading.Event()
    libvirt.when_connected(lambda: 1 // 0)  # type: ignore[arg-type]
    libvirt.when_connected(second.set)
    libvirt.start()
    assert second.wait(5)


def test_calls_that_hang_are_left_behind_and_counted(libvirt: Libvirt) -> None:
    libvirt.start()
    libvirt.wait_tried()
    go = threading.Event()
    for _ in range(STUCK):
        with pytest.raises(LibvirtTimeout):
            libvirt.call("hang", lambda connection: go.wait(), 0.001)
    with pytest.raises(LibvirtUnavailable, match=f"{STUCK} calls"):
        libvirt.call("one more", lambda connection: 1)
    go.set()
    end = time.monotonic() + 5
    while True:
        try:
            assert libvirt.call("again", lambda connection: 1) == 1
            break
        except LibvirtUnavailable:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_host_without_libvirt(loop: EventLoop) -> None:
    none = Libvirt(Settings(uri=""), loop, SystemClock())
    none.start()
    none.wait_tried()
    assert not none.enabled
    with pytest.raises(LibvirtUnavailable):
        none.call("anything", lambda connection: 1)
    none.stop()


def test_a_libvirt_that_is_not_there(loop: EventLoop, tmp_path: object) -> None:
    settings = Settings(uri=f"qemu+unix:///system?socket={tmp_path}/none", retry=0.05)
    one = Libvirt(settings, loop, SystemClock())
    one.start()
    one.wait_tried()
    with pytest.raises(LibvirtUnavailable, match=r"none.*try again"):
        one.call("anything", lambda connection: 1)
    one.stop()
