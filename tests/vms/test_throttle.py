# SPDX-License-Identifier: GPL-2.0-or-later
"""Limits of a disk that is slowed for a while; functional/test_thin_brake.py does it to guests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdsm_storage.host.libvirt_disks import LibvirtDisks
from vdsm_storage.host.libvirt_model import VmError, Why
from vdsm_storage.vms.throttle import TOTAL, WRITE, Throttles, restored, slowed

VM = "3f1c1d0e-6f0b-4c53-8d6e-0e2f7f3d9a11"
NONE = dict.fromkeys(
    ("total_bytes_sec", "read_bytes_sec", "write_bytes_sec",
     "total_iops_sec", "read_iops_sec", "write_iops_sec"), 0,
)  # fmt: skip

rates = st.integers(1, 2**40)


class Disks:
    """What libvirt was told; only the two calls that are used."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        self.limits = {**NONE, **limits}
        self.error: VmError | None = None

    def io_tune(self, _vm: str, _disk: str) -> dict[str, int]:
        return dict(self.limits)

    def set_io_tune(self, _vm: str, _disk: str, limits: Mapping[str, int]) -> None:
        if self.error is not None:
            raise self.error
        self.limits.update(limits)


def throttles(path: Path, disks: Disks) -> Throttles:
    return Throttles(str(path), cast(LibvirtDisks, disks))


@given(limits=st.dictionaries(st.sampled_from([*NONE]), rates), rate=rates)
def test_writes_are_at_most_so_fast_and_no_limit_rises(limits: dict[str, int], rate: int) -> None:
    if limits.get(TOTAL):  # libvirt has either
        limits = {**limits, WRITE: 0, "read_bytes_sec": 0}
    now = slowed(limits, rate)
    assert 0 < (now[TOTAL] or now[WRITE]) <= rate
    assert not (now[TOTAL] and now[WRITE])
    for key, value in restored(limits).items():
        assert not value or 0 < now[key] <= value


def test_bursts_would_be_faster() -> None:
    limits = {WRITE: 100, "write_bytes_sec_max": 1000, "write_bytes_sec_max_length": 5}
    now = slowed(limits, 50)
    assert (now[WRITE], now["write_bytes_sec_max"], now["write_bytes_sec_max_length"]) == (50, 0, 0)
    assert restored(limits) == {**NONE, **limits}


@pytest.mark.parametrize("user", [{}, {WRITE: 10**9}, {TOTAL: 10**9}, {WRITE: 10}])
def test_the_user_s_limits_come_back(tmp_path: Path, user: dict[str, int]) -> None:
    disks = Disks(user)
    one = throttles(tmp_path, disks)
    one.lower(VM, "vda", 1000)
    one.lower(VM, "vda", 500)
    assert max(disks.limits[WRITE], disks.limits[TOTAL]) == min([500, *user.values()])
    assert one.lowered() == [(VM, "vda")]
    assert one.of(VM) == {"vda": one.user(VM, "vda")}
    assert one.user(VM, "vda") == {**NONE, **user}
    one.lift(VM, "vda")
    assert disks.limits == {**NONE, **user}
    assert one.lowered() == []
    assert list(tmp_path.iterdir()) == []
    disks.error = AssertionError  # type: ignore[assignment]
    one.lift(VM, "vda")  # nothing is asked of libvirt


def test_another_agent_gives_them_back(tmp_path: Path) -> None:
    disks = Disks({WRITE: 10**9})
    throttles(tmp_path, disks).lower(VM, "vda", 500)
    another = throttles(tmp_path, disks)
    assert another.lowered() == [(VM, "vda")]
    another.lift(VM, "vda")
    assert disks.limits == {**NONE, WRITE: 10**9}


def test_limits_that_are_set_meanwhile(tmp_path: Path) -> None:
    disks = Disks({WRITE: 10**9})
    one = throttles(tmp_path, disks)
    one.lower(VM, "vda", 500)
    one.set_limits(VM, "vda", {**NONE, TOTAL: 10**6})
    assert (disks.limits[TOTAL], disks.limits[WRITE]) == (500, 0)
    assert throttles(tmp_path, disks).user(VM, "vda") == {**NONE, TOTAL: 10**6}
    one.lift(VM, "vda")
    assert disks.limits == {**NONE, TOTAL: 10**6}
    one.set_limits(VM, "vda", {**NONE, WRITE: 7})
    assert disks.limits == {**NONE, WRITE: 7}


def test_one_that_libvirt_refuses_stays_known(tmp_path: Path) -> None:
    disks = Disks({WRITE: 10**9})
    one = throttles(tmp_path, disks)
    one.lower(VM, "vda", 500)
    disks.error = VmError(Why.OTHER, "busy")
    with pytest.raises(VmError):
        one.lift(VM, "vda")
    assert one.lowered() == [(VM, "vda")]
    disks.error = VmError(Why.NO_VM, "gone")
    one.lift(VM, "vda")
    assert one.lowered() == []


def test_a_vm_that_ended(tmp_path: Path) -> None:
    one = throttles(tmp_path, Disks({}))
    one.lower(VM, "vda", 500)
    one.lower(VM, "vdb", 500)
    one.forget(VM)
    assert one.lowered() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"write_bytes_sec": "many"}'])
def test_a_broken_file(tmp_path: Path, content: bytes) -> None:
    """The disk gets no limits, rather than those of the brake for ever."""
    (tmp_path / f"{VM}.vda.json").write_bytes(content)
    (tmp_path / "other").write_bytes(json.dumps({}).encode())
    disks: Any = Disks({WRITE: 500})
    one = throttles(tmp_path, disks)
    one.lift(VM, "vda")
    assert disks.limits == NONE
