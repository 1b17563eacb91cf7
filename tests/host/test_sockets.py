# SPDX-License-Identifier: GPL-2.0-or-later
"""A port is freed although the one who listens on it cannot close it."""

from __future__ import annotations

import socket

import pytest

from vdsm_storage.host import sockets


@pytest.mark.parametrize("address", ["127.0.0.1", "::"])
def test_a_port_is_freed(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as stuck, socket.socket(family) as other:
        for each in (stuck, other):
            each.bind((address, 0))
            each.listen()
        port = stuck.getsockname()[1]
        sockets.close_listeners(port)
        with socket.socket(family) as successor:
            successor.bind((address, port))
            successor.listen()
        assert other.getsockname()[1]
        with socket.create_connection(("localhost", other.getsockname()[1]), 5):
            pass


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        sockets.close_listeners(1)
        with socket.create_connection(other.getsockname(), 5) as found:
            assert found.getpeername() == other.getsockname()
