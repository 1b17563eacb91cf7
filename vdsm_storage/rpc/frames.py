# SPDX-License-Identifier: GPL-2.0-or-later
"""STOMP 1.2 frames as bytes, without sockets.

    COMMAND LF
    key:value LF            (any number; the first of repeated keys counts)
    LF
    body NUL

Line feeds between frames are heart-beats.  A carriage return before a line feed is dropped.  With
a content-length header the body has that many bytes and may hold NUL, else it ends at the NUL.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

CONNECT = "CONNECT"
STOMP = "STOMP"
CONNECTED = "CONNECTED"
SEND = "SEND"
SUBSCRIBE = "SUBSCRIBE"
UNSUBSCRIBE = "UNSUBSCRIBE"
ACK = "ACK"
NACK = "NACK"
DISCONNECT = "DISCONNECT"
MESSAGE = "MESSAGE"
RECEIPT = "RECEIPT"
ERROR = "ERROR"

COMMANDS = frozenset(
    (CONNECT, STOMP, CONNECTED, SEND, SUBSCRIBE, UNSUBSCRIBE, ACK, NACK)
) | frozenset(("BEGIN", "COMMIT", "ABORT", DISCONNECT, MESSAGE, RECEIPT, ERROR)
)

MAX_FRAME = 4 * 1024 * 1024
MAX_HEAD = 64 * 1024
MAX_HEADERS = 64

_ESCAPES: Mapping[str, str] = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", ":": "\\c"}
_UNESCAPES: Mapping[str, str] = {"\\\\": "\\", "\\n": "\n", "\\r": "\r", "\\c": ":"}
_TO_ESCAPE = re.compile(r"[\\\n\r:]")
_ESCAPED = re.compile(r"\\[\\nrc]")


class FrameError(Exception):
    """What came is no frame, or a larger one than is allowed; the connection cannot go on."""


class HeartBeat(enum.Enum):
    """A line feed between two frames."""

    BEAT = "\n"


@dataclass(slots=True)
class Frame:
    command: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def escape(text: str) -> str:
    """A header's key or value as it crosses the wire."""
    return _TO_ESCAPE.sub(lambda match: _ESCAPES[match[0]], text)


def unescape(text: str) -> str:
    """The reverse.  A backslash that starts no known sequence stands for itself: one of the
    existing clients does not escape."""
    return _ESCAPED.sub(lambda match: _UNESCAPES[match[0]], text) if "\\" in text else text


def head(command: str, headers: Mapping[str, str]) -> bytes:
    """Command and headers, each line ended, without the empty line after them."""
    lines = [command]
    lines += [f"{escape(key)}:{escape(value)}" for key, value in headers.items()]
    lines.append("")
    return "\n".join(lines).encode()


def encode(frame: Frame) -> bytes:
    """A frame's bytes.  A body, and every MESSAGE and ERROR, gets a content-length."""
    start = head(frame.command, {k: v for k, v in frame.headers.items() if k != "content-length"})
    if frame.body or frame.command in (MESSAGE, ERROR):
        return with_body(start, frame.body)
    return start + b"\n\0"


def with_body(start: bytes, body: bytes) -> bytes:
    """A frame from what `head` gave and a body."""
    return b"%bcontent-length:%d\n\n%b\0" % (start, len(body), body)


class Decoder:
    """Bytes in, frames and heart-beats out, whatever the pieces in which the bytes come.

    Holds at most one unfinished frame, so at most `max_frame` bytes and what `feed` was given.
    After a FrameError the decoder is of no further use.
    """

    def __init__(
        self, max_frame: int = MAX_FRAME, max_head: int = MAX_HEAD, max_headers: int = MAX_HEADERS
    ) -> None:
        self.failed: FrameError | None = None
        self._max_frame = max_frame
        self._max_head = min(max_head, max_frame)
        self._max_headers = max_headers
        self._buffer = bytearray()
        self._frame: Frame | None = None  # its head has come, its body not yet
        self._length: int | None = None  # of the body, when the head says it
        self._seen = 0  # bytes of the buffer that were searched in vain

    @property
    def buffered(self) -> int:
        """Bytes of an unfinished frame."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Frame | HeartBeat]:
        """What `data` completes, in order.

        Raises FrameError; when whole frames stood before the error they are returned first, and
        `failed` says what the next `feed` raises.
        """
        if self.failed is not None:
            raise self.failed
        if not self._buffer and self._frame is None and (frame := self._whole(data)) is not None:
            return [frame]
        if self._buffer:
            self._buffer += data
            if self._more_body(data):
                return []
            data = bytes(self._buffer)
            self._buffer.clear()
        out: list[Frame | HeartBeat] = []
        try:
            at = self._parse(data, out)
        except FrameError as error:
            self.failed = error
            if not out:
                raise
            return out
        if at < len(data):
            self._buffer += data[at:] if at else data
        return out

    def _whole(self, data: bytes) -> Frame | None:
        """The usual case, quickly: `data` is one whole plain frame, its length given; else None.

        Only what is certain is taken; all else, errors included, is left to the careful way.
        """
        end = data.find(b"\n\n", 0, self._max_head)
        if end < 0 or data[-1] or len(data) > self._max_frame:
            return None
        raw = data[:end]
        if not raw.isascii() or b"\r" in raw or b"\\" in raw or b"\0" in raw:
            return None
        command, *lines = raw.decode("ascii").split("\n")
        if command not in COMMANDS or len(lines) > self._max_headers:
            return None
        lines.reverse()  # so that the first of repeated keys is the last to be put in
        try:
            headers: dict[str, str] = dict([line.split(":", 1) for line in lines])
            whole = end + 3 + int(headers["content-length"]) == len(data)
        except (ValueError, KeyError):
            return None
        return Frame(command, headers, data[end + 2 : -1]) if whole else None

    def _more_body(self, data: bytes) -> bool:
        """True if `data` is but another piece of a large body: nothing to look at yet."""
        if self._frame is None:
            return False
        if self._length is not None:
            return len(self._buffer) <= self._length
        self._seen = len(self._buffer) - len(data)
        if b"\0" in data or len(self._buffer) > self._max_frame:
            return False
        self._seen = len(self._buffer)
        return True

    def _parse(self, data: bytes, out: list[Frame | HeartBeat]) -> int:
        """Take what is complete; returns where the incomplete rest starts."""
        at, size = 0, len(data)
        while at < size:
            if self._frame is None:
                start = at
                at = self._skip_beats(data, at, out)
                if at == size:
                    break
                if at > start:
                    self._seen = 0
                end = self._take_head(data, at)
                if end < 0:
                    break
                at = end
            end = self._take_body(data, at)
            if end < 0:
                break
            assert self._frame is not None
            out.append(self._frame)
            self._frame = None
            self._length = None
            self._seen = 0
            at = end
        return at

    def _skip_beats(self, data: bytes, at: int, out: list[Frame | HeartBeat]) -> int:
        while at < len(data):
            if data[at] == 0x0A:
                out.append(HeartBeat.BEAT)
                at += 1
            elif data[at] == 0x0D and at + 1 == len(data):
                break  # its line feed is to come
            elif data[at] == 0x0D and data[at + 1] == 0x0A:
                out.append(HeartBeat.BEAT)
                at += 2
            else:
                break
        return at

    def _take_head(self, data: bytes, at: int) -> int:
        """Where the body starts, or -1 when the head is not complete."""
        search = at + max(0, self._seen - 2)
        end = data.find(b"\n\n", search)
        skip = 2
        with_return = data.find(b"\n\r\n", search, end if end >= 0 else len(data))
        if with_return >= 0:
            end, skip = with_return, 3
        have = (end if end >= 0 else len(data)) - at
        if have > self._max_head:
            raise FrameError(f"headers of more than {self._max_head} bytes")
        if end < 0:
            self._seen = have
            return -1
        self._seen = 0
        self._frame = self._head(data[at:end])
        return end + skip

    def _head(self, raw: bytes) -> Frame:
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise FrameError("headers are not UTF-8") from error
        if "\r" in text:
            text = text.replace("\r\n", "\n").removesuffix("\r")
        command, *lines = text.split("\n")
        if command not in COMMANDS:
            raise FrameError(f"unknown command {command[:20]!r}")
        if len(lines) > self._max_headers:
            raise FrameError(f"more than {self._max_headers} headers")
        lines.reverse()  # so that the first of repeated keys is the last to be put in
        try:
            headers: dict[str, str] = dict([line.split(":", 1) for line in lines])
        except ValueError as error:
            raise FrameError("a header without a colon") from error
        if "\\" in text:
            headers = {unescape(key): unescape(value) for key, value in headers.items()}
        if "\0" in text:
            raise FrameError("a NUL among the headers")
        self._length = self._body_length(headers)
        return Frame(command, headers)

    def _body_length(self, headers: Mapping[str, str]) -> int | None:
        text = headers.get("content-length")
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) <= 12):
            raise FrameError(f"content-length {text[:20]!r} is not a number")
        length = int(text)
        if length > self._max_frame:
            raise FrameError(f"a body of {length} bytes; at most {self._max_frame} are allowed")
        return length

    def _take_body(self, data: bytes, at: int) -> int:
        """Where the next frame starts, or -1 when the body is not complete."""
        assert self._frame is not None
        if self._length is None:
            end = data.find(b"\0", at + self._seen)
            have = (end if end >= 0 else len(data)) - at
            if have > self._max_frame:
                raise FrameError(f"a body of more than {self._max_frame} bytes")
            if end < 0:
                self._seen = have
                return -1
        else:
            end = at + self._length
            if end >= len(data):
                return -1
            if data[end]:
                raise FrameError("no NUL after the body; content-length is wrong")
        self._frame.body = data[at:end]
        return end + 1
