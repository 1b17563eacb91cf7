# SPDX-License-Identifier: GPL-2.0-or-later
"""The OpenRPC document: what `rpc.discover` and GET /schema answer.

Beside what OpenRPC 1.3 defines, each method has `implemented`, `x-since` and `x-runs`.  Schemas
of types describe what replies carry; requests may carry more forms, as the descriptions say.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Collection, Mapping

from vdsm_storage.schema.loader import Param, Schema, Type, Verb

VERSION = "1.3.2"
_DIGITS = "^-?[0-9]*$"
_UUID = "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"

_SCALARS: Mapping[str, Mapping[str, object]] = {
    "any": {},
    "boolean": {"type": "boolean"},
    "BoolString": {"type": "string", "enum": ["true", "false"]},
    "float": {"type": "number"},
    "FloatString": {"type": "string", "pattern": "^-?[0-9]+(\\.[0-9]+)?$"},
    "int": {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
    "uint": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
    "long": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "ulong": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
    "IntLike": {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": _DIGITS}]},
    "IntString": {"type": "string", "pattern": _DIGITS},
    "password": {"type": "string", "format": "password"},
    "string": {"type": "string"},
    "UUID": {"type": "string", "format": "uuid", "pattern": _UUID},
}


def document(schema: Schema, implemented: Collection[str], version: str) -> dict[str, object]:
    """The whole document, as plain JSON values.  `implemented` names the verbs that are built.

    Reads every file: give it a Schema of its own if memory matters.
    """
    return {
        "openrpc": VERSION,
        "info": {
            "title": "vdsm-storage",
            "version": version,
            "description": "Storage agent for KVM hypervisors, over JSON-RPC 2.0.",
            "license": {"name": "GPL-2.0-or-later"},
        },
        "methods": [_method(schema, verb, verb.name in implemented) for verb in schema.verbs()],
        "components": {
            "schemas": {found.name: _schema_of(found) for found in schema.types()},
            "errors": {
                error.name: {"code": error.code, "message": error.description}
                for error in schema.errors().values()
            },
        },
    }


def _method(schema: Schema, verb: Verb, implemented: bool) -> dict[str, object]:
    # OpenRPC wants required parameters first; a verb whose order differs is called by name.
    params = sorted(verb.params, key=lambda param: param.optional)
    positional = params == list(verb.params)
    result: dict[str, object] = {"name": "result", "schema": {"const": True}}
    if verb.returns is not None:
        result["schema"] = reference(verb.returns)
        result["description"] = verb.returns_description
    return {
        "name": verb.name,
        "summary": first_sentence(verb.description),
        "description": verb.description,
        "tags": [{"name": verb.namespace}],
        "paramStructure": "either" if positional else "by-name",
        "params": [_descriptor(param) for param in params],
        "result": result,
        "errors": [
            {"$ref": f"#/components/errors/{name}"}
            for name in verb.errors
            if name in schema.errors()
        ],
        "implemented": implemented,
        "x-since": verb.since,
        "x-runs": verb.runs,
    }


def _descriptor(param: Param) -> dict[str, object]:
    described: dict[str, object] = {
        "name": param.name,
        "description": param.description,
        "required": not param.optional,
        "schema": reference(param.type),
    }
    if param.default is not None:
        described["schema"] = {"allOf": [reference(param.type)], "default": param.default}
    return described


def reference(name: str) -> dict[str, object]:
    """A JSON Schema for a type's name; `[name]` is a list."""
    if name.startswith("["):
        return {"type": "array", "items": reference(name[1:-1])}
    return {"$ref": f"#/components/schemas/{name}"}


def first_sentence(text: str) -> str:
    head, stop, _rest = text.partition(". ")
    return head + "." if stop else text


def _schema_of(found: Type) -> dict[str, object]:
    return {"title": found.name, "description": found.description, **_KINDS[found.kind](found)}


def _scalar(found: Type) -> Mapping[str, object]:
    return _SCALARS[found.name]


def _object(found: Type) -> Mapping[str, object]:
    return {
        "type": "object",
        "properties": {param.name: _property(param) for param in found.fields},
        "required": [param.name for param in found.fields if not param.optional],
        "additionalProperties": found.extra == "keep",
    }


def _property(param: Param) -> dict[str, object]:
    body = reference(param.type)
    if param.nullable:
        body = {"anyOf": [body, {"type": "null"}]}
    if param.description or param.default is not None:
        body = {"allOf": [body]}
        if param.description:
            body["description"] = param.description
        if param.default is not None:
            body["default"] = param.default
    return body


def _enum(found: Type) -> Mapping[str, object]:
    body: dict[str, object] = {"type": "string", "enum": list(found.values)}
    if found.numbers:
        body["x-numbers"] = {str(number): name for number, name in found.numbers.items()}
    return body


def _map(found: Type) -> Mapping[str, object]:
    body: dict[str, object] = {"type": "object", "additionalProperties": reference(found.value)}
    if found.key != "string":
        body["propertyNames"] = reference(found.key)
    return body


def _union(found: Type) -> Mapping[str, object]:
    return {"anyOf": [reference(name) for name in found.of or found.variants.values()]}


def _flat(found: Type) -> Mapping[str, object]:
    wrapped = [
        {"type": "object", "properties": {key: {"type": "string"}}, "required": [key]}
        for key in found.of
    ]
    return {"anyOf": [{"type": "string"}, *wrapped]}


_KINDS: Mapping[str, Callable[[Type], Mapping[str, object]]] = {
    "scalar": _scalar,
    "object": _object,
    "enum": _enum,
    "map": _map,
    "union": _union,
    "flat": _flat,
}


class Discovery:
    """The document for GET /schema and `rpc.discover`: made when first asked for, then kept
    compressed, so that an agent that is never asked holds nothing of it.

    The first call reads every file and takes a tenth of a second: not for the event loop.
    """

    def __init__(self, implemented: Collection[str], version: str) -> None:
        self._implemented = frozenset(implemented)
        self._version = version
        self._lock = threading.Lock()
        self._packed: bytes | None = None

    def encoded(self) -> bytes:
        """The document as JSON."""
        with self._lock:
            if self._packed is None:
                # A Schema of its own, forgotten afterwards.
                made = document(Schema(), self._implemented, self._version)
                self._packed = zlib.compress(json.dumps(made, separators=(",", ":")).encode())
            return zlib.decompress(self._packed)

    def document(self) -> dict[str, object]:
        """The document as plain JSON values; the caller's own."""
        found: dict[str, object] = json.loads(self.encoded())
        return found
