# SPDX-License-Identifier: GPL-2.0-or-later
"""The reference as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vdsm_storage.schema.docs_pages import (
    ERRORS_PAGE,
    EVENTS_PAGE,
    RUNS,
    TYPES_PAGE,
    Page,
    Reference,
    base_type,
    forms,
    shown_default,
    signature,
)
from vdsm_storage.schema.loader import Param, Type, Verb


def pages(reference: Reference) -> dict[str, str]:
    """File name -> text."""
    made = {f"{page.name}.md": _namespace(reference, page) for page in reference.pages}
    made["index.md"] = _index(reference)
    made[f"{TYPES_PAGE}.md"] = _types("Shared types", reference, reference.shared, 2, 1)
    made[f"{EVENTS_PAGE}.md"] = _events(reference)
    made[f"{ERRORS_PAGE}.md"] = _errors(reference)
    return made


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join(_cell(cell) for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _index(reference: Reference) -> str:
    rows = [
        (
            f"[{row.namespace}]({row.namespace}.md)" if row.namespace != "all" else "**all**",
            row.verbs,
            "" if row.built is None else row.built,
            "" if row.unbuilt is None else row.unbuilt,
        )
        for row in reference.counts()
    ]
    return (
        "# Reference\n\nVerbs by namespace; those that are not built answer error 44.\n\n"
        + _table(("Namespace", "Verbs", "Built", "Unbuilt"), rows)
        + f"\n[Shared types]({TYPES_PAGE}.md), [events]({EVENTS_PAGE}.md), "
        + f"[errors]({ERRORS_PAGE}.md)\n"
    )


def _namespace(reference: Reference, page: Page) -> str:
    parts = [f"# {page.name}\n\n{page.description}\n"]
    parts += [_verb(reference, verb) for verb in page.verbs]
    if page.types:
        parts.append(_types("Types", reference, page.types, 3, 2))
    return "\n".join(parts)


def _type(reference: Reference, name: str) -> str:
    base = base_type(name)
    home = reference.homes.get(base)
    return name if home is None else f"[{name.strip()}]({home}.md#{base.lower()})"


def _verb(reference: Reference, verb: Verb) -> str:
    built = reference.is_built(verb.name)
    note = " **Not built yet.**" if built is False else ""
    parts = [
        f"## {verb.name}\n\n`{signature(verb)}`\n\n{verb.description}{note}\n",
        f"Runs {RUNS[verb.runs]}. Since {verb.since}.\n",
    ]
    if verb.params:
        parts.append(_params(reference, verb.params))
    if verb.returns is None:
        parts.append("Returns true.\n")
    else:
        parts.append(f"Returns {_type(reference, verb.returns)}: {verb.returns_description}\n")
    if verb.errors:
        named = (f"{name} ({reference.errors[name].code})" for name in verb.errors)
        parts.append(f"Errors: {', '.join(named)}.\n")
    return "\n".join(parts)


def _params(reference: Reference, params: Sequence[Param]) -> str:
    rows = [
        (
            f"`{param.name}`",
            _type(reference, param.type),
            "optional" if param.optional else "required",
            shown_default(param.default),
            param.description + (f" Since {param.since}." if param.since else ""),
        )
        for param in params
    ]
    return _table(("Name", "Type", "", "Default", "Meaning"), rows)


def _types(
    title: str, reference: Reference, types: Iterable[Type], level: int, title_level: int
) -> str:
    parts = [f"{'#' * title_level} {title}\n"]
    for found in types:
        parts.append(f"{'#' * level} {found.name}\n\n{found.description}\n")
        if found.kind == "object" and found.fields:
            parts.append(_params(reference, found.fields))
            if found.extra == "keep":
                parts.append("More keys may be there; they are passed on.\n")
        elif found.kind == "enum":
            parts.append(_table(("Value", "Also taken", "Meaning"), forms(found)))
        elif found.kind == "map":
            key, value = _type(reference, found.key), _type(reference, found.value)
            parts.append(f"Map of {key} to {value}.\n")
        elif found.kind == "union":
            members = found.of or tuple(found.variants.values())
            parts.append("One of " + ", ".join(_type(reference, m) for m in members) + ".\n")
        elif found.kind == "flat":
            parts.append(f"A string, or an object with one of {', '.join(found.of)}.\n")
    return "\n".join(parts)


def _events(reference: Reference) -> str:
    rows = [(f"`{e.name}`", e.description, e.params, e.since) for e in reference.events]
    return "# Events\n\n" + _table(("Method", "When", "Params", "Since"), rows)


def _errors(reference: Reference) -> str:
    rows = [
        (error.code, error.name, error.description, reference.users(error))
        for error in reference.errors.values()
    ]
    return "# Errors\n\n" + _table(("Code", "Name", "Meaning", "Verbs"), rows)
