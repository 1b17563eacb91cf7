# SPDX-License-Identifier: GPL-2.0-or-later
"""What the reference says, before it is HTML or Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vdsm_storage.schema.loader import ErrorCode, Event, Schema, Type, Verb

# What `runs:` of a verb means.
RUNS: Mapping[str, str] = {
    "host": "on any host",
    "pool": "on a host, about its membership in the pool",
    "spm-sync": "under the domain's lock (engines ask the pool's manager), answered when done",
    "spm-task": "under the domain's lock (engines ask the pool's manager), as a task",
    "host-task": "on any host, as a task",
    "job": "on any host, as a job",
}
TYPES_PAGE = "types"
ERRORS_PAGE = "errors"
EVENTS_PAGE = "events"


@dataclass(frozen=True)
class Page:
    """A namespace with its verbs and the types that only it uses."""

    name: str
    description: str
    verbs: tuple[Verb, ...]
    types: tuple[Type, ...]


@dataclass(frozen=True)
class Count:
    """A row of the table of what is built; `built` is None when nobody told."""

    namespace: str
    verbs: int
    built: int | None

    @property
    def unbuilt(self) -> int | None:
        return None if self.built is None else self.verbs - self.built


@dataclass(frozen=True)
class Reference:
    """All pages.  `built` names the verbs that are built, None when nobody told."""

    pages: tuple[Page, ...]
    shared: tuple[Type, ...]
    events: tuple[Event, ...]
    errors: Mapping[str, ErrorCode]
    used_by: Mapping[str, tuple[str, ...]]  # error -> verbs
    built: frozenset[str] | None
    homes: Mapping[str, str]  # type -> the page that describes it

    def users(self, error: ErrorCode) -> str:
        """How many verbs list an error; `any` for one that any verb may answer."""
        return "any" if error.anywhere else str(len(self.used_by.get(error.name, ())) or "")

    def is_built(self, verb: str) -> bool | None:
        return None if self.built is None else verb in self.built

    def counts(self) -> tuple[Count, ...]:
        """One row a namespace, and the total last."""
        rows = [self._count(page.name, page.verbs) for page in self.pages]
        everything = tuple(verb for page in self.pages for verb in page.verbs)
        return (*rows, self._count("all", everything))

    def _count(self, name: str, verbs: tuple[Verb, ...]) -> Count:
        if self.built is None:
            return Count(name, len(verbs), None)
        return Count(name, len(verbs), sum(verb.name in self.built for verb in verbs))


def build(schema: Schema, built: frozenset[str] | None) -> Reference:
    pages = tuple(_page(schema, name) for name in sorted(schema.namespaces, key=str.lower))
    shared = tuple(sorted(schema.shared_types(), key=lambda found: found.name.lower()))
    homes = {found.name: page.name for page in pages for found in page.types}
    homes |= {found.name: TYPES_PAGE for found in shared}
    used: dict[str, list[str]] = {}
    for page in pages:
        for verb in page.verbs:
            for error in verb.errors:
                used.setdefault(error, []).append(verb.name)
    return Reference(
        pages=pages,
        shared=shared,
        events=schema.events(),
        errors=schema.errors(),
        used_by={name: tuple(verbs) for name, verbs in used.items()},
        built=built,
        homes=homes,
    )


def _page(schema: Schema, name: str) -> Page:
    namespace = schema.namespace(name)
    verbs = tuple(sorted(namespace.verbs.values(), key=lambda verb: verb.name.lower()))
    return Page(name, namespace.description, verbs, schema.types_of(name))


def signature(verb: Verb) -> str:
    """`create(volumeID, …, bitmap?) -> UUID`."""
    inner = ", ".join(param.name + ("?" if param.optional else "") for param in verb.params)
    returns = f" -> {verb.returns}" if verb.returns else ""
    return f"{verb.short_name}({inner}){returns}"


def base_type(name: str) -> str:
    """The type in a list of lists of it."""
    return name.strip("[]")


def shown_default(value: object) -> str:
    """A default as JSON shows it; nothing for null."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return '""' if value == "" else str(value)


def forms(found: Type) -> list[tuple[str, str, str]]:
    """Of an enumeration: value, what peers may send instead, meaning."""
    sent: dict[str | None, list[str]] = {}
    for number, name in found.numbers.items():
        sent.setdefault(name, []).append(str(number))
    for alias, name in found.aliases.items():
        sent.setdefault(name, []).append(alias)
    rows = [(n or '""', ", ".join(sent.get(n, [])), text) for n, text in found.values.items()]
    if None in sent:
        rows.append(("(absent)", ", ".join(sent[None]), ""))
    return rows


