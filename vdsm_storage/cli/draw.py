# SPDX-License-Identifier: GPL-2.0-or-later
"""`vdsm-client thin plot VM DRIVE -o FILE`: a picture of how a disk grew."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final

from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.cli.options import UsageError, connect, parser, told
from vdsm_storage.cli.plot import plot
from vdsm_storage.errors import NoSuchVM
from vdsm_storage.rpc.client import Client

renderer: ModuleType | None
try:  # the agent does not need it, and distributions do not have it
    import resvg_py
except ImportError:
    renderer = None
else:
    renderer = resvg_py

STDOUT: Final = "-"
PNG_ZOOM: Final = 2.0  # for screens with fine pixels
IS_TIME: Final = 1e9  # seconds: as an age 31 years


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    return told(lambda: draw(parser().parse_intermixed_args(words)))


def draw(arguments: argparse.Namespace) -> int:
    if len(arguments.words) != 4 or not arguments.output:
        raise UsageError("thin plot takes a VM, a drive, and -o FILE")
    _, _, vm, drive = arguments.words
    must_be_possible(arguments.output)
    with connect(arguments) as client:
        vm_id, name = find(client, vm, arguments.flow_id)
        params: dict[str, Any] = {"vmID": vm_id, "drive": drive, "since": since(arguments.since)}
        found = client.call("VM.getThinHistory", params, flow_id=arguments.flow_id)
    points = found.get(drive, [])
    if not points:
        when = "" if arguments.since is None else " since then"
        raise UsageError(f"VM {vm} drive {drive}: nothing was recorded{when}; it does not grow")
    save(arguments.output, plot(points, f"VM {name}, drive {drive}"))
    return 0


def since(seconds: float | None) -> float:
    """A time, or an age; in seconds since the epoch."""
    if seconds is None:
        return 0.0
    return seconds if seconds >= IS_TIME else time.time() - seconds


def must_be_possible(output: str) -> None:
    """Before anything is asked.  UsageError."""
    suffix = os.path.splitext(output)[1].lower()
    if output != STDOUT and suffix not in (".svg", ".png"):
        raise UsageError(f"{output}: the name of the file must end with .svg or .png")
    if suffix == ".png" and renderer is None:
        raise UsageError(
            f"{output}: PNG needs the Python package resvg-py; or write an .svg and convert that, "
            "with rsvg-convert or Inkscape"
        )


def find(client: Client, vm: str, flow_id: str) -> tuple[str, str]:
    """UUID and name of a VM that either is told of.  NoSuchVM (1), or UsageError when several have
    that name."""
    there = client.call("Host.getVMList", flow_id=flow_id)
    found = [(one["vmId"], one["vmName"]) for one in there if vm in (one["vmId"], one["vmName"])]
    if len(found) > 1:
        raise UsageError(f"{vm}: {len(found)} VMs have that name: {', '.join(i for i, _ in found)}")
    if found:
        return found[0]
    if is_uuid(vm):
        return vm, vm
    raise NoSuchVM(vm=vm)


def save(output: str, svg: str) -> None:
    """UsageError when the file cannot be written."""
    if output == STDOUT:
        sys.stdout.write(svg)
        return
    data = svg.encode()
    if renderer is not None and output.lower().endswith(".png"):
        data = bytes(renderer.svg_to_bytes(svg_string=svg, zoom=PNG_ZOOM))
    try:
        with open(output, "wb") as file:
            file.write(data)
    except OSError as error:
        raise UsageError(f"{output}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
