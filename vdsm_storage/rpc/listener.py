# SPDX-License-Identifier: GPL-2.0-or-later
"""The port: accepts, does TLS, finds out who speaks what, and keeps count.

A peer has `handshake_timeout` seconds from accept until its first bytes tell STOMP from HTTP.  Of
peers that are not that far at most `MAX_UNDECIDED` are kept, the oldest goes first, so that nobody
without a certificate can keep others out.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

from vdsm_storage.config import Config
from vdsm_storage.rpc import frames, tls
from vdsm_storage.rpc.broker import Broker
from vdsm_storage.rpc.dispatch import Dispatcher
from vdsm_storage.rpc.http import HttpSession, Services
from vdsm_storage.rpc.session import Limits, PlainSession, Session
from vdsm_storage.rpc.tls_transport import TlsTransport, handshake

log = logging.getLogger("rpc.listener")

MAX_UNDECIDED = 200
BACKLOG = 512
STOMP_FIRST = tuple(command.encode() for command in sorted(frames.COMMANDS))
HTTP_FIRST = tuple(
    name + b" /" for name in (b"GET", b"PUT", b"POST", b"HEAD", b"OPTIONS", b"DELETE", b"PATCH")
)
LONGEST_FIRST = max(len(word) for word in STOMP_FIRST + HTTP_FIRST)


def protocol_of(first: bytes) -> str | None:
    """`stomp` or `http` by a connection's first bytes; None for neither, "" for not yet known."""
    first = first.lstrip(b"\r\n")
    if first.startswith(HTTP_FIRST):
        return "http"
    if first.split(b"\n")[0].rstrip(b"\r") in STOMP_FIRST and b"\n" in first:
        return "stomp"
    if b"\n" not in first and any(
        word.startswith(first.rstrip(b"\r")) for word in STOMP_FIRST + HTTP_FIRST
    ):
        return ""
    return None


@dataclass(frozen=True)
class Parts:
    """What connections are made of."""

    config: Config
    broker: Broker
    dispatcher: Dispatcher
    services: Services
    buffer: memoryview = field(default_factory=lambda: memoryview(bytearray(65536)))

    def limits(self, on_lost: Callable[[], None]) -> Limits:
        rpc = self.config.rpc
        return Limits(rpc.max_frame, rpc.max_output, on_lost=on_lost, buffer=self.buffer)

    def queues(self) -> list[str]:
        names = self.config.addresses.request_queues.split(",")
        return [name.strip() for name in names if name.strip()]


class Listener:
    """Made by `start`, which binds `addresses.management_ip` and `.management_port`."""

    def __init__(self, parts: Parts, ssl_context: ssl.SSLContext | None) -> None:
        self._parts = parts
        self._ssl = ssl_context
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._undecided: dict[Newcomer, asyncio.Task[None]] = {}
        self._open: set[asyncio.BaseTransport] = set()
        self._full = False

    @classmethod
    async def start(
        cls,
        config: Config,
        ssl_context: ssl.SSLContext | None,
        broker: Broker,
        dispatcher: Dispatcher,
        services: Services,
    ) -> Listener:
        """Serve on the running loop.  `ssl_context` None means plain text.  Raises OSError."""
        listener = cls(Parts(config, broker, dispatcher, services), ssl_context)
        loop = asyncio.get_running_loop()
        broker.attach(loop)
        listener._socket = _bind(
            config.addresses.management_ip, config.addresses.management_port
        )
        listener._accepting = loop.create_task(listener._accept(listener._socket))
        return listener

    @property
    def port(self) -> int:
        assert self._socket is not None
        return int(self._socket.getsockname()[1])

    @property
    def connections(self) -> int:
        """Open connections that have said what they speak."""
        return len(self._open)

    async def stop(self) -> None:
        """Take no more connections and close those that are open."""
        if self._accepting is not None:
            self._accepting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._accepting
        if self._socket is not None:
            self._socket.close()
        for task in list(self._undecided.values()):
            task.cancel()
        for transport in list(self._open):
            transport.close()
        for _turn in range(20):  # let replies that are on their way leave
            if not self._open:
                break
            await asyncio.sleep(0.02)
        for transport in list(self._open):
            if isinstance(transport, asyncio.WriteTransport):
                transport.abort()
        self._parts.broker.detach()

    # -- accepting -------------------------------------------------------------------------------

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listening)
            except OSError as error:
                log.warning("cannot accept connections: %s", error)
                await asyncio.sleep(0.5 if error.errno in (errno.EMFILE, errno.ENFILE) else 0.05)
                continue
            name = _peer_name(address)
            if len(self._open) >= self._parts.config.rpc.max_connections:
                if not self._full:
                    log.warning("%s: refused: %d connections are open", name, len(self._open))
                self._full = True
                connection.close()
                continue
            self._full = False
            if len(self._undecided) >= MAX_UNDECIDED:
                oldest = next(iter(self._undecided))
                oldest.give_up("too many newcomers")
            newcomer = Newcomer(self, name, address[0])
            self._undecided[newcomer] = loop.create_task(self._begin(newcomer, connection))

    async def _begin(self, newcomer: Newcomer, connection: socket.socket) -> None:
        """TLS handshake and protocol detection of one connection."""
        seconds = self._parts.config.tls.handshake_timeout
        try:
            async with asyncio.timeout(seconds):
                await self._open_transport(newcomer, connection)
                await newcomer.decided.wait()
        except TimeoutError:
            newcomer.give_up(f"no TLS handshake or no known protocol within {seconds:g} seconds")
        except OSError as error:
            log.info("%s: refused: %s", newcomer.name, error)
        except asyncio.CancelledError:
            newcomer.give_up("stopped")
        finally:
            self._undecided.pop(newcomer, None)
            if newcomer.transport is None:
                connection.close()

    async def _open_transport(self, newcomer: Newcomer, connection: socket.socket) -> None:
        _tune(connection)
        if self._ssl is None:
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(lambda: newcomer, connection)
        else:
            TlsTransport(await handshake(connection, self._ssl), newcomer)

    def forget(self, newcomer: Newcomer) -> None:
        task = self._undecided.pop(newcomer, None)
        if task is not None and newcomer.transport is None:
            task.cancel()

    def hand_over(self, newcomer: Newcomer, kind: str, first: bytes) -> None:
        """The peer has said what it speaks."""
        transport = newcomer.transport
        assert transport is not None
        self._open.add(transport)
        parts = self._parts
        caller = parts.dispatcher.client(newcomer.name)
        limits = parts.limits(lambda: self._open.discard(transport))
        protocol: Session | HttpSession
        if kind == "stomp":
            kind_of = Session if self._ssl else PlainSession
            protocol = kind_of(newcomer.name, parts.broker, caller, parts.queues(), limits)
        else:
            protocol = HttpSession(newcomer.name, caller, parts.services, limits)
        log.debug("%s: speaks %s", newcomer.name, kind)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        protocol.data_received(first)

    def admits(self, newcomer: Newcomer) -> bool:
        """The optional check of a client certificate's names."""
        if self._ssl is None or not self._parts.config.tls.verify_client_cert:
            return True
        assert newcomer.transport is not None
        certificate = newcomer.transport.get_extra_info("peercert")
        return tls.names_address(certificate, newcomer.address)


class Newcomer(asyncio.Protocol):
    """A connection before its protocol is known."""

    def __init__(self, listener: Listener, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.decided = asyncio.Event()
        self.transport: asyncio.Transport | None = None
        self._listener = listener
        self._first = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if not self._listener.admits(self):
            self.give_up("its certificate does not name its address")

    def data_received(self, data: bytes) -> None:
        if self.decided.is_set() or self.transport is None:
            return
        self._first += data
        kind = protocol_of(self._first)
        if kind is None or (not kind and len(self._first) > 4096):
            self.give_up("it speaks neither STOMP nor HTTP")
        elif kind:
            self.decided.set()
            self._listener.hand_over(self, kind, self._first)

    def connection_lost(self, exc: Exception | None) -> None:
        self.decided.set()

    def give_up(self, why: str) -> None:
        if not self.decided.is_set():
            self.decided.set()
            log.info("%s: refused: %s", self.name, why)
            if self.transport is not None:
                self.transport.abort()
            self._listener.forget(self)


def _bind(address: str, port: int) -> socket.socket:
    """A listening socket; `::` takes IPv4, too, and falls back to it where IPv6 is off."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listening = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        if address != "::":
            raise
        return _bind("0.0.0.0", port)  # noqa: S104 - what was asked for
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address != "::"))
        listening.bind((address, port))
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        if address == "::" and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return _bind("0.0.0.0", port)  # noqa: S104 - what was asked for
        raise
    return listening


def _tune(connection: socket.socket) -> None:
    """No waiting to fill packets; notice peers whose machine is gone, even when nothing is sent."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)


def _peer_name(address: tuple[str, int]) -> str:
    host = address[0].removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


