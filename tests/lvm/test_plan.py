# SPDX-License-Identifier: GPL-2.0-or-later
"""Plans: what several callers' changes make of a group."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from tests.lvm.writing import MIB, group_of, volume
from vdsm_storage.errors import (
    AgentError,
    CannotCreateLogicalVolume,
    LogicalVolumeAlreadyExists,
    LogicalVolumeDoesNotExist,
    LogicalVolumeExtendError,
    LogicalVolumeReplaceTagError,
    UnexpectedVolumeGroupMetadata,
    VolumeGroupSizeError,
)
from vdsm_storage.lvm.allocation import free_areas
from vdsm_storage.lvm.changes import (
    Change,
    CreateLv,
    ExtendLv,
    ReduceLv,
    RemoveLv,
    RetagLv,
    RetagVg,
)
from vdsm_storage.lvm.model import LogicalVolume, VolumeGroup
from vdsm_storage.lvm.native import natives
from vdsm_storage.lvm.plan import Plan, make_plan

DEVICES = {"uuid-0": "/dev/a", "uuid-1": "/dev/b"}


def plan_of(group: VolumeGroup, *transactions: Sequence[Change]) -> Plan:
    numbers = itertools.count()
    return make_plan(group, transactions, lambda: f"new-{next(numbers)}")


def places(lv: LogicalVolume) -> list[tuple[str, int, int]]:
    return [(s.pv, s.pv_start, s.count) for s in lv.segments]


def commands(plan: Plan) -> list[list[str]]:
    assert plan.errors.count(None) == len(plan.errors), plan.errors
    found = natives(plan, DEVICES, lambda: (2, 3, 16))
    common = ["--yes", "--autobackup", "n"]
    assert all(list(native.argv[1:4]) == common for native in found)
    return [[native.argv[0], *native.argv[4:]] for native in found]


def test_a_volume_gets_the_lowest_area_that_is_large_enough() -> None:
    group = group_of(volume("a", ("pv0", 2, 8)), volume("b", ("pv0", 15, 5)))
    plan = plan_of(group, [CreateLv("c", 5 * MIB), CreateLv("d", 2 * MIB), CreateLv("e", 9 * MIB)])
    assert places(plan.after.lvs["c"]) == [("pv0", 10, 5)]
    assert places(plan.after.lvs["d"]) == [("pv0", 0, 2)]
    assert places(plan.after.lvs["e"]) == [("pv0", 20, 9)]


def test_a_volume_grows_where_it_ends_and_elsewhere_when_it_must() -> None:
    group = group_of(volume("a", ("pv0", 0, 5)), volume("b", ("pv0", 8, 92)))
    plan = plan_of(group, [ExtendLv("a", 7 * MIB)], [ExtendLv("a", 12 * MIB)])
    assert places(plan.after.lvs["a"]) == [("pv0", 0, 8), ("pv1", 0, 4)]
    assert [s.start for s in plan.after.lvs["a"].segments] == [0, 8]


@pytest.mark.parametrize(
    ("size", "left"), [(7, ((7, 1), (20, 80))), (8, ((20, 80),)), (9, ((21, 79),))]
)
def test_what_is_left_when_a_volume_grows(size: int, left: tuple[tuple[int, int], ...]) -> None:
    """By a part of the space where it ends, by all of it, by more."""
    group = group_of(volume("a", ("pv0", 0, 5)), volume("b", ("pv0", 8, 12)))
    plan = plan_of(group, [ExtendLv("a", size * MIB)])
    free = free_areas(plan.after)
    assert free is not None
    assert free.areas["pv0"] == left
    assert sum(s.count for s in plan.after.lvs["a"].segments) == size


def test_space_that_becomes_free_is_used_by_who_comes_later() -> None:
    group = group_of(volume("a", ("pv0", 0, 100)), volume("b", ("pv1", 0, 100)))
    changes = [ExtendLv("b", 101 * MIB)]
    plan = plan_of(group, changes, [RemoveLv("a")], changes)
    assert isinstance(plan.errors[0], VolumeGroupSizeError)
    assert plan.errors[1:] == [None, None]
    assert places(plan.after.lvs["b"]) == [("pv1", 0, 100), ("pv0", 0, 1)]


def test_a_volume_is_cut_at_its_end() -> None:
    group = group_of(volume("a", ("pv0", 0, 5), ("pv1", 7, 5)))
    assert places(plan_of(group, [ReduceLv("a", 7 * MIB)]).after.lvs["a"]) == [
        ("pv0", 0, 5),
        ("pv1", 7, 2),
    ]
    assert places(plan_of(group, [ReduceLv("a", 5 * MIB)]).after.lvs["a"]) == [("pv0", 0, 5)]


def test_sizes_are_rounded_up_to_extents() -> None:
    group = group_of(volume("a", ("pv0", 0, 3)))
    plan = plan_of(
        group, [ExtendLv("a", 3 * MIB + 1), CreateLv("b", 1)], [ReduceLv("a", 2 * MIB + 1)]
    )
    assert plan.after.lvs["a"].extents == 3
    assert plan.after.lvs["b"].extents == 1


def test_changes_that_hold_already_are_no_changes() -> None:
    group = group_of(volume("a", ("pv0", 0, 3), tags=("X",)))
    changes = [
        ExtendLv("a", 2 * MIB),
        ReduceLv("a", 3 * MIB),
        RemoveLv("gone"),
        RetagLv("a", add=("X",), remove=("Y",)),
        RetagVg(add=("OLD",), remove=("NEW",)),
    ]
    plan = plan_of(group, changes)
    assert plan.errors == [None]
    assert not plan.changes
    assert plan.reached(group, 0)


def test_a_tag_that_is_removed_and_added_is_there_and_new_ones_are_last() -> None:
    group = group_of(volume("a", ("pv0", 0, 3), tags=("X", "Y")))
    plan = plan_of(group, [RetagLv("a", add=("Z", "Y", "A"), remove=("X", "Y"))])
    assert plan.after.lvs["a"].tags == ("Y", "Z", "A")


def test_tags_that_go_and_come_again_are_no_change() -> None:
    group = group_of(volume("a", ("pv0", 0, 3), tags=("X", "Y")))
    gone = [RetagLv("a", remove=("X",)), RetagVg(remove=("OLD",)), RetagVg(add=("NEW",))]
    back = [RetagLv("a", add=("X",)), RetagVg(add=("OLD",), remove=("NEW",))]
    plan = plan_of(group, gone, back)
    assert not plan.changes
    assert (plan.after.lvs["a"].tags, plan.after.tags) == (("X", "Y"), ("OLD",))


def test_a_transaction_that_fails_leaves_nothing_and_disturbs_no_other() -> None:
    group = group_of(volume("a", ("pv0", 0, 3)), pvs=(10,))
    plan = plan_of(
        group,
        [CreateLv("b", 2 * MIB)],
        [CreateLv("c", MIB), RetagVg(add=("T",)), RemoveLv("b"), ExtendLv("nope", MIB)],
        [CreateLv("d", 5 * MIB)],
        [ExtendLv("b", 3 * MIB)],
    )
    assert isinstance(plan.errors[1], LogicalVolumeDoesNotExist)
    assert isinstance(plan.errors[3], VolumeGroupSizeError)
    assert (plan.errors[3].free, plan.errors[3].size) == (0, MIB)
    assert sorted(plan.after.lvs) == ["a", "b", "d"]
    assert plan.after.tags == ("OLD",)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (CreateLv("a", MIB), LogicalVolumeAlreadyExists),
        (CreateLv("b", 0), CannotCreateLogicalVolume),
        (CreateLv("-b", MIB), CannotCreateLogicalVolume),
        (CreateLv("pvmove0", MIB), CannotCreateLogicalVolume),
        (CreateLv("b/c", MIB), CannotCreateLogicalVolume),
        (CreateLv("x" * 128, MIB), CannotCreateLogicalVolume),
        (CreateLv("b", MIB, ("no tag",)), CannotCreateLogicalVolume),
        (ExtendLv("a", -1), LogicalVolumeExtendError),
        (ReduceLv("a", 0), LogicalVolumeExtendError),
        (RetagLv("a", ("x" * 1025,)), LogicalVolumeReplaceTagError),
        (RetagVg(('"',)), LogicalVolumeReplaceTagError),
        (ExtendLv("gone", MIB), LogicalVolumeDoesNotExist),
        (ReduceLv("gone", MIB), LogicalVolumeDoesNotExist),
        (RetagLv("gone"), LogicalVolumeDoesNotExist),
        (CreateLv("b", 198 * MIB), VolumeGroupSizeError),
        (ExtendLv("moving", 6 * MIB), UnexpectedVolumeGroupMetadata),
        (RemoveLv("moving"), UnexpectedVolumeGroupMetadata),
    ],
)
def test_changes_that_cannot_be_made(change: Change, error: type[AgentError]) -> None:
    group = group_of(volume("a", ("pv0", 0, 3)))
    if getattr(change, "name", "") == "moving":
        group = group_of(volume("moving", ("", 0, 5)))
    assert type(plan_of(group, [change]).errors[0]) is error


def test_nothing_is_allocated_while_places_are_not_known() -> None:
    group = group_of(volume("moving", ("", 0, 5)), volume("a", ("pv0", 0, 3)))
    plan = plan_of(group, [ExtendLv("a", 9 * MIB)], [RetagLv("a", ("X",))], [RemoveLv("a")])
    assert [type(e) for e in plan.errors] == [UnexpectedVolumeGroupMetadata, *2 * [type(None)]]


def test_one_difference_is_one_command() -> None:
    group = group_of(
        volume("a", ("pv0", 0, 3), tags=("X", "Y")), volume("b", ("pv0", 3, 97), ("pv1", 0, 10))
    )
    keep = ["--activate", "n", "--zero", "n", "--wipesignatures", "n", "--contiguous", "n"]
    made = ["lvcreate", *keep, "--size", "2097152b", "--addtag", "T", "--addtag", "U"]
    cases: list[tuple[list[Change], list[list[str]]]] = [
        (
            [CreateLv("c", MIB, ("T",)), ExtendLv("c", 2 * MIB), RetagLv("c", ("U",))],
            [[*made, "--name", "c", "vg1", "/dev/b:10-11"]],
        ),
        ([ExtendLv("a", 5 * MIB)], [["lvextend", "--size", "5242880b", "vg1/a", "/dev/b:10-11"]]),
        ([ReduceLv("b", 98 * MIB)], [["lvreduce", "--force", "--size", "102760448b", "vg1/b"]]),
        ([RemoveLv("a"), RemoveLv("b")], [["lvremove", "--force", "vg1/a", "vg1/b"]]),
        (
            [RetagLv("a", ("Z",)), RetagLv("a", ("W",), ("X", "gone"))],
            [["lvchange", "--deltag", "X", "--addtag", "Z", "--addtag", "W", "vg1/a"]],
        ),
        (
            [RetagVg(("N",), ("OLD",)), RetagVg(("M",))],
            [["vgchange", "--deltag", "OLD", "--addtag", "N", "--addtag", "M", "vg1"]],
        ),
        ([CreateLv("c", MIB), RemoveLv("c")], []),
        ([ExtendLv("a", 5 * MIB), ReduceLv("a", 3 * MIB)], []),
    ]
    for changes, expected in cases:
        assert commands(plan_of(group, changes)) == expected


def test_growing_in_several_places_tells_lvm_all_of_them() -> None:
    group = group_of(volume("a", ("pv0", 0, 3)), volume("b", ("pv0", 5, 95), ("pv1", 3, 97)))
    (argv,) = commands(plan_of(group, [ExtendLv("a", 8 * MIB)]))
    assert argv[-2:] == ["/dev/a:3-4", "/dev/b:0-2"]


def test_a_volume_made_anew_is_removed_first() -> None:
    group = group_of(volume("a", ("pv0", 0, 3)))
    plan = plan_of(group, [RemoveLv("a"), CreateLv("a", MIB)])
    assert [argv[0] for argv in commands(plan)] == ["lvremove", "lvcreate"]


def test_newer_lvm_is_told_to_leave_file_systems_alone() -> None:
    group = group_of(volume("a", ("pv0", 0, 3)))
    (native,) = natives(plan_of(group, [ReduceLv("a", MIB)]), DEVICES, lambda: (2, 3, 22))
    assert list(native.argv[4:6]) == ["--fs", "ignore"]
