# SPDX-License-Identifier: GPL-2.0-or-later
"""JSON-RPC 2.0 as the existing clients speak it, around jsonrpcserver.

A reply holds exactly one of `result` and `error`: a client of today takes `"error": null` for an
error.  An id that is null is that of a notification.  Of a list of requests each one that is none
is answered by an error of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson
from jsonrpcserver.dispatcher import dispatch_to_response_pure
from oslash.either import Left

from vdsm_storage import errors
from vdsm_storage.base.secret import Secret

INVALID = "rpc.invalid"  # stands for a request that is none, inside jsonrpcserver


def dispatch(body: bytes, methods: dict[str, Callable[..., object]], context: object) -> Any:
    """What jsonrpcserver makes of `body`: None, a reply, a Later, or a list of them."""
    return dispatch_to_response_pure(
        deserializer=_deserialize,
        validator=_valid,
        methods=methods,
        context=context,
        post_process=_shape,  # type: ignore[arg-type]
        request=body,  # type: ignore[arg-type]
    )


def dumps(reply: object) -> bytes:
    """JSON bytes; TypeError or ValueError for what is not JSON."""
    return orjson.dumps(reply, default=_reveal, option=orjson.OPT_NON_STR_KEYS)


class Pending:
    """Stands for a result that comes later."""

    __slots__ = ("code", "done", "message", "on_done", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: object = None
        self.code: int | None = None
        self.message = ""
        self.on_done: Callable[[], None] | None = None

    def reply(self, request_id: object) -> dict[str, object]:
        if self.code is not None:
            return error_reply(self.code, self.message, request_id)
        return {"jsonrpc": "2.0", "id": request_id, "result": self.value}


class Later:
    """A reply whose result is pending, and the request's id."""

    __slots__ = ("id", "pending")

    def __init__(self, pending: Pending, request_id: object) -> None:
        self.pending = pending
        self.id = request_id


def _deserialize(body: str | bytes) -> Any:
    """Parse; requests that are none are replaced by ones that say so, each in its place."""
    data = orjson.loads(body)
    if type(data) is dict:
        return _normal(data)
    if type(data) is list and data:
        return [_normal(item) for item in data]
    return _invalid_request(None, "an empty list" if data == [] else "neither object nor list")


def _normal(item: Any) -> dict[str, Any]:
    if type(item) is not dict:
        return _invalid_request(None, "not an object")
    request_id = item.get("id")
    if item.get("jsonrpc") != "2.0":
        return _invalid_request(request_id, 'jsonrpc is not "2.0"')
    method = item.get("method")
    if type(method) is not str or method == INVALID:
        return _invalid_request(request_id, "method is not a verb's name")
    if isinstance(request_id, (dict, list)):
        return _invalid_request(None, "id is neither a string nor a number")
    if request_id is None:
        item.pop("id", None)  # a notification
    params = item.get("params")
    if params is None:
        item.pop("params", None)
    elif type(params) is not dict and type(params) is not list:
        return _invalid_request(request_id, "params is neither an object nor a list")
    return item


def _invalid_request(request_id: object, reason: str) -> dict[str, Any]:
    return {"method": INVALID, "params": {"reason": reason}, "id": request_id}


def _valid(request: Any) -> Any:
    """`_deserialize` has looked at it."""
    return request


def _shape(response: Any) -> dict[str, object] | Later:
    """jsonrpcserver's response as it crosses the wire: exactly one of result and error."""
    if isinstance(response, Left):
        code, message, data, request_id = response._error
        if code == errors.ParseError.code:
            message = errors.ParseError(reason=data).message
        elif code == errors.MethodNotFound.code:
            message = errors.MethodNotFound(method=data).message
        return error_reply(code, message, request_id)
    result, request_id = response._value
    if type(result) is Pending:
        if result.done:
            return result.reply(request_id)
        return Later(result, request_id)
    return {"jsonrpc": "2.0", "id": request_id, "result": result}


def error_reply(code: int, message: str, request_id: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": request_id, "error": {"code": code, "message": message}}


def when_done(pending: Pending, call: Callable[[], None]) -> None:
    if pending.done:
        call()
    else:
        pending.on_done = call


def wrap_passwords(value: Any) -> Any:
    """The same, with every string under a key that ends in `password` made a Secret."""
    if isinstance(value, Mapping):
        return {
            key: Secret(item)
            if isinstance(item, str) and str(key).lower().endswith("password")
            else wrap_passwords(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [wrap_passwords(item) for item in value]
    return value


def _reveal(value: object) -> object:
    """A password that a verb answers goes out as it is."""
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
