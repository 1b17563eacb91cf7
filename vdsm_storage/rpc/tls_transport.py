# SPDX-License-Identifier: GPL-2.0-or-later
"""A TLS connection as an asyncio transport that lets OpenSSL use the socket itself.

asyncio's own TLS copies every byte through two buffers in memory and a second protocol; on the
short messages of this wire that costs more than the encryption.  Here a message is one read and
one write.  One connection, server side, on a selector event loop; nothing else is needed.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import socket
import ssl
from typing import Any

RECORD = 16 * 1024  # bytes that one TLS record holds at most, and so one read gives
TURN = 16  # records that one connection may read before others get their turn
PIECE = 4 * RECORD  # bytes that are sent at a time
HIGH_WATER = 64 * 1024
LOW_WATER = 16 * 1024
AGAIN = (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError, InterruptedError)


async def handshake(connection: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
    """The server's side.  Raises OSError (ssl.SSLError is one); takes the socket over in any case.

    The caller bounds the time.
    """
    stream = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
    try:
        while True:
            try:
                stream.do_handshake()
                return stream
            except ssl.SSLWantReadError:
                await _ready(stream, write=False)
            except ssl.SSLWantWriteError:
                await _ready(stream, write=True)
    except BaseException:
        stream.close()
        raise


async def _ready(stream: socket.socket, write: bool) -> None:
    """Until the socket can be read or written."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    add, remove = (
        (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    )
    add(stream, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        remove(stream)


class TlsTransport(asyncio.Transport):
    """Calls its protocol as asyncio's own transports do.  `stream` has done its handshake."""

    def __init__(self, stream: ssl.SSLSocket, protocol: asyncio.Protocol) -> None:
        super().__init__({"peercert": stream.getpeercert(), "socket": stream})
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self._fd = stream.fileno()
        self._protocol = protocol
        self._out: collections.deque[memoryview] = collections.deque()
        self._left = 0  # bytes in these
        self._reading = False
        self._writing = False  # the loop watches for room to write
        self._closing = False  # no more is read; what is left is sent
        self._gone = False  # the socket is given up
        self._full = False  # the protocol was told to pause
        protocol.connection_made(self)
        if not self._closing:
            self.resume_reading()

    # -- asyncio.Transport -----------------------------------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def is_closing(self) -> bool:
        return self._closing

    def is_reading(self) -> bool:
        return self._reading

    def get_write_buffer_size(self) -> int:
        return self._left

    def pause_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def resume_reading(self) -> None:
        if not self._reading and not self._closing:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)
            if self._stream.pending():  # decrypted already: the loop would not see it
                self._loop.call_soon(self._readable)

    def write(self, data: Any) -> None:
        if self._closing or not data:
            return
        if not self._out and len(data) <= PIECE:  # the usual case
            try:
                sent = self._stream.send(data)
            except AGAIN:
                sent = 0
            except OSError as error:
                self._give_up(error)
                return
            if sent == len(data):
                return
            data = data[sent:]
        whole = memoryview(bytes(data))
        self._out += [whole[at : at + PIECE] for at in range(0, len(whole), PIECE)]
        self._left += len(whole)
        self._watch_room()
        if self._left > HIGH_WATER and not self._full:
            self._full = True
            self._protocol.pause_writing()

    def close(self) -> None:
        if not self._closing:
            self.pause_reading()
            self._closing = True
            if not self._out:
                self._say_goodbye()

    def abort(self) -> None:
        self._give_up(None)

    # -- the event loop --------------------------------------------------------------------------

    def _readable(self) -> None:
        for _turn in range(TURN):
            if not self._reading:
                return
            try:
                data = self._stream.read(RECORD)
            except AGAIN:
                return
            except OSError as error:
                self._give_up(error)
                return
            if not data:
                self._protocol.eof_received()
                self.close()
                return
            self._protocol.data_received(data)
            if len(data) < RECORD // 2 and not self._stream.pending():
                return  # most likely all there is; if not, the loop calls again
        if self._reading and self._stream.pending():
            self._loop.call_soon(self._readable)

    def _writable(self) -> None:
        for _turn in range(TURN):
            try:
                # A piece that could not be sent is sent again as it was: OpenSSL wants that.
                sent = self._stream.send(self._out[0])
            except AGAIN:
                break
            except OSError as error:
                self._give_up(error)
                return
            self._left -= sent
            piece = self._out.popleft()[sent:]
            if piece:
                self._out.appendleft(piece)
            elif not self._out:
                break
        if self._full and self._left <= LOW_WATER:
            self._full = False
            self._protocol.resume_writing()
        if not self._out and self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)
            if self._closing:
                self._say_goodbye()

    def _watch_room(self) -> None:
        if not self._writing and not self._gone:
            self._writing = True
            self._loop.add_writer(self._fd, self._writable)

    def _say_goodbye(self) -> None:
        """All is sent: tell the peer that nothing more comes, and go."""
        if not self._gone:
            with contextlib.suppress(OSError, ValueError):
                self._stream.unwrap()  # sends close_notify; the peer's is not waited for
            self._give_up(None)

    def _give_up(self, error: Exception | None) -> None:
        if self._gone:
            return
        self.pause_reading()
        self._closing = self._gone = True
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)
        self._out.clear()
        self._left = 0
        self._loop.call_soon(self._lost, error)

    def _lost(self, error: Exception | None) -> None:
        self._stream.close()
        self._protocol.connection_lost(error)
