# SPDX-License-Identifier: GPL-2.0-or-later
"""The stand-in for device-mapper does what device-mapper would."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from functional.standin import loops
from functional.standin.process import StandInProcess
from functional.world import World
from vdsm_storage.host.sanlock_daemon import SanlockDaemon

MIB = 1024 * 1024
SECTOR = 512
TIMEOUT = ("-o", "1")  # seconds for an I/O of sanlock
FALLOC_PUNCH = 0x01 | 0x02  # keep the size, punch a hole

Segments = list[list[object]]


@pytest.fixture(scope="module")
def pvs(make_luns: Callable[..., list[str]]) -> list[str]:
    return make_luns(2, 256 * MIB)


@pytest.fixture(scope="module")
def host(make_standin: Callable[[str], StandInProcess]) -> StandInProcess:
    return make_standin("a")


@pytest.fixture(scope="module")
def other(make_standin: Callable[[str], StandInProcess]) -> StandInProcess:
    return make_standin("b")


@pytest.fixture
def fragmented(pvs: list[str]) -> Segments:
    """20 MiB in three pieces on two devices, the last one before the first."""
    return [[pvs[0], 40 * MIB, 8 * MIB], [pvs[1], 3 * MIB, 4 * MIB], [pvs[0], 16 * MIB, 8 * MIB]]


@contextlib.contextmanager
def opened(path: object, flags: int = os.O_RDWR | os.O_DIRECT) -> Iterator[int]:
    fd = os.open(str(path), flags)
    try:
        yield fd
    finally:
        os.close(fd)


def aligned(data: bytes) -> mmap.mmap:
    buffer = mmap.mmap(-1, max(len(data), SECTOR))
    buffer[: len(data)] = data
    return buffer


def read(fd: int, offset: int, length: int) -> bytes:
    buffer = mmap.mmap(-1, length)
    assert os.preadv(fd, [buffer], offset) == length
    return buffer[:]


def on_device(device: str, offset: int, length: int) -> bytes:
    with opened(device, os.O_RDONLY | os.O_DIRECT) as fd:
        return read(fd, offset, length)


def size(path: object) -> int:
    with opened(path, os.O_RDONLY) as fd:
        return os.lseek(fd, 0, os.SEEK_END)


def test_bytes_are_where_the_segments_say(
    host: StandInProcess, fragmented: Segments, pvs: list[str]
) -> None:
    path = host.activate("vg", "map", fragmented)
    assert stat.S_ISBLK(os.stat(path).st_mode)
    assert size(path) == 20 * MIB
    data = random.Random(1).randbytes(20 * MIB)
    with opened(path) as fd:
        # In pieces that cross the borders, in any order.
        places = [(start, min(3 * MIB, 20 * MIB - start)) for start in range(0, 20 * MIB, 3 * MIB)]
        random.Random(2).shuffle(places)
        for start, length in places:
            buffer = memoryview(aligned(data[start : start + length]))[:length]
            assert os.pwritev(fd, [buffer], start) == length
        assert read(fd, 0, 20 * MIB) == data
        for start in (8 * MIB - SECTOR, 12 * MIB - SECTOR):
            assert read(fd, start, 2 * SECTOR) == data[start : start + 2 * SECTOR]
    assert on_device(pvs[0], 40 * MIB, 8 * MIB) == data[: 8 * MIB]
    assert on_device(pvs[1], 3 * MIB, 4 * MIB) == data[8 * MIB : 12 * MIB]
    assert on_device(pvs[0], 16 * MIB, 8 * MIB) == data[12 * MIB :]
    host.call("deactivate", vg="vg", lv="map")
    assert not os.path.lexists(path)


def test_activation_is_idempotent_and_listed(host: StandInProcess, fragmented: Segments) -> None:
    path = host.activate("vg", "twice", fragmented)
    device = os.readlink(path)
    assert host.activate("vg", "twice", fragmented) == path
    assert os.readlink(path) == device
    assert host.active("vg") == {"twice": {"size": 20 * MIB, "device": device, "users": []}}
    assert host.active("other") == {}
    for _ in range(2):
        host.call("deactivate", vg="vg", lv="twice")
    assert host.active("vg") == {}


def test_a_volume_in_use_stays(host: StandInProcess, fragmented: Segments) -> None:
    path = host.activate("vg", "used", fragmented)
    with opened(path) as fd:
        with pytest.raises(OSError, match=f"in use: {os.getpid()} ") as caught:
            host.call("deactivate", vg="vg", lv="used")
        assert caught.value.errno == errno.EBUSY
        assert len(host.active("vg")["used"]["users"]) == 1
        read(fd, 0, SECTOR)
    time.sleep(0.1)  # the kernel must not detach it on its own now that nobody has it open
    assert host.active("vg")["used"]["users"] == []
    read_once(path)
    host.call("deactivate", vg="vg", lv="used")


def read_once(path: object) -> bytes:
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
        return read(fd, 0, SECTOR)


def test_refresh_while_open(host: StandInProcess, fragmented: Segments, pvs: list[str]) -> None:
    path = host.activate("vg", "grow", fragmented)
    with opened(path) as fd:
        os.pwritev(fd, [aligned(b"first" + bytes(507))], 0)
        host.call(
            "refresh", vg="vg", lv="grow", segments=[*fragmented, [pvs[1], 64 * MIB, 4 * MIB]]
        )
        assert size(path) == 24 * MIB
        assert os.lseek(fd, 0, os.SEEK_END) == 24 * MIB
        os.pwritev(fd, [aligned(b"last" + bytes(508))], 24 * MIB - SECTOR)
        assert read(fd, 0, SECTOR)[:5] == b"first"
    assert on_device(pvs[1], 68 * MIB - SECTOR, SECTOR)[:4] == b"last"
    # Smaller, and elsewhere (pvmove does that).
    host.call("refresh", vg="vg", lv="grow", segments=[[pvs[1], 64 * MIB, 4 * MIB]])
    assert size(path) == 4 * MIB
    with opened(path) as fd:
        assert read(fd, 4 * MIB - SECTOR, SECTOR)[:4] == b"last"
    assert host.active("vg")["grow"]["size"] == 4 * MIB
    host.call("deactivate", vg="vg", lv="grow")


@pytest.mark.mount
def test_file_system(host: StandInProcess, pvs: list[str], workdir: Path) -> None:
    segments = [[pvs[0], 128 * MIB, 64 * MIB], [pvs[1], 128 * MIB, 64 * MIB]]
    path = host.activate("vg", "fs", segments)
    point = workdir / "mounted"
    point.mkdir()
    subprocess.run(["mkfs.ext3", "-q", str(path)], check=True, timeout=60)
    subprocess.run(["mount", str(path), str(point)], check=True, timeout=60)
    data = random.Random(3).randbytes(90 * MIB)
    (point / "file").write_bytes(data)
    with pytest.raises(OSError, match="mount"):
        host.call("deactivate", vg="vg", lv="fs")
    subprocess.run(["umount", str(point)], check=True, timeout=60)
    host.call("deactivate", vg="vg", lv="fs")
    path = host.activate("vg", "fs", segments)
    subprocess.run(["mount", "-o", "ro", str(path), str(point)], check=True, timeout=60)
    assert (point / "file").read_bytes() == data
    subprocess.run(["umount", str(point)], check=True, timeout=60)
    host.call("deactivate", vg="vg", lv="fs")


def test_discard_and_zeroes(host: StandInProcess, fragmented: Segments, pvs: list[str]) -> None:
    path = host.activate("vg", "discard", fragmented)
    for argv in (["blkdiscard"], ["blkdiscard", "--zeroout"]):
        with opened(path) as fd:
            data = aligned(b"x" * (20 * MIB))
            os.pwritev(fd, [data], 0)
        where = ["--offset", str(7 * MIB), "--length", str(6 * MIB)]
        subprocess.run([*argv, *where, str(path)], check=True, timeout=60)
        assert on_device(pvs[0], 40 * MIB, 8 * MIB) == b"x" * (7 * MIB) + bytes(MIB)
        assert on_device(pvs[1], 3 * MIB, 4 * MIB) == bytes(4 * MIB)
        assert on_device(pvs[0], 16 * MIB, 8 * MIB) == bytes(MIB) + b"x" * (7 * MIB)
    with opened(path) as fd:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate64(fd, FALLOC_PUNCH, ctypes.c_long(0), ctypes.c_long(MIB))
        assert read(fd, 0, MIB) == bytes(MIB)
    host.call("deactivate", vg="vg", lv="discard")


def test_two_hosts_see_each_other_at_once(
    host: StandInProcess, other: StandInProcess, fragmented: Segments
) -> None:
    paths = [one.activate("vg", "shared", fragmented) for one in (host, other)]
    failed: list[str] = []

    def play(mine: int) -> None:
        """Writers of neighbouring sectors; what one writes the other host must read."""
        generator = random.Random(mine)
        flags = os.O_RDWR | os.O_DIRECT | os.O_DSYNC
        with opened(paths[mine % 2], flags) as writer, opened(paths[1 - mine % 2], flags) as reader:
            for count in range(150):
                sector = 4 * MIB // SECTOR * generator.randrange(4) + mine
                data = f"{mine} {count} ".encode().ljust(SECTOR, b".")
                os.pwritev(writer, [aligned(data)], sector * SECTOR)
                if read(reader, sector * SECTOR, SECTOR) != data:
                    failed.append(f"{mine} {count}")

    threads = [threading.Thread(target=play, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for one in (host, other):
        one.call("deactivate", vg="vg", lv="shared")


@pytest.mark.sanlock
@pytest.mark.slow
def test_leases_of_two_hosts(
    host: StandInProcess, other: StandInProcess, fragmented: Segments, workdir: Path
) -> None:
    """Two sanlock daemons, each through its own host's devices."""
    space = [one.activate("vg", "ids", fragmented) for one in (host, other)]
    daemons = [SanlockDaemon(str(workdir / name), io_timeout=1) for name in ("s1", "s2")]
    try:
        for daemon in daemons:
            daemon.start()
        ask(daemons[0], "init", *TIMEOUT, "-s", f"space:0:{space[0]}:0")
        joins = [f"space:{number + 1}:{space[number]}:0" for number in (0, 1)]
        threads = [
            threading.Thread(target=ask, args=(daemon, "add_lockspace", *TIMEOUT, "-s", join))
            for daemon, join in zip(daemons, joins, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for daemon in daemons:
            World.wait(lambda d=daemon: sees_both(d), "both hosts to be seen")
        for daemon, join in zip(daemons, joins, strict=True):
            ask(daemon, "rem_lockspace", "-s", join)
    finally:
        for daemon in daemons:
            daemon.stop()
    for one in (host, other):
        World.wait(lambda h=one: h.active("vg")["ids"]["users"] == [], "sanlock to close")
        one.call("deactivate", vg="vg", lv="ids")
        assert "ids" not in one.active("vg")


def sees_both(daemon: SanlockDaemon) -> bool:
    found = ask(daemon, "host_status", "-s", "space")
    lines = [line for line in found.splitlines() if "timestamp" in line]
    return sum(not line.endswith("timestamp 0") for line in lines) == 2


def ask(daemon: SanlockDaemon, *words: str) -> str:
    environment = {**os.environ, "SANLOCK_RUN_DIR": daemon.directory}
    return subprocess.run(
        ["sanlock", "client", *words], env=environment, check=True, capture_output=True, text=True,
        timeout=60,
    ).stdout  # fmt: skip


@pytest.mark.parametrize("target", ["vg/sick", "device", "*"])
def test_hang_and_resume(
    host: StandInProcess, other: StandInProcess, pvs: list[str], target: str
) -> None:
    sick = host.activate("vg", "sick", [[pvs[0], MIB, MIB]])
    sound = host.activate("vg", "sound", [[pvs[1], MIB, MIB]])
    there = other.activate("vg", "sick", [[pvs[0], MIB, MIB]])
    target = pvs[0] if target == "device" else target
    data = os.urandom(SECTOR)
    host.hang(target)
    started = [threading.Thread(target=write_once, args=(sick, data)) for _ in range(40)]
    for thread in started:
        thread.start()
    World.wait(lambda: host.held() >= 40, "requests to hang")
    if target != "*":
        write_once(sound, data)  # more requests than there are threads, and the others go on
        assert read_once(sound) == data
    assert read_once(there) != data
    assert all(thread.is_alive() for thread in started)
    assert host.resume(target) >= 40
    for thread in started:
        thread.join(10)
    assert read_once(there) == data
    for one, lv in ((host, "sick"), (host, "sound"), (other, "sick")):
        one.call("deactivate", vg="vg", lv=lv)


def write_once(path: object, data: bytes) -> int:
    """0, or the error's number."""
    try:
        with opened(path) as fd:
            os.pwritev(fd, [aligned(data)], 0)
    except OSError as error:
        return error.errno or -1
    return 0


def test_errors(host: StandInProcess, pvs: list[str]) -> None:
    path = host.activate("vg", "bad", [[pvs[0], MIB, MIB], [pvs[1], MIB, MIB]])
    host.fail(pvs[1])
    with opened(path) as fd:
        read(fd, 0, SECTOR)
        with pytest.raises(OSError, match="Input/output error"):
            read(fd, MIB, SECTOR)
        host.resume(pvs[1])
        host.fail("vg/bad", "write")
        read(fd, MIB, SECTOR)
        with pytest.raises(OSError, match="Input/output error"):
            os.pwritev(fd, [aligned(bytes(SECTOR))], 0)
        host.resume("vg/bad")
        os.pwritev(fd, [aligned(bytes(SECTOR))], 0)
    # What hangs can be made to fail, too.
    host.hang("vg/bad")
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(write_once(path, bytes(SECTOR))))
    thread.start()
    World.wait(lambda: host.held() == 1, "the request to hang")
    assert host.drop() == 1
    thread.join(10)
    assert result == [errno.EIO]
    host.resume("vg/bad")
    host.call("deactivate", vg="vg", lv="bad")


def test_a_lun_of_its_own(host: StandInProcess, other: StandInProcess, pvs: list[str]) -> None:
    """Each host has its own device for a LUN, and what fails on one does not on the other."""
    luns = [one.lun(pvs[0]) for one in (host, other)]
    assert len({*luns, pvs[0]}) == 3
    assert {size(lun) for lun in luns} == {size(pvs[0])}
    path = host.activate("vg", "on", [[luns[0], 32 * MIB, MIB]])
    data = os.urandom(SECTOR)
    assert write_once(path, data) == 0
    assert on_device(luns[1], 32 * MIB, SECTOR) == data
    host.fail(luns[0])
    assert write_once(path, data) == errno.EIO
    assert write_once(luns[0], on_device(luns[1], 0, SECTOR)) == errno.EIO
    host.resume(luns[0])
    assert write_once(path, data) == 0
    host.call("deactivate", vg="vg", lv="on")


def test_killed(make_standin: Callable[[str], StandInProcess], pvs: list[str]) -> None:
    """kill -9 while requests hang: they fail, and a new one starts where it was."""
    host = make_standin("killed")
    path = host.activate("vg", "lv", [[pvs[0], MIB, MIB]])
    device = os.readlink(path)
    host.hang("*")
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(write_once(device, bytes(SECTOR))))
    thread.start()
    World.wait(lambda: host.held() == 1, "the request to hang")
    host.kill()
    thread.join(10)
    assert result == [errno.EIO]
    assert host.stop() == []
    assert device not in {f"/dev/{name}" for name in attached()}
    host.start()
    assert host.active("vg") == {}
    read_once(host.activate("vg", "lv", [[pvs[0], MIB, MIB]]))


def attached() -> set[str]:
    return {path.parts[3] for path in Path("/sys/block").glob("loop*/loop/backing_file")}


def test_many_at_once(host: StandInProcess, pvs: list[str]) -> None:
    """Activation by many threads, with others who take loop devices at the same time."""
    names = [f"lv{number}" for number in range(40)]
    failed: list[str] = []

    def work(name: str) -> None:
        try:
            for _ in range(3):
                path = host.activate("vg", name, [[pvs[0], MIB, MIB]])
                read_once(path)
                host.call("deactivate", vg="vg", lv=name)
        except OSError as error:
            failed.append(f"{name}: {error!r}")

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert host.active("vg") == {}


def test_who_has_a_loop_device_open(pvs: list[str]) -> None:
    with opened(pvs[0]):
        assert any(text.startswith(f"{os.getpid()} ") for text in loops.users()[pvs[0]])
