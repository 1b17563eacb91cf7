# SPDX-License-Identifier: GPL-2.0-or-later
"""vdsm-client's command line: one call, its result as JSON.

Nothing here imports rich: a plain call starts in the time that Python needs.  `tasks --follow` and
`thin` replace this process by programs of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from vdsm_storage import errors
from vdsm_storage.cli import completion, helptext
from vdsm_storage.cli.options import UsageError, connect, parser, told
from vdsm_storage.cli.values import read_value
from vdsm_storage.rpc.client import NoResponse
from vdsm_storage.schema.loader import Schema

# Programs of their own, for what they import is slow to import.
LIVE: Final = "vdsm_storage.cli.live"
THIN: Final[Mapping[str, str]] = {"top": "vdsm_storage.cli.top", "plot": "vdsm_storage.cli.draw"}


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the verb answered, 1 when it failed, 2 when the command line is wrong."""
    words = sys.argv[1:] if argv is None else list(argv)
    return told(lambda: _run(words))


def _run(words: Sequence[str]) -> int:
    if words[:1] == ["--complete"]:
        for candidate in completion.candidates(Schema(), words[1:]):
            sys.stdout.write(f"{candidate}\n")
        return 0
    arguments = parser().parse_intermixed_args(words)
    if arguments.completion:
        sys.stdout.write(completion.SCRIPTS[arguments.completion])
        return 0
    if arguments.help or not arguments.words:
        sys.stdout.write(_help(arguments.words))
        return 0 if arguments.help else 2
    if arguments.words == ["watch"]:
        return _watch(arguments)
    if arguments.words == ["tasks"]:
        return _tasks(arguments, words)
    if arguments.words[0] == "thin":
        program = THIN.get("".join(arguments.words[1:2]))
        if program is None:
            raise UsageError(f"thin {' or thin '.join(THIN)}; see vdsm-client --help thin")
        _become(program, words)
    if len(arguments.words) < 2:
        raise UsageError(f"a verb is missing; see vdsm-client --help {arguments.words[0]}")
    return _call(arguments)


def _call(arguments: argparse.Namespace) -> int:
    verb = ".".join(arguments.words[:2])
    params = _from_file(arguments.file) if arguments.file else {}
    params.update(_from_words(Schema(), verb, arguments.words[2:]))
    with connect(arguments) as client:
        result = client.call(verb, params, arguments.timeout, arguments.flow_id)
    _print(result)
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    """One line of JSON an event, until interrupted; a lost agent is waited for."""
    with connect(arguments) as client:
        client.subscribe()
        while True:
            try:
                for method, params in client.events():
                    line = json.dumps({"event": method, "params": params}, sort_keys=True)
                    sys.stdout.write(f"{line}\n")
                    sys.stdout.flush()
            except NoResponse as error:
                sys.stderr.write(f"vdsm-client: {error.message}; trying again\n")
                time.sleep(2)


def _tasks(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    if arguments.follow:
        _become(LIVE, words)
    with connect(arguments) as client:
        tasks = client.call("Host.getAllTasksStatuses", flow_id=arguments.flow_id)
        jobs = client.call("Host.getJobs", flow_id=arguments.flow_id)
    _print({"jobs": jobs, "tasks": tasks})
    return 0


def _become(module: str, words: Sequence[str]) -> NoReturn:
    sys.stdout.flush()
    program = [sys.executable, "-P", "-m", module, *words]
    os.execv(sys.executable, program)  # noqa: S606 - this program, under another name


def _from_words(schema: Schema, verb: str, words: Sequence[str]) -> dict[str, Any]:
    """`name=value` words, each value read by the type that the schema gives the parameter."""
    params: dict[str, Any] = {}
    if not words:
        return params
    known = {param.name: param for param in schema.verb(verb).params}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign:
            raise UsageError(f"{word!r} is not name=value")
        if name not in known:
            raise errors.InvalidParams(
                method=verb,
                parameter=name,
                reason=f"there is none of that name; there are {', '.join(known) or 'none'}",
            )
        try:
            params[name] = read_value(schema, verb.partition(".")[0], known[name].type, text)
        except ValueError as error:
            raise errors.InvalidParams(method=verb, parameter=name, reason=error) from error
    return params


def _from_file(path: str) -> dict[str, Any]:
    try:
        if path == "-":
            params = json.load(sys.stdin)
        else:
            with open(path, encoding="utf-8") as file:
                params = json.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    if not isinstance(params, dict):
        raise UsageError(f"{path}: a JSON object of parameters is wanted")
    return params


def _help(words: Sequence[str]) -> str:
    schema = Schema()
    if not words:
        return parser().format_help() + "\n" + helptext.namespaces(schema)
    if words[0] == "thin":
        return helptext.THIN
    if words[0] not in schema.namespaces:
        raise UsageError(f"no namespace {words[0]}; there are {', '.join(schema.namespaces)}")
    if len(words) == 1:
        return helptext.namespace(schema, words[0])
    return helptext.verb(schema, ".".join(words[:2]))


def _print(result: object) -> None:
    sys.stdout.write(json.dumps(result, indent=4, sort_keys=True, ensure_ascii=False) + "\n")
