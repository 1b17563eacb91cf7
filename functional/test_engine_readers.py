# SPDX-License-Identifier: GPL-2.0-or-later
"""The type traps of the engine's client, as the readers of the flow tests keep them."""

from __future__ import annotations

from typing import Any

import pytest

from functional.engine import readers as r
from functional.engine import replies


@pytest.mark.parametrize(
    ("value", "number"), [(12, 12), ("12", 12), ("12.7", 12), ("-1", -1), (2**31 - 1, 2**31 - 1)]
)
def test_int_is_read_from_ints_and_strings(value: object, number: int) -> None:
    assert r.assign_int({"key": value}, "key") == number


@pytest.mark.parametrize("value", [1.0, True, 2**31, "", "x", [], str(2**31)])
def test_int_breaks_on_others(value: object) -> None:
    with pytest.raises(r.WrongTypeError):
        r.assign_int({"key": value}, "key")


def test_sizes_of_domains_are_strings_only() -> None:
    assert r.assign_long_irs({"key": "17179869184"}, "key") == 17179869184
    with pytest.raises(r.WrongTypeError):
        r.assign_long_irs({"key": 17179869184}, "key")
    assert r.assign_long({"key": 17179869184}, "key") == 17179869184


def test_double_is_no_int() -> None:
    assert r.assign_double({"key": 0.0}, "key") == 0.0
    assert r.assign_double({"key": "0.25"}, "key") == 0.25
    with pytest.raises(r.WrongTypeError):
        r.assign_double({"key": 0}, "key")


@pytest.mark.parametrize(("value", "truth"), [(True, True), ("false", False), (None, False)])
def test_bool(value: object, truth: bool) -> None:
    assert r.assign_bool({"key": value}, "key") is truth


def test_bool_is_no_number() -> None:
    with pytest.raises(r.WrongTypeError):
        r.assign_bool({"key": 1}, "key")


def job(**changes: Any) -> dict[str, Any]:
    job_id = "11111111-2222-3333-4444-555555555555"
    whole = {
        "id": job_id,
        "job_type": "storage",
        "status": "running",
        "description": "",
        "progress": 10.0,
    }
    return {job_id: {**whole, **changes}}


def test_job_progress_is_a_float_or_absent() -> None:
    assert next(iter(replies.jobs(job()).values())).progress == 10.0
    for progress in (10, None):
        with pytest.raises(r.WrongTypeError):
            replies.jobs(job(progress=progress))


def test_health_of_a_domain_has_string_times_and_an_int_code() -> None:
    health = {
        "code": 0,
        "lastCheck": "1.2",
        "delay": "0.0003",
        "valid": True,
        "acquired": True,
        "actual": True,
        "version": 5,
    }
    whole = {"vmCount": 0, "multipathHealth": {}, "storageDomains": {"sd": health}}
    assert replies.host_stats(whole)["sd"].last_check == 1.2
    for key, value in (("lastCheck", 1.2), ("delay", 0), ("code", "0"), ("valid", "true")):
        broken = {**whole, "storageDomains": {"sd": {**health, key: value}}}
        with pytest.raises(r.WrongTypeError):
            replies.host_stats(broken)


def test_a_finished_task_has_a_result() -> None:
    status = {"taskState": "running", "taskResult": "", "code": 0, "message": ""}
    assert not replies.task_status(status).finished
    with pytest.raises(r.WrongTypeError):
        replies.task_status({**status, "taskState": "finished"})
