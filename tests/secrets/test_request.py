# SPDX-License-Identifier: GPL-2.0-or-later
"""What may be registered: everything is checked before anything is done."""

from __future__ import annotations

import base64
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdsm_storage.base.secret import Secret
from vdsm_storage.errors import BadSecretRequest
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.normalise import Checker
from vdsm_storage.secrets.request import LARGEST, parse

CHECKER = Checker(Schema())
# Not random: test ids have them, and must be the same in all processes.
ID, OTHER = "5e0f2a9c-6f1b-4f0e-9a55-0c1d5f6f7a01", "b1c7d0e4-2f6a-4b58-8d39-1e2f3a4b5c02"
VALUE = b"a value of thirty-two characters"
PASSWORD = base64.b64encode(VALUE).decode()
GOOD = {"uuid": ID, "usageType": "ceph", "usageID": "ovirt/p/s", "password": PASSWORD}


def ask(*secrets: Any) -> Any:
    """As a request goes through the schema to the registry."""
    checked = CHECKER.check_params("Host.registerSecrets", {"secrets": list(secrets)})
    values: Any = checked.values["secrets"]
    return parse(values)


@pytest.mark.parametrize("kind", ["ceph", "volume", "iscsi"])
def test_as_engines_send_them(kind: str) -> None:
    (found,) = ask({**GOOD, "usageType": kind, "uuid": ID.upper(), "description": ""})
    assert (found.uuid, found.usage, found.value()) == (ID, (kind, "ovirt/p/s"), VALUE)
    assert PASSWORD not in repr(found)
    element = {"ceph": "name", "volume": "volume", "iscsi": "target"}[kind]
    root = Xml.fromstring(found.xml())
    assert root.attrib == {"ephemeral": "yes", "private": "yes"}
    assert root.findtext(f"usage[@type='{kind}']/{element}") == "ovirt/p/s"
    assert root.findtext("uuid") == ID


WRONG = {
    "uuid": ["", "x", ID[:-1], 1, None, [], ID + "0"],
    "usageType": ["", "tls", "vtpm", "ceph ceph", 1, None, {}],
    "usageID": ["", "ovirt/", "ovirt", "vdsm/p/s", " ovirt/p", "/ovirt/p", "ovirt/a\nb",
                "ovirt/\0", "ovirt/\u202e", None, 1.5, []],
    "password": ["", "=", "a", "ab=", "a*b=", "ÄÖÜ=", "c2VjcmV0\0", "YWJj=YWJj", None, 5, ["YQ=="],
                 base64.b64encode(b"x" * (LARGEST + 1)).decode()],
    "description": ["\0", "a\x1b[31m", "\ufffe", "\r"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_each_wrong_value_is_72(key: str, value: Any) -> None:
    with pytest.raises(BadSecretRequest) as caught:
        ask({**GOOD, "uuid": OTHER, "usageID": "ovirt/first"}, {**GOOD, key: value})
    assert caught.value.code == 72
    assert "secrets[1]" in caught.value.message
    if key == "password" and len(str(value)) > 3:
        assert str(value) not in caught.value.message
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("key", ["uuid", "usageType", "usageID", "password"])
def test_each_missing_key_is_72(key: str) -> None:
    with pytest.raises(BadSecretRequest):
        ask({name: value for name, value in GOOD.items() if name != key})


@pytest.mark.parametrize("secrets", [None, "x", 5, [5], [[]], [None], {"a": 1}, [GOOD, "x"]])
def test_each_wrong_list_is_72(secrets: Any) -> None:
    with pytest.raises(BadSecretRequest):
        CHECKER.check_params("Host.registerSecrets", {"secrets": secrets})


@pytest.mark.parametrize("uuids", [None, 5, ["x"], [None], [ID, ""], [[ID]], "x"])
def test_wrong_ids_to_unregister_are_72(uuids: Any) -> None:
    with pytest.raises(BadSecretRequest):
        CHECKER.check_params("Host.unregisterSecrets", {"uuids": uuids})


def test_one_secret_twice() -> None:
    with pytest.raises(BadSecretRequest, match=r"secrets\[1\].*UUID of secrets\[0\]"):
        ask(GOOD, {**GOOD, "usageID": "ovirt/other"})
    with pytest.raises(BadSecretRequest, match=r"secrets\[1\].*usage of secrets\[0\]"):
        ask(GOOD, {**GOOD, "uuid": OTHER})
    assert len(ask(GOOD, {**GOOD, "uuid": OTHER, "usageType": "volume"})) == 2


def test_base64_in_lines() -> None:
    text = "\n".join(PASSWORD[at : at + 10] for at in range(0, len(PASSWORD), 10)) + "\r\n"
    (found,) = ask({**GOOD, "password": text})
    assert found.password == Secret(PASSWORD)


@given(st.binary(min_size=1, max_size=300), st.text(), st.text())
def test_what_is_taken_comes_out_as_it_was(value: bytes, name: str, description: str) -> None:
    sent = {
        **GOOD, "usageID": f"ovirt/{name}", "description": description,
        "password": base64.b64encode(value).decode(),
    }  # fmt: skip
    printable = f"ovirt/{name}".isprintable() and name != ""
    try:
        (found,) = ask(sent)
    except BadSecretRequest:
        assert not printable or not description.isprintable()
        return
    assert found.value() == value
    root = Xml.fromstring(found.xml())
    assert root.findtext("usage/name") == f"ovirt/{name}"
    assert (root.findtext("description") or "") == description
