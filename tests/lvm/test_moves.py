# SPDX-License-Identifier: GPL-2.0-or-later
"""Moving data: what is refused, what is run, what an interruption leads to.

pvmove itself needs device-mapper, and is tested in the laboratory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.lvm.writing import MIB, VG, group_of, volume
from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.run import Result
from vdsm_storage.errors import (
    ActionStopped,
    AgentError,
    CouldNotMovePVData,
    ForbiddenPhysicalVolumeOperation,
    LvmCommandError,
    NoSuchDestinationPhysicalVolumes,
    NoSuchPhysicalVolume,
    VolumeGroupSizeError,
)
from vdsm_storage.lvm import moves
from vdsm_storage.lvm.archive import Archive
from vdsm_storage.lvm.group import Group
from vdsm_storage.lvm.model import VolumeGroup

BEFORE = group_of(
    volume("metadata", ("pv0", 0, 1)), volume("a", ("pv1", 0, 30)), pvs=(100, 100, 100)
)
AFTER = group_of(
    volume("metadata", ("pv0", 0, 1)), volume("a", ("pv2", 0, 30)), pvs=(100, 100, 100)
)
HELPER = dataclasses.replace(volume("pvmove0", ("", 0, 30)), visible=False)
DURING = group_of(
    volume("metadata", ("pv0", 0, 1)), volume("a", ("", 0, 30)), HELPER, pvs=(100, 100, 100)
)


class Storage:
    """A group, and an lvm whose commands do what `plays` says."""

    timeout = 10.0

    def __init__(self, directory: Path) -> None:
        self.model = BEFORE
        self.ran: list[Sequence[str]] = []
        self.plays: dict[str, Callable[[Mapping[str, Any]], None]] = {}
        self.group = Group(VG, self, self, Archive(str(directory)))  # type: ignore[arg-type]
        self.percents: list[float] = []

    def read(self, within: float = 0.0) -> VolumeGroup:
        return self.model

    def text(self) -> tuple[bytes, VolumeGroup]:
        return b"", self.model

    def devices(self, group: VolumeGroup | None = None) -> Mapping[str, str]:
        return {f"uuid-{n}": f"/dev/{n}" for n in range(3)}

    def forget(self) -> None:
        return

    def run(self, argv: Sequence[str], devices: Sequence[str], **more: Any) -> Result:
        assert devices == ["/dev/0", "/dev/1", "/dev/2"]
        assert more["driver"]
        more["fence"]()
        self.ran.append(argv)
        self.plays["abort" if "--abort" in argv else "move"](more)
        return Result(b"", b"", 0.0)

    def move(self, source: str, *destinations: str, cancel: Cancel | None = None) -> None:
        request = moves.Request(source, destinations, self.percents.append)
        moves.move(self, self.group, request, cancel)  # type: ignore[arg-type]

    def becomes(
        self, model: VolumeGroup, error: Exception | None = None
    ) -> Callable[[Mapping[str, Any]], None]:
        def play(more: Mapping[str, Any]) -> None:
            self.model = model
            if "watch" in more:
                for piece in (b"  /dev/1: Mov", b"ed: 3.33%\n  /dev/1: Moved: 50,0", b"0%\n"):
                    more["watch"].on_output(piece)
            if error is not None:
                raise error

        return play


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


MOVE = ["pvmove", "--autobackup", "n", "--interval", "1", "/dev/1"]
ABORT = ["pvmove", "--abort"]


def test_a_move_with_progress(storage: Storage) -> None:
    storage.plays["move"] = storage.becomes(AFTER)
    storage.move("/dev/1", "/dev/2")
    assert storage.ran == [[*MOVE, "/dev/2"]]
    assert storage.percents == [3.33, 50.0, 100.0]
    storage.move("/dev/1")
    assert len(storage.ran) == 1  # there is nothing left


@pytest.mark.parametrize(
    ("source", "destinations", "error"),
    [
        ("/dev/9", [], NoSuchPhysicalVolume),
        ("/dev/1", ["/dev/2", "/dev/9"], NoSuchDestinationPhysicalVolumes),
        ("/dev/1", ["/dev/1"], ForbiddenPhysicalVolumeOperation),
        ("/dev/0", ["/dev/1"], ForbiddenPhysicalVolumeOperation),
    ],
)
def test_what_is_refused(
    storage: Storage, source: str, destinations: Sequence[str], error: type[AgentError]
) -> None:
    with pytest.raises(error):
        storage.move(source, *destinations)
    assert storage.ran == []


def test_there_must_be_space(storage: Storage) -> None:
    full = volume("b", ("pv2", 0, 71))
    lvs = {**BEFORE.lvs, "b": full, "c": volume("c", ("pv0", 1, 70))}
    storage.model = dataclasses.replace(BEFORE, lvs=lvs)
    message = f"{29 * MIB} bytes free, {30 * MIB} are needed"
    with pytest.raises(VolumeGroupSizeError, match=message):
        storage.move("/dev/1", "/dev/2")
    storage.plays["move"] = storage.becomes(AFTER)
    storage.move("/dev/1")


def test_an_interrupted_move_is_aborted_first(storage: Storage) -> None:
    storage.model = DURING
    storage.plays = {"abort": storage.becomes(BEFORE), "move": storage.becomes(AFTER)}
    storage.move("/dev/1", "/dev/2")
    assert storage.ran == [ABORT, [*MOVE, "/dev/2"]]


def test_cancelling_aborts(storage: Storage) -> None:
    storage.plays = {
        "move": storage.becomes(DURING, ActionStopped()),
        "abort": storage.becomes(BEFORE),
    }
    with pytest.raises(ActionStopped):
        storage.move("/dev/1", cancel=Cancel())
    assert storage.ran == [MOVE, ABORT]
    assert storage.percents == [3.33, 50.0]


def test_a_failure_aborts_and_tells_why(storage: Storage) -> None:
    error = LvmCommandError(command="pvmove", vg=VG, reason="no mirror target")
    storage.plays["move"] = storage.becomes(BEFORE, error)
    with pytest.raises(CouldNotMovePVData, match=r"/dev/1 .*no mirror target"):
        storage.move("/dev/1")
    assert storage.ran == [MOVE]
    storage.plays = {"move": storage.becomes(DURING, error), "abort": storage.becomes(BEFORE)}
    with pytest.raises(CouldNotMovePVData):
        storage.move("/dev/1")
    assert storage.ran[1:] == [MOVE, ABORT]


def test_an_abort_that_fails(storage: Storage) -> None:
    storage.model = DURING
    error = LvmCommandError(command="pvmove", vg=VG, reason="no device-mapper")
    storage.plays["abort"] = storage.becomes(DURING, error)
    with pytest.raises(CouldNotMovePVData, match="no device-mapper"):
        storage.move("/dev/1")
    assert storage.ran == [ABORT]
    storage.plays["abort"] = storage.becomes(BEFORE, error)
    storage.model = DURING
    moves.abort(storage, storage.group, "/dev/1")  # type: ignore[arg-type]


def test_a_move_that_leaves_something_is_a_failure(storage: Storage) -> None:
    storage.plays["move"] = storage.becomes(BEFORE)
    with pytest.raises(CouldNotMovePVData, match="30 extents are still there"):
        storage.move("/dev/1")


def test_nothing_runs_when_the_lock_may_be_lost(storage: Storage) -> None:
    def lost() -> None:
        raise ActionStopped

    storage.group.fence = lost
    storage.model = DURING
    with pytest.raises(ActionStopped):
        storage.move("/dev/1")
    storage.model = BEFORE
    with pytest.raises(ActionStopped):
        storage.move("/dev/1")
    assert storage.ran == []
