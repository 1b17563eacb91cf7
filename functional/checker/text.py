# SPDX-License-Identifier: GPL-2.0-or-later
"""LVM's text format: nested sections of `key = value`, where a value may be a list.

    vg {
        seqno = 3
        status = ["READ", "WRITE"]
        logical_volumes {
            lv { ... }
        }
    }
"""

from __future__ import annotations

import re
from typing import Any, Final

TOKEN: Final = re.compile(
    r"""\s*(?:\#[^\n]*\n\s*)*                # comments
        (?: (?P<string>"(?:[^"\\]|\\.)*")
          | (?P<number>-?\d+(?:\.\d+)?)(?![\w.+-])
          | (?P<word>[\w.+-]+)
          | (?P<sign>[{}\[\]=,])
          | (?P<end>\Z) )""",
    re.VERBOSE | re.DOTALL,
)


class BadTextError(ValueError):
    """It is not in the format."""


class Tokens:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.kind = ""
        self.value: Any = ""
        self.advance()

    def advance(self) -> None:
        found = TOKEN.match(self._text, self._at)
        if found is None:
            raise BadTextError(f"at {self._at}: {self._text[self._at : self._at + 40]!r}")
        self._at = found.end()
        self.kind = found.lastgroup or ""
        self.value = found[self.kind]
        if self.kind == "string":
            self.value = re.sub(r"\\(.)", r"\1", self.value[1:-1])
        elif self.kind == "number":
            self.value = float(self.value) if "." in self.value else int(self.value)

    def take(self, kind: str, value: str = "") -> Any:
        if self.kind != kind or (value and self.value != value):
            raise BadTextError(f"at {self._at}: {self.value!r} instead of {value or kind}")
        taken = self.value
        self.advance()
        return taken

    def found(self, sign: str) -> bool:
        """Take a sign if it is next."""
        if self.kind == "sign" and self.value == sign:
            self.advance()
            return True
        return False


def parse(text: str) -> dict[str, Any]:
    """Sections become dictionaries, in their order.  A name that comes twice is an error."""
    tokens = Tokens(text)
    tree = _section(tokens)
    tokens.take("end")
    return tree


def _section(tokens: Tokens) -> dict[str, Any]:
    section: dict[str, Any] = {}
    while tokens.kind in ("word", "number"):  # a name may be all digits
        name = str(tokens.value)
        tokens.advance()
        if name in section:
            raise BadTextError(f"{name} is there twice")
        if tokens.found("{"):
            section[name] = _section(tokens)
            tokens.take("sign", "}")
        else:
            tokens.take("sign", "=")
            section[name] = _value(tokens)
    return section


def _value(tokens: Tokens) -> Any:
    if not tokens.found("["):
        if tokens.kind not in ("string", "number"):
            raise BadTextError(f"{tokens.value!r} is no value")
        return tokens.take(tokens.kind)
    values = []
    while not tokens.found("]"):
        values.append(_value(tokens))
        if not tokens.found(","):
            tokens.take("sign", "]")
            break
    return values
