# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the YAML files of this folder: verbs, types, events and errors as plain dataclasses.

A file is read when something in it is first asked for, so that an idle agent holds only the
namespaces that its peers use.  A type is looked for in the file of the namespace that names it,
then in the files that namespaces share (`types.yml`, `types_vm.yml`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from vdsm_storage import errors

# Namespace on the wire -> file.  Written out, so that a reader finds the file of every verb.
FILES: Mapping[str, str] = {
    "GlusterEvent": "gluster_event",
    "GlusterHook": "gluster_hook",
    "GlusterHost": "gluster_host",
    "GlusterService": "gluster_service",
    "GlusterSnapshot": "gluster_snapshot",
    "GlusterTask": "gluster_task",
    "GlusterVolume": "gluster_volume",
    "Host": "host",
    "ISCSIConnection": "iscsi_connection",
    "Image": "image",
    "LVMVolumeGroup": "lvm_volume_group",
    "Lease": "lease",
    "ManagedVolume": "managed_volume",
    "NBD": "nbd",
    "SDM": "sdm",
    "StorageDomain": "storage_domain",
    "StoragePool": "storage_pool",
    "Task": "task",
    "VM": "vm",
    "Volume": "volume",
    "rpc": "rpc",
}
SHARED_TYPES = ("types", "types_vm")


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a verb, or a field of an object type.

    `type` is a type's name, `[name]` for a list.  `default` stands in for an absent or null
    optional value.  `aliases` are other keys that peers send for the same field.  `nullable`
    concerns replies: the value may be JSON null.
    """

    name: str
    type: str
    description: str = ""
    optional: bool = False
    default: object = None
    since: str = ""
    nullable: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb.  `returns` is a type, or None when the answer is just `true`.

    `runs` says where and how: host, pool, spm-sync, spm-task, host-task or job.  `ignored` are
    parameters that engines send although nothing uses them.  `unusable` names the error that
    answers parameters that cannot be used, where that is not InvalidParams.
    """

    name: str
    description: str
    params: tuple[Param, ...]
    returns: str | None
    returns_description: str
    errors: tuple[str, ...]
    runs: str
    since: str
    ignored: tuple[str, ...] = ()
    unusable: str = ""

    @property
    def namespace(self) -> str:
        return self.name.partition(".")[0]

    @property
    def short_name(self) -> str:
        return self.name.partition(".")[2]


@dataclass(frozen=True, slots=True)
class Type:
    """A named type.  `kind` says which of the other attributes hold something.

    scalar: nothing more.  object: `fields`; `extra` is "keep" when unknown keys pass through.
    enum: `values` (name -> description), `numbers` and `aliases` (what peers send instead).
    map: `key`, `value`.  union: `of`, tried in order, or chosen by the value of the key `tag`
    among `variants`.  flat: a string, or an object holding it under one of the keys in `of`.
    """

    name: str
    kind: str
    description: str = ""
    fields: tuple[Param, ...] = ()
    extra: str = "drop"
    values: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[int, str | None] = field(default_factory=dict)
    aliases: Mapping[str, str | None] = field(default_factory=dict)
    key: str = ""
    value: str = ""
    of: tuple[str, ...] = ()
    tag: str = ""
    variants: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Event:
    """A notification that the agent sends on its own."""

    name: str
    description: str
    params: str
    since: str


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """An error that verbs may answer; `anywhere` if any verb may, without listing it."""

    name: str
    code: int
    description: str
    anywhere: bool = False


@dataclass(frozen=True, slots=True)
class Namespace:
    name: str
    description: str
    verbs: Mapping[str, Verb]


class Schema:
    """All that the YAML files say.  Safe to use from several threads."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(__file__).parent
        self._lock = threading.RLock()
        self._namespaces: dict[str, Namespace] = {}
        self._types: dict[str, dict[str, Type]] = {}  # file -> name -> type
        self._errors: dict[str, ErrorCode] = {}

    # -- verbs ---------------------------------------------------------------------------

    @property
    def namespaces(self) -> tuple[str, ...]:
        return tuple(FILES)

    def namespace(self, name: str) -> Namespace:
        """KeyError if there is no such namespace."""
        loaded = self._namespaces.get(name)
        if loaded is not None:
            return loaded
        with self._lock:
            if name not in self._namespaces:
                self._load_namespace(name)
            return self._namespaces[name]

    def find(self, verb: str) -> Verb | None:
        """The verb of that wire name (`Volume.create`), or None."""
        namespace = verb.partition(".")[0]
        if namespace not in FILES:
            return None
        return self.namespace(namespace).verbs.get(verb)

    def verb(self, name: str) -> Verb:
        """Like `find`; MethodNotFound (-32601) if there is none."""
        found = self.find(name)
        if found is None:
            raise errors.MethodNotFound(method=name)
        return found

    def verbs(self) -> Iterator[Verb]:
        """Every verb, namespace by namespace.  Reads every file."""
        for namespace in FILES:
            yield from self.namespace(namespace).verbs.values()

    # -- types ---------------------------------------------------------------------------

    def type(self, name: str, namespace: str = "") -> Type:
        """The named type, as `namespace` sees it; KeyError if there is none."""
        own = (FILES[namespace],) if namespace else ()
        for file in (*own, *SHARED_TYPES):
            found = self._file_types(file).get(name)
            if found is not None:
                return found
        for file in FILES.values():
            found = self._file_types(file).get(name)
            if found is not None:
                return found
        raise KeyError(name)

    def types(self) -> Iterator[Type]:
        """Every type.  Reads every file."""
        for file in (*SHARED_TYPES, *FILES.values()):
            yield from self._file_types(file).values()

    def types_of(self, namespace: str) -> tuple[Type, ...]:
        """The types that only this namespace uses."""
        return tuple(self._file_types(FILES[namespace]).values())

    def shared_types(self) -> tuple[Type, ...]:
        return tuple(t for file in SHARED_TYPES for t in self._file_types(file).values())

    def type_summary(self, name: str) -> str:
        """One line for a person: what a value of this type looks like."""
        if name.startswith("["):
            return f"list of {self.type_summary(name[1:-1])}"
        found = self.type(name)
        if found.kind == "object":
            inner = ", ".join(f.name + ("?" if f.optional else "") for f in found.fields)
            return f"{name} {{{inner}}}"
        if found.kind == "enum":
            return f"{name}: {' | '.join(value or repr(value) for value in found.values)}"
        if found.kind == "map":
            return f"{name}: map of {found.key} to {found.value}"
        if found.kind == "union":
            return f"{name}: one of {', '.join(found.of or found.variants.values())}"
        return name

    # -- events and errors ---------------------------------------------------------------

    def events(self) -> tuple[Event, ...]:
        raw = self._read("events")["events"]
        return tuple(
            Event(name, _text(row, "description"), _text(row, "params"), _text(row, "since"))
            for name, row in raw.items()
        )

    def errors(self) -> Mapping[str, ErrorCode]:
        """Every error by name, in the order of the codes."""
        with self._lock:
            if not self._errors:
                raw = self._read("errors")["errors"]
                self._errors = {
                    name: ErrorCode(
                        name,
                        int(_text(row, "code")),
                        _text(row, "description"),
                        bool(row.get("anywhere")),
                    )
                    for name, row in raw.items()
                }
            return self._errors

    # -- files ---------------------------------------------------------------------------

    def _read(self, file: str) -> dict[str, dict[str, dict[str, object]]]:
        with (self._folder / f"{file}.yml").open("rb") as stream:
            # CSafeLoader is a SafeLoader in C: it builds plain values only.
            return yaml.load(stream, Loader=yaml.CSafeLoader) or {}

    def _file_types(self, file: str) -> dict[str, Type]:
        loaded = self._types.get(file)
        if loaded is not None:
            return loaded
        with self._lock:
            if file not in self._types:
                raw = self._read(file)
                self._types[file] = _build_types(raw)
            return self._types[file]

    def _load_namespace(self, name: str) -> None:
        raw = self._read(FILES[name])
        self._types[FILES[name]] = _build_types(raw)
        verbs = {
            f"{name}.{short}": _build_verb(f"{name}.{short}", row)
            for short, row in raw["verbs"].items()
        }
        self._namespaces[name] = Namespace(name, str(raw.get("description", "")).strip(), verbs)


def _text(row: Mapping[str, object], key: str) -> str:
    return str(row.get(key) or "").strip()


def _names(row: Mapping[str, object], key: str) -> tuple[str, ...]:
    found = row.get(key) or ()
    assert isinstance(found, (list, tuple))
    return tuple(str(name) for name in found)


def _mapping(row: Mapping[str, object], key: str) -> Mapping[object, object]:
    found = row.get(key) or {}
    assert isinstance(found, dict)
    return found


def type_name(raw: object) -> str:
    """`UUID` stays, the YAML list [UUID] becomes "[UUID]"."""
    if isinstance(raw, list):
        return f"[{type_name(raw[0])}]"
    return str(raw)


def _build_params(rows: Mapping[object, object]) -> tuple[Param, ...]:
    params = []
    for name, row in rows.items():
        assert isinstance(row, dict)
        params.append(
            Param(
                name=str(name),
                type=type_name(row["type"]),
                description=_text(row, "description"),
                optional=bool(row.get("optional", False)),
                default=row.get("default"),
                since=_text(row, "since"),
                nullable=bool(row.get("nullable", False)),
                aliases=_names(row, "aliases"),
            )
        )
    return tuple(params)


def _build_verb(name: str, row: Mapping[str, object]) -> Verb:
    returns = row.get("returns")
    assert returns is None or isinstance(returns, dict)
    return Verb(
        name=name,
        description=_text(row, "description"),
        params=_build_params(_mapping(row, "params")),
        returns=type_name(returns["type"]) if returns else None,
        returns_description=_text(returns, "description") if returns else "",
        errors=_names(row, "errors"),
        runs=_text(row, "runs"),
        since=_text(row, "since"),
        ignored=_names(row, "ignored"),
        unusable=_text(row, "unusable"),
    )


def _build_types(raw: Mapping[str, Mapping[str, object]]) -> dict[str, Type]:
    types = {}
    for name, row in (raw.get("types") or {}).items():
        assert isinstance(row, dict)
        types[name] = Type(
            name=name,
            kind=_text(row, "kind"),
            description=_text(row, "description"),
            fields=_build_params(_mapping(row, "fields")),
            extra=_text(row, "extra") or "drop",
            values={str(k): str(v or "") for k, v in _mapping(row, "values").items()},
            numbers={int(str(k)): _optional(v) for k, v in _mapping(row, "numbers").items()},
            aliases={str(k): _optional(v) for k, v in _mapping(row, "aliases").items()},
            key=type_name(row.get("key", "")),
            value=type_name(row.get("value", "")),
            of=tuple(type_name(one) for one in _mapping_or_list(row, "of")),
            tag=_text(row, "tag"),
            variants={str(k): str(v) for k, v in _mapping(row, "variants").items()},
        )
    return types


def _mapping_or_list(row: Mapping[str, object], key: str) -> list[object]:
    found = row.get(key) or []
    assert isinstance(found, list)
    return found


def _optional(value: object) -> str | None:
    return None if value is None else str(value)
