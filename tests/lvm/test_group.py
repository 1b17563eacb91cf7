# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes of a real volume group: alone, together, and when lvm fails."""

from __future__ import annotations

import functools
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.lvm.conftest import LoopDevices, LvmTool, program
from tests.lvm.writing import (
    MIB,
    VG,
    CountedLvm,
    check,
    made_group,
    open_group,
    side_by_side,
    sizes,
    told,
)
from vdsm_storage.errors import (
    ActionStopped,
    CannotCreateLogicalVolume,
    CommandTimeout,
    InaccessiblePhysDev,
    LogicalVolumeDoesNotExist,
    LogicalVolumeExtendError,
    LvmCommandError,
    ResourceTimeout,
    UnexpectedVolumeGroupMetadata,
    VolumeGroupDoesNotExist,
    VolumeGroupSizeError,
)
from vdsm_storage.lvm.changes import (
    Change,
    CreateLv,
    ExtendLv,
    ReduceLv,
    RemoveLv,
    RetagLv,
    RetagVg,
)
from vdsm_storage.lvm.group import Group

Made = tuple[Group, CountedLvm]


@pytest.fixture
def made(loops: LoopDevices, lvm: LvmTool, tmp_path: Path) -> Made:
    return made_group(loops, lvm, tmp_path)


@pytest.mark.parametrize(
    ("change", "command"),
    [
        (CreateLv("b", 3 * MIB, ("T", "U")), "lvcreate"),
        (ExtendLv("a", 9 * MIB - 1), "lvextend"),
        (ReduceLv("a", MIB), "lvreduce"),
        (RemoveLv("a"), "lvremove"),
        (RetagLv("a", ("NEW", "X"), ("OLD", "gone")), "lvchange"),
        (RetagVg(("NEW",), ("gone",)), "vgchange"),
    ],
)
def test_each_change_alone(made: Made, lvm: LvmTool, change: Change, command: str) -> None:
    group, ours = made
    before = group.apply(CreateLv("a", 5 * MIB, ("OLD", "KEPT")))
    ours.version()
    ours.ran.clear()
    after = group.apply(change)
    assert ours.commands() == [command]
    assert after.seqno == before.seqno + 1
    assert sizes(after) == sizes(told(lvm))
    expected = {
        "lvcreate": {"a": (5, {"OLD", "KEPT"}), "b": (3, {"T", "U"})},
        "lvextend": {"a": (9, {"OLD", "KEPT"})},
        "lvreduce": {"a": (1, {"OLD", "KEPT"})},
        "lvremove": {},
        "lvchange": {"a": (5, {"KEPT", "NEW", "X"})},
        "vgchange": {"a": (5, {"OLD", "KEPT"})},
    }
    assert sizes(after) == expected[command]
    assert after.tags == (("NEW",) if command == "vgchange" else ())
    ours.ran.clear()
    if command != "lvcreate":
        assert group.apply(change) is after
        assert ours.ran == []
    check(lvm, after)


def test_many_changes_are_one_commit(made: Made, lvm: LvmTool) -> None:
    group, ours = made
    before = group.apply(CreateLv("a", 5 * MIB, ("OLD",)))
    ours.ran.clear()
    after = group.apply(
        CreateLv("b", 3 * MIB, ("T",)),
        ExtendLv("a", 9 * MIB),
        RetagLv("a", ("NEW",), ("OLD",)),
        RetagVg(("VG",)),
        *(CreateLv(f"c{n}", MIB) for n in range(50)),
    )
    assert ours.commands() == ["vgcfgrestore"]
    assert after.seqno == before.seqno + 1
    assert sizes(after) == sizes(told(lvm))
    assert sizes(after)["a"] == (9, {"NEW"})
    check(lvm, after)
    ours.ran.clear()
    after = group.apply(*(RemoveLv(f"c{n}") for n in range(20)))
    assert ours.commands() == ["lvremove"]
    after = group.apply(*(RemoveLv(name) for name in after.lvs))
    assert after.lvs == {}
    check(lvm, after)


def test_all_or_nothing(made: Made) -> None:
    group, ours = made
    before = group.apply(CreateLv("a", 5 * MIB))
    ours.ran.clear()
    with pytest.raises(LogicalVolumeDoesNotExist, match="vg1/nope"):
        group.apply(ExtendLv("a", 9 * MIB), RemoveLv("gone"), ExtendLv("nope", MIB))
    with pytest.raises(
        VolumeGroupSizeError, match=f"{before.free + MIB} bytes free, {1 << 40} are"
    ):
        group.apply(RemoveLv("a"), CreateLv("b", 4 * MIB), CreateLv("c", 1 << 40))
    assert ours.ran == []
    assert group.read() is before


def test_twenty_callers(made: Made, lvm: LvmTool) -> None:
    group, ours = made
    begun = threading.Event()

    def work(n: int) -> None:
        begun.wait()
        group.apply(CreateLv(f"v{n}", MIB, ("A", f"N{n}")))
        group.apply(ExtendLv(f"v{n}", (n + 2) * MIB))
        group.apply(RetagLv(f"v{n}", ("B",), ("A",)), RetagVg((f"G{n}",)))

    begun.set()
    assert side_by_side(*(functools.partial(work, n) for n in range(20))) == 20 * [None]
    expected = {f"v{n}": (n + 2, {"B", f"N{n}"}) for n in range(20)}
    assert sizes(group.read()) == sizes(told(lvm)) == expected
    assert set(group.read().tags) == {f"G{n}" for n in range(20)}
    commits = [command for command in ours.commands() if command != "version"]
    assert len(commits) <= 15  # of 60 changes; three to five is what it takes
    check(lvm, group.read())


def test_those_that_are_about_to_come_are_waited_for(made: Made, lvm: LvmTool) -> None:
    """Ten that do not come at the same moment share a commit; who is alone does not wait."""
    group, ours = made
    group.apply(*(CreateLv(f"v{n}", MIB) for n in range(10)))
    group.peers = lambda: 10
    ours.ran.clear()

    def work(n: int) -> None:
        time.sleep(n * 0.001)
        group.apply(ExtendLv(f"v{n}", 2 * MIB))

    assert side_by_side(*(functools.partial(work, n) for n in range(10))) == 10 * [None]
    assert len([command for command in ours.commands() if command != "version"]) <= 4
    group.peers = lambda: 1
    assert group.apply(RemoveLv("v0")).lvs.keys() == {f"v{n}" for n in range(1, 10)}
    check(lvm, group.read())


def test_who_cannot_be_served_disturbs_nobody(made: Made, lvm: LvmTool) -> None:
    group, _ = made
    free = group.read().extents
    share = free // 4

    def work(n: int) -> None:
        group.apply(CreateLv(f"v{n}", share * MIB))

    errors = side_by_side(*(functools.partial(work, n) for n in range(9)))
    assert [type(error) for error in errors if error] == 5 * [VolumeGroupSizeError]
    assert len(group.read().lvs) == 4
    for n, error in enumerate(errors):
        assert (f"v{n}" in group.read().lvs) == (error is None)
    check(lvm, group.read())


def test_a_full_group(made: Made, lvm: LvmTool) -> None:
    group, ours = made
    whole = group.read().extents
    after = group.apply(CreateLv("a", whole * MIB))
    assert after.free == 0
    ours.ran.clear()
    for change in (CreateLv("b", 1), ExtendLv("a", whole * MIB + 1)):
        with pytest.raises(VolumeGroupSizeError, match="has 0 bytes free, 1048576 are needed"):
            group.apply(change)
    assert ours.ran == []
    group.apply(RetagLv("a", ("T",)), RetagVg(("T",)))
    assert group.apply(ReduceLv("a", MIB), CreateLv("b", MIB)).lvs.keys() == {"a", "b"}
    check(lvm, group.read())


def test_a_device_that_is_gone(made: Made, lvm: LvmTool, loops: LoopDevices) -> None:
    group, ours = made
    before = group.apply(CreateLv("a", 5 * MIB))
    # Not detached: others who look for a free loop device would take it.
    left, lost = loops.paths[:1], loops.paths[1]
    partial = open_group(left, ours)
    ours.ran.clear()
    for change in (CreateLv("b", MIB), ExtendLv("a", 9 * MIB), RemoveLv("a"), RetagVg(("T",))):
        with pytest.raises(InaccessiblePhysDev, match=lost):
            partial.apply(change)
    assert ours.ran == []
    assert partial.read().partial
    assert group.read() == before
    assert sizes(group.apply(ExtendLv("a", 9 * MIB))) == {"a": (9, set())}
    check(lvm, group.read())


def test_copied_devices_are_refused(made: Made, lvm: LvmTool, loops: LoopDevices) -> None:
    group, ours = made
    before = group.apply(CreateLv("a", 5 * MIB))
    (copy,) = loops(1)
    devices = loops.paths
    subprocess.run(["cp", "--sparse=always", devices[0], copy], check=True)
    doubled = open_group(devices, ours)
    ours.ran.clear()
    with pytest.raises(UnexpectedVolumeGroupMetadata, match="same physical volume"):
        doubled.apply(ExtendLv("a", 9 * MIB))
    assert [command for command in ours.commands() if command != "fullreport"] == []
    program("wipefs", "--all", "--quiet", copy)
    assert open_group(devices, ours).read() == before


def test_a_group_that_is_not_there(loops: LoopDevices, tmp_path: Path) -> None:
    with pytest.raises(VolumeGroupDoesNotExist):
        open_group(loops(1), CountedLvm(str(tmp_path))).apply(RemoveLv("a"))


# -- when lvm fails --------------------------------------------------------------------------


def test_an_alien_change_between_reading_and_writing(made: Made, lvm: LvmTool) -> None:
    """Only someone without the domain's lock does that; what he did is kept."""
    group, ours = made
    text = group.metadata.text

    def disturbed() -> tuple[bytes, object]:
        group.metadata.text = text  # type: ignore[method-assign]
        answer = text()
        lvm.create(VG, "alien", 3)
        return answer

    group.metadata.text = disturbed  # type: ignore[method-assign, assignment]
    after = group.apply(CreateLv("a", MIB), CreateLv("b", MIB))
    assert sizes(after) == {"alien": (3, set()), "a": (1, set()), "b": (1, set())}
    assert ours.commands().count("vgcfgrestore") == 1
    check(lvm, after)


def test_without_vgcfgrestore_there_are_single_commands(made: Made, lvm: LvmTool) -> None:
    group, ours = made
    group.apply(CreateLv("a", 5 * MIB, ("T",)))
    ours.refuse["vgcfgrestore"] = LvmCommandError(command="vgcfgrestore", vg=VG, reason="no")
    ours.ran.clear()
    after = group.apply(ExtendLv("a", 9 * MIB), RetagLv("a", ("U",), ("T",)), CreateLv("b", MIB))
    assert sizes(after) == {"a": (9, {"U"}), "b": (1, set())}
    assert ours.commands() == ["vgcfgrestore", "lvextend", "lvchange", "lvcreate"]
    ours.ran.clear()
    errors = side_by_side(
        lambda: group.apply(CreateLv("c", MIB), RetagVg(("V",))),
        lambda: group.apply(CreateLv("d", MIB), RetagLv("a", ("W",))),
    )
    assert errors == [None, None]
    check(lvm, group.read())


def test_half_a_change_is_taken_back(made: Made, lvm: LvmTool) -> None:
    group, ours = made
    before = group.apply(CreateLv("a", 5 * MIB, ("T",)), CreateLv("r", MIB))
    for command in ("vgcfgrestore", "lvcreate"):
        ours.refuse[command] = LvmCommandError(command=command, vg=VG, reason="refused")
    with pytest.raises(CannotCreateLogicalVolume, match="refused"):
        group.apply(
            ExtendLv("a", 9 * MIB), RetagLv("a", ("U",), ("T",)), CreateLv("b", MIB), RemoveLv("r")
        )
    assert sizes(group.read()) == sizes(before)
    check(lvm, group.read())


def test_lvms_own_words_are_in_the_error(made: Made) -> None:
    group, ours = made
    group.apply(CreateLv("a", 5 * MIB))
    real = ours.run

    def misled(argv: list[str], *args: object, **more: object) -> object:
        if argv[0] == "lvextend":
            argv = [argv[0], "--size", f"{1 << 40}b", f"{VG}/a"]
        return real(argv, *args, **more)  # type: ignore[arg-type]

    ours.run = misled  # type: ignore[method-assign, assignment]
    with pytest.raises(LogicalVolumeExtendError, match="Insufficient free space") as caught:
        group.apply(ExtendLv("a", 9 * MIB))
    assert "WARNING" not in str(caught.value)
    assert caught.value.code == 554


@pytest.mark.parametrize("ends", ["before", "after"])
def test_what_really_happened_decides_after_a_time_out(made: Made, lvm: LvmTool, ends: str) -> None:
    group, ours = made
    before = group.apply(CreateLv("a", 5 * MIB))
    real = ours.run

    def late(argv: list[str], *args: object, **more: object) -> object:
        if ends == "after":
            real(argv, *args, **more)  # type: ignore[arg-type]
        raise CommandTimeout(program="lvm", seconds=1, stderr="no answer")

    ours.run = late  # type: ignore[method-assign, assignment]
    if ends == "after":
        after = group.apply(ExtendLv("a", 9 * MIB), RetagVg(("T",)))
        assert (sizes(after), after.tags) == ({"a": (9, set())}, ("T",))
        assert group.apply(CreateLv("b", MIB)).lvs.keys() == {"a", "b"}
    else:
        for changes in ([ExtendLv("a", 9 * MIB)], [ExtendLv("a", 9 * MIB), RetagVg(("T",))]):
            with pytest.raises(CommandTimeout):
                group.apply(*changes)
        assert group.read() is before
    check(lvm, group.read())


def test_waiting_for_the_group_is_bounded(made: Made) -> None:
    group, ours = made
    ours.timeout = 0.05
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with group.exclusive():
            held.set()
            done.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with pytest.raises(ResourceTimeout):
        group.apply(CreateLv("a", MIB))
    ours.timeout = 60.0
    done.set()
    holder.join()
    assert group.apply(CreateLv("b", MIB)).lvs.keys() == {"b"}


def test_earlier_metadata_is_kept(made: Made, tmp_path: Path) -> None:
    group, _ = made
    group.apply(CreateLv("a", MIB))
    assert group.archive.kept(VG) == []
    before = group.apply(CreateLv("b", MIB), CreateLv("c", MIB))
    group.apply(RemoveLv("a"))
    (newest, *_) = group.archive.kept(VG)
    assert newest.endswith(f"{VG}_{before.seqno}.vg")
    group.lvm.run(
        ["vgcfgrestore", "--yes", "--file", newest, VG], list(group.devices().values()), vg=VG
    )
    assert group.read().lvs.keys() == {"a", "b", "c"}
    for n in range(20):
        group.archive.keep(VG, 100 + n, b"x")
    assert len(group.archive.kept(VG)) == 10
    assert group.archive.kept(VG)[0].endswith("_119.vg")


def test_nothing_is_written_when_the_lock_may_be_lost(made: Made) -> None:
    group, _ = made
    before = group.apply(CreateLv("a", MIB))

    def lost() -> None:
        raise ActionStopped

    group.fence = lost
    for changes in ([ExtendLv("a", 9 * MIB)], [ExtendLv("a", 9 * MIB), RetagVg(("T",))]):
        with pytest.raises(ActionStopped):
            group.apply(*changes)
    assert group.apply(ExtendLv("a", MIB)) is before
    assert group.read() is before
