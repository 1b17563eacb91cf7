# SPDX-License-Identifier: GPL-2.0-or-later
"""How an engine reads replies: Java's types, and what happens when JSON brings another one.

Where an engine throws ClassCastException (and sets the host to Error, or fails the verb), these
readers raise WrongTypeError.  Where it silently reads "unknown" (a size that is a number, a
percentage that is an int), they raise too: a test must not pass over a value that got lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
LONG_MIN, LONG_MAX = -(2**63), 2**63 - 1
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
NUMBER = re.compile(r"-?\d+(\.\d+)?")


class WrongTypeError(Exception):
    """A reply's value has a type that the engine cannot read."""

    def __init__(self, key: str, value: object, wanted: str) -> None:
        super().__init__(f"{key}: {value!r} ({type(value).__name__}); the engine reads {wanted}")


Reply = Mapping[str, Any]


def assign_int(reply: Reply, key: str, default: int = 0) -> int:
    """An int of 32 bits, or a string whose fraction is cut off; absent is `default`."""
    value = reply.get(key)
    if value is None:
        return default
    if type(value) is int and INT_MIN <= value <= INT_MAX:
        return value
    if type(value) is str and NUMBER.fullmatch(value):
        number = int(value.partition(".")[0])
        if INT_MIN <= number <= INT_MAX:
            return number
    raise WrongTypeError(key, value, "a 32-bit int or a string of one")


def assign_long(reply: Reply, key: str) -> int | None:
    """An int of 64 bits or a string (host side)."""
    value = reply.get(key)
    if value is None:
        return None
    if type(value) is int and LONG_MIN <= value <= LONG_MAX:
        return value
    if type(value) is str and NUMBER.fullmatch(value):
        return int(value.partition(".")[0])
    raise WrongTypeError(key, value, "a long or a string of one")


def assign_long_irs(reply: Reply, key: str) -> int | None:
    """Sizes of domains and LUNs: strings only; a number is silently taken for "unknown"."""
    value = reply.get(key)
    if value is None:
        return None
    if type(value) is str and NUMBER.fullmatch(value):
        return int(value.partition(".")[0])
    raise WrongTypeError(key, value, "a string of decimal digits")


def assign_double(reply: Reply, key: str) -> float | None:
    """A JSON float or a string; an int is silently taken for "unknown"."""
    value = reply.get(key)
    if value is None:
        return None
    if type(value) is float:
        return value
    if type(value) is str and NUMBER.fullmatch(value):
        return float(value)
    raise WrongTypeError(key, value, "a JSON float (0.0, not 0) or a string")


def assign_bool(reply: Reply, key: str) -> bool:
    value = reply.get(key)
    if value is None:
        return False
    if type(value) is bool:
        return value
    if value in ("true", "false"):
        return bool(value == "true")
    raise WrongTypeError(key, value, 'a boolean or "true"/"false"')


def assign_string(reply: Reply, key: str) -> str | None:
    value = reply.get(key)
    if value is None or type(value) is str:
        return value
    raise WrongTypeError(key, value, "a string")


def cast(reply: Reply, key: str, kind: type) -> Any:
    """An explicit Java cast of a value that must be there."""
    if key not in reply:
        raise WrongTypeError(key, None, f"{kind.__name__}, and the key must be there")
    value = reply[key]
    if type(value) is not kind:
        raise WrongTypeError(key, value, f"a JSON {kind.__name__}")
    if kind is int and not INT_MIN <= value <= INT_MAX:
        raise WrongTypeError(key, value, "an int of 32 bits")
    return value


def uuid(reply: Reply, key: str) -> str:
    value = cast(reply, key, str)
    if not UUID.fullmatch(value):
        raise WrongTypeError(key, value, "a UUID in lower case")
    return str(value)


def one_of(reply: Reply, key: str, *names: str) -> str:
    """An enumeration that the engine parses without regard to case; others break the reply."""
    value = cast(reply, key, str)
    for name in names:
        if name.lower() == value.lower():
            return name
    raise WrongTypeError(key, value, " or ".join(names))


def string_list(value: object, what: str) -> list[str]:
    if type(value) is not list or any(type(item) is not str for item in value):
        raise WrongTypeError(what, value, "a list of strings")
    return list(value)
