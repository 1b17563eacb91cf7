# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest

from vdsm_storage.host.libvirt_blockjobs import BlockJob
from vdsm_storage.vms.merge_request import MergeRequest, Standing

ACTIVE = MergeRequest("vm", "sd", "image", leaf="c", base="b", top="c")
INNER = MergeRequest("vm", "sd", "image", leaf="c", base="a", top="b")

def test_what_is_above_top() -> None:
    assert ACTIVE.active
    assert ACTIVE.child(["c", "b", "a"]) is None
    assert ACTIVE.child(["b", "a"]) is None  # after the pivot
    assert not INNER.active
    assert INNER.child(["c", "b", "a"]) == "c"
    assert INNER.child(["c", "a"]) == "c"  # after the merge


def test_when_it_has_merged() -> None:
    job = BlockJob("commit", 1, 2, 0)
    assert not Standing(["c", "b", "a"], job, "yes").has_merged(ACTIVE)
    assert Standing(["b", "a"], None, "").has_merged(ACTIVE)
    assert Standing(["c", "a"], None, "").has_merged(INNER)
    assert not Standing([], None, "").has_merged(INNER)


@pytest.mark.parametrize(
    ("mirror", "busy", "settling"),
    [("", False, False), ("yes", False, False), ("pivot", False, True), ("", True, True)],
)
def test_what_may_change_by_itself(mirror: str, busy: bool, settling: bool) -> None:
    assert Standing(["a"], None, mirror, busy).is_settling is settling


def test_request_survives_the_journal() -> None:
    assert MergeRequest.from_params(INNER.as_request().params) == INNER
