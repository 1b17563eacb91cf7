# SPDX-License-Identifier: GPL-2.0-or-later
"""The STOMP codec: what each existing client sends, every way of cutting it, and garbage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdsm_storage.rpc import frames
from vdsm_storage.rpc.frames import Decoder, Frame, FrameError, HeartBeat, encode

BEAT = HeartBeat.BEAT
LENGTH_1 = Frame("SEND", {"a": "1", "content-length": "1"}, b"b")


def decode(data: bytes) -> list[Frame | HeartBeat]:
    return Decoder().feed(data)


def test_a_frame() -> None:
    (frame,) = decode(b"SEND\ndestination:a\ncontent-length:5\n\nhello\0")
    assert frame == Frame("SEND", {"destination": "a", "content-length": "5"}, b"hello")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"CONNECT\naccept-version:1.2\n\n\0", Frame("CONNECT", {"accept-version": "1.2"})),
        (b"CONNECT\r\nhost:x\r\n\r\n\0", Frame("CONNECT", {"host": "x"})),
        (b"SEND\n\nbody\0", Frame("SEND", {}, b"body")),
        (b"SEND\na:1\na:2\n\n\0", Frame("SEND", {"a": "1"})),
        (b"SEND\na:1\na:2\ncontent-length:1\n\nb\0", LENGTH_1),
        (b"SEND\na:b:c\n\n\0", Frame("SEND", {"a": "b:c"})),
        (b"SEND\na:b\\cc\\nd\\\\e\\r\n\n\0", Frame("SEND", {"a": "b:c\nd\\e\r"})),
        (b"SEND\na:one\\two\n\n\0", Frame("SEND", {"a": "one\\two"})),
        (b"SEND\na:\n\n\0", Frame("SEND", {"a": ""})),
        (b"SEND\ncontent-length:3\n\na\0b\0", Frame("SEND", {"content-length": "3"}, b"a\0b")),
        ("SEND\na:ä\n\n\0".encode(), Frame("SEND", {"a": "ä"})),
    ],
)
def test_forms(data: bytes, expected: Frame) -> None:
    assert decode(data) == [expected]
    pieces = Decoder()
    found = [item for byte in data for item in pieces.feed(bytes([byte]))]
    assert found == [expected]


def test_heart_beats_between_frames() -> None:
    data = b"\n\r\nSEND\n\n\0\nSEND\n\n\0\n\n"
    kinds = [item if item is BEAT else item.command for item in decode(data)]
    assert kinds == [BEAT, BEAT, "SEND", BEAT, "SEND", BEAT, BEAT]


@pytest.mark.parametrize(
    "data",
    [
        b"HELLO\n\n\0",
        b"SEND\nno colon\n\n\0",
        b"SEND\ncontent-length:x\n\n\0",
        b"SEND\ncontent-length:-1\n\n\0",
        "SEND\ncontent-length:٣\n\nabc\0".encode(),
        b"SEND\ncontent-length:1\n\nab\0",
        b"SEND\na:\xff\n\n\0",
        b"SEND\na:1\0SEND\n\n\0",
    ],
)
def test_what_is_no_frame(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode(data)


def test_limits() -> None:
    with pytest.raises(FrameError, match="at most 100"):
        Decoder(max_frame=100).feed(b"SEND\ncontent-length:101\n\n")
    with pytest.raises(FrameError, match="more than 100"):
        Decoder(max_frame=100).feed(b"SEND\n\n" + b"x" * 101)
    with pytest.raises(FrameError, match="headers of more"):
        Decoder(max_head=20).feed(b"SEND\nheader:" + b"x" * 20)
    with pytest.raises(FrameError, match="more than 3 headers"):
        Decoder(max_headers=3).feed(b"SEND\na:1\nb:1\nc:1\nd:1\n\n\0")


def test_memory_of_an_unfinished_frame_is_bounded() -> None:
    decoder = Decoder(max_frame=1000)
    decoder.feed(b"SEND\n\n")
    for _ in range(10):
        decoder.feed(b"x" * 100)
    with pytest.raises(FrameError):
        decoder.feed(b"x" * 100)
    assert decoder.buffered <= 1100


def test_a_body_in_small_pieces_is_not_searched_again_and_again() -> None:
    """Linear: a megabyte without a length, 16 bytes at a time, within the suite's time-out."""
    decoder = Decoder()
    decoder.feed(b"SEND\n\n")
    for _ in range(65536):
        assert decoder.feed(b"0123456789abcdef") == []
    (frame,) = decoder.feed(b"\0")
    assert len(frame.body) == 1024 * 1024


@pytest.mark.parametrize("command", ["MESSAGE", "ERROR"])
def test_messages_and_errors_always_have_a_length(command: str) -> None:
    assert b"\ncontent-length:0\n" in encode(Frame(command, {"a": "b"}))


@pytest.mark.parametrize(
    "frame",
    [
        Frame("CONNECTED", {"version": "1.2", "heart-beat": "0,0"}),
        Frame("RECEIPT", {"receipt-id": "1"}),
        Frame("ERROR", {}, b"x"),
    ],
)
def test_a_frame_has_three_lines_at_least(frame: Frame) -> None:
    """One of the existing clients takes anything shorter for a heart-beat."""
    assert len(encode(frame).split(b"\n")) >= 3


def test_a_wrong_length_of_the_caller_is_corrected() -> None:
    frame = Frame("MESSAGE", {"content-length": "99"}, b"abc")
    assert decode(encode(frame)) == [Frame("MESSAGE", {"content-length": "3"}, b"abc")]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
KEYS = TEXT.filter(lambda key: key not in ("", "content-length"))
FRAMES = st.builds(
    Frame,
    st.sampled_from(sorted(frames.COMMANDS)),
    st.dictionaries(KEYS, TEXT, max_size=5),
    st.binary(max_size=200),
)


def without_length(item: Frame | HeartBeat) -> Frame | HeartBeat:
    if isinstance(item, HeartBeat):
        return item
    kept = {key: value for key, value in item.headers.items() if key != "content-length"}
    return Frame(item.command, kept, item.body)


@given(st.lists(FRAMES | st.just(BEAT), max_size=5), st.lists(st.integers(1, 40), max_size=50))
def test_round_trip_in_any_pieces(items: list[Frame | HeartBeat], cuts: list[int]) -> None:
    data = b"".join(b"\n" if item is BEAT else encode(item) for item in items)
    decoder = Decoder()
    found: list[Frame | HeartBeat] = []
    for cut in cuts:
        found += decoder.feed(data[:cut])
        data = data[cut:]
    found += decoder.feed(data)
    assert [without_length(item) for item in found] == items
    assert decoder.buffered == 0


@given(st.lists(st.binary(max_size=60), max_size=10))
def test_garbage_is_an_error_or_nothing(pieces: list[bytes]) -> None:
    decoder = Decoder(max_frame=200, max_head=50)
    try:
        for piece in pieces:
            decoder.feed(piece)
    except FrameError:
        return
    assert decoder.buffered <= 261


ALMOST = st.lists(
    st.sampled_from(
        [b"SEND", b"CONNECT", b"\n", b"\r\n", b"\0", b":", b"a", b"content-length:3", b"\\", b"abc"]
    ),
    max_size=20,
).map(b"".join)


@given(ALMOST, st.integers(0, 40))
def test_cutting_changes_nothing(data: bytes, cut: int) -> None:
    """Whatever the bytes, what is found does not depend on how they come."""

    def outcome(*pieces: bytes) -> tuple[list[Frame | HeartBeat], bool]:
        decoder, found = Decoder(), []
        for piece in pieces:
            try:
                found += decoder.feed(piece)
            except FrameError:
                break
        return found, decoder.failed is not None

    assert outcome(data) == outcome(data[:cut], data[cut:])


def test_frames_before_an_error_count() -> None:
    decoder = Decoder()
    assert decoder.feed(b"SEND\n\na\0GARBAGE\n\n\0") == [Frame("SEND", {}, b"a")]
    with pytest.raises(FrameError, match="GARBAGE"):
        decoder.feed(b"SEND\n\na\0")
