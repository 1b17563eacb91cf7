# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks a result before it goes to the wire: engines are typed, and a wrong JSON type costs.

An engine's reader casts: a JSON number where it reads strings is taken for "unknown", a whole
number where it wants a float breaks its task, a number above 31 bits where it wants an int sets
the whole host to Error.  The types of the schema say which of them each value must have:

    int, uint: JSON integer in 32 bits        IntString: a string of decimal digits, or ""
    long, ulong: JSON integer in 64 bits      FloatString: a string such as "0.003"
    float: JSON number with a point           BoolString: "true" or "false"
    IntLike: integer or string of digits      UUID: lower case
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from vdsm_storage.base.secret import Secret
from vdsm_storage.schema.loader import Param, Schema, Type, Verb

# Appends what is wrong with the value at the path to the list.
Check = Callable[[object, str, list[str]], None]

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}").fullmatch
_DIGITS = re.compile(r"-?[0-9]*").fullmatch
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?").fullmatch


def compile_reply(schema: Schema, verb: Verb) -> Check | None:
    """None for a verb without a result."""
    if verb.returns is None:
        return None
    return _Compiler(schema, verb.namespace).check(verb.returns)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _scalar(expected: str, good: Callable[[object], bool]) -> Check:
    def check(value: object, path: str, problems: list[str]) -> None:
        if not good(value):
            problems.append(f"{path}: expected {expected}, got {_kind(value)}")

    return check


def _between(low: int, high: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and low <= value <= high


_SCALARS: Mapping[str, Check] = {
    "string": _scalar("a string", lambda v: type(v) is str),
    "password": _scalar("a string", lambda v: type(v) in (str, Secret)),
    "UUID": _scalar("a lower-case UUID", lambda v: type(v) is str and _UUID(v) is not None),
    "int": _scalar("a JSON integer of 32 bits", _between(-(2**31), 2**31 - 1)),
    "uint": _scalar("a JSON integer of 31 bits, not negative", _between(0, 2**31 - 1)),
    "long": _scalar("a JSON integer of 64 bits", _between(-(2**63), 2**63 - 1)),
    "ulong": _scalar("a JSON integer of 63 bits, not negative", _between(0, 2**63 - 1)),
    "float": _scalar("a JSON float (1.0, not 1)", lambda v: type(v) is float),
    "boolean": _scalar("a JSON boolean", lambda v: type(v) is bool),
    "IntString": _scalar(
        "a string of decimal digits", lambda v: type(v) is str and _DIGITS(v) is not None
    ),
    "IntLike": _scalar(
        "an integer or a string of decimal digits",
        lambda v: type(v) is int or (type(v) is str and _DIGITS(v) is not None),
    ),
    "FloatString": _scalar(
        "a string such as 0.1", lambda v: type(v) is str and _NUMBER(v) is not None
    ),
    "BoolString": _scalar('"true" or "false"', lambda v: v in ("true", "false")),
    "any": _scalar("anything", lambda v: True),
}


class _Compiler:
    def __init__(self, schema: Schema, namespace: str) -> None:
        self._schema = schema
        self._namespace = namespace
        self._done: dict[str, Check] = {}

    def check(self, name: str) -> Check:
        if name in _SCALARS:
            return _SCALARS[name]
        if name in self._done:
            return self._done[name]
        # A type that contains itself meets this stand-in, which finds the real one when called.
        self._done[name] = lambda value, path, problems: self._done[name](value, path, problems)
        self._done[name] = made = self._make(name)
        return made

    def _make(self, name: str) -> Check:
        if name.startswith("["):
            return _list(self.check(name[1:-1]))
        found = self._schema.type(name, self._namespace)
        if found.kind == "object":
            return self._object(found)
        if found.kind == "enum":
            return _enum(found)
        if found.kind == "map":
            return _map(self.check(found.key), self.check(found.value))
        if found.kind == "union":
            return _union(
                found, [self.check(member) for member in found.of or found.variants.values()]
            )
        assert found.kind == "flat", f"{name}: kind {found.kind}"
        return _SCALARS["string"]

    def _object(self, found: Type) -> Check:
        fields: list[tuple[Param, Check]] = [(f, self.check(f.type)) for f in found.fields]
        known = frozenset(param.name for param in found.fields)
        keep = found.extra == "keep"

        def check(value: object, path: str, problems: list[str]) -> None:
            if type(value) is not dict:
                problems.append(f"{path}: expected an object ({found.name}), got {_kind(value)}")
                return
            for param, inner in fields:
                if param.name not in value:
                    if not param.optional:
                        problems.append(f"{path}.{param.name}: missing")
                elif value[param.name] is None:
                    if not param.nullable:
                        problems.append(f"{path}.{param.name}: null, leave the key out instead")
                else:
                    inner(value[param.name], f"{path}.{param.name}", problems)
            if not keep:
                problems += [
                    f"{path}.{key}: not in the schema ({found.name})"
                    for key in value
                    if key not in known
                ]

        return check


def _list(item: Check) -> Check:
    def check(value: object, path: str, problems: list[str]) -> None:
        if not isinstance(value, (list, tuple)):
            problems.append(f"{path}: expected a list, got {_kind(value)}")
            return
        for index, one in enumerate(value):
            item(one, f"{path}[{index}]", problems)

    return check


def _map(key_check: Check, value_check: Check) -> Check:
    def check(value: object, path: str, problems: list[str]) -> None:
        if type(value) is not dict:
            problems.append(f"{path}: expected an object, got {_kind(value)}")
            return
        for key, one in value.items():
            key_check(key, f"{path}: key {key!r}", problems)
            value_check(one, f"{path}[{key!r}]", problems)

    return check


def _enum(found: Type) -> Check:
    names = frozenset(found.values)

    def check(value: object, path: str, problems: list[str]) -> None:
        if type(value) is not str or value not in names:
            problems.append(f"{path}: expected one of {', '.join(found.values)}, got {value!r}")

    return check


def _union(found: Type, members: list[Check]) -> Check:
    def check(value: object, path: str, problems: list[str]) -> None:
        best: list[str] | None = None
        for member in members:
            heard: list[str] = []
            member(value, path, heard)
            if not heard:
                return
            if best is None or len(heard) < len(best):
                best = heard
        problems += best or [f"{path}: fits nothing in {found.name}"]

    return check
