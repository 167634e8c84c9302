"""One request as its handler sees it: head, bounded body, and the answer."""

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

DECOMPRESSED_CHUNK_BYTES = 2**18  # takes less than a millisecond to decompress
COMPRESSED_CHUNK_BYTES = 2**14  # small, because zlib copies the input that it does not use
# A longer body is decompressed in a thread. Blocks may be empty: so many bytes of them take some
# 4 ms, and 10 MB of them over a second, without a byte of output.
MAX_INLINE_BYTES = 2**15
MAX_GZIP_MEMBERS = 1000  # even an empty member takes some microseconds
MAX_DISCARDED_BYTES = 65_536  # to read and drop these costs less than a new connection
UNMATCHED = "unmatched"  # the route in metrics and logs when no route has the path
CLIENT_CLOSED_REQUEST = 499  # nginx's status for metrics and logs; it is never sent

JSON: Headers = [(b"content-type", b"application/json")]


class Answer(NamedTuple):
    """An answer. The connection adds the length and the header fields that all answers have."""

    body: bytes
    status: int = 200
    headers: Headers = JSON


def error_answer(error: ServiceError, request_id: bytes) -> Answer:
    """Return an error as an answer; all errors have this JSON shape."""
    body = {"error": error.message, "code": error.code, "request_id": request_id.decode("ascii")}
    headers = [(k.lower().encode(), v.encode()) for k, v in error.headers.items()]
    return Answer(orjson.dumps(body), error.status, JSON + headers)


class Exchange:
    """A request and, later, its answer.

    Args:
        method: the request's method.
        path: the decoded path.
        query_string: the query as sent.
        headers: header fields by lower-case name. Values of a repeated field are joined by commas
            (RFC 9110, section 5.3).
        budget: counts the bytes of this request's body.

    Attributes:
        route: the path's template, for metrics and logs.
        handler: answers the request; None if the framework does.
        body_limit: the most bytes that the body may have, as sent and when decompressed.
        request_id: the client's own if it is well-formed, else a new one.
        trace_id: the id of the W3C trace, if the client sent a valid one.
        error_code: the code in the answer, if the request failed.
        started: when the head arrived, or when the answer before it was sent if that is later; on
            the clock of `time.perf_counter`.
        complete: the whole request has arrived.
        keep_alive: the client may send another request on the same connection.
        answer: an answer that needs no handler, such as a refusal.
        task: the task that answers the request.
        cancelled: the task was cancelled, at the deadline or because the client left.
        client_left: the client closed the connection while the task ran.
    """

    __slots__ = (
        "__weakref__",
        "_body",
        "_budget",
        "_held",
        "answer",
        "body_limit",
        "cancelled",
        "client_left",
        "complete",
        "error_code",
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
        self.complete = self.cancelled = self.client_left = False
        self.keep_alive = True
        self.answer: Answer | None = None
        self.task: asyncio.Task[Any] | None = None
        self._body: bytes | bytearray = b""
        self._budget = budget
        self._held = 0

    def query(self) -> dict[str, str]:
        """Return the query parameters. If one is repeated, the last value counts."""
        text = self.query_string
        return dict(parse_qsl(text.decode("latin-1"), keep_blank_values=True)) if text else {}

    def announces_body(self) -> bool:
        """Return whether the head says that a body follows."""
        return b"content-length" in self.headers or b"transfer-encoding" in self.headers

    def limit_body(self, limit: int) -> None:
        """Set the most bytes that the body may have.

        Raises:
            PayloadTooLarge: Content-Length is larger.
        """
        self.body_limit = limit
        if int(self.headers.get(b"content-length", 0)) > limit:
            raise self._too_large()

    def extend(self, piece: bytes) -> None:
        """Add a piece of the body.

        Raises:
            PayloadTooLarge: the body is over its limit.
            Overloaded: the budget for bodies is full.
        """
        if len(self._body) + len(piece) > self.body_limit:
            raise self._too_large()
        self._hold(len(piece))
        if not self._body:
            self._body = piece  # most bodies have one piece: no copy
            return
        if isinstance(self._body, bytes):
            self._body = bytearray(self._body)
        self._body += piece

    async def body(self) -> bytes:
        """Return the body, decompressed. Call this once: the exchange does not keep the body.

        Raises:
            LengthRequired: the request announces no body.
            PayloadTooLarge: the decompressed body is over the limit.
            Overloaded: the budget for bodies is full.
            BadRequest: the body is not in its stated content encoding.
            UnsupportedMediaType: the content encoding is unknown.
        """
        if not self.announces_body():
            raise LengthRequired("Send a body, and its length in Content-Length.")
        body, self._body = bytes(self._body), b""  # the caller's alone, to free it when it can
        encoding = self.headers.get(b"content-encoding")
        return body if encoding is None else await self._decompress(body, encoding)

    def release(self) -> None:
        """Free the body, and give its bytes back to the budget."""
        self._body = b""
        self._budget.give_back(self._held)
        self._held = 0

    def too_long_to_discard(self) -> bool:
        """Return whether the body is incomplete, and closing costs less than reading the rest."""
        if self.complete:
            return False
        declared = self.headers.get(b"content-length")
        return declared is None or int(declared) > MAX_DISCARDED_BYTES

    def cancel(self) -> None:
        """Cancel the task that answers the request, once."""
        if self.task is not None and not self.cancelled:
            self.cancelled = True
            self.task.cancel()

    def _hold(self, count: int) -> None:
        self._held += count  # before `take`, which may evict and release this very request
        self._budget.take(count)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"The body is too large; send at most {self.body_limit:,} bytes.")

    async def _decompress(self, body: bytes, encoding: bytes) -> bytes:
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
        chunk = min(limit + 1, DECOMPRESSED_CHUNK_BYTES)
        pieces = _decompressed(body, name == b"deflate", chunk)
        inline = len(body) <= MAX_INLINE_BYTES
        plain = _join(pieces, chunk) if inline else b""
        self._hold(len(plain))
        if not inline or DECOMPRESSED_CHUNK_BYTES <= len(plain) <= limit:
            # There may be much more: continue in a thread, so that the event loop stays free. One
            # body at a time; the budget first holds the most that it may need.
            async with self._budget.decompressing:
                self._hold(limit)
                rest = await asyncio.to_thread(_join, pieces, limit + 1 - len(plain))
                self._hold(len(rest) - limit)
            plain += rest
        if len(plain) > limit:
            raise self._too_large()
        return plain


Handler = Callable[[Exchange], Awaitable[Answer]]


def _decompressed(body: bytes, deflate: bool, chunk: int) -> Iterator[bytes]:
    """Yield the decompressed bytes of a gzip body, all its members, or of a deflate body.

    Args:
        body: the body as sent.
        deflate: the encoding is deflate, else gzip.
        chunk: the most bytes to yield at once.

    Raises:
        BadRequest: the body is not in this encoding, is cut short, or has more bytes after its end.
    """
    # zlib's wbits. 47: a gzip or zlib header. 31: a gzip header. -15: no header; some clients send
    # this as deflate (RFC 9110, section 8.4.1.2), whose zlib header has 8 in its low four bits.
    wbits = -15 if deflate and body[:1] and body[0] & 0x0F != 8 else 47
    view, position = memoryview(body), 0
    for _ in range(MAX_GZIP_MEMBERS):
        member = zlib.decompressobj(wbits)
        while not member.eof:
            source = view[position : position + COMPRESSED_CHUNK_BYTES]
            try:
                piece = member.decompress(source, chunk)
            except zlib.error:
                raise BadRequest(
                    "The body is not in its stated content encoding.", code="bad_content_encoding"
                ) from None
            position += len(source) - len(member.unconsumed_tail) - len(member.unused_data)
            if not source and not piece and not member.eof:
                raise BadRequest(
                    "The body's content encoding is cut short.", code="bad_content_encoding"
                )
            yield piece
        if position == len(view):
            return
        if deflate:
            break  # has one member
        wbits = 31  # every further member has a gzip header (RFC 1952, section 2.2)
    raise BadRequest(
        "The body has more bytes after the end of its content encoding, or too many gzip members.",
        code="bad_content_encoding",
    )


def _join(pieces: Iterator[bytes], size: int) -> bytes:
    """Join pieces until they have at least this size, or end."""
    taken, total = [], 0
    for piece in pieces:
        taken.append(piece)
        total += len(piece)
        if total >= size:
            break
    return b"".join(taken)
