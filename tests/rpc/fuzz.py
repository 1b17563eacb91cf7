# SPDX-License-Identifier: GPL-2.0-or-later
"""Targets for atheris: `python tests/rpc/fuzz.py frames|jsonrpc|http [libFuzzer options]`."""

from __future__ import annotations

import contextlib
import json
import sys
import types
from collections.abc import Callable, Mapping

import h11

from vdsm_storage.rpc import frames as codec
from vdsm_storage.rpc import jsonrpc, listener
from vdsm_storage.rpc.frames import Decoder, Frame, FrameError, encode


def frames(data: bytes) -> None:
    """The first byte says where to cut; what is decoded must survive encoding."""
    cut = data[0] if data else 0
    found = []
    decoder = Decoder(max_frame=1000, max_head=300)
    try:
        for piece in (data[1 : 1 + cut], data[1 + cut :]):
            found += decoder.feed(piece)
    except FrameError:
        pass
    for item in found:
        if isinstance(item, Frame):
            (again,) = Decoder().feed(encode(item))
            assert isinstance(again, Frame)
            assert (again.command, again.body) == (item.command, item.body)


def requests(data: bytes) -> None:
    """Whatever comes in, what goes out is JSON with one of result and error."""
    out = jsonrpc.dispatch(data, {}, None)
    for reply in out if isinstance(out, list) else [out]:
        if reply is not None:
            decoded = json.loads(jsonrpc.dumps(reply))
            assert ("result" in decoded) != ("error" in decoded)


def first_bytes(data: bytes) -> None:
    kind = listener.protocol_of(data)
    assert kind in ("stomp", "http", "", None)
    if kind == "http":
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1000)
        parser.receive_data(data)
        with contextlib.suppress(h11.RemoteProtocolError):
            parser.next_event()


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "frames": frames,
    "jsonrpc": requests,
    "http": first_bytes,
}

if __name__ == "__main__":
    import atheris

    for owner in (codec, jsonrpc, listener, codec.Decoder):  # instrument_all takes half a minute
        for found in list(vars(owner).values()):
            if isinstance(found, types.FunctionType):
                atheris.instrument_func(found)
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()
