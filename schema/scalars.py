# SPDX-License-Identifier: GPL-2.0-or-later
"""Converters of single values: every form that a peer sends for a number, a flag, a name."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping

from vdsm_storage.base.secret import Secret
from vdsm_storage.schema.loader import Type

# Takes a value and the list that collects warnings; raises UnusableError.
Convert = Callable[[object, list[str]], object]

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}").fullmatch
_INT = re.compile(r"[+-]?[0-9]{1,20}").fullmatch
_FLOAT = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]{1,20})?").fullmatch
_SHOWN = 60  # characters of a bad value that a message shows
_MIN64, _MAX64 = -(2**63), 2**63 - 1
_BOOLS: Mapping[str, bool] = {"true": True, "false": False, "1": True, "0": False, "": False}


class UnusableError(Exception):
    """A value that does not fit; `path` leads to it from where the exception is caught."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = path

    def under(self, step: str) -> UnusableError:
        dot = "." if self.path and not self.path.startswith("[") else ""
        return UnusableError(self.reason, f"{step}{dot}{self.path}")


# -- what a message shows ----------------------------------------------------------------------

_KINDS: Mapping[type, str] = {
    dict: "an object",
    list: "a list",
    tuple: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
    Secret: "a password",
}


def show_kind(value: object) -> str:
    return _KINDS.get(type(value), "something else")


def show(value: object) -> str:
    """A bad scalar, shortened; of anything else only its kind."""
    if value is None or isinstance(value, (str, bool, int, float)):
        text = json.dumps(value)
        return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return show_kind(value)


def similar(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]}?" if close else ""


# -- scalars -----------------------------------------------------------------------------------


def _to_string(value: object, _warnings: list[str]) -> str:
    if type(value) is str:
        return value
    if type(value) is bool:
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    raise UnusableError(f"expected a string, got {show_kind(value)}")


def _to_uuid(value: object, _warnings: list[str]) -> str:
    if type(value) is str:
        if _UUID(value):
            return value
        lower = value.lower()
        if _UUID(lower):
            return lower
    raise UnusableError(
        f"expected a UUID (32 hexadecimal digits as 8-4-4-4-12), got {show(value)}"
    )


def _integer(low: int, what: str) -> Convert:
    def convert(value: object, _warnings: list[str]) -> int:
        if type(value) is int:
            number = value
        elif (type(value) is str and _INT(value.strip())) or (
            type(value) is float and value.is_integer()
        ):
            number = int(value)
        else:
            raise UnusableError(f"expected {what}, got {show(value)}")
        if low <= number <= _MAX64:
            return number
        raise UnusableError(f"expected {what} of at most 64 bits, got {show(number)}")

    return convert


def _to_float(value: object, _warnings: list[str]) -> float:
    if type(value) is float or type(value) is int:
        return float(value)
    if type(value) is str and _FLOAT(value.strip()):
        return float(value)
    raise UnusableError(f"expected a number, got {show(value)}")


def _to_bool(value: object, _warnings: list[str]) -> bool:
    if type(value) is bool:
        return value
    if type(value) is str:
        known = _BOOLS.get(value.lower())
        if known is not None:
            return known
    if type(value) is int and value in (0, 1):
        return bool(value)
    raise UnusableError(f"expected true or false, got {show(value)}")


def _to_secret(value: object, _warnings: list[str]) -> Secret:
    if type(value) is Secret:
        return value
    if type(value) is str:
        return Secret(value)
    raise UnusableError(f"expected a string, got {show_kind(value)} (not shown)")


def _to_any(value: object, _warnings: list[str]) -> object:
    return value


SCALARS: Mapping[str, Convert] = {
    "string": _to_string,
    "UUID": _to_uuid,
    "int": _integer(_MIN64, "a whole number"),
    "long": _integer(_MIN64, "a whole number"),
    "uint": _integer(0, "a whole number, not negative"),
    "ulong": _integer(0, "a whole number, not negative"),
    "IntString": _integer(_MIN64, "a whole number"),
    "IntLike": _integer(_MIN64, "a whole number"),
    "float": _to_float,
    "FloatString": _to_float,
    "boolean": _to_bool,
    "BoolString": _to_bool,
    "password": _to_secret,
    "any": _to_any,
}
# "" is a value of these; of any other type it means "not given".
BLANK_IS_VALUE = frozenset({"string", "password", "any"})


# -- enumerations ------------------------------------------------------------------------------


def enum_table(found: Type) -> dict[object, str | None]:
    """Every form that peers send for the values of an enumeration.  Names match in any case."""
    table: dict[object, str | None] = {}
    for number, name in found.numbers.items():
        table[number] = name
        table[str(number)] = name
    for alias, name in found.aliases.items():
        table[alias.lower()] = table[alias] = name
    for name in found.values:
        table.setdefault(name.lower(), name)
    table.update({name: name for name in found.values})
    return table


def to_enum(found: Type) -> Convert:
    table = enum_table(found)
    nothing = object()

    def convert(value: object, _warnings: list[str]) -> object:
        known: object = nothing
        if type(value) is str:
            known = table.get(value, nothing)
            if known is nothing:
                known = table.get(value.strip().lower(), nothing)
        elif type(value) is int:
            known = table.get(value, nothing)
        if known is nothing:
            names = ", ".join(name or '""' for name in found.values)
            numbers = f" (or {', '.join(map(str, found.numbers))})" if found.numbers else ""
            raise UnusableError(f"expected one of {names}{numbers}, got {show(value)}")
        return known

    return convert
