# SPDX-License-Identifier: GPL-2.0-or-later
"""For any sequence of changes, what is read of the storage is what lvm's own report says."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.lvm.conftest import LoopDevices, LvmTool, comparable
from vdsm_storage.lvm.cache import CachedGroup
from vdsm_storage.lvm.model import VolumeGroup
from vdsm_storage.lvm.text import parse_group

LV = st.integers(0, 3).map(lambda number: f"vg/lv{number}")
DEVICE = st.integers(0, 2)
SIZE = st.integers(1, 9).map(str)
TAG = st.text("abZ09_+.-/=!:&#", min_size=1, max_size=30).filter(lambda tag: tag[0] != "-")

CREATE = st.tuples(LV, SIZE, TAG).map(
    lambda row: ("lvcreate", *NEW, "-l", row[1], "--addtag", row[2], "-n", row[0])
)
STRIPED = st.tuples(LV, SIZE).map(lambda row: ("lvcreate", *NEW, "-i2", "-l", row[1], "-n", row[0]))
EXTEND = st.tuples(LV, SIZE).map(lambda row: ("lvextend", "-l", f"+{row[1]}", row[0]))
EXTEND_ON = st.tuples(LV, SIZE, st.integers(0, 1)).map(
    lambda row: ("lvextend", "-l", f"+{row[1]}", row[0], f"@{row[2]}")
)
REDUCE = st.tuples(LV, SIZE).map(lambda row: ("lvreduce", "-f", "-y", "-l", row[1], row[0]))
REMOVE = LV.map(lambda lv: ("lvremove", "-y", lv))
RENAME = st.tuples(LV, LV).map(lambda row: ("lvrename", *row))
TAG_LV = st.tuples(LV, TAG).map(lambda row: ("lvchange", "--addtag", row[1], row[0]))
UNTAG_LV = st.tuples(LV, st.sampled_from("ab")).map(
    lambda row: ("lvchange", "--deltag", row[1], row[0])
)
TAG_VG = TAG.map(lambda tag: ("vgchange", "--addtag", tag, "vg"))
TAG_PV = st.tuples(TAG, DEVICE).map(lambda row: ("pvchange", "--addtag", row[0], f"@{row[1]}"))
LOCK_PV = st.tuples(st.sampled_from("yn"), DEVICE).map(
    lambda row: ("pvchange", "-x", row[0], f"@{row[1]}")
)
AREAS = st.tuples(st.sampled_from("yn"), DEVICE).map(
    lambda row: ("pvchange", "--metadataignore", row[0], f"@{row[1]}")
)
EXTEND_VG = DEVICE.map(lambda number: ("vgextend", "vg", f"@{number}"))
REDUCE_VG = DEVICE.map(lambda number: ("vgreduce", "vg", f"@{number}"))
MOST = st.one_of(CREATE, EXTEND, EXTEND_ON, REDUCE, REMOVE, TAG_LV, UNTAG_LV, TAG_VG, RENAME)
CHANGES = st.lists(
    MOST | st.one_of(STRIPED, TAG_PV, LOCK_PV, AREAS, EXTEND_VG, REDUCE_VG),
    min_size=4,
    max_size=20,
)
NEW = ("-an", "-Zn", "-Wn")


def no_report(devices: Sequence[str]) -> VolumeGroup:
    raise AssertionError(f"lvm is asked about {devices}")


def do(lvm: LvmTool, change: Sequence[str], devices: Sequence[str]) -> None:
    """Do it, or let lvm refuse it: that is a change of nothing."""
    words = [devices[int(word[1:])] if word.startswith("@") else word for word in change]
    where = ["--driverloaded", "n", "--devices", ",".join(devices)]
    argv = ["lvm", words[0], *where, *words[1:]]
    subprocess.run(argv, capture_output=True, timeout=60, env=lvm.environment(), check=False)


@given(changes=CHANGES)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_cached_is_what_lvm_reports(
    loops: LoopDevices, lvm: LvmTool, changes: Sequence[Sequence[str]]
) -> None:
    devices = loops.paths or loops(3, size=64 << 20)
    small = ("--metadatasize", "40k", "--metadatacopies", "2", "--dataalignment", "4k")
    lvm("pvcreate", "-ff", "-y", *small, "--metadataignore", "y", *devices)
    lvm("pvchange", "--metadataignore", "n", devices[0])
    lvm("vgcreate", "-s", "1m", "vg", *devices[:2])
    for number in range(3):
        lvm.create("vg", f"lv{number}", 4, tags=["a", "b"])
    cached = CachedGroup("vg", lambda: devices, no_report)
    before = cached.read()
    for change in changes:
        do(lvm, change, devices)
        now = cached.read()
        assert comparable(now) == comparable(lvm.report("vg")), change
        text, group = cached.text()
        assert group is now
        assert parse_group(text) == now
        assert (now is before) == (now.seqno == before.seqno)
        for name in now.lvs.keys() & before.lvs.keys():
            same = now.lvs[name] == before.lvs[name]
            assert (
                now.lvs[name] is before.lvs[name]
            ) == same or now.pvs.keys() != before.pvs.keys()
        before = now
    lvm("vgremove", "-f", "vg")
