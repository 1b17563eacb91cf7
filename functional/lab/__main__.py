# SPDX-License-Identifier: GPL-2.0-or-later
"""The laboratory from the command line.

.venv/bin/python -m functional.lab build
.venv/bin/python -m functional.lab run [--disk GIB]... [--memory MIB] -- COMMAND...
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from functional.lab.errors import LabError
from functional.lab.guest import GIB, Settings, blank_disk, guest, say, why_not
from functional.lab.image import image


def main() -> int:
    parser = argparse.ArgumentParser(prog="functional.lab", description="guests with real storage")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="make the guest image if it is not there")
    run = commands.add_parser("run", help="boot a guest, run one command in it as root, stop it")
    run.add_argument("--disk", type=int, action="append", default=[], metavar="GIB")
    run.add_argument("--memory", type=int, default=1024, metavar="MIB")
    run.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    run.add_argument("argv", nargs="+", metavar="COMMAND", help="one word is given to a shell")
    options = parser.parse_args()
    # As an interruption: what was begun is taken back.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if reason := why_not():
        sys.exit(f"lab: {reason}")
    try:
        if options.command == "build":
            say(f"ready: {image(say).root.parent}")
            return 0
        return _run(options)
    except LabError as error:
        sys.exit(f"lab: {error}")


def _run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    argv = options.argv if len(options.argv) > 1 else ["sh", "-c", options.argv[0]]
    with tempfile.TemporaryDirectory(prefix="lab.", dir="/var/tmp") as scratch:
        disks = [
            blank_disk(Path(scratch) / f"disk{number}", size * GIB)
            for number, size in enumerate(options.disk)
        ]
        with guest(Settings(memory=options.memory, disks=disks), say) as one:
            say(f"up after {time.monotonic() - started:.1f} s")
            return one.run(*argv, timeout=options.timeout, listener=_show).rc


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
