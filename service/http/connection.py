"""HTTP/1.1 on one connection: httptools parses, the gate answers, uvicorn runs the server.

uvicorn takes a class like this for its setting `http`. Ours replaces uvicorn's own because that
one takes heads of any size and any number of pipelined requests (one connection took 1.4 GB in
seven seconds), starts a timer for each answer, and sends an answer in two writes. All that
is used of uvicorn stands in this file: the arguments of `__init__`, `shutdown`, and the attributes
of `ServerState` named in `NEEDED`. All bytes that wait here for anything are held in the budget.
"""

import asyncio
import re
import socket
from collections import deque
from collections.abc import Mapping
from functools import lru_cache
from http import HTTPStatus
from time import perf_counter
from typing import Any, Protocol, cast
from urllib.parse import unquote

import uvicorn
from httptools import (
    HttpParserCallbackError,
    HttpParserError,
    HttpParserUpgrade,
    HttpRequestParser,
    parse_url,
)
from uvicorn.server import ServerState

from service.errors import (
    BadRequest,
    HeadersTooLarge,
    Overloaded,
    ServiceError,
    SlowRequest,
    UnsupportedTransferCoding,
    UnsupportedVersion,
)
from service.http.admission import Admission
from service.http.exchange import Answer, Exchange, Headers

KEEP_ALIVE_SECONDS = (
    75  # longer than load balancers keep idle connections, so that they close first
)
HEAD_SECONDS = 10.0
LOOK_EVERY_SECONDS = 5.0
LINGER_SECONDS = 1.0
FIRST_REQUEST_SECONDS = 3.0  # for a connection that was accepted as the server stops
PROBE_AFTER_SECONDS = 0.25
MAX_HEAD_BYTES = 32_768
FIELD_BYTES = 32  # that a header field counts beyond its own, as in RFC 9113, section 6.5.2
FIELD_MEMORY = 128  # bytes that a field takes, however short it is
PARSED_AT_ONCE = 2048  # bytes: some 75 of the smallest requests, and most requests whole
QUEUED_BYTES = 2048  # that a request takes which waits for the one before it
MAX_CONNECTIONS = 8192  # of some 4 KB each
UNSENT_BYTES = 4096  # that a client may leave unread before its next request has to wait

CLOSE = (b"connection", b"close")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
line = b"%b: %b\r\n".__mod__  # of a header field
STATUS_LINE = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}
WITHOUT_BODY = (204, 304)
NOTHING = memoryview(b"")
# RFC 9112, section 3.2, and RFC 3986, section 3.2.2; an empty one is allowed.
HOST = re.compile(rb" *([A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]*)? *")
is_host = lru_cache(64)(HOST.fullmatch)  # most clients send the same
NEEDED = {"connections", "default_headers", "total_requests"}

if not vars(ServerState()).keys() >= NEEDED:
    raise ImportError(
        f"uvicorn {uvicorn.__version__} is not one that this service knows (its ServerState lacks"
        f" one of {', '.join(sorted(NEEDED))}): install a version within pyproject.toml's bounds."
    )


class Gate(Protocol):
    """What a connection needs of the application."""

    @property
    def admission(self) -> Admission:
        """Limits what is inside."""

    def open(self, exchange: Exchange) -> None:
        """Decide by its head what becomes of a request."""

    def enter(self, exchange: Exchange) -> None:
        """Let a request in that has all that its answer needs; else give it its refusal."""

    async def answer(self, exchange: Exchange) -> Answer:
        """Return the answer to a request that was let in."""

    def refuse(self, error: ServiceError, exchange: Exchange) -> Answer:
        """Return the answer to a request that is refused."""

    def refuse_unread(self, error: ServiceError, headers: Mapping[bytes, bytes]) -> Exchange:
        """Return an exchange, answered, for what cannot be read as a request."""

    def fields(self, exchange: Exchange) -> Headers:
        """Return the header fields that every answer carries."""

    def record(self, exchange: Exchange, status: int, client: str | None = None) -> None:
        """Count an answer that was sent, or that its client did not wait for."""


class Connection(asyncio.Protocol):
    """Reads requests from a connection and sends their answers, in order and one at a time.

    While one is being answered, no more is parsed than came in the same piece; while anything
    waits to be parsed, no more is read. Else reading goes on, to notice a client that leaves.

    Args:
        config: its application is a `Gate`.
        server_state: where uvicorn keeps count of connections and requests.
        app_state: unused.
        _loop: the event loop.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],  # noqa: ARG002 - uvicorn's signature
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._gate: Gate = config.loaded_app
        self._admission = self._gate.admission
        self._state = server_state
        self._loop = _loop or asyncio.get_running_loop()
        self._parser: Any = _parser(self)  # until nothing more is parsed
        self._fields: dict[bytes, bytes] = {}
        self._queue: deque[Exchange] = deque()  # not answered yet
        self._incoming: Exchange | None = None  # its body is still coming
        self._unparsed = NOTHING
        self._loose_bytes = 0  # of an unfinished head, or of what goes with a body's pieces
        self._held = 0  # bytes in the budget
        self._unsent = 0
        self._body_left = 0
        self._begun = False  # a request has, and is not whole
        self._waits = False  # something does, for more to come or for the first of the queue
        self._busy = False  # with the first of the queue
        self._writable = True
        self._last = False  # nothing more is parsed
        self._closing = False
        self._half_closed = False
        self._used = False
        self._offered = False
        self._awaits_continue = False
        self._head_seconds = self._patience = min(HEAD_SECONDS, self._admission.timeout)

    # What the event loop calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # a socket's
        """Begin to wait for a first request."""
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self._client = peer[0] if isinstance(peer, tuple) else None
        transport.set_write_buffer_limits(UNSENT_BYTES, 0)
        others = cast(set[Connection], self._state.connections)  # uvicorn names its own classes
        if len(others) >= MAX_CONNECTIONS:
            next((other for other in others if other.is_idle()), self)._close()
        others.add(self)
        self._waiting_since = self._loop.time()
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Let go of everything; the work that is being done for the client ends."""
        self._closing = True
        self._watch.cancel()
        self._state.connections.discard(self)
        self._let_go()

    def data_received(self, data: bytes) -> None:
        """Parse what came, unless a request is being answered."""
        if self._closing:
            return  # a moment to read, so that the answer is not lost to a reset
        self._unparsed = memoryview(b"".join((self._unparsed, data)) if self._unparsed else data)
        self._go_on()

    def eof_received(self) -> bool:
        """Answer the whole requests of a client that closed its sending side; drop a half one."""
        incoming, self._incoming = self._incoming, None
        if incoming is not None and len(self._queue) > self._busy and self._queue[-1] is incoming:
            self._drop(self._queue.pop())
        if self._closing or not (self._queue or self._unparsed):
            return False  # closes
        self._half_closed = True
        self._loop.call_later(PROBE_AFTER_SECONDS, self._probe)
        return True

    def pause_writing(self) -> None:
        """Answer no more until the client has read."""
        self._writable = False
        self._waits = True
        self._count_held()

    def resume_writing(self) -> None:
        """Go on."""
        self._writable = True
        self._go_on()

    def is_idle(self) -> bool:
        """Return whether nothing is going on that a client waits for."""
        return not (self._queue or self._begun or self._unparsed or self._closing)

    # What uvicorn calls

    def shutdown(self) -> None:
        """Close when nothing is going on. A new connection gets a moment for its request."""
        if self.is_idle() and self._used:
            self._close()
        elif self.is_idle():
            self._used = True
            self._loop.call_later(FIRST_REQUEST_SECONDS, self.shutdown)

    # What admission calls

    def evict(self, error: ServiceError) -> None:
        """Refuse the request that is coming in; give back what it holds."""
        if not self._closing:
            self._end_with(error)
            self._answer_ready()

    # What the parser calls

    def on_message_begin(self) -> None:
        """Begin a head."""
        self._begun = True
        self._url = b""
        self._fields = {}
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request's target."""
        self._url += url
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header field; those after a body change nothing."""
        self._head_bytes += len(name) + len(value) + FIELD_BYTES
        if self._incoming is None and self._head_bytes <= MAX_HEAD_BYTES:
            name, fields = name.lower(), self._fields
            fields[name] = value if name not in fields else b"%b, %b" % (fields[name], value)

    def on_headers_complete(self) -> None:
        """Open the request."""
        self._loose_bytes = 0
        parser = self._parser
        if self._last or self._closing:
            return
        if parser.should_upgrade() and parser.get_method() != b"CONNECT":
            self._offered = True
            return
        fields, version = self._fields, parser.get_http_version()
        try:
            if self._head_bytes > MAX_HEAD_BYTES:
                raise _too_large()
            _check(version, fields)
            method, (path, query) = parser.get_method().decode("ascii"), _target(self._url)
        except ServiceError as error:
            self._end_with(error)
            return
        exchange = Exchange(method, path, query, fields, self._admission.budget)
        exchange.keep_alive = version == "1.1" and parser.should_keep_alive()
        self._gate.open(exchange)
        self._queue.append(exchange)
        self._incoming = exchange
        self._body_left = int(fields.get(b"content-length", 0))
        self._awaits_continue = (
            b"expect" in fields
            and fields[b"expect"].lower() == b"100-continue"
            and version == "1.1"  # a client of 1.0 knows no interim answers
        )

    def on_body(self, piece: bytes) -> None:
        """Take a piece of the body, or drop it when the answer does not need it."""
        self._loose_bytes = 0
        self._body_left -= len(piece)
        exchange = self._incoming
        if exchange is None or exchange.handler is None or exchange.answer is not None:
            return
        try:
            exchange.extend(piece)
        except ServiceError as error:
            exchange.answer = self._gate.refuse(error, exchange)
            exchange.release()

    def on_message_complete(self) -> None:
        """Close the request: it is whole."""
        self._loose_bytes = 0
        if self._offered or self._incoming is None:
            return
        self._begun = False
        if self._waits:
            self._admission.received(self)  # the deadline of the next begins with it
        self._incoming.complete = True
        self._incoming = None
        self._body_left = 0

    # What we call

    def _go_on(self) -> None:
        """Answer and parse for as long as nothing has to be waited for."""
        self._answer_ready()
        while self._unparsed and not (self._busy or self._last or self._closing) and self._writable:
            rest, step = self._unparsed, max(PARSED_AT_ONCE, self._body_left)
            self._unparsed = rest[step:] if len(rest) > step else NOTHING
            self._parse(rest[:step])
            self._answer_ready()
        if self._begun or self._unparsed or self._waits or len(self._queue) > 1:
            self._wait()

    def _wait(self) -> None:
        """Read no more while something waits to be parsed; time and hold what is not whole."""
        self._waits = self._begun or bool(self._unparsed) or len(self._queue) > 1
        if self._closing:
            return
        if self._unparsed:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()
        if self._begun:
            self._admission.receive(self)
        else:
            self._admission.received(self)
        self._count_held()

    def _parse(self, piece: memoryview) -> None:
        self._loose_bytes += len(piece)
        try:
            try:
                self._parser.feed_data(piece)
            except HttpParserUpgrade as offer:
                if not self._last:  # as it is after `CONNECT`, which offers nothing
                    rest = piece[offer.args[0] :]
                    self._parse(memoryview(b"".join((self._without_offer(), rest))))
        except HttpParserCallbackError:
            raise  # a bug of ours
        except HttpParserError as exc:
            if "HTTP version" in str(exc) or "PRI" in str(exc):
                self._end_with(UnsupportedVersion("Send the request as HTTP/1.1."))
            else:
                self._end_with(BadRequest("The request is not valid HTTP.", code="invalid_http"))
        if self._loose_bytes > MAX_HEAD_BYTES:
            self._end_with(_too_large())

    def _without_offer(self) -> bytes:
        """Return the head just parsed without its offer of another protocol, for a new parser.

        Java's client sends its first request so, and we may ignore it (RFC 9110, section 7.8). But
        the parser takes all that comes after such a head, its body too, for the other protocol.
        """
        version = self._parser.get_http_version().encode()
        head = [self._parser.get_method(), b" ", self._url, b" HTTP/", version, b"\r\n"]
        for name, value in self._fields.items():
            if name != b"upgrade":
                head += [name, b": ", value, b"\r\n"]
        self._parser = _parser(self)
        self._offered = False
        return b"".join([*head, b"\r\n"])

    def _end_with(self, error: ServiceError) -> None:
        """Answer the request that is coming in with an error, as the last; parse no more."""
        if self._last:
            return
        self._last = True
        self._unparsed = NOTHING
        exchange = self._incoming
        if exchange is None:
            self._queue.append(self._gate.refuse_unread(error, self._fields))
        elif exchange.answer is None and self._queue and self._queue[-1] is exchange:
            exchange.answer = self._gate.refuse(error, exchange)
            exchange.keep_alive = False
            exchange.release()
        elif not self._queue:
            self._close()  # it has its answer

    def _answer_ready(self) -> None:
        """Answer the first of the queue for as long as it can be."""
        while self._queue and self._writable and not (self._busy or self._closing):
            exchange = self._queue[0]
            if exchange.answer is None:
                if exchange.handler is not None and not exchange.complete:
                    if self._awaits_continue:
                        self._awaits_continue = False
                        self._transport.write(CONTINUE)
                    return
                self._gate.enter(exchange)
            if exchange.answer is None:
                self._busy = True
                self._task = self._loop.create_task(self._work(exchange))
            else:
                self._send(exchange, exchange.answer)

    async def _work(self, exchange: Exchange) -> None:
        answer = await self._gate.answer(exchange)
        self._busy = False
        if exchange.gone:
            self._drop(exchange)
        else:
            self._send(exchange, answer)
            if self._waits:
                self._go_on()

    def _send(self, exchange: Exchange, answer: Answer) -> None:
        """Send an answer in one write: proxies lose a second one after an early refusal."""
        self._queue.popleft()
        exchange.release()
        body, status, headers = answer
        close = (
            not exchange.keep_alive
            or self._admission.draining
            or exchange.expired
            or exchange.unread()
            or (self._half_closed and not self._queue and not self._unparsed)
        )
        fields = [*self._state.default_headers, *headers, *self._gate.fields(exchange)]
        if status not in WITHOUT_BODY:
            fields.append((b"content-length", b"%d" % len(body)))
        if close:
            fields.append(CLOSE)
        end = b"" if exchange.method == "HEAD" else body
        self._transport.write(b"".join((STATUS_LINE[status], *map(line, fields), b"\r\n", end)))
        self._gate.record(exchange, status, self._client)
        self._state.total_requests += 1
        self._used = True
        self._waiting_since, self._patience = self._loop.time(), KEEP_ALIVE_SECONDS
        if close:
            self._close()
        elif self._queue:
            self._queue[0].started = perf_counter()  # its turn has come

    def _drop(self, exchange: Exchange) -> None:
        """Forget a request whose client has left."""
        exchange.release()
        self._gate.record(exchange, 499, self._client)

    def _close(self) -> None:
        """Close; where the client may still be sending, not before it had a moment to read.

        Closing with unread data resets the connection, and the answer may be lost on its way.
        """
        if self._closing:
            return
        self._closing = True
        sending = self._begun or bool(self._queue) or bool(self._unparsed) or self._last
        self._let_go()
        if sending and not self._half_closed:
            self._transport.write_eof()
            self._transport.resume_reading()
            self._loop.call_later(LINGER_SECONDS, self._transport.close)
        else:
            self._transport.close()

    def _let_go(self) -> None:
        """Give back what is held for requests that get no answer any more."""
        self._admission.received(self)
        self._parser = None  # it may hold much, and a cycle would wait for the garbage collector
        self._fields, self._unparsed = {}, NOTHING
        self._loose_bytes = 0
        for exchange in self._queue:
            if self._busy and exchange is self._queue[0]:
                exchange.gone = True  # its task drops it
                exchange.cancel()
            else:
                self._drop(exchange)
        self._queue.clear()
        self._admission.budget.give_back(self._held)
        self._held = 0

    def _count_held(self) -> None:
        """Hold in the budget what waits here; without room, end the connection."""
        held = self._loose_bytes + QUEUED_BYTES * max(0, len(self._queue) - 1)
        if self._begun and self._incoming is None:
            held += FIELD_MEMORY * len(self._fields)
        if self._unparsed:
            held += len(cast(bytes, self._unparsed.obj))  # all of it, while a part is needed
        if not self._writable:
            held += self._transport.get_write_buffer_size()
        if held == self._held or self._closing:
            return
        more, self._held = held - self._held, held
        try:
            self._admission.budget.take(more)
        except Overloaded as error:
            if not self._writable:
                self._transport.abort()
                return
            while len(self._queue) > self._busy:
                self._queue.pop().release()
            self._incoming = None
            self._end_with(error)
            self._admission.budget.give_back(self._held)
            self._held = 0
            self._answer_ready()

    def _look(self) -> None:
        """Close the connection if no request has come, or no answer been read, for too long."""
        unsent = self._transport.get_write_buffer_size()
        if unsent and unsent == self._unsent:
            self._transport.abort()  # closing would wait for a client that does not read
            return
        self._unsent = unsent
        waited = self._loop.time() - self._waiting_since
        if not self._queue and waited >= self._patience and not self._closing:
            if self._begun:
                self.evict(SlowRequest("The request came too slowly; send all of it at once."))
            else:
                self._close()
        self._look_later()

    def _look_later(self) -> None:
        seconds = min(LOOK_EVERY_SECONDS, self._head_seconds)
        self._watch = self._loop.call_later(seconds, self._look)

    def _probe(self) -> None:
        """Find out whether a client that sends no more still reads.

        To its end of the connection, closing and closing the sending side look the same from
        here. An interim answer, which any client must expect (RFC 9110, section 15.2), makes the
        system of one that left reset the connection.
        """
        if self._closing or not self._queue:
            return
        if self._transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._transport.abort()
            return
        self._transport.write(CONTINUE)
        self._loop.call_later(PROBE_AFTER_SECONDS, self._probe)


def _parser(connection: Connection) -> HttpRequestParser:
    parser = HttpRequestParser(connection)
    # Else what comes after a request with `Connection: close` makes that an error.
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


def _check(version: str, fields: Mapping[bytes, bytes]) -> None:
    """Check what the parser does not.

    Raises:
        UnsupportedVersion: the request is not HTTP/1.1 or 1.0.
        BadRequest: it has no host, two, or none that could be one (RFC 9112, section 3.2).
        UnsupportedTransferCoding: its body is encoded for its transfer.
    """
    if version not in ("1.1", "1.0"):
        raise UnsupportedVersion("Send the request as HTTP/1.1.")
    host = fields.get(b"host", b"" if version == "1.0" else None)
    if host is None or not is_host(host):
        raise BadRequest("Send one Host field, with a valid host.", code="invalid_http")
    coding = fields.get(b"transfer-encoding")
    if coding is not None and coding.strip().lower() != b"chunked":
        raise UnsupportedTransferCoding("Send the body plain, or with Content-Encoding: gzip.")


def _target(url: bytes) -> tuple[str, bytes]:
    """Return a request target's path, decoded, and its query."""
    if not url.startswith(b"/") or b"#" in url:
        try:
            parsed = parse_url(url)
        except HttpParserError:
            raise BadRequest("The request is not valid HTTP.", code="invalid_http") from None
        path, query = parsed.path or b"/", parsed.query or b""
    else:
        path, _, query = url.partition(b"?")
    text = path.decode("latin-1")
    return unquote(text) if "%" in text else text, query


def _too_large() -> HeadersTooLarge:
    return HeadersTooLarge(
        f"The header fields are too large; send at most {MAX_HEAD_BYTES:,} bytes of them."
    )
