"""One request as the hot paths see it: its head, its bounded body, and the answer to be sent."""

import asyncio
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from service.errors import (
    BadRequest,
    LengthRequired,
    Overloaded,
    PayloadTooLarge,
    UnsupportedMediaType,
)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

UNPACKED_AT_ONCE = 2**18  # bytes that take less than a millisecond
WORTH_READING = 65_536  # bytes that cost less to read and drop than a new connection

JSON: Headers = [(b"content-type", b"application/json")]


class Answer(NamedTuple):
    """What a hot path answers; length, request id and connection fields are added when sent."""

    body: bytes
    status: int = 200
    headers: Headers = JSON


class ClientGone(Exception):  # noqa: N818 - not an error of ours: there is nobody to answer
    """The client closed the connection before its request was complete."""


@dataclass
class Room:
    """How much of bodies is held in memory.

    Attributes:
        each: the most bytes of one body, as sent and when unpacked.
        left: how many more bytes all unfinished bodies together may have.
        make: sends away a client that is slow in sending its body; tells whether there was one.
    """

    each: int
    left: int
    make: Callable[[], bool]


class Exchange:
    """A request on its way to an answer.

    Attributes:
        scope: the ASGI connection scope.
        receive: the ASGI callable that the body comes from.
        headers: header fields by lower-case name; of a repeated field, the last.
        request_id: the client's own, if sound, or one made here.
        started: when it arrived, on the clock of `time.perf_counter`.
        complete: the whole body has been read.
        expired: its work was cut short, as the deadline passed or others needed the place.
        gone: its work was cut short, as the client closed the connection.
        closing: the answer leaves part of the request unread, so the connection must close.
        task: the task that works on it; None outside the hot paths.
    """

    __slots__ = (
        "_room",
        "closing",
        "complete",
        "expired",
        "gone",
        "headers",
        "receive",
        "request_id",
        "scope",
        "started",
        "task",
    )

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        headers: dict[bytes, bytes],
        request_id: bytes,
        started: float,
        room: Room,
    ) -> None:
        self.scope = scope
        self.headers = headers
        self.request_id = request_id
        self.started = started
        self.complete = False
        self.expired = False
        self.gone = False
        self.closing = False
        self.task: asyncio.Task[Any] | None = None
        self.receive = receive
        self._room = room

    def query(self) -> dict[str, str]:
        """Return the query parameters; of a repeated one, the last."""
        text: bytes = self.scope["query_string"]
        return dict(parse_qsl(text.decode("latin-1"), keep_blank_values=True)) if text else {}

    async def body(self) -> bytes:
        """Read the whole body, within the limits, and undo its content encoding.

        Raises:
            LengthRequired: the request announces no body.
            PayloadTooLarge: it announces, sends or unpacks to more than the limit.
            Overloaded: too much of other bodies is held already.
            BadRequest: it is not in the encoding it claims.
            UnsupportedMediaType: the content encoding is unknown.
            ClientGone: the client went away before the end.
        """
        headers = self.headers
        declared = headers.get(b"content-length")
        if declared is None:
            if b"transfer-encoding" not in headers:
                self.complete = True  # HTTP/1.1: neither field means that there is no body
                raise LengthRequired("Send a body, and its length in Content-Length.")
        elif int(declared) > self._room.each:
            raise self._too_large()
        message = await self.receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body") or message["type"] == "http.disconnect":
            body = await self._rest(message)
        self.complete = True
        if len(body) > self._room.each:
            raise self._too_large()
        encoding = headers.get(b"content-encoding")
        return body if encoding is None else await self._unpack(body, encoding)

    def unread(self) -> bool:
        """Tell whether more of the body may be to come than is worth waiting for."""
        if self.complete:
            return False
        declared = self.headers.get(b"content-length")
        return int(declared) > WORTH_READING if declared else b"transfer-encoding" in self.headers

    async def _rest(self, message: Message) -> bytes:
        """Read a body that comes in pieces; `message` has the first."""
        room = self._room
        pieces, size = [], 0
        try:
            while message["type"] != "http.disconnect":
                piece = message.get("body", b"")
                pieces.append(piece)
                size += len(piece)
                room.left -= len(piece)
                if size > room.each:
                    raise self._too_large()
                if not message.get("more_body"):
                    return b"".join(pieces)
                if room.left < 0 and not room.make():
                    raise Overloaded(
                        "The server is receiving too much at once; try again in a second.",
                        headers={"Retry-After": "1"},
                    )
                message = await self.receive()
            raise ClientGone
        finally:
            room.left += size

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"The body is too large; send at most {self._room.each:,} bytes.")

    async def _unpack(self, body: bytes, encoding: bytes) -> bytes:
        name = encoding.strip().lower()
        if name == b"identity":
            return body
        if name not in (b"gzip", b"x-gzip", b"deflate"):
            raise UnsupportedMediaType(
                "The content encoding is not supported; send the body plain, gzip or deflate.",
                code="unsupported_content_encoding",
                headers={"Accept-Encoding": "gzip, deflate"},
            )
        # 47: a gzip or zlib header, told by its bytes. -15: deflate without a header, which some
        # clients send under the same name (RFC 9110, section 8.4.1.2).
        raw = name == b"deflate" and body[:1] and body[0] & 0x0F != 8
        decompressor = zlib.decompressobj(-15 if raw else 47)
        most = self._room.each + 1
        try:
            plain = decompressor.decompress(body, min(most, UNPACKED_AT_ONCE))
            if len(plain) == UNPACKED_AT_ONCE < most:
                # In a thread: a few kilobytes may unpack to what would hold up all others.
                rest = decompressor.unconsumed_tail
                plain += await asyncio.to_thread(decompressor.decompress, rest, most - len(plain))
        except zlib.error:
            raise BadRequest(
                "The body is not in its stated content encoding.", code="bad_content_encoding"
            ) from None
        if len(plain) > self._room.each:
            raise self._too_large()
        if not decompressor.eof or decompressor.unused_data:
            raise BadRequest(
                "The body's content encoding is cut short or followed by more.",
                code="bad_content_encoding",
            )
        return plain
