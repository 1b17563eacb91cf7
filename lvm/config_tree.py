# SPDX-License-Identifier: GPL-2.0-or-later
"""LVM's configuration language, in which its metadata is written: sections, values, arrays.

    vg {
        id = "q0RlpD-uusT-Q1cF-6HLl-v5Qo-jU6R-1bQhRC"	# a comment
        status = ["READ", "WRITE"]
        pv0 { pe_count = 503 }
    }

The robust way, for text of any form; what is read often has a faster one (text.py).
"""

from __future__ import annotations

import re
from typing import Final

Scalar = str | int | float
Value = Scalar | list[Scalar] | dict[str, "Value"]
Section = dict[str, Value]

DEPTH_LIMIT: Final = 32  # sections inside sections; metadata has 4
WINDOW: Final = 4096  # bytes in which one section mostly ends

_TOKEN: Final = re.compile(
    r"""
      (?P<blank> (?: \s+ | \#[^\n]* )+ )
    | (?P<float> [+-]?\d{0,20}\.\d{1,20} (?![^\s{}\[\],=\#]) )
    | (?P<int> [+-]?\d{1,20} (?![^\s{}\[\],=\#]) )
    | (?P<name> [^\s{}\[\],="\\\#']+ )
    | "(?P<string> [^"\\]* (?: \\. [^"\\]* )* )"
    | '(?P<plain> [^']* )'
    | (?P<mark> [{}\[\],=] )
    """,
    re.VERBOSE | re.DOTALL,
)
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)


class TextError(ValueError):
    """A text that is not understood; the message says where and why."""


def to_text(data: bytes) -> str:
    """As Python has file names: bytes that are no UTF-8 come back from `to_bytes`."""
    return data.decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def parse_config(text: bytes | str) -> Section:
    """The sections and values of a text.  Raises TextError."""
    reader = _Reader(text if isinstance(text, str) else to_text(text))
    section = reader.section(0)
    if reader.kind != "end":
        raise reader.error("a section ends that did not begin")
    return section


def parse_section(text: memoryview, start: int) -> tuple[str, Section, int]:
    """(name, content, end) of the one section that begins at `start`.  Raises TextError."""
    window = WINDOW
    while True:
        piece = bytes(text[start : start + window])
        try:
            return _one_section(piece, start)
        except TextError:
            if len(piece) < window:  # it was all of the text
                raise
            window *= 4


def _one_section(piece: bytes, start: int) -> tuple[str, Section, int]:
    reader = _Reader(to_text(piece))
    name = reader.name()
    reader.take("{")
    section = reader.section(1)
    if reader.kind != "}":
        raise reader.error("the text ends inside a section")
    return name, section, start + len(to_bytes(reader.taken()))


class _Reader:
    """The text as tokens, one ahead: `kind` is int, float, string, name, a mark, or end."""

    def __init__(self, text: str) -> None:
        self._text = text.rstrip("\0")
        self._after = 0  # behind the present token
        self._found = ""  # the present token as it is written
        self.kind = ""
        self._value: Scalar = ""
        self.next()

    def error(self, reason: str) -> TextError:
        line = self._text.count("\n", 0, self._after) + 1
        return TextError(f"line {line}: {reason}")

    def taken(self) -> str:
        """The text up to the present token and with it."""
        return self._text[: self._after]

    def next(self) -> None:
        while True:
            if self._after == len(self._text):
                self.kind = "end"
                return
            match = _TOKEN.match(self._text, self._after)
            if match is None:
                raise self.error(
                    f"{self._text[self._after : self._after + 20]!r} is not understood"
                )
            self._after = match.end()
            if match.lastgroup and match.lastgroup != "blank":
                self._accept(match.lastgroup, match[match.lastgroup])
                return

    def _accept(self, kind: str, found: str) -> None:
        self.kind, self._found, self._value = kind, found, found
        if kind == "int":
            self._value = int(found)
        elif kind == "float":
            self._value = float(found)
        elif kind == "string":
            self._value = _ESCAPE.sub(r"\1", found) if "\\" in found else found
        elif kind == "plain":
            self.kind = "string"
        elif kind == "mark":
            self.kind = found

    def take(self, mark: str) -> None:
        if self.kind != mark:
            raise self.error(f"{mark} expected")
        self.next()

    def name(self) -> str:
        """The name of a section or value; some names look like numbers."""
        if self.kind not in ("name", "string", "int", "float"):
            raise self.error("a name expected")
        name = self._found if self.kind in ("int", "float") else str(self._value)
        self.next()
        return name

    def section(self, depth: int) -> Section:
        """Up to the } that ends it, or the end of the text; that token is not taken."""
        if depth > DEPTH_LIMIT:
            raise self.error("too many sections inside each other")
        found: Section = {}
        while self.kind not in ("}", "end"):
            name = self.name()
            if name in found:
                raise self.error(f"{name} is there twice")
            if self.kind == "{":
                self.next()
                found[name] = self.section(depth + 1)
                self.take("}")
            else:
                self.take("=")
                found[name] = self._array() if self.kind == "[" else self._scalar()
        return found

    def _scalar(self) -> Scalar:
        if self.kind not in ("string", "int", "float"):
            raise self.error("a value expected")
        value = self._value
        self.next()
        return value

    def _array(self) -> list[Scalar]:
        self.take("[")
        found: list[Scalar] = []
        while self.kind != "]":
            if found:
                self.take(",")
            found.append(self._scalar())
        self.next()
        return found
