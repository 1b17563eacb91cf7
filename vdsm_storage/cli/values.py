# SPDX-License-Identifier: GPL-2.0-or-later
"""What a person types, read by the type that the schema gives the parameter."""

from __future__ import annotations

import json
from typing import Any

from vdsm_storage.schema.loader import Schema

WHOLE = frozenset(("int", "uint", "long", "ulong", "IntLike"))
STRUCTURED = frozenset(("object", "map"))


def read_value(schema: Schema, namespace: str, type_name: str, text: str) -> Any:
    """ValueError says what was expected.

    Numbers and booleans become such, objects and lists are JSON (a list of plain values may also
    be a,b,c), null is `null` for what is not text, all else is text.
    """
    if type_name.startswith("["):
        return _read_list(schema, namespace, type_name[1:-1], text)
    if type_name in WHOLE:
        return _whole(text)
    if type_name == "float":
        return _number(text)
    if type_name == "boolean":
        return _boolean(text)
    kind = _kind(schema, namespace, type_name)
    if kind in STRUCTURED:
        value = _json(text)
        if not isinstance(value, dict) and value is not None:
            raise ValueError(f"a JSON object is wanted, not {text[:40]!r}")
        return value
    if type_name == "any" or kind in ("union", "flat"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _read_list(schema: Schema, namespace: str, inner: str, text: str) -> Any:
    if text.lstrip().startswith("["):
        return _json(text)
    if inner.startswith("[") or _kind(schema, namespace, inner) in STRUCTURED:
        raise ValueError(f"a JSON list is wanted, not {text[:40]!r}")
    return [read_value(schema, namespace, inner, part) for part in text.split(",")] if text else []


def _kind(schema: Schema, namespace: str, type_name: str) -> str:
    try:
        return schema.type(type_name, namespace).kind
    except KeyError:
        return "scalar"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"a whole number is wanted, not {text[:40]!r}") from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"a number is wanted, not {text[:40]!r}") from error


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"true or false is wanted, not {text[:40]!r}")
    return text.lower() == "true"
