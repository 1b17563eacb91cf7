# SPDX-License-Identifier: GPL-2.0-or-later
"""vdsm-storaged: the agent's program."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable

from vdsm_storage import config as configuration
from vdsm_storage.agent import Agent
from vdsm_storage.base import dump, logs, memory, single
from vdsm_storage.config import Config
from vdsm_storage.errors import AgentError, InvalidConfiguration
from vdsm_storage.host import sockets


def main(argv: list[str] | None = None, make_agent: Callable[..., Agent] = Agent) -> int:
    """`make_agent` takes what Agent takes."""
    arguments = _parser().parse_args(argv)
    try:
        config = _config(arguments)
    except InvalidConfiguration as error:
        return _complain(error)
    if arguments.show_config:
        json.dump(config.as_dict(), sys.stdout, indent=4, sort_keys=True)
        sys.stdout.write("\n")
        return 0
    memory.give_back_large_buffers()
    try:
        dump.never()
        # Every file that the agent makes is 0660 or 0644 by an explicit mode; never more than this.
        os.umask(0o022)
        os.makedirs(config.paths.run, mode=0o755, exist_ok=True)
        os.makedirs(os.path.dirname(config.paths.log), mode=0o755, exist_ok=True)
        turn = single.take(os.path.join(config.paths.run, "agent.lock"))
    except OSError as error:
        return _complain(error)
    logs.setup(config.log_path(), config.log.level, config.log.size, config.log.keep)
    if turn.after_stuck:
        sockets.close_listeners(config.addresses.management_port)
    try:
        return asyncio.run(_serve(config, arguments.dev is not None, make_agent))
    except (AgentError, OSError) as error:
        return _complain(error)
    finally:
        os.close(turn.fd)


async def _serve(config: Config, dev: bool, make_agent: Callable[..., Agent]) -> int:
    agent = make_agent(config, dev=dev, crash_point=os.environ.get("VDSM_STORAGE_CRASH"))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        port = await agent.start()
        sys.stdout.write(f"ready {port}\n")
        sys.stdout.flush()
        await stop.wait()
    finally:
        await agent.stop()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vdsm-storaged", description="The storage agent of a hypervisor."
    )
    parser.add_argument(
        "--dev",
        metavar="DIR",
        help="all state below DIR, with a TLS authority and a sanlock of its own",
    )
    parser.add_argument("--port", type=int, metavar="N", help="TCP port (0: any free one)")
    parser.add_argument("--no-tls", action="store_true", help="serve plain text, for a lab only")
    parser.add_argument(
        "--config", metavar="DIR", default="/etc/vdsm-storage", help="where the .conf files are"
    )
    parser.add_argument(
        "--set", metavar="SECTION.OPTION=VALUE", action="append", default=[],
        help="override one option; may be given several times",
    )
    parser.add_argument(
        "--show-config", action="store_true", help="print the configuration as JSON and end"
    )
    return parser


def _config(arguments: argparse.Namespace) -> Config:
    config = configuration.load(arguments.config)
    if arguments.dev is not None:
        configuration.dev(config, os.path.abspath(arguments.dev))
    for assignment in arguments.set:
        configuration.override(config, assignment)
    if arguments.port is not None:
        config.addresses.management_port = arguments.port
    if arguments.no_tls:
        config.tls.enabled = False
    return config


def _complain(error: Exception) -> int:
    sys.stderr.write(f"vdsm-storaged: {error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
