# SPDX-License-Identifier: GPL-2.0-or-later
"""JSON-RPC: request bytes in, verbs called, reply bytes out.

jsonrpcserver parses, looks the method up and shapes the replies; the schema checks parameters.  A
verb without a lane is called on the event loop; the others run in their lane, and the client's
next request does not wait for them.
"""

from __future__ import annotations

import asyncio
import collections
import contextvars
import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from jsonrpcserver.result import Error, Success

from vdsm_storage import errors
from vdsm_storage.base import logs
from vdsm_storage.rpc import jsonrpc
from vdsm_storage.rpc.fair import FairQueues, Lanes, Work
from vdsm_storage.verbs.table import Verb

log = logging.getLogger("rpc.dispatch")

QUIET = frozenset(("Host.ping", "Host.ping2"))  # asked every few seconds; logged at debug level
LINE = "%s %s -> %s (%.1f ms)"  # client, verb, code and message, time
TRUE: Final = Success(True)  # what most short verbs answer
MAX_BYTES = 32 * 1024 * 1024  # of one client's outstanding requests; then no more is read
MAX_ORPHANS = 10_000  # outstanding requests of clients that are gone


class Checked(Protocol):
    """What schema.checker answers."""

    @property
    def values(self) -> Mapping[str, Any]: ...

    @property
    def warnings(self) -> Iterable[str]: ...


class Checker(Protocol):
    """schema.checker.Checker, as far as it is used here."""

    def knows(self, name: str) -> bool:
        """Whether the schema has a verb of that wire name."""

    def check_params(self, name: str, params: Any, strict: bool) -> Checked:
        """Values by parameter name; InvalidParams."""

    def check_reply(self, name: str, reply: Any) -> None:
        """Raises InternalError when a reply is not what the schema promises."""


@dataclass(frozen=True)
class Settings:
    """Of the dispatcher; config.Rpc has these, too."""

    max_outstanding: int = 2000
    strict: bool = False
    check_replies: bool = False
    width: int = 8  # calls in one lane at a time
    timeout: float = 170.0  # seconds for any verb


class Client:
    """One connection's side of the dispatcher."""

    def __init__(self, dispatcher: Dispatcher, name: str) -> None:
        self.name = name
        self.outstanding = 0
        self.bytes = 0
        self.closed = False
        self.on_room: Callable[[], None] = _nothing
        self.handle = functools.partial(dispatcher.handle, self)
        self._dispatcher = dispatcher

    @property
    def full(self) -> bool:
        return self.bytes > MAX_BYTES

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.on_room = _nothing
            self._dispatcher.gone(self)


class _Call:
    """One frame's worth of requests on its way through jsonrpcserver."""

    __slots__ = ("client", "flow_id", "secret", "size")

    def __init__(self, client: Client, flow_id: str, body: bytes) -> None:
        self.client = client
        self.flow_id = flow_id
        text = body.lower()  # a key may be written in any case, or with escapes
        self.secret = b"assword" in text or b"\\u" in text
        self.size = len(body)


class Dispatcher:
    """Lives on the event loop.

    `make_context(flow_id, client)` gives the first argument of every verb.  While `ready()` is
    false every verb answers 99.  `builtins` are answered whatever the state (`rpc.discover`).
    """

    def __init__(
        self,
        checker: Checker,
        verbs: Mapping[str, Verb],
        make_context: Callable[[str, str], object],
        lanes: Lanes,
        settings: Settings,
        ready: Callable[[], bool] | None = None,
        builtins: Mapping[str, Callable[[], object]] | None = None,
    ) -> None:
        self.checker = checker
        self.settings = settings
        self.make_context = make_context
        self.ready = ready or _always
        self._fair = FairQueues(lanes, settings.width)
        self._flows = 0
        self._flushing = False
        self._orphans: collections.deque[Client] = collections.deque()
        self._warned: set[tuple[str, str]] = set()
        self._methods = _Methods(self, verbs)
        self._methods[jsonrpc.INVALID] = _invalid
        for name, function in (builtins or {}).items():
            self._methods[name] = _Builtin(self, name, function)

    def client(self, name: str) -> Client:
        """For a new connection; `close()` it when the connection is gone."""
        return Client(self, name)

    def handle(
        self, client: Client, body: bytes, flow_id: str, reply: Callable[[bytes], None]
    ) -> bool:
        """Execute what `body` asks; `reply` gets the answer's bytes.  False if there is none to
        come (notifications)."""
        if not flow_id:
            self._flows += 1
            flow_id = f"{self._flows:08x}"
        call = _Call(client, flow_id, body)
        token = logs.FLOW.set(flow_id)
        try:
            out = jsonrpc.dispatch(body, self._methods, call)
        finally:
            logs.FLOW.reset(token)
        if out is None:
            return False
        if type(out) is dict:
            reply(self.dumps(out))
        elif type(out) is jsonrpc.Later:
            pending, request_id = out.pending, out.id
            jsonrpc.when_done(pending, lambda: reply(self.dumps(pending.reply(request_id))))
        else:
            self._batch(list(out), reply)
        return True

    def gone(self, client: Client) -> None:
        """What a client that went away had asked is still done, within a bound."""
        if client.outstanding:
            self._orphans.append(client)
        total = sum(orphan.outstanding for orphan in self._orphans)
        while self._orphans and (total > MAX_ORPHANS or not self._orphans[0].outstanding):
            oldest = self._orphans.popleft()
            if oldest.outstanding:
                log.warning("%s is gone; its waiting requests are dropped", oldest.name)
                self._fair.drop(oldest)
                total -= oldest.outstanding

    def submit(self, key: str, client: Client, work: Work) -> None:
        self._fair.submit(key, client, work)

    def warn(self, method: str, warnings: Iterable[str]) -> None:
        """Engines repeat themselves: each warning is logged once."""
        for warning in warnings:
            if (method, warning) not in self._warned and len(self._warned) < 1000:
                self._warned.add((method, warning))
                log.warning("%s: %s (logged once)", method, warning)

    def flush_soon(self) -> None:
        """Have the log written at the end of this turn of the loop."""
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        logs.flush()

    def dumps(self, reply: dict[str, object]) -> bytes:
        try:
            return jsonrpc.dumps(reply)
        except (TypeError, ValueError) as error:
            log.error("A reply cannot be written as JSON: %s", error)
            failed = errors.InternalError(reason="the reply is not JSON", flow_id=logs.FLOW.get())
            return jsonrpc.dumps(jsonrpc.error_reply(failed.code, failed.message, reply.get("id")))

    def _batch(self, parts: list[object], reply: Callable[[bytes], None]) -> None:
        """Answer when all parts have come; a batch of one is answered by a bare object."""
        waiting = [part for part in parts if type(part) is jsonrpc.Later]
        left = len(waiting)

        def finish() -> None:
            bodies = [
                self.dumps(
                    part.pending.reply(part.id) if isinstance(part, jsonrpc.Later) else part  # type: ignore[arg-type]
                )
                for part in parts
            ]
            reply(bodies[0] if len(bodies) == 1 else b"[" + b",".join(bodies) + b"]")

        def one() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                finish()

        if not waiting:
            finish()
        for part in waiting:
            jsonrpc.when_done(part.pending, one)


class _Method:
    """A verb as jsonrpcserver calls it."""

    def __init__(self, dispatcher: Dispatcher, name: str, verb: Verb) -> None:
        self._dispatcher = dispatcher
        self._name = name
        self._verb = verb
        self._strict = dispatcher.settings.strict
        self._check_replies = dispatcher.settings.check_replies
        self._level = logging.DEBUG if name in QUIET else logging.INFO

    def __call__(self, call: _Call, /, *args: Any, **params: Any) -> Any:
        start = time.monotonic()
        dispatcher, verb = self._dispatcher, self._verb
        try:
            if not dispatcher.ready():
                raise errors.RecoveryInProgress()
            given = list(args) if args else params
            checked = dispatcher.checker.check_params(self._name, given, self._strict)
            values = checked.values
            if checked.warnings:
                dispatcher.warn(self._name, checked.warnings)
            if call.secret:
                values = jsonrpc.wrap_passwords(values)
            if verb.lane is not None:
                return Success(self._submit(call, values, verb.lane_key(values), start))
            context = dispatcher.make_context(call.flow_id, call.client.name)
            result = self._result(verb.function(context, **values))
        except Exception as error:  # noqa: BLE001 - every failure is an answer
            code, message = self.failure(error, call.flow_id)
            self._log(call, start, code, message)
            return Error(code, message)
        if log.isEnabledFor(self._level):
            self._log(call, start, 0, "")
        return TRUE if result is True else Success(result)

    def _result(self, value: object) -> object:
        """What goes on the wire: a verb that returns nothing answers true."""
        result = True if value is None else value
        if self._check_replies:
            self._dispatcher.checker.check_reply(self._name, result)
        return result

    def _submit(
        self, call: _Call, values: Mapping[str, Any], key: str, start: float
    ) -> jsonrpc.Pending:
        dispatcher, client, function = self._dispatcher, call.client, self._verb.function
        limit = dispatcher.settings.max_outstanding
        if client.outstanding >= limit:
            raise errors.ResourceExhausted(resource=f"The queue of {client.name}", limit=limit)
        pending = jsonrpc.Pending()
        context = dispatcher.make_context(call.flow_id, client.name)

        def done(result: object, error: BaseException | None) -> None:
            client.outstanding -= 1
            room = client.full
            client.bytes -= call.size
            self._finish(call, pending, start, result, error)
            if room and not client.full:
                client.on_room()

        work = Work(
            lambda: self._result(function(context, **values)),
            min(self._verb.timeout, dispatcher.settings.timeout),
            done,
            contextvars.copy_context(),
        )
        client.outstanding += 1
        client.bytes += call.size
        dispatcher.submit(key, client, work)
        return pending

    def _finish(
        self,
        call: _Call,
        pending: jsonrpc.Pending,
        start: float,
        result: object,
        error: BaseException | None,
    ) -> None:
        token = logs.FLOW.set(call.flow_id)
        try:
            if error is None:
                pending.value = result
                if log.isEnabledFor(self._level):
                    self._log(call, start, 0, "")
            else:
                pending.code, pending.message = self.failure(error, call.flow_id)
                self._log(call, start, pending.code, pending.message)
            pending.done = True
            if pending.on_done is not None:
                pending.on_done()
        finally:
            logs.FLOW.reset(token)

    def failure(self, error: BaseException, flow_id: str) -> tuple[int, str]:
        known = errors.agent_error(error)
        if known is not error:
            log.error("%s failed", self._name, exc_info=error)
        if known is not None:
            return known.code, known.message
        internal = errors.InternalError(reason=f"{type(error).__name__}: {error}", flow_id=flow_id)
        return internal.code, internal.message

    def _log(self, call: _Call, start: float, code: int, message: str) -> None:
        ms = (time.monotonic() - start) * 1000
        end = f"{code} {message}" if code else 0
        level = logging.INFO if code else self._level
        if logs.line(log, level, LINE, call.client.name, self._name, end, ms):
            self._dispatcher.flush_soon()


class _Builtin(_Method):
    """What the dispatcher answers itself, whatever the state of the agent; in a lane, since it may
    take a while."""

    def __init__(self, dispatcher: Dispatcher, name: str, function: Callable[[], object]) -> None:
        super().__init__(dispatcher, name, Verb(lambda _context: function(), lane=":rpc"))

    def __call__(self, call: _Call, /, *args: Any, **params: Any) -> Any:
        try:
            return Success(self._submit(call, {}, ":rpc", time.monotonic()))
        except errors.AgentError as error:
            return Error(error.code, error.message)


class _Methods(dict[str, Callable[..., object]]):
    """Callables by wire name, made when a name is first asked for: the schema reads a namespace's
    file then, and an idle agent holds only what its peers use."""

    def __init__(self, dispatcher: Dispatcher, verbs: Mapping[str, Verb]) -> None:
        super().__init__()
        self._dispatcher = dispatcher
        self._verbs = verbs

    def __missing__(self, name: str) -> Callable[..., object]:
        if not self._dispatcher.checker.knows(name):
            raise KeyError(name)
        verb = self._verbs.get(name)
        made = _unbuilt(name) if verb is None else _Method(self._dispatcher, name, verb)
        self[name] = made
        return made


def _unbuilt(name: str) -> Callable[..., object]:
    error = errors.NotImplementedVerb(method=name)

    def answer(call: _Call, /, *args: Any, **params: Any) -> Any:
        return Error(error.code, error.message)

    return answer


def _invalid(call: _Call, /, reason: str) -> Any:
    error = errors.InvalidRequest(reason=reason)
    return Error(error.code, error.message)


def _always() -> bool:
    return True


def _nothing() -> None:
    """Nobody waits for room."""
