# SPDX-License-Identifier: GPL-2.0-or-later
"""Agents of other hosts, asked by this one: as any client of theirs, with this host's certificate.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from typing import Any, Final

from vdsm_storage.base.secret import Secret
from vdsm_storage.errors import NoConnectionToPeer, PeerRefused
from vdsm_storage.rpc.client import Client, NoResponse, RemoteError

PORT: Final = 54321
CONNECT: Final = 20.0  # seconds


class Peers:
    """`context()` gives what connections are made with; None for plain text (a laboratory)."""

    def __init__(self, context: Callable[[], ssl.SSLContext | None]) -> None:
        self._context = context

    def call(self, peer: str, verb: str, params: Mapping[str, Any], timeout: float) -> Any:
        """The answer of `peer` (`host`, `host:port`, `[address]:port`) within `timeout` seconds.

        Secrets in `params` are sent as what they are.  Raises NoConnectionToPeer (10: also when
        the verb may have been done), PeerRefused.
        """
        host, port = split(peer)
        try:
            with Client(host, port, self._context(), CONNECT) as client:
                return client.call(verb, plain(params), timeout)
        except NoResponse as error:
            raise NoConnectionToPeer(peer=peer, verb=verb, reason=error) from error
        except RemoteError as error:
            raise PeerRefused(
                peer=peer, verb=verb, number=error.code, reason=error.message
            ) from error


def split(peer: str) -> tuple[str, int]:
    """Host and port.  An IPv6 address with a port is in brackets."""
    host, _, port = peer.rpartition(":")
    if not port.isdigit() or not host or (":" in host and not host.endswith("]")):
        host, port = peer, str(PORT)
    return host.strip("[]"), int(port)


def plain(value: Any) -> Any:
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value
