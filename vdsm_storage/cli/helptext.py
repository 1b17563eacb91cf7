# SPDX-License-Identifier: GPL-2.0-or-later
"""What the schema tells a person at a shell: help pages and completion."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from vdsm_storage.schema.loader import Param, Schema

OPTIONS = (
    "--help -a -p --insecure -f --flow-id --timeout --dev --completion".split()  # noqa: SIM905
)
TAKES_VALUE = ("-a", "--host", "-p", "--port", "-f", "--file", "--flow-id", "--timeout", "--dev")

COMPLETION: Mapping[str, str] = {
    "bash": """\
_vdsm_client() {
    local words=("${COMP_WORDS[@]:1:COMP_CWORD}")
    local IFS=$'\\n'
    COMPREPLY=($(vdsm-client --complete "${words[@]}" 2>/dev/null))
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]]; then
        compopt -o nospace
    elif [[ ${#COMPREPLY[@]} == 0 ]]; then
        compopt -o default
    fi
}
complete -F _vdsm_client vdsm-client
""",
    "zsh": """\
#compdef vdsm-client
_vdsm_client() {
    local -a found
    found=(${(f)"$(vdsm-client --complete "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( ${#found} == 0 )); then
        _files
    elif [[ ${found[1]} == *= ]]; then
        compadd -S '' -a found
    else
        compadd -a found
    fi
}
compdef _vdsm_client vdsm-client
""",
}


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
    lines.append(f"runs: {found.runs or 'host'}; since {found.since or 'the beginning'}")
    return "\n".join(lines) + "\n"


def candidates(schema: Schema, words: Sequence[str]) -> Iterator[str]:
    """What the last of `words` may become; the others stand before it."""
    *before, last = words or [""]
    plain = _positional(before)
    if plain is None:
        return  # the value of an option: the shell completes files
    if last.startswith("-"):
        found: Sequence[str] = OPTIONS
    elif not plain:
        found = ("watch", "tasks", *schema.namespaces)
    elif plain == ["tasks"]:
        found = ("--follow",)
    elif len(plain) == 1 and plain[0] in schema.namespaces:
        verbs = schema.namespace(plain[0]).verbs.values()
        found = [one.short_name for one in verbs]
    elif len(plain) >= 2 and (known := schema.find(".".join(plain[:2]))) is not None:
        given = {word.partition("=")[0] for word in plain[2:]}
        found = [f"{param.name}=" for param in known.params if param.name not in given]
    else:
        found = ()
    yield from (word for word in found if word.startswith(last))


def _positional(words: Sequence[str]) -> list[str] | None:
    """The words that are no options; None if an option's value comes next."""
    out: list[str] = []
    value = False
    for word in words:
        if value:
            value = False
        elif word.startswith("-"):
            value = word in TAKES_VALUE
        else:
            out.append(word)
    return None if value else out


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
