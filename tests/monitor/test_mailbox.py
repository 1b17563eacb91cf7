# SPDX-License-Identifier: GPL-2.0-or-later
"""Both sides of the mailbox on real files: with each other, and with the other hosts' sides."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.monitor.other_mailbox import OtherHost, OtherManager, message
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.units import MIB
from vdsm_storage.errors import (
    ExtendNotAnswered,
    ExtendRefused,
    LogicalVolumeExtendError,
    MailboxFull,
    VolumeExtendingError,
)
from vdsm_storage.monitor import mailbox_format as fmt
from vdsm_storage.monitor.mailbox_file import Mailboxes
from vdsm_storage.monitor.mailbox_host import HostMailbox
from vdsm_storage.monitor.mailbox_spm import PER_DOMAIN, SpmMailbox

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "mailbox"
CLOCK = SystemClock()
TICK = 0.05  # seconds between looks, a tenth of what they are in earnest
DOMAIN = "738e0b77-d5f8-40c3-a06a-0deb1adbce5d"


def volume(number: int) -> str:
    return str(uuid.UUID(int=number + 1))


@dataclass
class Disk:
    """What volumes have, in MiB; `extend` grows them by whole extents."""

    sizes: dict[str, int] = field(default_factory=dict)
    calls: list[tuple[str, int]] = field(default_factory=list)
    hung: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    go_on: threading.Event = field(default_factory=threading.Event)
    delay: float = 0.0

    def extend(self, domain: str, name: str, size: int) -> int:
        self.calls.append((name, size))
        time.sleep(self.delay)
        if name in self.hung:
            self.go_on.wait(60)
        if name in self.broken:
            raise LogicalVolumeExtendError(vg=domain, lv=name, size=size, reason="no space")
        have = max(self.sizes.get(name, 0), -(-size // 128) * 128)
        self.sizes[name] = have
        return have


@dataclass
class World:
    boxes: Mailboxes
    lanes: Lanes
    disk: Disk
    stops: list[Callable[[], object]] = field(default_factory=list)

    def spm(self, start: bool = True) -> SpmMailbox:
        made = SpmMailbox(self.boxes, self.disk.extend, self.lanes, CLOCK, 250, TICK, 4 * TICK)
        self.stops.append(made.stop)
        if start:
            made.start()
        return made

    def host(self, number: int, repeat: float = 10.0) -> HostMailbox:
        made = HostMailbox(self.boxes, number, CLOCK, TICK, repeat)
        self.stops.append(made.stop)
        made.start()
        return made

    def other_host(self, number: int) -> OtherHost:
        made = OtherHost(self.boxes.inbox, self.boxes.outbox, number)
        self.stops.append(made.kill)
        made.start()
        return made

    def other_spm(self) -> OtherManager:
        def extend(domain: str, name: str, size: int) -> None:
            try:
                self.disk.extend(domain, name, size)
            except LogicalVolumeExtendError as error:
                raise OSError(errno.ENOSPC, str(error)) from error

        made = OtherManager(self.boxes.inbox, self.boxes.outbox, extend)
        self.stops.append(made.kill)
        made.start()
        return made

    def block(self, box: str, host: int) -> bytes:
        data = Path(getattr(self.boxes, box)).read_bytes()
        return data[host * fmt.BLOCK : (host + 1) * fmt.BLOCK]

    def quiet(self, host: int) -> bool:
        """No message is on its way."""
        return not self.block("inbox", host).strip(b"\0")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    for name in ("inbox", "outbox"):
        with open(tmp_path / name, "wb") as file:
            file.write(os.urandom(fmt.HOSTS * fmt.BLOCK) if name == "outbox" else b"")
            file.truncate(16 * MIB)
    boxes = Mailboxes(str(tmp_path / "inbox"), str(tmp_path / "outbox"))
    made = World(boxes, Lanes(CLOCK), Disk())
    yield made
    made.disk.go_on.set()
    for stop in made.stops:
        stop()
    made.lanes.close()


def wait_for(condition: Callable[[], object], timeout: float = 20.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# -- our two sides ---------------------------------------------------------------------------


def test_hosts_and_manager(world: World) -> None:
    world.spm()
    hosts = [world.host(number) for number in (1, 3, 249)]
    with ThreadPoolExecutor(60) as pool:
        wanted = {
            (host, number): pool.submit(
                hosts[host].request, DOMAIN, volume(100 * host + number), number * MIB, 30
            )
            for host in range(3)
            for number in range(1, 21)
        }
        for (_, number), result in wanted.items():
            assert result.result() == -(-number // 128) * 128 * MIB
    assert len(world.disk.calls) == 60
    for host in (1, 3, 249):
        wait_for(lambda host=host: world.quiet(host))
    assert world.block("outbox", 5) == fmt.EMPTY_BLOCK  # zeroed at the start


def test_sizes_are_rounded_up(world: World) -> None:
    world.spm()
    host = world.host(1)
    assert host.request(DOMAIN, volume(1), 128 * MIB + 1, 10) == 256 * MIB
    assert world.disk.calls == [(volume(1), 129)]


def test_failure(world: World) -> None:
    world.disk.broken.add(volume(1))
    world.spm()
    host = world.host(1)
    with pytest.raises(ExtendRefused) as error:
        host.request(DOMAIN, volume(1), MIB, 10)
    assert error.value.code == 206
    assert volume(1) in str(error.value)
    world.disk.broken.clear()
    assert host.request(DOMAIN, volume(1), MIB, 10) == 128 * MIB


def test_a_manager_that_gives_less_has_failed(world: World) -> None:
    spm = SpmMailbox(world.boxes, lambda *_: 5, world.lanes, CLOCK, 250, TICK, TICK)
    world.stops.append(spm.stop)
    spm.start()
    with pytest.raises(ExtendRefused):
        world.host(1).request(DOMAIN, volume(1), 6 * MIB, 10)


def test_requests_for_one_volume_are_joined(world: World) -> None:
    world.disk.hung.add(volume(1))
    world.spm()
    host = world.host(2)
    with ThreadPoolExecutor(10) as pool:
        first = pool.submit(host.request, DOMAIN, volume(1), 10 * MIB, 30)
        wait_for(lambda: world.disk.calls)
        others = [
            pool.submit(host.request, DOMAIN, volume(1), size * MIB, 30)
            for size in (5, 10, 400, 300, 500)
        ]
        assert host.request(DOMAIN, volume(2), MIB, 30) == 128 * MIB
        world.disk.hung.clear()
        world.disk.go_on.set()
        assert first.result() == others[0].result() == others[1].result() == 128 * MIB
        assert {other.result() for other in others[2:]} == {512 * MIB}
    assert [size for name, size in world.disk.calls if name == volume(1)] == [10, 500]


def test_impossible_requests(world: World) -> None:
    host = world.host(1)
    for name, size in ((volume(1), 2**32 * MIB + 1), ("no-uuid", MIB)):
        with pytest.raises(VolumeExtendingError, match=name):
            host.request(DOMAIN, name, size, 5)


def test_full_mailbox_without_a_manager(world: World) -> None:
    """63 messages stand, one more is told what is the matter; when a manager comes, all is well."""
    host = world.host(1)
    with ThreadPoolExecutor(70) as pool:

        def ask(number: int, timeout: float) -> Future[int]:
            return pool.submit(host.request, DOMAIN, volume(number), MIB, timeout)

        asked = [ask(number, 30) for number in range(fmt.SLOTS)]
        wait_for(lambda: b"\0" * 64 not in fmt.messages(world.block("inbox", 1)))
        with pytest.raises(MailboxFull) as error:
            host.request(DOMAIN, volume(100), MIB, 1)
        assert error.value.code == 1100
        assert "63" in str(error.value)
        patient = ask(101, 30)
        world.spm()
        assert patient.result() == 128 * MIB
        assert {result.result() for result in asked} == {128 * MIB}
    assert volume(100) not in {name for name, _ in world.disk.calls}  # it was taken back


def test_nobody_answers(world: World) -> None:
    host = world.host(1)
    with pytest.raises(ExtendNotAnswered) as error:
        host.request(DOMAIN, volume(1), MIB, 1)
    assert error.value.code == 206
    assert world.boxes.inbox in str(error.value)
    # What was given up is not extended by a manager that comes later.
    wait_for(lambda: fmt.messages(world.block("inbox", 1))[0] == fmt.CLEAN)
    world.spm()
    assert host.request(DOMAIN, volume(2), MIB, 10) == 128 * MIB
    wait_for(lambda: world.quiet(1))
    assert world.disk.calls == [(volume(2), 1)]


def test_silent_hosts_do_not_fill_up(world: World) -> None:
    """Messages that were given up leave room, although no manager cleans their slots."""
    host = world.host(1)
    with ThreadPoolExecutor(63) as pool:
        for round_ in range(3):
            results = [
                pool.submit(host.request, DOMAIN, volume(100 * round_ + n), MIB, 0.3)
                for n in range(63)
            ]
            for result in results:
                assert isinstance(result.exception(), ExtendNotAnswered)


def test_a_hung_extend_stops_nobody_else(world: World) -> None:
    other = str(uuid.uuid4())
    world.disk.hung.update(volume(number) for number in range(63))
    spm = world.spm()
    stuck, free = world.host(1), world.host(2)
    with ThreadPoolExecutor(63) as pool:
        waiting = [
            pool.submit(stuck.request, DOMAIN, volume(n), MIB, 60) for n in range(PER_DOMAIN - 1)
        ]
        wait_for(lambda: len(world.disk.calls) == PER_DOMAIN - 1)
        assert free.request(DOMAIN, volume(100), MIB, 10) == 128 * MIB  # of the same domain
        waiting += [pool.submit(stuck.request, DOMAIN, volume(n), MIB, 60) for n in range(10, 63)]
        wait_for(lambda: len(world.disk.calls) == PER_DOMAIN + 1)
        assert free.request(other, volume(101), MIB, 10) == 128 * MIB
        assert stuck.request(other, volume(102), MIB, 10) == 128 * MIB
        assert len(world.disk.calls) == PER_DOMAIN + 3  # a domain that hangs has a bound
        started = time.monotonic()
        assert spm.stop()
        assert time.monotonic() - started < 2
        before = world.block("outbox", 1)
        world.disk.hung.clear()
        world.disk.go_on.set()
        time.sleep(4 * TICK)
        assert world.block("outbox", 1) == before  # a manager that stopped answers no more
        world.spm()  # its successor does, all of it
        assert {result.result() for result in waiting} == {128 * MIB}


# -- restarts --------------------------------------------------------------------------------


def test_the_manager_dies_and_another_comes(world: World) -> None:
    world.disk.hung.add(volume(1))
    first = world.spm()
    host = world.host(1)
    with ThreadPoolExecutor(2) as pool:
        result = pool.submit(host.request, DOMAIN, volume(1), MIB, 30)
        wait_for(lambda: world.disk.calls)
        first.stop()
        world.disk.hung.clear()
        world.spm()
        assert result.result() == 128 * MIB
    assert len(world.disk.calls) == 2


def test_the_host_starts_anew(world: World) -> None:
    """An answer to its predecessor is not taken for one to itself."""
    world.spm()
    first = world.host(7)
    first.request(DOMAIN, volume(1), MIB, 10)
    wait_for(lambda: world.quiet(7))
    # The predecessor died with an answer before it.
    stale = fmt.answer(message(DOMAIN, volume(1), 5), 7)
    with open(world.boxes.outbox, "r+b") as file:
        file.seek(7 * fmt.BLOCK)
        file.write(stale)
    assert first.stop()
    world.disk.sizes[volume(1)] = 1280
    second = world.host(7)
    assert second.request(DOMAIN, volume(1), 5 * MIB, 10) == 1280 * MIB
    wait_for(lambda: world.quiet(7))


def test_a_host_that_stops_leaves_nothing(world: World) -> None:
    host = world.host(1)
    with ThreadPoolExecutor(2) as pool:
        result = pool.submit(host.request, DOMAIN, volume(1), MIB, 30)
        wait_for(lambda: not world.quiet(1))
        assert host.stop()
        assert isinstance(result.exception(), ExtendNotAnswered)
    assert world.quiet(1)
    with pytest.raises(ExtendNotAnswered, match="stops"):
        host.request(DOMAIN, volume(1), MIB, 1)


# -- damage ----------------------------------------------------------------------------------


def test_lost_and_damaged_blocks(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong checksum is ignored; the host writes its block again after a while."""
    host = world.host(1, repeat=0.5)
    with ThreadPoolExecutor(2) as pool:
        result = pool.submit(host.request, DOMAIN, volume(1), MIB, 30)
        wait_for(lambda: not world.quiet(1))
        bad = (GOLDEN / "host-block-bad-checksum.bin").read_bytes()
        with open(world.boxes.inbox, "r+b") as file:
            file.seek(fmt.BLOCK)
            file.write(bad)
            file.seek(3 * fmt.BLOCK)
            file.write(bad)
        world.spm()
        assert result.result() == 128 * MIB
    assert world.disk.calls == [(volume(1), 1)]
    assert caplog.text.count("Host 3: the checksum") == 1
    assert world.block("outbox", 3) == fmt.EMPTY_BLOCK


def test_unknown_messages(world: World) -> None:
    world.spm()
    slots = [b"1move" + bytes(59), b"\xff" * 64, message(DOMAIN, volume(1), 9)] + [fmt.EMPTY] * 60
    with open(world.boxes.inbox, "r+b") as file:
        file.seek(2 * fmt.BLOCK)
        file.write(fmt.seal(slots))
    wait_for(lambda: fmt.decode(fmt.messages(world.block("outbox", 2))[2]) is not None)
    assert fmt.messages(world.block("outbox", 2))[:2] == [fmt.EMPTY, fmt.EMPTY]
    assert world.disk.calls == [(volume(1), 9)]


def test_storage_that_comes_and_goes(world: World, caplog: pytest.LogCaptureFixture) -> None:
    os.rename(world.boxes.inbox, world.boxes.inbox + ".away")
    os.rename(world.boxes.outbox, world.boxes.outbox + ".away")
    world.spm()
    host = world.host(1)
    with pytest.raises(ExtendNotAnswered, match="No such file"):
        host.request(DOMAIN, volume(1), MIB, 1)
    for box in (world.boxes.inbox, world.boxes.outbox):
        os.rename(box + ".away", box)
    assert host.request(DOMAIN, volume(2), MIB, 20) == 128 * MIB
    assert caplog.text.count("it is tried again") == 2


# -- with the other hosts --------------------------------------------------------------------


def test_golden_exchange(world: World) -> None:
    """The block of a golden host, and the golden answers to it."""
    about = json.loads((GOLDEN / "index.json").read_text())["host-block.bin"]
    world.disk.broken.add(about["requests"][1]["volume"])
    world.spm()
    with open(world.boxes.inbox, "r+b") as file:
        file.seek(about["offset_in_inbox"])
        file.write((GOLDEN / "host-block.bin").read_bytes())
        file.seek(0)
        file.write((GOLDEN / "event-block.bin").read_bytes())
    wait_for(lambda: all(fmt.messages(world.block("outbox", 3))[:4]) and len(world.disk.calls) == 3)
    golden = (GOLDEN / "spm-reply-block.bin").read_bytes()
    wait_for(lambda: world.block("outbox", 3)[:128] == golden[:128])
    wait_for(lambda: fmt.messages(world.block("outbox", 3))[3] == fmt.CLEAN)
    assert world.block("outbox", 3)[-4:] == bytes(4)  # the SPM writes no checksum
    assert [size for _, size in sorted(world.disk.calls, key=lambda call: call[1])] == [
        asked["size_mib"] for asked in about["requests"]
    ]


def test_we_serve_other_hosts(world: World) -> None:
    world.disk.broken.add(volume(5))
    world.spm()
    hosts = [world.other_host(number) for number in (1, 2, 100)]
    for host in hosts:
        for number in range(20):
            host.request(DOMAIN, volume(number), 100 + number)
    for host in hosts:
        wait_for(lambda host=host: len(host.results) == 20 and not host.active)
        assert host.results.pop(volume(5)) == 0
        assert set(host.results.values()) == {128}
    # Once more in the same slots, through an event; and a host that was killed and comes back.
    hosts[0].request(DOMAIN, volume(0), 300)
    wait_for(lambda: hosts[0].results[volume(0)] == 384)
    hosts[0].kill()
    again = world.other_host(1)
    again.request(DOMAIN, volume(0), 300)
    wait_for(lambda: again.results == {volume(0): 384} and not again.active)


def test_others_serve_us(world: World) -> None:
    world.disk.broken.add(volume(7))
    first = world.other_spm()
    host = world.host(4)
    with ThreadPoolExecutor(100) as pool:
        results = {
            number: pool.submit(host.request, DOMAIN, volume(number), number * MIB, 60)
            for number in range(1, 101)  # more than there are slots
        }
        assert isinstance(results.pop(7).exception(), ExtendRefused)
        for number, result in results.items():
            assert result.result() == number * MIB  # what was asked for is what VDSM tells
        world.disk.delay = 0.3
        late = [
            pool.submit(host.request, DOMAIN, volume(n), 300 * MIB, 60) for n in range(100, 110)
        ]
        time.sleep(0.2)
        first.kill()
        world.disk.delay = 0.0
        world.other_spm()
        assert {result.result() for result in late} == {300 * MIB}
    wait_for(lambda: world.quiet(4))
