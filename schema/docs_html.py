# SPDX-License-Identifier: GPL-2.0-or-later
"""The reference as HTML: plain pages, one style sheet, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

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

_CSS = """\
:root { --ink: #1d2330; --soft: #5c6475; --line: #dfe3ea; --fill: #f6f7f9; --link: #0b5cad;
  --good: #1b7f4b; --idle: #8a5a00; --page: #fff; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ee; --soft: #a0a8b8; --line: #333a47;
  --fill: #1c212b; --link: #7ab7f5; --good: #5fce95; --idle: #e0b35a; --page: #12151c; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--page); display: flex;
  font: 16px/1.5 system-ui, sans-serif; }
nav { flex: 0 0 13.5rem; height: 100vh; position: sticky; top: 0; overflow: auto; padding: 1.2rem;
  background: var(--fill); border-right: 1px solid var(--line); font-size: .92rem; }
nav a { display: block; padding: .1rem .4rem; border-radius: .3rem; }
nav a.here { background: var(--line); font-weight: 600; }
nav hr { border: 0; border-top: 1px solid var(--line); }
main { flex: 1; min-width: 0; max-width: 64rem; padding: 1.2rem 2.5rem 6rem; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
h2 { margin: 2.6rem 0 .4rem; padding-top: 1rem; border-top: 1px solid var(--line);
  font-size: 1.2rem; }
h3 { margin: 1.8rem 0 .3rem; font-size: 1.02rem; }
code, .sig { font-family: ui-monospace, monospace; font-size: .87em; }
.sig { background: var(--fill); border: 1px solid var(--line); border-radius: .4rem;
  padding: .45rem .7rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .7rem 0; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
.n { text-align: right; padding: .3rem 1.4rem .3rem 0; }
td:first-child { white-space: nowrap; }
.soft { color: var(--soft); } .errors { font-size: .9rem; }
.tag { font-size: .74rem; font-weight: 600; padding: .1rem .5rem; border-radius: 1rem;
  border: 1px solid; margin-left: .6rem; vertical-align: middle; }
.built { color: var(--good); } .unbuilt { color: var(--idle); }
@media (max-width: 46rem) { body { display: block; } nav { height: auto; position: static;
  display: flex; flex-wrap: wrap; padding: .6rem; border-right: 0; } nav hr { display: none; }
  main { padding: 1rem; } }
"""


def pages(reference: Reference) -> dict[str, str]:
    """File name -> text."""
    made = {f"{page.name}.html": _namespace(reference, page) for page in reference.pages}
    made["index.html"] = _index(reference)
    shared = "<h1>Shared types</h1>" + _types(reference, reference.shared, "h2")
    made[f"{TYPES_PAGE}.html"] = _frame(reference, "Shared types", TYPES_PAGE, shared)
    made[f"{EVENTS_PAGE}.html"] = _events(reference)
    made[f"{ERRORS_PAGE}.html"] = _errors(reference)
    made["style.css"] = _CSS
    return made


def _frame(reference: Reference, title: str, here: str, body: str) -> str:
    def link(name: str, text: str) -> str:
        mark = ' class="here"' if name == here else ""
        return f'<a href="{name}.html"{mark}>{escape(text)}</a>'

    spaces = "\n".join(link(page.name, page.name) for page in reference.pages)
    others = "\n".join(
        link(name, text)
        for name, text in (
            (TYPES_PAGE, "Shared types"),
            (EVENTS_PAGE, "Events"),
            (ERRORS_PAGE, "Errors"),
        )
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} - vdsm-storage</title>\n"
        '<link rel="stylesheet" href="style.css"></head>\n<body>\n'
        f"<nav>{link('index', 'Overview')}<hr>\n{spaces}\n<hr>\n{others}</nav>\n"
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: frozenset[int]) -> str:
    """Cells are HTML already; `numbers` are the columns that are set to the right."""

    def cell(index: int, text: str) -> str:
        return f'<td class="n">{text}</td>' if index in numbers else f"<td>{text}</td>"

    body = "\n".join(
        "<tr>" + "".join(cell(i, text) for i, text in enumerate(row)) + "</tr>" for row in rows
    )
    names = "".join(
        f'<th class="n">{name}</th>' if index in numbers else f"<th>{escape(name)}</th>"
        for index, name in enumerate(head)
    )
    return f'<div class="scroll"><table><tr>{names}</tr>\n{body}</table></div>'


def _index(reference: Reference) -> str:
    def number(value: int | None) -> str:
        return "" if value is None else str(value)

    rows = [
        (
            "<strong>all</strong>"
            if row.namespace == "all"
            else f'<a href="{row.namespace}.html">{row.namespace}</a>',
            str(row.verbs),
            number(row.built),
            number(row.unbuilt),
        )
        for row in reference.counts()
    ]
    body = (
        "<h1>vdsm-storage: reference</h1>\n<p>Every verb of the wire, by namespace. A verb that is"
        " not built yet answers error 44; <code>rpc.discover</code> tells which are.</p>\n"
        + _table(("Namespace", "Verbs", "Built", "Unbuilt"), rows, frozenset((1, 2, 3)))
    )
    return _frame(reference, "Reference", "index", body)


def _namespace(reference: Reference, page: Page) -> str:
    listing = [
        (
            f'<a href="#{verb.short_name}">{escape(verb.short_name)}</a>'
            + _tag(reference.is_built(verb.name)),
            escape(verb.description.partition(". ")[0].rstrip(".") + "."),
        )
        for verb in page.verbs
    ]
    parts = [
        f"<h1>{page.name}</h1>\n<p>{escape(page.description)}</p>",
        _table(("Verb", "What it does"), listing, frozenset()),
    ]
    parts += [_verb(reference, verb) for verb in page.verbs]
    if page.types:
        parts.append("<h2>Types</h2>" + _types(reference, page.types, "h3"))
    return _frame(reference, page.name, page.name, "\n".join(parts))


def _tag(built: bool | None) -> str:
    if built is None:
        return ""
    name = "built" if built else "unbuilt"
    return f'<span class="tag {name}">{"built" if built else "not built"}</span>'


def _type(reference: Reference, name: str) -> str:
    base = base_type(name)
    home = reference.homes.get(base)
    if home is None:
        return f"<code>{escape(name)}</code>"
    return f'<a href="{home}.html#type-{base}"><code>{escape(name)}</code></a>'


def _verb(reference: Reference, verb: Verb) -> str:
    parts = [
        f'<h2 id="{verb.short_name}">{escape(verb.name)}{_tag(reference.is_built(verb.name))}</h2>',
        f'<p class="sig">{escape(signature(verb))}</p>\n<p>{escape(verb.description)}</p>',
        f'<p class="soft">Runs {RUNS[verb.runs]}. Since {escape(verb.since)}.</p>',
    ]
    if verb.params:
        parts.append(_params(reference, verb.params))
    if verb.returns is None:
        parts.append("<p>Returns true.</p>")
    else:
        text = escape(verb.returns_description)
        parts.append(f"<p>Returns {_type(reference, verb.returns)}: {text}</p>")
    if verb.errors:
        named = ", ".join(
            f'<a href="{ERRORS_PAGE}.html#{name}">{name}</a> ({reference.errors[name].code})'
            for name in verb.errors
        )
        parts.append(f'<p class="errors">Errors: {named}</p>')
    return "\n".join(parts)


def _params(reference: Reference, params: Sequence[Param]) -> str:
    def meaning(param: Param) -> str:
        text = escape(param.description)
        if param.aliases:
            text += f' <span class="soft">Also taken: {", ".join(param.aliases)}.</span>'
        if param.nullable:
            text += ' <span class="soft">May be null.</span>'
        if param.since:
            text += f' <span class="soft">Since {escape(param.since)}.</span>'
        return text

    rows = [
        (
            f"<code>{escape(param.name)}</code>",
            _type(reference, param.type),
            "optional" if param.optional else "required",
            f"<code>{escape(shown_default(param.default))}</code>",
            meaning(param),
        )
        for param in params
    ]
    return _table(("Name", "Type", "", "Default", "Meaning"), rows, frozenset())


def _types(reference: Reference, types: Iterable[Type], tag: str) -> str:
    parts = []
    for found in types:
        name = escape(found.name)
        parts.append(f'<{tag} id="type-{name}">{name}</{tag}>\n<p>{escape(found.description)}</p>')
        parts.append(_type_body(reference, found))
    return "\n".join(parts)


def _type_body(reference: Reference, found: Type) -> str:
    if found.kind == "object" and found.fields:
        more = "<p>More keys may be there; they are passed on.</p>" if found.extra == "keep" else ""
        return _params(reference, found.fields) + more
    if found.kind == "enum":
        rows = [(f"<code>{escape(v)}</code>", escape(a), escape(t)) for v, a, t in forms(found)]
        return _table(("Value", "Also taken", "Meaning"), rows, frozenset())
    if found.kind == "map":
        key, value = _type(reference, found.key), _type(reference, found.value)
        return f"<p>Map of {key} to {value}.</p>"
    if found.kind == "union":
        members = found.of or tuple(found.variants.values())
        return "<p>One of " + ", ".join(_type(reference, m) for m in members) + ".</p>"
    if found.kind == "flat":
        return f"<p>A string, or an object with one of {escape(', '.join(found.of))}.</p>"
    return ""


def _events(reference: Reference) -> str:
    rows = [
        (f"<code>{escape(e.name)}</code>", escape(e.description), escape(e.params), escape(e.since))
        for e in reference.events
    ]
    table = _table(("Method", "When", "Params", "Since"), rows, frozenset())
    return _frame(reference, "Events", EVENTS_PAGE, f"<h1>Events</h1>\n{table}")


def _errors(reference: Reference) -> str:
    rows = [
        (
            str(error.code),
            f'<span id="{error.name}">{error.name}</span>',
            escape(error.description),
            reference.users(error),
        )
        for error in reference.errors.values()
    ]
    table = _table(("Code", "Name", "Meaning", "Verbs"), rows, frozenset((0, 3)))
    return _frame(reference, "Errors", ERRORS_PAGE, f"<h1>Errors</h1>\n{table}")
