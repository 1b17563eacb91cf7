# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of the forms that engines send have in common: names, and what they check."""

from __future__ import annotations

from typing import Any

from vdsm_storage.schema.normalise import Checker

ZERO = "00000000-0000-0000-0000-000000000000"
POOL = "5849b030-626e-47cb-ad90-3ce782d831b3"
SD = "6513270e-269e-4d37-b2a7-4de452e6b438"
SD2 = "089632e3-f678-4941-8fd2-6ec4b372c56b"
IMG = "d23f0824-128b-4f33-8c5c-7fd0a6a3a450"
VOL = "9531985d-5d9d-49f8-9818-e811892f902b"
VOL2 = "36f675cc-81e7-4ef5-a8e2-5d940ed90475"
JOB = "2129d338-b425-4188-bcb5-d0e3bcb1cec4"
VM = "57740511-ea3d-4be7-b6a0-0758cb138653"
GUID = "360014052d05b1f3670a40e0ae4637e4f"
VG = "Dxzv10-gMnm-EsIZ-vUO9-q8LQ-uNT6-h1IWoQ"


Case = tuple[str, dict[str, Any], dict[str, Any]]


def unchanged(verb: str, sent: dict[str, Any]) -> Case:
    """A row of a verb whose function gets what was sent."""
    return verb, sent, sent


def check_form(
    checker: Checker, verb: str, sent: dict[str, Any], expected: dict[str, Any]
) -> None:
    checked = checker.check_params(verb, sent)
    assert {name: checked.values[name] for name in expected} == expected
    for name, value in expected.items():
        assert type(checked.values[name]) is type(value), name
    # what came in is left alone, and what comes out goes in again
    again = checker.check_params(verb, checked.values)
    assert again.values == checked.values
    assert again.warnings == []
