# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemons that block storage needs; one that runs already is used as it is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from functional.lab.inner.tool import run, succeeds, wait_for

INITIATOR = Path("/etc/iscsi/initiatorname.iscsi")
MULTIPATH = Path("/etc/multipath.conf")
# Every device of more or less paths becomes a map, quickly.  Nothing of virtio or a loop.
SETTINGS = """\
defaults {
    user_friendly_names no
    find_multipaths no
    polling_interval 1
    no_path_retry 4
}
blacklist {
    devnode "^(vd|loop|dm-)"
}
"""


@contextlib.contextmanager
def iscsid() -> Iterator[None]:
    """The initiator's daemon, with a name of its own if the host has none."""
    if _runs("iscsid"):
        yield
        return
    run("modprobe", "iscsi_tcp")
    if not INITIATOR.exists() or "InitiatorName=" not in INITIATOR.read_text():
        INITIATOR.write_text("InitiatorName=iqn.2024-01.test.lab:initiator\n")
    with _daemon("iscsid", "--foreground"):
        wait_for("iscsid answers", lambda: "No active" in _sessions())
        yield


@contextlib.contextmanager
def multipathd(settings: str = SETTINGS) -> Iterator[None]:
    """`settings` are written to /etc/multipath.conf if there is none."""
    if _runs("multipathd"):
        yield
        return
    run("modprobe", "dm_multipath")
    ours = not MULTIPATH.exists()
    if ours:
        MULTIPATH.write_text(settings)
    try:
        with _daemon("multipathd", "-d", "-s"):
            wait_for("multipathd answers", lambda: succeeds("multipathd", "show", "daemon"))
            yield
            run("multipath", "-F")
    finally:
        if ours:
            MULTIPATH.unlink()


@contextlib.contextmanager
def _daemon(*argv: str) -> Iterator[None]:
    """In the foreground, so that it ends with the test; alone, for iscsid signals its group."""
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def _sessions() -> str:
    done = subprocess.run(
        ("iscsiadm", "-m", "session"), capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


def _runs(name: str) -> bool:
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and Path(f"/proc/{entry}/comm").read_text().strip() == name:
                return True
    return False
