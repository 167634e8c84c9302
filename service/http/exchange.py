"""One request as its handler sees it, the answer to it, and its body within the limits."""

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from time import perf_counter
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import orjson

from service.errors import (
    BadRequest,
    LengthRequired,
    PayloadTooLarge,
    ServiceError,
    UnsupportedMediaType,
)
from service.http.budget import BodyBudget

Headers = list[tuple[bytes, bytes]]

UNPACKED_AT_ONCE = 2**18  # bytes that take less than a millisecond
PACKED_AT_ONCE = 2**14  # bytes: zlib copies what it leaves unread, so it gets little at a time
UNMATCHED = "unmatched"  # the route of a path that is nobody's
MAX_MEMBERS = 1000  # of a gzip body; each takes some microseconds, however small it is
WORTH_READING = 65_536  # bytes that cost less to read and drop than a new connection

JSON: Headers = [(b"content-type", b"application/json")]


class Answer(NamedTuple):
    """An answer; the connection adds length, request id and the connection's fields."""

    body: bytes
    status: int = 200
    headers: Headers = JSON


def error_answer(error: ServiceError, request_id: bytes) -> Answer:
    """Return the one shape of every error answer."""
    body = {"error": error.message, "code": error.code, "request_id": request_id.decode("ascii")}
    headers = [(k.lower().encode(), v.encode()) for k, v in error.headers.items()]
    return Answer(orjson.dumps(body), error.status, JSON + headers)


class Exchange:
    """A request on its way to an answer.

    Args:
        method: the request's method.
        path: its path, decoded.
        query_string: its query as sent.
        headers: header fields by lower-case name; the values of a repeated field are joined by
            commas (RFC 9110, section 5.3).
        budget: counts the bytes that this request holds in memory.

    Attributes:
        route: the path's template, for logs and metrics.
        handler: answers it; None for the framework.
        body_limit: the most bytes that its body may have, as sent and when unpacked.
        request_id: the client's own, if it is well-formed, or one made here.
        trace_id: W3C trace context's, if the client sent a valid one.
        error_code: the code in the answer, of a request that is refused.
        started: when its head arrived or its turn came, on the clock of `time.perf_counter`.
        complete: the whole request has arrived.
        keep_alive: the client may send another request on the same connection.
        answer: made without a handler's work, as refusals are.
        task: the task that works on it.
        expired: its work was cut short at the deadline.
        gone: its work was cut short because the client closed the connection.
    """

    __slots__ = (
        "__weakref__",
        "_body",
        "_budget",
        "_held",
        "answer",
        "body_limit",
        "complete",
        "error_code",
        "expired",
        "gone",
        "handler",
        "headers",
        "keep_alive",
        "method",
        "path",
        "query_string",
        "request_id",
        "route",
        "started",
        "task",
        "trace_id",
    )

    def __init__(
        self,
        method: str,
        path: str,
        query_string: bytes,
        headers: Mapping[bytes, bytes],
        budget: BodyBudget,
    ) -> None:
        self.method = method
        self.path = path
        self.query_string = query_string
        self.headers = headers
        self.route = UNMATCHED
        self.handler: Handler | None = None
        self.body_limit = 0
        self.request_id = b""
        self.trace_id: str | None = None
        self.error_code: str | None = None
        self.started = perf_counter()
        self.complete = self.expired = self.gone = False
        self.keep_alive = True
        self.answer: Answer | None = None
        self.task: asyncio.Task[Any] | None = None
        self._body: bytes | bytearray = b""
        self._budget = budget
        self._held = 0

    def query(self) -> dict[str, str]:
        """Return the query parameters; of a repeated one, the last."""
        text = self.query_string
        return dict(parse_qsl(text.decode("latin-1"), keep_blank_values=True)) if text else {}

    def announces_body(self) -> bool:
        """Return whether the head says that a body follows."""
        return b"content-length" in self.headers or b"transfer-encoding" in self.headers

    def limit_body(self, limit: int) -> None:
        """Set the most bytes that the body may have.

        Raises:
            PayloadTooLarge: the head announces more.
        """
        self.body_limit = limit
        if int(self.headers.get(b"content-length", 0)) > limit:
            raise self._too_large()

    def extend(self, piece: bytes) -> None:
        """Add a piece of the body.

        Raises:
            PayloadTooLarge: the body is over its limit.
            Overloaded: too much of other bodies is held already.
        """
        if len(self._body) + len(piece) > self.body_limit:
            raise self._too_large()
        self._hold(len(piece))
        if not self._body:
            self._body = piece  # most bodies come in one
            return
        if isinstance(self._body, bytes):
            self._body = bytearray(self._body)
        self._body += piece

    async def body(self) -> bytes:
        """Return the body without its content encoding; it can be had once.

        Raises:
            LengthRequired: the request announces no body.
            PayloadTooLarge: it unpacks to more than the limit.
            Overloaded: too much of other bodies is held already.
            BadRequest: it is not in the encoding it claims.
            UnsupportedMediaType: the content encoding is unknown.
        """
        if not self.announces_body():
            raise LengthRequired("Send a body, and its length in Content-Length.")
        body, self._body = bytes(self._body), b""  # who has it now may let go of it
        encoding = self.headers.get(b"content-encoding")
        return body if encoding is None else await self._unpack(body, encoding)

    def release(self) -> None:
        """Give back what the body held of the budget, when nobody needs it any more."""
        self._body = b""
        self._budget.give_back(self._held)
        self._held = 0

    def unread(self) -> bool:
        """Return whether more of the body may come than is worth reading to drop it."""
        if self.complete:
            return False
        declared = self.headers.get(b"content-length")
        return declared is None or int(declared) > WORTH_READING

    def cancel(self) -> None:
        """Cut the work on it short."""
        if self.task is not None and not self.expired:
            self.expired = True
            self.task.cancel()

    def _hold(self, count: int) -> None:
        self._held += count  # first: making room may send this very request away
        self._budget.take(count)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"The body is too large; send at most {self.body_limit:,} bytes.")

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
        limit = self.body_limit
        at_once = min(limit + 1, UNPACKED_AT_ONCE)
        pieces = _unpacked(body, name == b"deflate", at_once)
        plain = _joined(pieces, at_once)
        self._hold(len(plain))
        if UNPACKED_AT_ONCE <= len(plain) <= limit:
            # In a thread, as a few kilobytes may unpack to what would hold up all others; one body
            # at a time, with all that it may need held for it.
            async with self._budget.unpacking:
                self._hold(limit)
                rest = await asyncio.to_thread(_joined, pieces, limit + 1 - len(plain))
                self._hold(len(rest) - limit)
            plain += rest
        if len(plain) > limit:
            raise self._too_large()
        return plain


Handler = Callable[[Exchange], Awaitable[Answer]]


def _unpacked(packed: bytes, deflate: bool, at_once: int) -> Iterator[bytes]:
    """Yield the plain bytes of all members of a gzip body, or of a deflate body, in pieces.

    Args:
        packed: the body as sent.
        deflate: it has one member, with zlib's header or none.
        at_once: the most bytes of a piece.

    Raises:
        BadRequest: it is not what it claims, is cut short, or is followed by more.
    """
    # 47: a gzip or zlib header, told by its bytes. -15: deflate without a header, which some
    # clients send under the same name (RFC 9110, section 8.4.1.2).
    form = -15 if deflate and packed[:1] and packed[0] & 0x0F != 8 else 47
    view, at = memoryview(packed), 0
    for _ in range(MAX_MEMBERS):
        member = zlib.decompressobj(form)
        while not member.eof:
            source = view[at : at + PACKED_AT_ONCE]
            try:
                piece = member.decompress(source, at_once)
            except zlib.error:
                raise BadRequest(
                    "The body is not in its stated content encoding.", code="bad_content_encoding"
                ) from None
            at += len(source) - len(member.unconsumed_tail) - len(member.unused_data)
            if not source and not piece and not member.eof:
                raise BadRequest(
                    "The body's content encoding is cut short.", code="bad_content_encoding"
                )
            yield piece
        if at == len(view):
            return
        if deflate:
            break
        form = 31  # of several members (RFC 1952, section 2.2), all have a gzip header
    raise BadRequest(
        "The body's content encoding is followed by more, or has too many members.",
        code="bad_content_encoding",
    )


def _joined(pieces: Iterator[bytes], most: int) -> bytes:
    """Join pieces until there are `most` bytes, or a few more."""
    taken, size = [], 0
    for piece in pieces:
        taken.append(piece)
        size += len(piece)
        if size >= most:
            break
    return b"".join(taken)
