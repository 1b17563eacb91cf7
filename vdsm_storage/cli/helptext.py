# SPDX-License-Identifier: GPL-2.0-or-later
"""What the schema tells a person at a shell."""

from __future__ import annotations

import textwrap
from typing import Final

from vdsm_storage.schema.docs_pages import RUNS
from vdsm_storage.schema.loader import Param, Schema

THIN: Final = """\
vdsm-client thin top [--once] [--interval S]

Shows the disks of this host that grow while their guests write, those first that will need more
space first: a table that is renewed every S seconds (2), and whenever the agent tells of something.
A narrow terminal shows fewer columns. With --once, or when it goes to a file or a pipe, it is
printed one time; a file or a pipe gets all columns.

vdsm-client thin plot VM DRIVE -o FILE [--since S]

Draws how a disk (vda) of a VM (its UUID, or its name) grew: what the guest wrote, how large the
volume was, where the threshold stood, and when the guest was paused or slowed. FILE ends with .svg,
or with .png if the Python package resvg-py is installed; - is SVG to standard output. With --since
only the last S seconds are drawn, or what happened since S if that is a time (seconds since 1970).
"""


def namespaces(schema: Schema) -> str:
    return _wrapped("namespaces: " + " ".join(schema.namespaces)) + "\n"


def namespace(schema: Schema, name: str) -> str:
    """Its verbs, a line each."""
    found = schema.namespace(name)
    lines = [_wrapped(f"{name}: {found.description}"), ""]
    width = max(len(verb.short_name) for verb in found.verbs.values())
    for verb in found.verbs.values():
        first = verb.description.split(". ")[0].rstrip(".")
        text = f"  {verb.short_name:{width}}  {first}"
        lines.append(text if len(text) <= 100 else text[:97] + "...")
    return "\n".join(lines) + "\n"


def verb(schema: Schema, name: str) -> str:
    """Parameters, types, result and errors; MethodNotFound."""
    found = schema.verb(name)
    usage = " ".join(_usage(param) for param in found.params)
    lines = [f"vdsm-client {found.namespace} {found.short_name} {usage}".rstrip(), ""]
    if found.description:
        lines += [_wrapped(found.description), ""]
    if found.params:
        lines.append("parameters")
        for param in found.params:
            lines += _param(schema, param)
        lines.append("")
    lines.append("result")
    if found.returns is None:
        lines.append("  true")
    else:
        lines.append(_wrapped(schema.type_summary(found.returns), "  ", "      "))
        if found.returns_description:
            lines.append(_wrapped(found.returns_description, "      "))
    lines.append("")
    if found.errors:
        lines.append("errors")
        codes = schema.errors()
        for error in found.errors:
            known = codes.get(error)
            text = f"{known.code:>7}  {error}: {known.description}" if known else error
            lines.append(_wrapped(text, "", " " * 11))
        lines.append("")
    lines.append(f"runs {RUNS[found.runs]}; since {found.since}")
    return "\n".join(lines) + "\n"


def _usage(param: Param) -> str:
    text = f"{param.name}={param.type.strip('[]').upper()}"
    return f"[{text}]" if param.optional else text


def _param(schema: Schema, param: Param) -> list[str]:
    head = f"  {param.name}  {schema.type_summary(param.type)}"
    if param.optional:
        head += " (optional)" if param.default is None else f" (default {param.default!r})"
    lines = [_wrapped(head, "", "      ")]
    if param.description:
        lines.append(_wrapped(param.description, "      "))
    return lines


def _wrapped(text: str, first: str = "", rest: str | None = None) -> str:
    return textwrap.fill(
        text,
        100,
        initial_indent=first,
        subsequent_indent=first if rest is None else rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
