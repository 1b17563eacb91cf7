# SPDX-License-Identifier: GPL-2.0-or-later
"""The recorded history of thin drives: bounded files that survive whatever happens to the agent."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.monitor import thin_history
from vdsm_storage.monitor.thin_drive import Board
from vdsm_storage.monitor.thin_history import KINDS, LARGEST, History, Point
from vdsm_storage.monitor.thin_view import ThinView
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.replies import compile_reply

VM = "8d6a1f0e-0000-4000-8000-000000000001"
OTHER = "8d6a1f0e-0000-4000-8000-000000000002"
RECORD = 32


def point(number: int, what: str = "event") -> Point:
    return Point(1.7e9 + number, number, 2 * number, 3 * number, what)


def file_of(directory: Path, vm: str = VM, drive: str = "vda") -> Path:
    return directory / vm / f"{drive}.points"


def test_what_was_noted_is_told_again_by_the_next_agent(tmp_path: Path) -> None:
    history = History(str(tmp_path / "thin"))
    noted = [point(number, what) for number, what in enumerate(KINDS)]
    for each in noted:
        history.note(VM, "vda", each)
    history.note(VM, "sdb", point(7))
    history.note(OTHER, "vda", point(8))
    again = History(str(tmp_path / "thin"))
    assert again.points(VM, "vda") == noted
    assert again.points(VM, "vda", since=noted[5].when) == noted[5:]
    assert again.drives(VM) == ["sdb", "vda"]
    assert again.vms() == [VM, OTHER]
    assert os.stat(file_of(tmp_path / "thin")).st_mode & 0o777 == 0o600


def test_the_numbers_of_the_kinds_are_those_of_files_that_are_there(tmp_path: Path) -> None:
    """An agent that is updated reads what the one before it wrote."""
    file_of(tmp_path).parent.mkdir()
    names = [
        "event", "extended", "armed", "paused", "resumed",
        "throttled", "released", "full", "looked",
    ]  # fmt: skip
    rows = [
        number.to_bytes(8, "little") + bytes.fromhex("0201") + bytes(6) + b"\1" + bytes(7)
        + bytes.fromhex("00000001000000") + bytes([number])
        for number in range(1, 10)
    ]  # fmt: skip
    file_of(tmp_path).write_bytes(b"".join(rows))
    assert History(str(tmp_path)).points(VM, "vda") == [
        Point(number / 1e6, 258, 1, 1 << 24, name) for number, name in enumerate(names, 1)
    ]


def test_nobody_and_nothing(tmp_path: Path) -> None:
    history = History(str(tmp_path / "thin"))
    assert history.points(VM, "vda") == []
    assert history.drives(VM) == []
    assert history.vms() == []
    history.forget(VM)
    assert not (tmp_path / "thin").exists()


def test_a_vm_is_forgotten_and_others_are_not(tmp_path: Path) -> None:
    history = History(str(tmp_path))
    history.note(VM, "vda", point(1))
    history.note(VM, "vdb", point(2))
    history.note(OTHER, "vda", point(3))
    history.forget(VM)
    assert history.vms() == [OTHER]
    assert not (tmp_path / VM).exists()
    assert history.points(OTHER, "vda") == [point(3)]
    history.note(VM, "vda", point(4))
    assert history.points(VM, "vda") == [point(4)]


@pytest.mark.parametrize(
    "drive", ["", "../vda", "vda/..", ".", "vda.points", "Vda", "v" * 40, "a\0"]
)
def test_names_of_drives_that_cannot_be(tmp_path: Path, drive: str) -> None:
    history = History(str(tmp_path))
    with pytest.raises(ValueError, match="no name of a drive"):
        history.note(VM, drive, point(1))
    with pytest.raises(ValueError, match="no name of a drive"):
        history.points(VM, drive)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("vm", ["", "..", "../" + VM, VM.upper(), VM + "/x"])
def test_names_of_vms_that_cannot_be(tmp_path: Path, vm: str) -> None:
    history = History(str(tmp_path))
    for ask in (
        lambda: history.note(vm, "vda", point(1)), lambda: history.points(vm, "vda"),
        lambda: history.drives(vm), lambda: history.forget(vm),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="no UUID"):
            ask()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "wrong",
    [
        Point(1.0, 1, 1, 1, "nothing"), Point(-1.0, 1, 1, 1, "event"),
        Point(1.0, -1, 1, 1, "event"), Point(1.0, 1, 1 << 64, 1, "event"),
        Point(1.0, 1, 1, LARGEST + 1, "event"), Point(1.0, 1, 1, -1, "event"),
    ],
    ids=["kind", "when", "allocation", "size", "threshold", "below"],
)  # fmt: skip
def test_points_that_cannot_be(tmp_path: Path, wrong: Point) -> None:
    history = History(str(tmp_path))
    with pytest.raises(ValueError, match="noted"):
        history.note(VM, "vda", wrong)
    assert history.points(VM, "vda") == []


POINTS = st.builds(
    Point,
    st.integers(0, 4 * 10**15).map(lambda micros: micros / 1e6),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, LARGEST),
    st.sampled_from(sorted(KINDS)),
)
STEPS = st.lists(
    st.one_of(POINTS, st.sampled_from(["restart", "look"]), st.binary(min_size=1, max_size=31)),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(keep=st.integers(1, 9), steps=STEPS)
def test_any_order_of_notes_restarts_and_torn_records(
    keep: int, steps: list[Point | str | bytes]
) -> None:
    """Bytes are what a write that was cut off left behind."""
    with tempfile.TemporaryDirectory() as name:
        history, noted = History(name, keep), list[Point]()
        path = file_of(Path(name))
        for step in steps:
            if isinstance(step, Point):
                history.note(VM, "vda", step)
                noted.append(step)
                assert path.stat().st_size % RECORD == 0
            elif isinstance(step, bytes):
                if path.exists() and path.stat().st_size % RECORD == 0:
                    with path.open("ab") as file:
                        file.write(step)
            elif step == "restart":
                history = History(name, keep)
            assert history.points(VM, "vda") == noted[-keep:]
            if path.exists():
                assert path.stat().st_size < RECORD * (keep + max(1, keep // 4) + 1)


def test_a_file_stays_small_and_a_point_costs_one_append(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = []
    real = thin_history.files.write_volatile

    def spy(path: str, data: bytes, mode: int) -> None:
        replaced.append(len(data))
        real(path, data, mode)

    monkeypatch.setattr(thin_history.files, "write_volatile", spy)
    history = History(str(tmp_path), 400)
    for number in range(2000):
        history.note(VM, "vda", point(number))
    assert replaced == [400 * RECORD] * 16
    assert history.points(VM, "vda") == [point(number) for number in range(1600, 2000)]
    assert len(os.listdir(tmp_path / VM)) == 1


def test_what_is_no_record_is_left_out(tmp_path: Path) -> None:
    """Zeroes, as a file system leaves them after a power cut, and kinds of a later release."""
    history = History(str(tmp_path))
    history.note(VM, "vda", point(1))
    with file_of(tmp_path).open("ab") as file:
        file.write(bytes(RECORD) + bytes(RECORD - 1) + b"\xff")
    history.note(VM, "vda", point(2))
    assert history.points(VM, "vda") == [point(1), point(2)]


def test_a_directory_that_cannot_be_written_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "thin").write_text("not a directory")
    history = History(str(tmp_path / "thin"))
    with caplog.at_level(logging.ERROR):
        for number in range(5):
            history.note(VM, "vda", point(number))
        assert len(caplog.records) == 1
        assert VM in caplog.text
        os.unlink(tmp_path / "thin")
        history.note(VM, "vda", point(9))
        assert history.points(VM, "vda") == [point(9)]
        assert len(caplog.records) == 1


def test_a_link_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "elsewhere").write_bytes(b"mine")
    file_of(tmp_path).parent.mkdir()
    file_of(tmp_path).symlink_to(tmp_path / "elsewhere")
    history = History(str(tmp_path))
    history.note(VM, "vda", point(1))
    assert history.points(VM, "vda") == []
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"
    assert len(caplog.records) == 2


@pytest.mark.mount
def test_a_full_file_system_costs_points_and_nothing_else(tmp_path: Path) -> None:
    """What could be written stays whole, and it goes on when there is space again."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)]
    subprocess.run(mount, check=True, timeout=30)
    try:
        history = History(str(tmp_path), 100_000)
        history.note(VM, "vda", point(0))
        (tmp_path / "fill").write_bytes(bytes(8192))
        for number in range(1, 1000):
            history.note(VM, "vda", point(number))
        found = history.points(VM, "vda")
        assert 0 < len(found) < 1000
        assert found == [point(number) for number in range(len(found))]
        (tmp_path / "fill").unlink()
        history.note(VM, "vda", point(5000))
        assert history.points(VM, "vda") == [*found, point(5000)]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=30)


def test_threads(tmp_path: Path) -> None:
    """While readers look: whole points, each drive's own, none lost."""
    history, wrong, stop = History(str(tmp_path), 50), list[object](), threading.Event()

    def write(drive: str, vm: str) -> None:
        for number in range(300):
            history.note(vm, drive, point(number))

    def read() -> None:
        while not stop.is_set():
            found = history.points(VM, "vda")
            first = found[0].allocation if found else 0
            if found != [point(first + number) for number in range(len(found))]:
                wrong.append(found)

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [
        threading.Thread(target=write, args=args)
        for args in (("vda", VM), ("vdb", VM), ("vda", OTHER))
    ]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join(60)
    stop.set()
    for thread in readers:
        thread.join(60)
    assert wrong == []
    last = [point(number) for number in range(250, 300)]
    for vm, drive in ((VM, "vda"), (VM, "vdb"), (OTHER, "vda")):
        assert history.points(vm, drive) == last


CHILD = """
import itertools, sys
from vdsm_storage.monitor.thin_history import History, Point
history = History(sys.argv[1], 8)
for number in itertools.count(int(sys.argv[2])):
    history.note(sys.argv[3], "vda", Point(float(number), number, number, number, "event"))
    if number == int(sys.argv[2]) + 40:
        print("on", flush=True)
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Agents that are killed while they write, compacting every few points: what the next one finds
    are the last points of all of them, in order, and it goes on."""
    start = 0
    for _ in range(12):
        argv = [sys.executable, "-c", CHILD, str(tmp_path), str(start), VM]
        child = subprocess.Popen(argv, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"on\n"
        child.send_signal(signal.SIGKILL)
        child.wait(30)
        child.stdout.close()
        found = [each.allocation for each in History(str(tmp_path), 8).points(VM, "vda")]
        assert len(found) == 8
        assert found == list(range(found[-1] - 7, found[-1] + 1))
        assert found[-1] >= start + 40
        start = found[-1] + 1


def test_nothing_is_kept_in_memory(tmp_path: Path) -> None:
    history = History(str(tmp_path))
    before = sum(sys.getsizeof(value) for value in vars(history).values())
    for number in range(300):
        history.note(VM, f"vd{number}", point(number))
    assert sum(sys.getsizeof(value) for value in vars(history).values()) == before


def test_as_the_schema_has_it(tmp_path: Path) -> None:
    schema = Schema()
    history = History(str(tmp_path))
    for number, what in enumerate(KINDS):
        history.note(VM, "vda", point(number, what))
    history.note(VM, "vdb", point(1))
    view = ThinView(history, Board(), SystemClock(), lambda domain: None)
    check = compile_reply(schema, schema.verb("VM.getThinHistory"))
    problems: list[str] = []
    assert check is not None
    told = view.history(VM)
    check(told, "reply", problems)
    assert problems == []
    assert list(told) == ["vda", "vdb"]
    assert told["vda"][2] == {
        "when": 1.7e9 + 2, "allocation": "2", "size": "4", "threshold": "6", "what": "armed",
    }  # fmt: skip
    assert view.history(VM, "vda", 1.7e9 + 8) == {"vda": told["vda"][8:]}
    assert view.history(VM, "vdc") == {"vdc": []}
    assert set(KINDS) == set(schema.type("ThinPointKind", "VM").values)
