# SPDX-License-Identifier: GPL-2.0-or-later
"""`name=value` as a person types it, turned into what goes on the wire.

Numbers and booleans by the parameter's type, JSON for objects, JSON or commas for lists.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from vdsm_storage import errors
from vdsm_storage.schema.loader import Param, Schema, Type, Verb
from vdsm_storage.schema.scalars import show, similar

_INTEGERS = frozenset(("int", "uint", "long", "ulong", "IntLike"))
_BOOLS: Mapping[str, bool] = {"true": True, "false": False}


class _BadTextError(ValueError):
    """What is wrong with a text; the message is for a person."""


def typed_arguments(schema: Schema, verb: str, arguments: Iterable[str]) -> dict[str, object]:
    """Parameters for the wire from `name=value` texts.  InvalidParams, MethodNotFound."""
    found = schema.verb(verb)
    params = {param.name: param for param in found.params}
    values: dict[str, object] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise _invalid(verb, name[:60], "is not name=value")
        if name not in params:
            known = ", ".join(params) or "none"
            raise _invalid(
                verb, name[:60], f"no such parameter; known are {known}{similar(name, params)}"
            )
        values[name] = typed_value(schema, found, params[name], text)
    return values


def typed_value(schema: Schema, verb: Verb, param: Param, text: str) -> object:
    """One value for the wire.  InvalidParams."""
    try:
        return _value(schema, verb.namespace, param.type, text)
    except _BadTextError as bad:
        raise _invalid(verb.name, param.name, str(bad)) from None


def choices(schema: Schema, verb: Verb, param: Param) -> tuple[str, ...]:
    """What shell completion can offer as a value."""
    if param.type in ("boolean", "BoolString"):
        return ("true", "false")
    if param.type.startswith("[") or param.type in _SCALAR_NAMES:
        return ()
    return tuple(schema.type(param.type, verb.namespace).values)


_SCALAR_NAMES = _INTEGERS | {
    "string", "password", "UUID", "IntString", "FloatString", "float", "any",
}  # fmt: skip


def _invalid(verb: str, parameter: str, reason: str) -> errors.InvalidParams:
    return errors.InvalidParams(method=verb, parameter=parameter, reason=reason)


def _value(schema: Schema, namespace: str, name: str, text: str) -> object:
    if name.startswith("["):
        return _list(schema, namespace, name[1:-1], text)
    if name in _INTEGERS:
        return _integer(text)
    if name == "IntString":
        return str(_integer(text))
    if name == "boolean":
        return _boolean(text)
    if name == "BoolString":
        return "true" if _boolean(text) else "false"
    if name == "float":
        try:
            return float(text)
        except ValueError:
            raise _BadTextError(f"expected a number, got {show(text)}") from None
    if name == "any":
        return _json(text) if text[:1] in "{[" else text
    if name in _SCALAR_NAMES:
        return text
    return _compound(schema.type(name, namespace), text)


def _compound(found: Type, text: str) -> object:
    if found.kind == "enum":
        return text
    bare = found.kind == "flat" or "string" in found.of
    if bare and not text.lstrip().startswith("{"):
        return text
    value = _json(text)
    if not isinstance(value, Mapping):
        raise _BadTextError(f"expected a JSON object ({found.name})")
    return value


def _list(schema: Schema, namespace: str, item: str, text: str) -> object:
    if text.lstrip().startswith("["):
        return _json(text)
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if text.lstrip().startswith("{"):
        return [_json(text)]  # one object is a list of one
    return [_value(schema, namespace, item, part) for part in parts]


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _BadTextError(f"expected a whole number, got {show(text)}") from None


def _boolean(text: str) -> bool:
    known = _BOOLS.get(text.strip().lower())
    if known is None:
        raise _BadTextError(f"expected true or false, got {show(text)}")
    return known


def _json(text: str) -> object:
    """The text itself is never shown: objects may hold passwords."""
    try:
        found: object = json.loads(text)
    except ValueError as error:
        where = getattr(error, "pos", 0)
        raise _BadTextError(f"expected JSON, but it breaks at character {where + 1}") from None
    return found
