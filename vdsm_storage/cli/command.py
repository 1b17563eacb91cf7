# SPDX-License-Identifier: GPL-2.0-or-later
"""vdsm-client's command line: one call, its result as JSON.

Nothing here imports rich: a plain call starts in the time that Python needs.  `tasks --follow`
replaces this process by `python -m vdsm_storage.cli.live`, which does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from vdsm_storage import config, errors
from vdsm_storage.cli import completion, helptext
from vdsm_storage.cli.values import read_value
from vdsm_storage.errors import AgentError
from vdsm_storage.rpc import tls
from vdsm_storage.rpc.client import Client, NoResponse, RemoteError
from vdsm_storage.schema.loader import Schema

LIVE = "vdsm_storage.cli.live"
USAGE = """vdsm-client [options] NAMESPACE VERB [name=value ...]
       vdsm-client [options] watch
       vdsm-client [options] tasks [--follow]
       vdsm-client --help [NAMESPACE [VERB]]
       vdsm-client --completion bash|zsh"""


class UsageError(Exception):
    """The command line is not understood."""


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the verb answered, 1 when it failed, 2 when the command line is wrong."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(words)
    except UsageError as error:
        sys.stderr.write(f"vdsm-client: {error}\n")
        return 2
    except RemoteError as error:
        return _failed(error.code, error.message)
    except AgentError as error:
        return _failed(error.code, error.message)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
    if len(arguments.words) < 2:
        raise UsageError(f"a verb is missing; see vdsm-client --help {arguments.words[0]}")
    return _call(arguments)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="vdsm-client", usage=USAGE, add_help=False)
    made.add_argument("-h", "--help", action="store_true", help="this, or what a verb takes")
    made.add_argument("-a", "--host", default="localhost", help="the agent's host (localhost)")
    made.add_argument("-p", "--port", type=int, help="its port (what the configuration says)")
    made.add_argument("--insecure", action="store_true", help="plain text, no TLS")
    made.add_argument(
        "-f", "--file", help="parameters from a JSON file, - for standard input (passwords!)"
    )
    made.add_argument("--flow-id", default="", help="goes into the agent's log with each line")
    made.add_argument(
        "--timeout", type=float, default=180.0, metavar="S", help="seconds to wait (180)"
    )
    made.add_argument("--dev", metavar="DIR", help="the instance of vdsm-storaged --dev DIR")
    made.add_argument("--follow", action="store_true", help="with tasks: progress bars")
    made.add_argument("--completion", choices=("bash", "zsh"), help="print a shell's script")
    made.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    return made


def connect(arguments: argparse.Namespace) -> Client:
    """A client for the options; RemoteError or InvalidConfiguration if there is no way."""
    if arguments.dev is not None:
        return Client.dev(arguments.dev, arguments.timeout)
    settings = config.load()
    context = None
    if not arguments.insecure:
        context = tls.client_context(tls.host_files(settings.paths.pki))
    port = settings.addresses.management_port if arguments.port is None else arguments.port
    return Client(arguments.host, port, context, arguments.timeout)


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
        sys.stdout.flush()
        program = [sys.executable, "-P", "-m", LIVE, *words]
        os.execv(sys.executable, program)  # noqa: S606 - this program, under another name
    with connect(arguments) as client:
        tasks = client.call("Host.getAllTasksStatuses", flow_id=arguments.flow_id)
        jobs = client.call("Host.getJobs", flow_id=arguments.flow_id)
    _print({"jobs": jobs, "tasks": tasks})
    return 0


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
    if words[0] not in schema.namespaces:
        raise UsageError(f"no namespace {words[0]}; there are {', '.join(schema.namespaces)}")
    if len(words) == 1:
        return helptext.namespace(schema, words[0])
    return helptext.verb(schema, ".".join(words[:2]))


def _print(result: object) -> None:
    sys.stdout.write(json.dumps(result, indent=4, sort_keys=True, ensure_ascii=False) + "\n")


def _failed(code: int, message: str) -> int:
    sys.stderr.write(json.dumps({"code": code, "message": message}, indent=4) + "\n")
    return 1
