# SPDX-License-Identifier: GPL-2.0-or-later
"""HTTP on the agent's port.

    POST /jsonrpc   a JSON-RPC request or batch; 204 when there is nothing to answer
    GET /schema     the OpenRPC document
    GET /healthz    200 when the agent is ready, else 503
    PUT /, GET /    image streams of the engine (OVF_STORE), see `streams`
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11

from vdsm_storage.errors import AgentError
from vdsm_storage.rpc.fair import Lanes
from vdsm_storage.rpc.output import Output
from vdsm_storage.rpc.session import Caller, Limits
from vdsm_storage.rpc.streams import StreamError, Streams, Transfer

log = logging.getLogger("rpc.http")

MAX_HEAD = 32 * 1024
SCHEMA_SECONDS = 60.0
IDLE_SECONDS = 60.0  # between two requests, and for a request to come in


@dataclass(frozen=True)
class Services:
    """What HTTP serves beside JSON-RPC.

    `schema()` gives the OpenRPC document's bytes; `health()` a status and an object for JSON;
    `streams` moves images in `lanes`; None where that is not built.
    """

    schema: Callable[[], bytes]
    health: Callable[[], tuple[int, Mapping[str, object]]]
    streams: Streams | None = None
    lanes: Lanes | None = None


class HttpSession(asyncio.Protocol):
    """A connection that turned out to speak HTTP/1.1."""

    def __init__(self, name: str, caller: Caller, services: Services, limits: Limits) -> None:
        self.name = name
        self._caller = caller
        self._services = services
        self._limits = limits
        self._parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._request: h11.Request | None = None
        self._body = bytearray()
        self._busy = False  # a request is being answered
        self._done = False
        self._transfer: Transfer | None = None
        self._timer: asyncio.TimerHandle | None = None

    # -- asyncio ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._output = Output(
            transport, self.name, self._limits.max_output, self._limits.patience
        )
        self._idle()

    def data_received(self, data: bytes) -> None:
        if self._done:
            return
        self._parser.receive_data(data)
        self.advance()

    def eof_received(self) -> bool:
        if self._done:
            return False
        self._parser.receive_data(b"")
        self.advance()
        return self._busy  # a client may half-close and wait for its answer

    def connection_lost(self, exc: Exception | None) -> None:
        self._done = True
        self._output.lost()
        self._not_idle()
        if self._transfer is not None:
            self._transfer.lost()
        self._caller.close()
        self._limits.on_lost()

    def pause_writing(self) -> None:
        self._output.pause()
        if self._transfer is not None:
            self._transfer.pause()

    def resume_writing(self) -> None:
        self._output.resume()
        if self._transfer is not None:
            self._transfer.resume()

    # -- requests --------------------------------------------------------------------------------

    def advance(self) -> None:
        """Take what has come in, as far as it goes."""
        try:
            while not self._done and not (self._transfer and self._transfer.full):
                event = self._parser.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    break
                self._take(event)
        except h11.RemoteProtocolError as error:
            self._fail(error.error_status_hint, str(error))
        if self._done:
            return
        # One request at a time: what a peer pipelines waits in its own socket.
        if (self._busy and self._transfer is None) or (self._transfer and self._transfer.full):
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _take(self, event: Any) -> None:
        if isinstance(event, h11.Request):
            self._request = event
            self._body.clear()
            self._start(event)
        elif isinstance(event, h11.Data):
            if self._transfer is not None:
                self._transfer.write(bytes(event.data))
                return
            self._body += event.data
            if len(self._body) > self._limits.max_frame:
                self._fail(413, f"a body of more than {self._limits.max_frame} bytes")
        elif isinstance(event, h11.EndOfMessage):
            self._busy = True
            self._not_idle()
            if self._transfer is not None:
                self._transfer.end()
            else:
                self._answer()
        elif isinstance(event, h11.ConnectionClosed):
            self._end()

    def _start(self, request: h11.Request) -> None:
        """The head of a request: decide about its body before it is read."""
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in request.headers}
        if self._target(request) == "/" and request.method in (b"PUT", b"GET"):
            self._stream(request.method == b"PUT", headers)
            return
        length = headers.get("content-length", "0")
        if int(length) > self._limits.max_frame:
            self._fail(413, f"a body of {length} bytes; at most {self._limits.max_frame}")
        elif self._parser.they_are_waiting_for_100_continue:
            self._send(h11.InformationalResponse(status_code=100, headers=[]))

    def _stream(self, upload: bool, headers: Mapping[str, str]) -> None:
        streams, lanes = self._services.streams, self._services.lanes
        if streams is None or lanes is None:
            self._fail(501, "image streams are not served here")
            return
        try:
            transfer = Transfer(self, streams, lanes, headers, upload)
        except StreamError as error:
            self._fail(error.status, str(error))
            return
        self._not_idle()
        if upload and self._parser.they_are_waiting_for_100_continue:
            self._send(h11.InformationalResponse(status_code=100, headers=[]))
        self._transfer = transfer
        transfer.start()

    def _answer(self) -> None:
        request = self._request
        assert request is not None
        target, method = self._target(request), request.method
        if target == "/jsonrpc":
            if method == b"POST":
                self._jsonrpc(request)
            else:
                self._refuse(method, "POST")
        elif target in ("/schema", "/healthz"):
            if method not in (b"GET", b"HEAD"):
                self._refuse(method, "GET, HEAD")
            elif target == "/schema":
                self._schema()
            else:
                status, value = self._services.health()
                self.reply(status, to_json(value))
        elif target == "/":
            self._refuse(method, "GET, PUT")
        else:
            self.error(404, "no such path; /jsonrpc, /schema and /healthz are served")

    def _jsonrpc(self, request: h11.Request) -> None:
        flow_id = ""
        for name, value in request.headers:
            if name in (b"flow-id", b"ovirtcorrelationid"):
                flow_id = value.decode("latin-1")
        body = bytes(self._body)
        self._body.clear()
        if not self._caller.handle(body, flow_id, lambda answer: self.reply(200, answer)):
            self.reply(204, b"")  # notifications only

    def _schema(self) -> None:
        """Made in a lane, since that takes a while the first time."""
        lanes = self._services.lanes
        if lanes is None:
            self.reply(200, self._services.schema())
            return
        loop = asyncio.get_running_loop()

        def made(future: Future[Any]) -> None:
            error = future.exception()
            if error is not None:
                self.error(500, f"the document cannot be made: {error}")
            else:
                self.reply(200, future.result())

        try:
            future = lanes.submit(":rpc", self._services.schema, SCHEMA_SECONDS)
        except AgentError as error:
            self.error(503, error.message)
            return
        future.add_done_callback(lambda done: loop.call_soon_threadsafe(made, done))

    def _target(self, request: h11.Request) -> str:
        return str(request.target.decode("latin-1")).partition("?")[0]

    def _refuse(self, method: bytes, allowed: str) -> None:
        self.error(405, f"{method.decode('latin-1')} is not served here", {"allow": allowed})

    # -- replies ---------------------------------------------------------------------------------

    def reply(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """A whole JSON reply; the next request may follow."""
        if self._done:
            return
        self.begin(status, len(body), "application/json", headers)
        head_only = self._request is not None and self._request.method == b"HEAD"
        if body and not head_only:
            self.data(body)
        self.finish()

    def error(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """An error as image streams and everything else here report it."""
        body = to_json({"status": {"code": status, "message": message}})
        self.reply(status, body, headers)

    def begin(
        self, status: int, length: int, kind: str, headers: Mapping[str, str] | None = None
    ) -> None:
        fields = [] if status == 204 else [("content-type", kind), ("content-length", str(length))]
        fields += (headers or {}).items()
        self._output.hold()
        reason = HTTPStatus(status).phrase
        self._send(h11.Response(status_code=status, headers=fields, reason=reason))

    def data(self, body: bytes) -> None:
        self._send(h11.Data(data=body))
        self._output.release()

    def finish(self) -> None:
        """The reply is complete; go on with the next request, or close."""
        self._send(h11.EndOfMessage())
        self._output.release()
        self._busy = False
        self._transfer = None
        self._request = None
        if self._parser.our_state is h11.MUST_CLOSE or self._parser.their_state is not h11.DONE:
            self._end()
            return
        self._parser.start_next_cycle()
        self._idle()
        asyncio.get_running_loop().call_soon(self.advance)

    def _send(self, event: Any) -> None:
        data = self._parser.send(event)
        if data:
            self._output.send(data)

    def _fail(self, status: int, message: str) -> None:
        """Answer if that is still possible, and close."""
        log.info("%s: HTTP %d %s", self.name, status, message)
        if self._transfer is not None:
            self._transfer.lost()
            self._transfer = None
        if self._parser.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.error(status, message, {"connection": "close"})
        self._end()

    def failed(self, message: str, code: int) -> None:
        """An image stream failed."""
        if self._parser.our_state is h11.SEND_RESPONSE:
            body = to_json({"status": {"code": code, "message": message}})
            self.reply(500, body, {"connection": "close"})
            self._end()
        else:
            self.abort(message)

    def abort(self, why: str) -> None:
        """A reply that began cannot be finished; the peer must see that."""
        if not self._done:
            self._done = True
            self._output.abort(why)

    def _end(self) -> None:
        if not self._done:
            self._done = True
            self._output.close()

    def _idle(self) -> None:
        self._not_idle()
        self._timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._end)

    def _not_idle(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def to_json(value: object) -> bytes:
    return json.dumps(value).encode()
