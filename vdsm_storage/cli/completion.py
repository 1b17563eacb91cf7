# SPDX-License-Identifier: GPL-2.0-or-later
"""Completion in a shell: two small scripts that ask `vdsm-client --complete` with what is typed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from vdsm_storage.schema.loader import Schema, Verb

OPTIONS = (
    "--help -a -p --insecure -f --flow-id --timeout --dev --completion".split()  # noqa: SIM905
)
TAKES_VALUE = (
    "-a", "--host", "-p", "--port", "-f", "--file", "--flow-id", "--timeout", "--dev",
    "--interval", "-o", "--output", "--since",
)  # fmt: skip
MORE: Mapping[str, Sequence[str]] = {
    "tasks": ("--follow",), "thin top": ("--once", "--interval"), "thin plot": ("-o", "--since"),
}  # fmt: skip

# Bash breaks words at "=" and replaces only what follows it.  zsh loads a function by its file's
# name, and runs the file as the function the first time.
SCRIPTS: Mapping[str, str] = {
    "bash": """\
_vdsm_client() {
    local IFS=$'\\n' last=${COMP_WORDS[COMP_CWORD]}
    COMPREPLY=($(vdsm-client --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    if [[ $last == = || ${COMP_WORDS[COMP_CWORD-1]} == = ]]; then
        COMPREPLY=("${COMPREPLY[@]#*=}")
    elif [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]]; then
        compopt -o nospace
    fi
    if [[ ${#COMPREPLY[@]} == 0 ]]; then
        compopt -o default
    fi
}
complete -F _vdsm_client vdsm-client
""",
    "zsh": """\
#compdef vdsm-client
_vdsm-client() {
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
if [[ ${funcstack[1]} == _vdsm-client ]]; then
    _vdsm-client "$@"
else
    compdef _vdsm-client vdsm-client
fi
""",
}


def candidates(schema: Schema, words: Sequence[str]) -> Iterator[str]:
    """What the last of `words` may become; the others stand before it."""
    *before, last = _joined(words) or [""]
    plain = _positional(before)
    if plain is None:
        return  # the value of an option: the shell completes files
    if last.startswith("-"):
        found: Iterable[str] = (*MORE.get(" ".join(plain[:2]), ()), *OPTIONS)
    elif not plain:
        found = ("watch", "tasks", "thin", *schema.namespaces)
    elif plain == ["tasks"]:
        found = ("--follow",)
    elif plain == ["thin"]:
        found = ("top", "plot")
    elif len(plain) == 1 and plain[0] in schema.namespaces:
        verbs = schema.namespace(plain[0]).verbs.values()
        found = [one.short_name for one in verbs]
    elif len(plain) >= 2 and (known := schema.find(".".join(plain[:2]))) is not None:
        found = _parameters(schema, known, plain[2:], last)
    else:
        found = ()
    yield from (word for word in found if word.startswith(last))


def _joined(words: Sequence[str]) -> list[str]:
    """The words as they were typed: bash hands over `name`, `=`, `value`.

    >>> _joined(["Volume", "create", "volFormat", "=", "CO"])
    ['Volume', 'create', 'volFormat=CO']
    """
    out: list[str] = []
    before = ""
    for word in words:
        if out and "=" in (word, before):
            out[-1] += word
        else:
            out.append(word)
        before = word
    return out


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


def _parameters(schema: Schema, verb: Verb, given: Sequence[str], last: str) -> Iterable[str]:
    """`name=` of those that are not there yet; `name=value` where the values are known."""
    name, sign, _ = last.partition("=")
    if not sign:
        there = {word.partition("=")[0] for word in given}
        return [f"{param.name}=" for param in verb.params if param.name not in there]
    kinds = [param.type for param in verb.params if param.name == name]
    return [f"{name}={value}" for kind in kinds for value in _values(schema, verb, kind)]


def _values(schema: Schema, verb: Verb, type_name: str) -> Iterable[str]:
    if type_name == "boolean":
        return ("false", "true")
    try:
        return [value for value in schema.type(type_name, verb.namespace).values if value]
    except KeyError:
        return ()
