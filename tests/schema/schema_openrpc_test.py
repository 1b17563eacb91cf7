# SPDX-License-Identifier: GPL-2.0-or-later
"""The OpenRPC document keeps the rules of OpenRPC 1.3 and of JSON Schema as far as it uses them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.openrpc import Discovery, document, first_sentence

BUILT = frozenset(("Host.ping", "Volume.create"))
METHOD_KEYS = {
    "name", "tags", "summary", "description", "externalDocs", "params", "result", "deprecated",
    "servers", "errors", "links", "paramStructure", "examples",
}  # fmt: skip
SCHEMA_KEYS = {
    "$ref", "title", "description", "type", "enum", "const", "anyOf", "allOf", "items",
    "properties", "required", "additionalProperties", "propertyNames", "pattern", "format",
    "minimum", "maximum", "default", "x-numbers",
}  # fmt: skip
JSON_TYPES = {"string", "integer", "number", "boolean", "object", "array", "null"}


@pytest.fixture(scope="module")
def made() -> Any:
    return document(Schema(), BUILT, "9.9")


def test_is_json(made: Any) -> None:
    assert json.loads(json.dumps(made)) == made


def test_top(made: Any) -> None:
    assert set(made) == {"openrpc", "info", "methods", "components"}
    assert re.fullmatch(r"1\.\d+\.\d+", made["openrpc"])
    assert made["info"]["title"]
    assert made["info"]["version"] == "9.9"
    assert made["info"]["license"]["name"]


def test_every_verb_is_a_method_once(made: Any) -> None:
    names = [method["name"] for method in made["methods"]]
    assert names == [verb.name for verb in Schema().verbs()]
    assert len(set(names)) == len(names) == 252


def test_implemented(made: Any) -> None:
    flags = {method["name"]: method["implemented"] for method in made["methods"]}
    assert {name for name, built in flags.items() if built} == BUILT
    assert set(flags.values()) == {True, False}


def test_methods(made: Any) -> None:
    for method in made["methods"]:
        own = {key for key in method if not key.startswith("x-")} - {"implemented"}
        assert own <= METHOD_KEYS
        assert {"name", "params", "result"} <= own
        assert method["paramStructure"] in ("by-name", "by-position", "either")
        required = [param["required"] for param in method["params"]]
        assert required == sorted(required, reverse=True)  # required ones come first
        names = [param["name"] for param in method["params"]]
        assert len(set(names)) == len(names)
        for described in (*method["params"], method["result"]):
            assert described["name"]
            assert isinstance(described["schema"], dict)
        assert method["tags"] == [{"name": method["name"].partition(".")[0]}]


def test_by_position_is_the_order_of_the_wire(made: Any) -> None:
    schema = Schema()
    for method in made["methods"]:
        wire = [param.name for param in schema.verb(method["name"]).params]
        same = wire == [param["name"] for param in method["params"]]
        assert (method["paramStructure"] == "either") == same
    assert any(method["paramStructure"] == "by-name" for method in made["methods"])


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_every_reference_leads_somewhere(made: Any) -> None:
    for reference in references(made):
        found = made
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]
        assert isinstance(found, dict)


def test_errors(made: Any) -> None:
    for error in made["components"]["errors"].values():
        assert type(error["code"]) is int
        assert error["message"]


def check_schema(schema: Any) -> None:
    assert isinstance(schema, (dict, bool))
    if isinstance(schema, bool):
        return
    assert set(schema) <= SCHEMA_KEYS
    if "type" in schema:
        assert schema["type"] in JSON_TYPES
    if "pattern" in schema:
        re.compile(schema["pattern"])
    for key in ("anyOf", "allOf"):
        for inner in schema.get(key, ()):
            check_schema(inner)
    for key in ("items", "additionalProperties", "propertyNames"):
        if key in schema:
            check_schema(schema[key])
    for inner in schema.get("properties", {}).values():
        check_schema(inner)
    assert set(schema.get("required", ())) <= set(schema.get("properties", {}))


def test_schemas(made: Any) -> None:
    for schema in made["components"]["schemas"].values():
        check_schema(schema)
    for method in made["methods"]:
        check_schema(method["result"]["schema"])
        for param in method["params"]:
            check_schema(param["schema"])


def test_first_sentence() -> None:
    assert first_sentence("One. Two.") == "One."
    assert first_sentence("One.") == "One."


def test_discovery_is_the_same_document(made: Any) -> None:
    discovery = Discovery(BUILT, "9.9")
    assert json.loads(discovery.encoded()) == made
    assert discovery.document() == made
    discovery.document().clear()
    assert discovery.document() == made
