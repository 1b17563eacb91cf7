# SPDX-License-Identifier: GPL-2.0-or-later
"""The 63 messages of a host that asks a storage pool manager; no I/O, no threads.

A slot goes round: free, asked (the request stands there), cleaning (CLEAN stands there until the
manager has answered that with CLEAN), free.  A manager that starts zeroes its answers: it reads
what is asked and answers anew, and what it found cleaning is free.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from vdsm_storage.monitor import mailbox_format as fmt
from vdsm_storage.monitor.mailbox_format import CLEAN, EMPTY, SLOTS, Extend


class _State(enum.Enum):
    FREE = enum.auto()
    ASKED = enum.auto()
    CLEANING = enum.auto()


@dataclass(slots=True)
class _Slot:
    """`message` is what stands there; `subject` the last message that was no CLEAN; `written`:
    the storage has it; `stuck`: it has been cleaning for a whole turn of `nudge`.
    """

    state: _State = _State.FREE
    message: bytes = EMPTY
    subject: bytes = EMPTY
    written: bool = True
    stuck: bool = False


class HostSlots:
    """The slots of one host's block.  The caller writes `block()` and tells `written()`."""

    def __init__(self) -> None:
        self._slots: Final = [_Slot() for _ in range(SLOTS)]
        self._next = 0  # slots are used in turn: a late answer meets no request for its volume

    def adopt(self, outbox: bytes) -> None:
        """At the start, with nothing asked: answers to a process before us have to be cleaned."""
        for slot, message in zip(self._slots, fmt.messages(outbox), strict=True):
            if message != CLEAN and not fmt.is_empty(message):
                slot.subject = message
                _clean(slot)

    def ask(self, request: Extend) -> int | None:
        """Put a request; the number of its slot, or None when all wait for answers.

        Raises ValueError for what no message can hold.
        """
        message = request.encode()
        number = self._choose(message)
        if number is None:
            return None
        slot = self._slots[number]
        slot.state, slot.written = _State.ASKED, False
        slot.message = slot.subject = message
        self._next = (number + 1) % SLOTS
        return number

    def _choose(self, message: bytes) -> int | None:
        in_turn = [(self._next + n) % SLOTS for n in range(SLOTS)]
        for number in in_turn:
            if self._slots[number].state is _State.FREE:
                return number
        # A slot that a silent manager has not cleaned can serve for another volume: no answer to
        # what stood there will be taken for one to this request.
        for number in in_turn:
            slot = self._slots[number]
            if slot.state is _State.CLEANING and not fmt.same_subject(slot.subject, message):
                return number
        return None

    def give_up(self, number: int) -> None:
        """Nobody waits for this answer any more."""
        if self._slots[number].state is _State.ASKED:
            _clean(self._slots[number])

    def receive(self, outbox: bytes) -> dict[int, int]:
        """Read the answers: {slot: size in MiB, 0 for a failure}; each is given once."""
        found: dict[int, int] = {}
        for number, (slot, message) in enumerate(
            zip(self._slots, fmt.messages(outbox), strict=True)
        ):
            if slot.state is _State.FREE or not slot.written:
                continue
            if slot.state is _State.CLEANING:
                if message == CLEAN or fmt.is_empty(message):
                    slot.state, slot.message, slot.written = _State.FREE, EMPTY, False
                continue
            size = _answered(slot.message, message)
            if size is not None:
                found[number] = size
                _clean(slot)
        return found

    def nudge(self) -> None:
        """To be called now and then while slots are cleaning.

        A manager that gave a late answer over its own CLEAN looks at the slot again only when it
        changes: so it changes, to empty and back to CLEAN, until that is answered.
        """
        for slot in self._slots:
            if slot.state is not _State.CLEANING:
                continue
            if slot.stuck:
                slot.message = EMPTY if slot.message == CLEAN else CLEAN
                slot.written = False
            slot.stuck = True

    # -- what the storage has ------------------------------------------------------------------

    def block(self) -> bytes:
        """The host's block as it should be."""
        return fmt.seal([slot.message for slot in self._slots])

    @property
    def unwritten(self) -> bool:
        return any(not slot.written for slot in self._slots)

    @property
    def news(self) -> bool:
        """Whether a request has to be written."""
        return any(not slot.written and slot.state is _State.ASKED for slot in self._slots)

    def written(self) -> None:
        for slot in self._slots:
            slot.written = True

    @property
    def asking(self) -> bool:
        """Whether an answer is waited for."""
        return any(slot.state is _State.ASKED for slot in self._slots)

    @property
    def cleaning(self) -> bool:
        return any(slot.state is _State.CLEANING for slot in self._slots)


def _clean(slot: _Slot) -> None:
    slot.state, slot.message, slot.written, slot.stuck = _State.CLEANING, CLEAN, False, False


def _answered(request: bytes, message: bytes) -> int | None:
    """The size that `message` answers to `request`; None when it answers something else.

    A size below the one asked for answers an older request that stood in the slot.
    """
    if message == CLEAN or fmt.is_empty(message) or not fmt.same_subject(request, message):
        return None
    asked, told = fmt.decode(request), fmt.decode(message)
    if asked is None or told is None or 0 < told.size < asked.size:
        return None
    return told.size
