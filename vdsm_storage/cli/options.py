# SPDX-License-Identifier: GPL-2.0-or-later
"""What vdsm-client's programs have in common: options, the way to the agent, how failures are told.

Nothing here imports what is slow to import.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable

from vdsm_storage import config
from vdsm_storage.errors import AgentError
from vdsm_storage.rpc import tls
from vdsm_storage.rpc.client import Client, RemoteError

USAGE = """vdsm-client [options] NAMESPACE VERB [name=value ...]
       vdsm-client [options] watch
       vdsm-client [options] tasks [--follow]
       vdsm-client [options] thin top [--once] [--interval S]
       vdsm-client [options] thin plot VM DRIVE -o FILE.svg|FILE.png [--since S]
       vdsm-client --help [NAMESPACE [VERB]]
       vdsm-client --completion bash|zsh"""


class UsageError(Exception):
    """The command line is not understood."""


def told(work: Callable[[], int]) -> int:
    """What `work` returns: 0 when all is well; 1 when a verb failed, 2 when the command line is
    wrong, as is told on standard error."""
    try:
        return work()
    except UsageError as error:
        sys.stderr.write(f"vdsm-client: {error}\n")
        return 2
    except (RemoteError, AgentError) as error:
        failure = {"code": error.code, "message": error.message}
        sys.stderr.write(json.dumps(failure, indent=4) + "\n")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
    made.add_argument("--once", action="store_true", help="with thin top: one table, no more")
    made.add_argument(
        "--interval", type=_seconds, default=2.0, metavar="S", help="with thin top: seconds (2)"
    )
    made.add_argument("-o", "--output", metavar="FILE", help="with thin plot: where it is drawn")
    made.add_argument(
        "--since", type=_seconds, metavar="S",
        help="with thin plot: only the last S seconds, or from S on if it is a time (since 1970)",
    )  # fmt: skip
    made.add_argument("--completion", choices=("bash", "zsh"), help="print a shell's script")
    made.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    return made


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


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
