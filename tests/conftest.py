# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of real components that several folders use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.host.sanlock_daemon import SanlockDaemon

# Examples have no deadline: how long one takes says how busy the machine is.
settings.register_profile("busy machines", deadline=None)
settings.load_profile("busy machines")


@pytest.fixture(scope="session")
def sanlock_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The run directory of a sanlock daemon with I/O time-outs of a second.

    The binding reads the directory from the environment: one daemon a test process.
    """
    directory = str(tmp_path_factory.mktemp("sanlock"))
    daemon = SanlockDaemon(directory, io_timeout=1)
    daemon.start()
    yield directory
    daemon.stop()


@pytest.fixture(scope="session")
def sanlock(sanlock_daemon: str) -> Sanlock:
    return Sanlock(sanlock_daemon, io_timeout=1)
