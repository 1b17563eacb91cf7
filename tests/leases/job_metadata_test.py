# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.leases import job_metadata as jm
from vdsm_storage.leases.job_metadata import JobMetadata

JOB = JobMetadata(new_uuid(), 3, jm.PENDING, 1700000000, 1700000001, new_uuid())


def test_there_and_back() -> None:
    data = JOB.encode()
    assert len(data) == 512
    assert jm.decode(data) == JOB
    assert json.loads(data.rstrip(b"\0"))["type"] == "JOB"


def test_a_lease_without_a_job() -> None:
    assert jm.decode(bytes(512)) is None
    assert jm.decode(b"") is None


def test_the_generation_wraps() -> None:
    last = JobMetadata("j", jm.MAX_GENERATION, jm.PENDING)
    assert last.ended(jm.SUCCEEDED, 5) == JobMetadata("j", 0, jm.SUCCEEDED, 0, 5)


def test_what_the_engine_leaves_out_is_filled_in() -> None:
    given_ = {"type": "JOB", "job_id": "j", "generation": "7", "created": None}
    assert jm.from_request(given_, 9, "hw") == JobMetadata("j", 7, jm.PENDING, 9, 9, "hw")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"type": "VM"}',
        '{"type": "JOB", "job_id": "j", "generation": 1}',
        '{"type": "JOB", "job_id": "j", "generation": null, "job_status": "PENDING"}',
        '{"type": "JOB", "job_id": "j", "generation": Infinity, "job_status": "PENDING"}',
        '{"type": "JOB", "job_id": "j", "generation": 1, "job_status": "LOST"}',
    ],
)
def test_what_is_no_job(text: str) -> None:
    with pytest.raises(ValueError):
        jm.decode(text.encode().ljust(512, b"\0"))


@given(st.one_of(st.binary(max_size=512), st.text(max_size=100).map(str.encode)))
def test_hostile_data(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        found = jm.decode(data)
        assert (found is None) == (not data.strip(b"\0"))
