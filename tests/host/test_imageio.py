# SPDX-License-Identifier: GPL-2.0-or-later
"""Image tickets, asked of a real ovirt-imageio daemon."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdsm_storage.errors import (
    ImageDaemonError,
    ImageDaemonUnsupported,
    ImageTicketsError,
    InvalidParameter,
)
from vdsm_storage.host.imageio import ImageTickets
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.normalise import Checker

DAEMON = Path(sys.executable).with_name("ovirt-imageio")
CONFIG = """
[tls]
enable = false
[local]
enable = false
[remote]
host = 127.0.0.1
port = 0
[control]
transport = unix
socket = {run}/control.sock
[daemon]
run_dir = {run}
drop_privileges = false
systemd_enable = false
[handlers]
keys = stderr
[logger_root]
handlers = stderr
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Path]:
    """Its run directory."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        (run / "conf.d").mkdir()
        (run / "conf.d" / "test.conf").write_text(CONFIG.format(run=run))
        with (run / "log").open("wb") as log:
            process = subprocess.Popen([DAEMON, "-c", run], stderr=log, stdin=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 30
            while not (run / "control.sock").exists() and time.monotonic() < end:
                time.sleep(0.05)
            yield run
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture
def tickets(daemon: Path) -> ImageTickets:
    return ImageTickets(str(daemon / "control.sock"))


def ticket(image: Path, **changes: object) -> dict[str, object]:
    return {
        "uuid": str(uuid.uuid4()),
        "size": 1024**2,
        "url": f"file://{image}",
        "timeout": 300,
        "inactivity_timeout": 60,
        "ops": ["read", "write"],
        "sparse": True,
        "transfer_id": "t",
        "dirty": False,
        **changes,
    }


def test_life_of_a_ticket(tickets: ImageTickets, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1024**2))
    new = ticket(image)
    name = str(new["uuid"])
    tickets.add(new)
    found = tickets.get(name)
    assert (found["uuid"], found["size"], found["active"]) == (name, 1024**2, False)
    assert found["ops"] == ["read", "write"]
    Checker(Schema()).check_reply("Host.get_image_ticket", found)
    tickets.extend(name, 600)
    assert tickets.get(name)["expires"] > found["expires"]
    tickets.remove(name)
    with pytest.raises(ImageTicketsError) as gone:
        tickets.get(name)
    assert (gone.value.code, gone.value.status) == (481, 404)
    tickets.remove(name)  # once more is fine


def test_the_daemon_serves_the_image(
    tickets: ImageTickets, daemon: Path, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(1024**2))
    new = ticket(image, ops=["read"])
    tickets.add(new)
    log = (daemon / "log").read_text()
    port = re.search(r"remote.service listening on \('127.0.0.1', (\d+)\)", log)[1]  # type: ignore[index]
    url = f"http://127.0.0.1:{port}/images/{new['uuid']}"
    with urllib.request.urlopen(url, timeout=30) as reply:
        assert reply.read() == image.read_bytes()
    assert tickets.get(str(new["uuid"]))["transferred"] == 1024**2
    tickets.remove(str(new["uuid"]))


def test_what_is_wrong_is_said(tickets: ImageTickets, tmp_path: Path) -> None:
    with pytest.raises(ImageTicketsError) as refused:
        tickets.add(ticket(tmp_path, size="much"))
    assert refused.value.status == 400
    with pytest.raises(ImageTicketsError):
        tickets.extend(str(uuid.uuid4()), 300)
    with pytest.raises(InvalidParameter):
        tickets.get("../../elsewhere")


def test_no_daemon(tmp_path: Path) -> None:
    missing = ImageTickets(str(tmp_path / "sock"))
    with pytest.raises(ImageDaemonUnsupported):
        missing.get(str(uuid.uuid4()))
    (tmp_path / "sock").touch()
    with pytest.raises(ImageDaemonError):
        missing.get(str(uuid.uuid4()))
