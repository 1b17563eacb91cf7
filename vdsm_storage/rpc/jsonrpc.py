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
from jsonrpcserver.dispatcher import call
from jsonrpcserver.request import Request
from jsonrpcserver.result import Error
from jsonrpcserver.sentinels import NOID
from oslash.either import Left

from vdsm_storage import errors
from vdsm_storage.base.secret import Secret

INVALID = "rpc.invalid"  # stands for a request that is none, inside jsonrpcserver


def dispatch(body: bytes, methods: Mapping[str, Callable[..., Any]], context: object) -> Any:
    """What becomes of a request's bytes: None for notifications, a reply (a dict or a Later), or
    for a batch a list of those.

    The steps are jsonrpcserver's own (request, call, result).  Its pipeline around them, which
    also binds the arguments to the method's signature, costs more than all the rest of a short
    request; parameters are checked by the schema instead.
    """
    try:
        data = orjson.loads(body)
    except ValueError as error:
        failed = errors.ParseError(reason=error)
        return error_reply(failed.code, failed.message, None)
    if type(data) is list and data:
        replies = [_one(item, methods, context) for item in data]
        return [reply for reply in replies if reply is not None] or None
    return _one(data, methods, context)


def _one(item: Any, methods: Mapping[str, Callable[..., Any]], context: object) -> Any:
    request = _request(item)
    try:
        method = methods[request.method]
    except KeyError:
        unknown = errors.MethodNotFound(method=request.method[:100])
        result = Error(unknown.code, unknown.message)
    else:
        result = call(request, context, method)
    if request.id is NOID:
        return None
    if isinstance(result, Left):
        error = result._error
        return error_reply(error.code, error.message, request.id)
    value = result._value.result
    if type(value) is Pending:
        return value.reply(request.id) if value.done else Later(value, request.id)
    return {"jsonrpc": "2.0", "id": request.id, "result": value}


def dumps(reply: object) -> bytes:
    """JSON bytes; TypeError or ValueError for what is not JSON."""
    try:
        return orjson.dumps(reply, default=reveal)
    except TypeError:  # numbers as keys take orjson's slower way
        return orjson.dumps(reply, default=reveal, option=orjson.OPT_NON_STR_KEYS)


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


def _request(item: Any) -> Request:
    """jsonrpcserver's request; one of INVALID for what is none."""
    if type(item) is not dict:
        return _invalid(None, "an empty list" if item == [] else "not an object")
    request_id = item.get("id")
    if item.get("jsonrpc") != "2.0":
        return _invalid(request_id, 'jsonrpc is not "2.0"')
    method = item.get("method")
    if type(method) is not str or method == INVALID:
        return _invalid(request_id, "method is not a verb's name")
    if request_id is None:
        request_id = NOID  # a notification
    elif type(request_id) is not str and isinstance(request_id, (dict, list)):
        return _invalid(None, "id is neither a string nor a number")
    params = item.get("params")
    if params is None:
        params = {}
    elif type(params) is not dict and type(params) is not list:
        return _invalid(request_id, "params is neither an object nor a list")
    return Request(method, params, request_id)


def _invalid(request_id: object, reason: str) -> Request:
    return Request(INVALID, {"reason": reason}, request_id)


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


def reveal(value: object) -> object:
    """A password that a verb answers goes out as it is."""
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
