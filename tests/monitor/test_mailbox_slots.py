# SPDX-License-Identifier: GPL-2.0-or-later
"""The slots of a host against managers that answer late, twice, not at all, or start anew."""

from __future__ import annotations

import uuid

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vdsm_storage.monitor import mailbox_format as fmt
from vdsm_storage.monitor.mailbox_format import CLEAN, EMPTY, SLOTS, Extend
from vdsm_storage.monitor.mailbox_slots import HostSlots

DOMAIN = str(uuid.UUID(int=1))
VOLUMES = [str(uuid.UUID(int=number)) for number in range(2, 7)]


def ask(slots: HostSlots, volume: str, size: int) -> int | None:
    return slots.ask(Extend(DOMAIN, volume, size))


def outbox(answers: dict[int, bytes]) -> bytes:
    return b"".join(answers.get(slot, EMPTY) for slot in range(SLOTS)).ljust(4096, b"\0")


def test_the_whole_round() -> None:
    slots = HostSlots()
    assert not any((slots.unwritten, slots.asking, slots.cleaning))
    assert slots.block() == fmt.EMPTY_BLOCK
    assert ask(slots, VOLUMES[0], 100) == 0
    assert slots.unwritten
    assert slots.news
    assert slots.asking
    request = Extend(DOMAIN, VOLUMES[0], 100).encode()
    assert fmt.messages(slots.block())[0] == request
    assert slots.receive(outbox({0: fmt.answer(request, 100)})) == {}  # it was not sent yet
    slots.written()
    assert slots.receive(outbox({})) == {}
    assert slots.receive(outbox({0: CLEAN})) == {}
    assert slots.receive(outbox({0: fmt.answer(request, 128)})) == {0: 128}
    assert fmt.messages(slots.block())[0] == CLEAN
    assert slots.unwritten
    assert not slots.news
    slots.written()
    assert slots.receive(outbox({0: fmt.answer(request, 128)})) == {}
    assert slots.cleaning
    assert slots.receive(outbox({0: CLEAN})) == {}
    assert not slots.cleaning
    assert slots.block() == fmt.EMPTY_BLOCK
    assert ask(slots, VOLUMES[0], 200) == 1  # in turn


def test_full() -> None:
    slots = HostSlots()
    for number in range(SLOTS):
        assert ask(slots, str(uuid.UUID(int=number)), 1) == number
    assert ask(slots, VOLUMES[0], 1) is None
    slots.give_up(7)
    assert ask(slots, str(uuid.UUID(int=7)), 1) is None  # its own late answer could come
    assert ask(slots, str(uuid.UUID(int=99)), 1) == 7


def test_answers_to_a_process_before_us_are_cleaned() -> None:
    request = Extend(DOMAIN, VOLUMES[0], 5).encode()
    slots = HostSlots()
    slots.adopt(outbox({0: fmt.answer(request, 5), 1: CLEAN}))
    assert fmt.messages(slots.block())[:2] == [CLEAN, EMPTY]
    assert ask(slots, VOLUMES[0], 5) == 1
    slots.written()
    assert slots.receive(outbox({0: fmt.answer(request, 5)})) == {}
    slots.receive(outbox({0: CLEAN}))
    assert not slots.cleaning


def test_a_late_answer_over_the_clean_one() -> None:
    slots = HostSlots()
    ask(slots, VOLUMES[0], 10)
    slots.written()
    slots.give_up(0)
    stood = []
    for _ in range(4):
        slots.written()
        assert slots.receive(outbox({0: Extend(DOMAIN, VOLUMES[0], 10).encode()})) == {}
        stood.append(fmt.messages(slots.block())[0])
        slots.nudge()
    assert stood == [CLEAN, CLEAN, EMPTY, CLEAN]
    slots.written()
    slots.receive(outbox({0: CLEAN}))
    assert not slots.cleaning


def test_answers_to_something_else() -> None:
    slots = HostSlots()
    ask(slots, VOLUMES[0], 10)
    slots.written()
    for wrong in (
        Extend(DOMAIN, VOLUMES[1], 10).encode(),
        Extend(DOMAIN, VOLUMES[0], 9).encode(),  # to what was asked before
        b"1" * 64,
        b"\xff" * 64,
    ):
        assert slots.receive(outbox({0: wrong})) == {}
    assert slots.receive(outbox({0: Extend(DOMAIN, VOLUMES[0], 0).encode()})) == {0: 0}


class Exchange(RuleBasedStateMachine):
    """A host and a manager that compares what it reads with what it read before, as VDSM does."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = HostSlots()
        self.inbox = fmt.EMPTY_BLOCK
        self.outbox = [EMPTY] * SLOTS
        self.seen = [EMPTY] * SLOTS
        self.jobs: list[tuple[int, bytes]] = []
        self.asked: dict[int, Extend] = {}

    @rule(volume=st.sampled_from(VOLUMES), size=st.integers(1, 5))
    def ask(self, volume: str, size: int) -> None:
        if volume in {asked.volume for asked in self.asked.values()}:
            return  # HostMailbox has one message a volume
        number = self.slots.ask(Extend(DOMAIN, volume, size))
        if number is not None:
            assert number not in self.asked
            self.asked[number] = Extend(DOMAIN, volume, size)

    @rule()
    def write(self) -> None:
        self.inbox = self.slots.block()
        self.slots.written()

    @rule()
    def manager_reads(self) -> None:
        for number, message in enumerate(fmt.messages(self.inbox)):
            if message != self.seen[number] and not fmt.is_empty(message):
                if message == CLEAN:
                    self.outbox[number] = CLEAN
                else:
                    self.jobs.append((number, message))
            self.seen[number] = message

    @rule(data=st.data(), fails=st.booleans())
    def manager_answers(self, data: st.DataObject, fails: bool) -> None:
        if self.jobs:
            place = data.draw(st.integers(0, len(self.jobs) - 1))
            number, message = self.jobs.pop(place)
            wanted = fmt.decode(message)
            assert wanted is not None
            self.outbox[number] = fmt.answer(message, 0 if fails else wanted.size)

    @rule()
    def manager_starts_anew(self) -> None:
        self.outbox = [EMPTY] * SLOTS
        self.seen = [EMPTY] * SLOTS
        self.jobs = []

    @rule()
    def receive(self) -> None:
        for number, size in self.slots.receive(outbox(dict(enumerate(self.outbox)))).items():
            asked = self.asked.pop(number)
            assert size == 0 or size >= asked.size

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        if self.asked:
            number = data.draw(st.sampled_from(sorted(self.asked)))
            del self.asked[number]
            self.slots.give_up(number)

    @rule()
    def nudge(self) -> None:
        self.slots.nudge()

    @invariant()
    def asked_as_known(self) -> None:
        assert self.slots.asking == bool(self.asked)

    def teardown(self) -> None:
        """With a manager that works, everything ends, and no slot is lost."""
        for _ in range(8):
            self.slots.nudge()
            self.write()
            self.manager_reads()
            for number, message in self.jobs:
                wanted = fmt.decode(message)
                assert wanted is not None
                if fmt.messages(self.inbox)[number] == message:
                    self.outbox[number] = message
            self.jobs = []
            self.receive()
        assert not self.asked
        assert not any((self.slots.asking, self.slots.cleaning))


TestExchange = Exchange.TestCase
TestExchange.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
