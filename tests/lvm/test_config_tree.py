# SPDX-License-Identifier: GPL-2.0-or-later
"""LVM's configuration language."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdsm_storage.lvm.config_tree import TextError, parse_config, parse_section


def test_language() -> None:
    text = rb"""
    # comment { "
    a = 1  b = -2 # behind
    c = 1.5 d = "with \"quotes\", \\ and # no comment" e = 'plain \n'
    f = [ ] g = [ 1, "two", 3.0,
    4 ]
    "odd name" { h = 1 i { } } 7 { x = "" } 8.1 { }
    """
    assert parse_config(text) == {
        "a": 1,
        "b": -2,
        "c": 1.5,
        "d": 'with "quotes", \\ and # no comment',
        "e": "plain \\n",
        "f": [],
        "g": [1, "two", 3.0, 4],
        "odd name": {"h": 1, "i": {}},
        "7": {"x": ""},
        "8.1": {},
    }


BROKEN = (
    *("a", "a =", "a = b", "= 1", "a { ", "}", "{ }", "a = { }", "a = 1 a = 2", "\\"),
    *("a = [1", "a = [1 2]", "a = [,]", "a = [[1]]", 'a = "x', "a = '"),
    "a = 123456789012345678901234567890",
)


@pytest.mark.parametrize("text", BROKEN)
def test_language_refuses(text: str) -> None:
    with pytest.raises(TextError, match="line 1"):
        parse_config(text)


NAMES = st.text("abc.-+_09", min_size=1, max_size=8)
STRINGS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=20)
SCALARS = STRINGS | st.integers(-(10**18), 10**18)
TREES = st.recursive(
    st.dictionaries(NAMES, SCALARS | st.lists(SCALARS, max_size=4), max_size=4),
    lambda inner: st.dictionaries(NAMES, inner | SCALARS, max_size=4),
    max_leaves=8,
)


def print_tree(tree: dict[str, Any]) -> str:
    out = ""
    for name, value in tree.items():
        if isinstance(value, dict):
            out += f"{name} {{\n{print_tree(value)}}}\n"
        elif isinstance(value, list):
            out += f"{name} = [" + ", ".join(map(print_scalar, value)) + "]\n"
        else:
            out += f"{name} = {print_scalar(value)}\n"
    return out


def print_scalar(value: str | int) -> str:
    if isinstance(value, int):
        return str(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@given(TREES)
def test_language_round_trip(tree: dict[str, Any]) -> None:
    assert parse_config(print_tree(tree).encode()) == tree


@pytest.mark.parametrize("text", [b"a {" * 100_000, b"a = [" * 100_000, b"[" * 100_000])
def test_depth_is_limited(text: bytes) -> None:
    with pytest.raises(TextError):
        parse_config(text)


@given(TREES.filter(bool), st.text("é x", max_size=9), st.integers(0, 9000))
@settings(max_examples=60, deadline=None)
def test_one_section_ends_where_it_ends(tree: dict[str, Any], noise: str, size: int) -> None:
    """Also when it is longer than what is looked at first, and has characters of many bytes."""
    before = f"{noise}\n".encode()
    tree["long"] = "é" * size
    section = f"some_name {{\n{print_tree(tree)}}}".encode()
    text = memoryview(before + section + b"\n\nnext {")
    assert parse_section(text, len(before)) == ("some_name", tree, len(before) + len(section))


def test_section_without_end() -> None:
    with pytest.raises(TextError, match="ends inside"):
        parse_section(memoryview(b"a { b = 1"), 0)
