# SPDX-License-Identifier: GPL-2.0-or-later
"""What engines send of an iSCSI connection, and what nobody should."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdsm_storage.base.secret import Secret
from vdsm_storage.domains.portals import parse, parse_address
from vdsm_storage.errors import ConnectionInvalid
from vdsm_storage.host.iscsi_sessions import Portal

TARGET = "iqn.2020-01.org.example:t1"
SENT = {
    "id": "11111111-0000-4000-8000-000000000001",
    "connection": "10.0.0.5",
    "port": "3260",
    "iqn": TARGET,
    "tpgt": "1",
    "user": "",
    "password": Secret(""),
    "ipv6_enabled": False,
}


def test_as_the_engine_sends_it() -> None:
    wanted = parse(SENT)
    assert wanted.portal == Portal(TARGET, "10.0.0.5")
    assert (wanted.chap.user, bool(wanted.chap.password)) == ("", False)


def test_all_of_it() -> None:
    more = {
        "connection": "[2001:0DB8::1]", "port": "3261", "tpgt": 2, "user": "bob",
        "password": Secret("x y"), "ifaceName": "bond.1", "netIfaceName": "eth0.10",
    }  # fmt: skip
    wanted = parse({**SENT, **more})
    assert wanted.portal == Portal(TARGET, "2001:db8::1", 3261, 2, "bond.1", "eth0.10")
    assert (wanted.chap.user, wanted.chap.password) == ("bob", Secret("x y"))


def test_little_of_it() -> None:
    assert parse({"connection": "San.Example", "iqn": TARGET}).portal == Portal(
        TARGET, "san.example"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("iqn", ""), ("iqn", "iqn.a/../b"), ("iqn", "-x"), ("iqn", "iqn." + "a" * 230),
     ("iqn", "iqn.a b"), ("connection", ""), ("connection", "-h"), ("connection", "a b"),
     ("connection", "a/b"), ("connection", "::g"), ("connection", "fe80::1%../x"),
     ("connection", "a\nb"), ("port", "0"), ("port", "65536"), ("ifaceName", "../x"),
     ("ifaceName", "-I"), ("netIfaceName", "eth0/../all"), ("netIfaceName", "..")],
)  # fmt: skip
def test_refused(key: str, value: str) -> None:
    with pytest.raises(ConnectionInvalid) as error:
        parse({**SENT, key: value})
    assert error.value.code == 453


@pytest.mark.parametrize(
    "password", ["zz\nnode.startup = automatic", " zz", "zz ", "z" * 256, "zz\0"]
)
def test_passwords_that_would_be_read_as_something_else(password: str) -> None:
    with pytest.raises(ConnectionInvalid) as error:
        parse({**SENT, "user": "bob", "password": Secret(password)})
    assert "zz" not in error.value.message
    with pytest.raises(ConnectionInvalid):
        parse({**SENT, "user": password, "password": Secret("good")})


def test_a_user_needs_a_password() -> None:
    with pytest.raises(ConnectionInvalid, match="no password"):
        parse({**SENT, "user": "bob"})


@pytest.mark.parametrize("text", ["fe80::1%eth0", "[::1]", "192.0.2.1", "a-b.example", "x"])
def test_addresses(text: str) -> None:
    assert parse_address(text, "") == (text.strip("[]"), 3260)


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_is_refused_or_safe(address: str, iqn: str) -> None:
    try:
        portal = parse({**SENT, "connection": address, "iqn": iqn}).portal
    except ConnectionInvalid:
        return
    for text in (portal.address, portal.target):
        assert "/" not in text
        assert not text.startswith("-")
        assert text.isprintable()
        assert " " not in text
