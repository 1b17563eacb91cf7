# SPDX-License-Identifier: GPL-2.0-or-later
"""Hostile bytes and hostile JSON: nothing but errors and replies may come of them.

tests/rpc/fuzz.py feeds the same targets with atheris, where that is installed.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rpc.conftest import Probe, Wire, request, rpc, table
from tests.rpc.fuzz import SEEDS, TARGETS
from vdsm_storage.rpc.dispatch import Dispatcher, Settings
from vdsm_storage.rpc.listener import protocol_of
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.normalise import Checker


class NoLanes:
    """Nothing here runs in a lane."""

    def submit(self, key: str, call: Callable[[], object], timeout: float) -> Future[Any]:
        raise AssertionError(key)


@pytest.fixture(scope="module")
def dispatcher() -> Dispatcher:
    verbs = {name: verb for name, verb in table(Probe()).items() if verb.lane is None}
    settings = Settings(check_replies=True)
    return Dispatcher(Checker(Schema()), verbs, lambda _flow, _client: None, NoLanes(), settings)


def replies_to(dispatcher: Dispatcher, body: bytes) -> list[Any]:
    """What comes back for a request's bytes, as JSON values."""
    out: list[bytes] = []
    dispatcher.handle(dispatcher.client("fuzz"), body, "flow", out.append)
    assert len(out) <= 1
    if not out:
        return []
    value = json.loads(out[0])
    return value if isinstance(value, list) else [value]


def well_formed(reply: Any) -> bool:
    if reply.keys() == {"jsonrpc", "id", "result"}:
        return True
    error = reply["error"]
    return (
        reply.keys() == {"jsonrpc", "id", "error"}
        and type(error["code"]) is int
        and type(error["message"]) is str
    )


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(max_size=10)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
NAMES = st.sampled_from(
    ["Host.echo", "Host.ping2", "Host.getHardwareInfo", "Volume.create", "VM.create", "rpc.invalid"]
) | st.text(max_size=12)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | VALUES,
        "method": NAMES | VALUES,
        "params": st.dictionaries(st.sampled_from(["message", "password"]), VALUES) | VALUES,
        "id": VALUES,
    },
)


@given(st.binary(max_size=100))
def test_any_bytes(dispatcher: Dispatcher, body: bytes) -> None:
    assert all(well_formed(reply) for reply in replies_to(dispatcher, body))


@given(VALUES | REQUESTS | st.lists(REQUESTS | VALUES, max_size=4))
@settings(max_examples=300)
def test_any_json(dispatcher: Dispatcher, value: Any) -> None:
    replies = replies_to(dispatcher, json.dumps(value).encode())
    assert all(well_formed(reply) for reply in replies)
    if not isinstance(value, dict) or value.get("id") is not None:
        assert replies or value == [] or isinstance(value, list)


@given(st.binary(max_size=40))
def test_first_bytes(first: bytes) -> None:
    assert protocol_of(first) in ("stomp", "http", "", None)


@given(st.lists(st.binary(max_size=200), max_size=6))
@settings(max_examples=40, deadline=None)
def test_any_bytes_on_a_connection(shared: Wire, pieces: list[bytes]) -> None:
    """The server outlives them, whatever it makes of the connection."""
    with shared.peer() as peer:
        try:
            peer.send(b"CONNECT\naccept-version:1.2\n\n\0")
            for piece in pieces:
                peer.send(piece)
        except OSError:
            pass
    with shared.peer() as peer:
        peer.connect(replies="alive")
        peer.send(request(rpc("Host.ping2"), "alive"))
        assert peer.reply()["result"] is True


@pytest.fixture(scope="module")
def shared() -> Any:
    """One server for all examples."""
    config = Wire.local_config()
    wire = Wire(config, None)
    wire.start()
    yield wire
    wire.stop()


@given(st.data())
@settings(max_examples=50)
def test_targets_of_the_fuzzer(data: st.DataObject) -> None:
    """So that the fuzzer's targets do not rot where atheris is missing."""
    target = data.draw(st.sampled_from(sorted(TARGETS)))
    assert TARGETS[target](data.draw(st.binary(max_size=300))) is None


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_atheris(target: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed")
    program = [sys.executable, "-P", str(Path(__file__).parent / "fuzz.py"), target]
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "one").write_bytes(SEEDS[target])
    options = ["-runs=200000", "-max_total_time=4", f"-artifact_prefix={tmp_path}/"]
    options.append(str(tmp_path / "seeds"))
    done = subprocess.run([*program, *options], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]


def test_orjson_and_json_agree_on_what_is_sent() -> None:
    value = {"jsonrpc": "2.0", "id": "ä", "result": {"a": [1, 2.5, None, True]}}
    assert json.loads(orjson.dumps(value)) == value
