# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

from pathlib import Path

import pytest

from vdsm_storage.vms import frozen
from vdsm_storage.vms.frozen import FrozenVms, Record

VM = "11111111-1111-4111-8111-111111111111"


@pytest.mark.parametrize(
    ("by", "state", "after"),
    [
        (frozen.FREEZE, frozen.FREEZING, frozen.THAWING),  # it died while it waited for the agent
        (frozen.FREEZE, frozen.FROZEN, frozen.FROZEN),  # the caller may still thaw it
        (frozen.FREEZE, frozen.THAWING, frozen.THAWING),
        (frozen.FREEZE, frozen.THAWED, frozen.THAWED),
        (frozen.SNAPSHOT, frozen.FROZEN, frozen.THAWING),  # who would have thawed it is dead
    ],
)
def test_what_a_restart_makes_of_a_record(tmp_path: Path, by: str, state: str, after: str) -> None:
    FrozenVms(str(tmp_path)).put(Record(VM, by, 12.5, state, 2))
    found = FrozenVms(str(tmp_path)).get(VM)
    assert found == Record(VM, by, 12.5, after, 2)


def test_a_record_that_is_gone_stays_gone(tmp_path: Path) -> None:
    records = FrozenVms(str(tmp_path))
    records.put(Record(VM, frozen.FREEZE, 1.0))
    records.drop(VM)
    records.set_state(VM, frozen.FROZEN)
    assert records.all() == []
    assert FrozenVms(str(tmp_path)).all() == []


def test_a_damaged_record_is_no_reason_to_leave_a_guest_frozen(tmp_path: Path) -> None:
    (tmp_path / f"{VM}.json").write_text("{")
    (tmp_path / "other.json").write_text("{")
    (found,) = FrozenVms(str(tmp_path)).all()
    assert (found.vm, found.state) == (VM, frozen.THAWING)


def test_only_a_uuid_names_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no UUID"):
        FrozenVms(str(tmp_path)).put(Record("../x", frozen.FREEZE, 1.0))
