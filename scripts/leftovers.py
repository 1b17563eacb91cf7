# SPDX-License-Identifier: GPL-2.0-or-later
"""List what a test run left behind: processes, mounts, loop devices.

    leftovers.py DIR          list; exit 1 if there is anything, else remove DIR
    leftovers.py DIR --clean  and put an end to it, then remove DIR

DIR is the run's TMPDIR.  A process belongs to the run if it carries VDSM_STORAGE_TEST_RUN=DIR in
its environment; a mount, if it is below DIR; a loop device, if its file is (or was) below DIR.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def processes(mark: bytes) -> Iterator[tuple[int, str]]:
    """(pid, command line) of each live process with `mark` in its environment, but ours."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if mark in environment and int(entry.name) not in _ancestors():
            yield int(entry.name), command.strip()


def _ancestors() -> set[int]:
    """The processes that wait for us: the shell script, and make."""
    found: set[int] = set()
    pid = os.getpid()
    while pid > 1:
        found.add(pid)
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = int(stat.rpartition(")")[2].split()[1])
    return found


def mounts(below: Path) -> list[str]:
    """Mount points below a directory, the innermost first.

    A line of mountinfo: 25 1 0:21 / /tmp/a\\040b rw,relatime shared:9 - tmpfs tmpfs rw
    """
    prefix = f"{below}/"
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape")
        if point.startswith(prefix):
            points.append(point)
    return points[::-1]


def loops(below: Path) -> Iterator[tuple[str, str]]:
    """(device, backing file) of each loop device whose file is below a directory."""
    for backing in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        try:
            name = backing.read_text().strip()
        except OSError:  # detached meanwhile
            continue
        if name.startswith(f"{below}/"):
            yield f"/dev/{backing.parts[3]}", name


def listing(below: Path, mark: bytes) -> list[str]:
    return [
        *(f"process {pid}: {command}" for pid, command in processes(mark)),
        *(f"mount {point}" for point in mounts(below)),
        *(f"loop device {device}: {name}" for device, name in loops(below)),
    ]


def clean(below: Path, mark: bytes) -> None:
    """End the processes, then unmount, then detach."""
    for pid, _ in list(processes(mark)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    time.sleep(0.5)
    for point in mounts(below):
        subprocess.run(["umount", "--lazy", point], check=False, timeout=30)
    for device, _ in list(loops(below)):
        subprocess.run(["losetup", "--detach", device], check=False, timeout=30)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--clean", action="store_true", help="put an end to what is left")
    parser.add_argument(
        "--settle", type=float, default=5.0, help="seconds that what was just ended has to go away"
    )
    options = parser.parse_args()
    below = options.directory.resolve()
    mark = f"VDSM_STORAGE_TEST_RUN={options.directory}".encode()
    end = time.monotonic() + options.settle
    while (found := listing(below, mark)) and time.monotonic() < end:
        time.sleep(0.2)
    if found:
        print(f"left behind by the tests below {below}:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in found), file=sys.stderr)
        if not options.clean:
            print(f"end it all: scripts/leftovers.py {below} --clean", file=sys.stderr)
            return 1
        clean(below, mark)
    # Nothing may be mounted there any more when the tree is removed.
    if not mounts(below):
        shutil.rmtree(below, ignore_errors=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
