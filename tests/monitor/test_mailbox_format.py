# SPDX-License-Identifier: GPL-2.0-or-later
"""The bytes of the mailbox, against those of other hosts."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdsm_storage.monitor import mailbox_format as fmt
from vdsm_storage.monitor.mailbox_format import CLEAN, EMPTY, SLOTS, Extend

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "mailbox"
INDEX = json.loads((GOLDEN / "index.json").read_text())

EXTENDS = st.builds(Extend, st.uuids().map(str), st.uuids().map(str), st.integers(0, fmt.MAX_SIZE))
MESSAGES = st.one_of(
    st.just(EMPTY), st.just(CLEAN), st.binary(min_size=64, max_size=64), EXTENDS.map(Extend.encode)
)


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


@pytest.mark.parametrize("name", [n for n in INDEX if n.startswith("extend-")])
def test_golden_messages(name: str) -> None:
    asked = INDEX[name]["input"]
    message = Extend(asked["domain"], asked["volume"], asked["size_mib"])
    assert message.encode() == golden(name)
    assert fmt.decode(golden(name)) == message
    again = fmt.answer(golden(name), asked["size_mib"])
    assert again == golden(name)
    assert fmt.answer(golden("extend-1.bin"), asked["size_mib"]) == golden(name)
    assert fmt.same_subject(golden("extend-1.bin"), golden(name))


def test_golden_host_block() -> None:
    about = INDEX["host-block.bin"]
    block = golden("host-block.bin")
    slots = fmt.messages(block)
    for asked in about["requests"]:
        found = fmt.decode(slots[asked["slot"]])
        assert found == Extend(asked["domain"], asked["volume"], asked["size_mib"])
    assert slots[3] == CLEAN
    assert all(fmt.is_empty(message) for message in slots[4:])
    assert fmt.is_sound(block)
    assert fmt.seal(slots) == block
    assert int.from_bytes(block[-4:], "little") == about["checksum"]
    assert about["offset_in_inbox"] == about["host_id"] * fmt.BLOCK


def test_golden_full_block() -> None:
    about = INDEX["host-block-full.bin"]
    messages = [
        Extend(about["domain"], volume, 1000 + slot).encode()
        for slot, volume in enumerate(about["volumes"])
    ]
    assert len(messages) == SLOTS
    assert fmt.seal(messages) == golden("host-block-full.bin")


def test_golden_wrong_checksum() -> None:
    assert not fmt.is_sound(golden("host-block-bad-checksum.bin"))
    assert not fmt.is_sound(golden("spm-reply-block.bin"))  # the SPM writes none
    assert not fmt.is_sound(b"")
    assert fmt.is_sound(fmt.EMPTY_BLOCK)


def test_golden_answers() -> None:
    asked = fmt.messages(golden("host-block.bin"))
    told = fmt.messages(golden("spm-reply-block.bin"))
    wanted = fmt.decode(asked[0])
    assert wanted is not None
    assert told[0] == fmt.answer(asked[0], wanted.size)
    assert told[1] == fmt.answer(asked[1], 0)
    assert golden("clean.bin") == CLEAN


def test_golden_event() -> None:
    block = golden("event-block.bin")
    number = uuid.UUID(INDEX["event-block.bin"]["event"])
    assert fmt.event(number) == block
    assert fmt.event_of(block) == number.bytes
    assert fmt.event_of(fmt.EMPTY_BLOCK) is None
    assert all(fmt.is_empty(message) for message in fmt.messages(block))
    assert fmt.new_event() != fmt.new_event()


def test_golden_uuids() -> None:
    for text, packed in json.loads(golden("uuid-packing.json")).items():
        assert Extend(text, text, 0).encode()[5:21].hex() == packed


@given(EXTENDS, st.integers(0, fmt.MAX_SIZE))
def test_round_trip(message: Extend, size: int) -> None:
    data = message.encode()
    assert len(data) == 64
    assert fmt.decode(data) == message
    assert not fmt.is_empty(data)
    told = fmt.answer(data, size)
    assert fmt.decode(told) == Extend(message.domain, message.volume, size)
    assert fmt.same_subject(data, told)


@given(st.lists(MESSAGES, min_size=SLOTS, max_size=SLOTS))
def test_blocks(messages: list[bytes]) -> None:
    block = fmt.seal(messages)
    assert len(block) == fmt.BLOCK
    assert fmt.is_sound(block)
    assert fmt.messages(block) == messages


@given(st.binary(min_size=64, max_size=64))
def test_any_message(data: bytes) -> None:
    found = fmt.decode(data)
    fmt.is_empty(data)
    assert found is None or 0 <= found.size <= fmt.MAX_SIZE


@given(
    st.lists(MESSAGES, min_size=SLOTS, max_size=SLOTS), st.integers(0, 4095), st.integers(1, 255)
)
def test_one_wrong_byte_is_noticed(messages: list[bytes], place: int, change: int) -> None:
    block = bytearray(fmt.seal(messages))
    block[place] = (block[place] + change) % 256
    assert not fmt.is_sound(bytes(block))


def test_what_no_message_can_hold() -> None:
    ok = str(uuid.uuid4())
    for wrong in (Extend(ok, ok, -1), Extend(ok, ok, 2**32), Extend("x", ok, 1), Extend(ok, "", 1)):
        with pytest.raises(ValueError, match=r"\w"):
            wrong.encode()
    with pytest.raises(ValueError, match="MiB"):
        fmt.answer(CLEAN, 2**32)
    sound = Extend(ok, ok, 5).encode()
    for wrong_bytes in (
        b"1move" + sound[5:],
        sound[:37] + b"0x0000000000000a" + sound[53:],
        sound[:37] + b"f" * 16 + sound[53:],
        CLEAN,
        EMPTY,
    ):
        assert fmt.decode(wrong_bytes) is None
    assert fmt.decode(b"2" + sound[1:]) is not None  # only the op code counts
