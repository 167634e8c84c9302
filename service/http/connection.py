"""One HTTP/1.1 connection: httptools parses its requests, and the gate answers them.

uvicorn takes a class like this as its setting `http`. Ours replaces uvicorn's own, which

- reads heads of any size and queues any number of pipelined requests: one connection took 1.4 GB
  in seven seconds;
- starts a timer for each answer;
- sends an answer in two writes.

Only this file depends on uvicorn's internals: the arguments of `__init__`, the method `shutdown`,
and the attributes of `ServerState` in `SERVER_STATE`.

The way of a request: `data_received`, `_advance`, `_parse`, the `on_...` methods, `_answer_next`,
`_answer` (in a task), `_send`. All bytes that wait here are counted in the budget for bodies.
"""

import asyncio
import logging
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
from service.http.exchange import CLIENT_CLOSED_REQUEST, Answer, Exchange, Headers

KEEP_ALIVE_SECONDS = 75  # longer than load balancers keep idle connections: they close first
FIRST_HEAD_SECONDS = 10.0  # for the first head of a connection
IDLE_CHECK_SECONDS = 5.0  # between two checks whether the connection is idle or stalled
LINGER_SECONDS = 1.0  # after the last answer, while the client may still be sending
SHUTDOWN_GRACE_SECONDS = 3.0  # for the first request of a connection accepted during shutdown
PROBE_SECONDS = 0.25  # between two probes of a half-closed connection
MAX_HEAD_BYTES = 32_768
FIELD_OVERHEAD_BYTES = 32  # counted for each header field, as in RFC 9113, section 6.5.2
FIELD_MEMORY_BYTES = 128  # what a header field takes in memory, however short it is
USUAL_HEAD_BYTES = 4096  # of memory; the budget counts only more of a request that still arrives
PARSE_CHUNK_BYTES = 2048  # holds some 75 of the smallest requests, and most requests whole
QUEUED_REQUEST_BYTES = 2048  # what a pipelined request takes in memory while it waits
MAX_CONNECTIONS = 8192  # of some 4 KB each, and as much for a usual head
MAX_UNSENT_BYTES = 4096  # above this, the next answer waits until the client has read

CLOSE = (b"connection", b"close")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}
WITHOUT_LENGTH = (204, 304)  # answers without a body (RFC 9110, section 8.6)
EMPTY = memoryview(b"")
# RFC 9112, section 3.2, and RFC 3986, section 3.2.2; an empty host is allowed.
HOST = re.compile(rb" *([A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]*)? *")
SERVER_STATE = {"connections", "default_headers", "total_requests"}

logger = logging.getLogger("service")
format_field = b"%b: %b\r\n".__mod__
is_host = lru_cache(64)(HOST.fullmatch)  # most clients send the same host

if not vars(ServerState()).keys() >= SERVER_STATE:
    raise ImportError(
        f"This service does not work with uvicorn {uvicorn.__version__} (its ServerState lacks"
        f" one of {', '.join(sorted(SERVER_STATE))}): install a version within pyproject.toml's"
        " bounds."
    )


class Gate(Protocol):
    """What a connection needs of the application."""

    @property
    def admission(self) -> Admission:
        """Limits requests in flight, their time and their memory."""

    def dispatch(self, exchange: Exchange) -> None:
        """Choose the handler from the request's head, or refuse the request."""

    def admit(self, exchange: Exchange) -> None:
        """Count the request as in flight, or refuse it."""

    async def answer(self, exchange: Exchange) -> Answer:
        """Return the answer to an admitted request."""

    def refuse(self, error: ServiceError, exchange: Exchange) -> Answer:
        """Return the error as an answer, and count it."""

    def refuse_head(self, error: ServiceError, headers: Mapping[bytes, bytes]) -> Exchange:
        """Return an answered exchange for a request whose head is incomplete or invalid."""

    def common_headers(self, exchange: Exchange) -> Headers:
        """Return the header fields that every answer has."""

    def record(self, exchange: Exchange, status: int, client: str | None = None) -> None:
        """Count and log a request that is finished: answered, or given up by its client."""


class Connection(asyncio.Protocol):
    """Reads the requests of one connection and answers them in order, one at a time.

    Nothing is parsed while a request is being answered; requests that arrived in the same chunk
    wait in a queue. While unparsed bytes wait, the socket is not read. Otherwise reading goes on,
    so that the server notices when a client leaves.

    Args:
        config: its application is a `Gate`.
        server_state: uvicorn's count of connections and requests.
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
        self._parser: Any = _new_parser(self)  # None when the connection is closing
        self._headers: dict[bytes, bytes] = {}  # of the head that is being parsed
        self._queue: deque[Exchange] = deque()  # requests without an answer, in order
        self._incoming: Exchange | None = None  # the request whose body is arriving
        self._unparsed = EMPTY
        self._unfinished_bytes = 0  # parsed, of an incomplete head, chunk size or trailer
        self._held_bytes = 0  # counted in the budget
        self._unsent_bytes = 0  # at the last idle check
        self._body_bytes_left = 0
        self._receiving = False  # a request has begun to arrive and is incomplete
        self._backlog = False  # a request is incomplete, or something waits for its turn
        self._answering = False  # a task works on the first request of the queue
        self._writable = True  # the client reads its answers
        self._parsing_ended = False  # after an error: no more requests are accepted
        self._closing = False
        self._half_closed = False  # the client has closed its sending side
        self._resting = False  # after a refusal: the socket is not read for a moment
        self._may_close = False  # when idle: it has had an answer, or time for a first request
        self._upgrade_offered = False  # in the head just parsed
        self._expects_continue = False  # the client waits before it sends the body
        self._idle_timeout = min(FIRST_HEAD_SECONDS, self._admission.timeout)
        self._check_seconds = min(IDLE_CHECK_SECONDS, self._idle_timeout)

    # Called by the event loop

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # a socket's
        """Wait for the first request. If there are too many connections, make room for this one.

        An idle connection is closed, or else the slowest sender is evicted, or else this closes.
        """
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self._client = peer[0] if isinstance(peer, tuple) else None
        transport.set_write_buffer_limits(MAX_UNSENT_BYTES, 0)
        others = cast(set[Connection], self._state.connections)  # uvicorn names its own classes
        if len(others) >= MAX_CONNECTIONS:
            idle = next((other for other in others if other.is_idle()), None)
            if idle is not None or not self._admission.evict_slowest():
                (idle or self)._close()
        others.add(self)
        self._idle_since = self._loop.time()
        self._schedule_idle_check()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Cancel the client's request, and free all that the connection holds."""
        self._closing = True
        self._idle_timer.cancel()
        self._state.connections.discard(self)
        self._release_all()

    def data_received(self, data: bytes) -> None:
        """Parse the bytes, unless a request is being answered."""
        if self._closing:
            return  # drop them: unread bytes would reset the connection when it closes
        self._unparsed = memoryview(b"".join((self._unparsed, data)) if self._unparsed else data)
        self._advance()

    def eof_received(self) -> bool:
        """Answer the complete requests of a client that closed its sending side; drop the last."""
        incoming, self._incoming = self._incoming, None
        waiting = len(self._queue) > self._answering
        if incoming is not None and waiting and self._queue[-1] is incoming:
            self._abandon(self._queue.pop())
        if self._closing or not (self._queue or self._unparsed):
            return False  # asyncio closes the connection
        self._half_closed = True
        if self._parser.get_http_version() == "1.1":  # HTTP/1.0 has no interim answers
            self._loop.call_later(PROBE_SECONDS, self._probe)
        return True

    def pause_writing(self) -> None:
        """Send no more answers until the client has read those before."""
        self._writable = False
        self._backlog = True
        self._update_held_bytes()

    def resume_writing(self) -> None:
        """Answer and parse again."""
        self._writable = True
        self._advance()

    def is_idle(self) -> bool:
        """Return whether no request is arriving, waiting or being answered."""
        return not (self._queue or self._receiving or self._unparsed or self._closing)

    # Called by uvicorn

    def shutdown(self) -> None:
        """Close the connection if it is idle. A new one first gets time to send a request.

        So does one that rests: its next request may wait in the kernel.
        """
        if not self.is_idle():
            return
        if self._may_close and not self._resting:
            self._close()
        else:
            self.wake()
            self._may_close = True
            self._loop.call_later(SHUTDOWN_GRACE_SECONDS, self.shutdown)

    # Called by admission

    def evict(self, error: ServiceError) -> None:
        """Refuse the request that is arriving, and free its memory."""
        if not self._closing:
            self._refuse_last(error)
            self._answer_next()

    def wake(self) -> None:
        """Read again after a rest."""
        self._resting = False
        if not self._unparsed:
            self._transport.resume_reading()

    # Called by the parser

    def on_message_begin(self) -> None:
        """Start a new head."""
        self._receiving = True
        self._url = b""
        self._headers = {}
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Add a piece of the request target."""
        self._url += url
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header field. Trailer fields, which follow a chunked body, are ignored."""
        self._head_bytes += len(name) + len(value) + FIELD_OVERHEAD_BYTES
        if self._incoming is None and self._head_bytes <= MAX_HEAD_BYTES:
            name, headers = name.lower(), self._headers
            headers[name] = value if name not in headers else b"%b, %b" % (headers[name], value)

    def on_headers_complete(self) -> None:
        """Check the head, dispatch the request, and put it into the queue."""
        self._unfinished_bytes = 0
        parser = self._parser
        if self._parsing_ended or self._closing:
            return
        headers, version = self._headers, parser.get_http_version()
        try:
            if self._head_bytes > MAX_HEAD_BYTES:
                raise _head_too_large()
            if parser.should_upgrade():
                if parser.get_method() == b"CONNECT":
                    raise BadRequest("Send another method than CONNECT.", code="invalid_http")
                self._upgrade_offered = True
                return
            _check_head(version, headers)
            body_bytes = int(headers.get(b"content-length", 0))
            method, (path, query) = parser.get_method().decode("ascii"), _split_target(self._url)
        except ServiceError as error:
            self._refuse_last(error)
            return
        except ValueError:  # Python converts at most 4300 digits, and httptools takes any zeros
            self._refuse_last(_invalid_http())
            return
        exchange = Exchange(method, path, query, headers, self._admission.budget)
        exchange.keep_alive = version == "1.1" and parser.should_keep_alive()
        self._gate.dispatch(exchange)
        self._queue.append(exchange)
        self._incoming = exchange
        self._body_bytes_left = body_bytes
        self._expects_continue = (
            b"expect" in headers
            and headers[b"expect"].lower() == b"100-continue"
            and version == "1.1"  # HTTP/1.0 has no interim answers
        )

    def on_body(self, piece: bytes) -> None:
        """Add a piece of the body; drop it if the answer does not need the body."""
        self._unfinished_bytes = 0
        self._body_bytes_left -= len(piece)
        exchange = self._incoming
        if exchange is None or exchange.handler is None or exchange.answer is not None:
            return
        try:
            exchange.extend(piece)
        except ServiceError as error:
            exchange.answer = self._gate.refuse(error, exchange)
            exchange.release()

    def on_message_complete(self) -> None:
        """Mark the request as complete."""
        self._unfinished_bytes = 0
        if self._upgrade_offered or self._incoming is None:
            return
        self._receiving = False
        if self._backlog:
            self._admission.stop_read_deadline(self)  # the next request gets its own
        self._incoming.complete = True
        self._incoming = None
        self._headers, self._url = {}, b""  # else idle connections would hold them
        self._body_bytes_left = 0

    # Our own steps

    def _advance(self) -> None:
        """Answer and parse in turn, until nothing is left or a task or the client has to act."""
        self._answer_next()
        while (
            self._unparsed
            and self._writable
            and not (self._answering or self._parsing_ended or self._closing)
        ):
            data, end = self._unparsed, max(PARSE_CHUNK_BYTES, self._body_bytes_left)
            self._unparsed = data[end:] if len(data) > end else EMPTY
            self._parse(data[:end])
            self._answer_next()
        if self._receiving or self._unparsed or self._backlog or len(self._queue) > 1:
            self._apply_backpressure()

    def _apply_backpressure(self) -> None:
        """Pause or resume reading, set or clear the read deadline, and update the budget.

        `_advance` skips this for a client that sends one complete request at a time.
        """
        self._backlog = self._receiving or bool(self._unparsed) or len(self._queue) > 1
        if self._closing:
            return
        if self._unparsed or self._resting:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()
        if self._receiving:
            self._admission.start_read_deadline(self)
        else:
            self._admission.stop_read_deadline(self)
        self._update_held_bytes()

    def _parse(self, piece: memoryview) -> None:
        self._unfinished_bytes += len(piece)
        try:
            self._parser.feed_data(piece)
        except HttpParserUpgrade as upgrade:
            if not self._parsing_ended:  # it has ended if the request is refused, as CONNECT is
                rest = piece[upgrade.args[0] :]
                self._parse(memoryview(b"".join((self._restart_without_upgrade(), rest))))
        except HttpParserCallbackError:
            raise  # a bug in our `on_...` methods
        except HttpParserError as exc:
            if "HTTP version" in str(exc) or "PRI" in str(exc):
                self._refuse_last(UnsupportedVersion("Send the request as HTTP/1.1."))
            else:
                self._refuse_last(_invalid_http())
        if self._unfinished_bytes > MAX_HEAD_BYTES:
            self._refuse_last(_head_too_large())

    def _restart_without_upgrade(self) -> bytes:
        """Start a new parser; return the head just parsed without its `Upgrade` field.

        Java's client offers HTTP/2 in its first request. A server may ignore the offer (RFC 9110,
        section 7.8), but httptools cannot: it takes the body for data of the new protocol.
        """
        version = self._parser.get_http_version().encode()
        head = [self._parser.get_method(), b" ", self._url, b" HTTP/", version, b"\r\n"]
        for name, value in self._headers.items():
            if name != b"upgrade":
                head += [name, b": ", value, b"\r\n"]
        self._parser = _new_parser(self)
        self._upgrade_offered = False
        return b"".join([*head, b"\r\n"])

    def _refuse_last(self, error: ServiceError) -> None:
        """Refuse the request that is arriving, and parse no more."""
        if self._parsing_ended:
            return
        self._parsing_ended = True
        self._unparsed = EMPTY
        exchange = self._incoming
        if exchange is None:
            self._queue.append(self._gate.refuse_head(error, self._headers))
        elif self._queue and self._queue[-1] is exchange:
            exchange.keep_alive = False
            if exchange.answer is None:
                exchange.answer = self._gate.refuse(error, exchange)
                exchange.release()
        elif not self._queue:
            self._close()  # the request was answered before its body was complete

    def _answer_next(self) -> None:
        """Send the answers that are ready, in order; start the next request that needs a task."""
        while self._queue and self._writable and not (self._answering or self._closing):
            exchange = self._queue[0]
            if exchange.answer is None:
                if exchange.handler is not None and not exchange.complete:
                    if self._expects_continue:
                        self._expects_continue = False
                        self._transport.write(CONTINUE)
                    return
                self._gate.admit(exchange)
            if exchange.answer is None:
                self._answering = True
                # Hold the task: asyncio itself has only a weak reference to it.
                self._task = self._loop.create_task(self._answer(exchange))
            else:
                self._send(exchange, exchange.answer)

    def _rest(self) -> None:
        """Do not read for a moment: a client that asks again at once is only refused again."""
        self._resting = True
        self._transport.pause_reading()
        self._admission.rest(self)

    async def _answer(self, exchange: Exchange) -> None:
        answer = await self._gate.answer(exchange)
        self._answering = False
        if exchange.client_left:
            self._abandon(exchange)
        else:
            self._send(exchange, answer)
            if self._backlog:
                self._advance()

    def _send(self, exchange: Exchange, answer: Answer) -> None:
        """Send an answer in one write: after an early refusal, proxies lose a second write."""
        self._queue.popleft()
        exchange.release()
        body, status, headers = answer
        close = (
            not exchange.keep_alive
            or self._admission.draining
            or exchange.cancelled
            or exchange.too_long_to_discard()
            or (self._half_closed and not self._queue and not self._unparsed)
        )
        fields = [*self._state.default_headers, *headers, *self._gate.common_headers(exchange)]
        if status not in WITHOUT_LENGTH:
            fields.append((b"content-length", b"%d" % len(body)))
        if close:
            fields.append(CLOSE)
        content = b"" if exchange.method == "HEAD" else body
        self._transport.write(
            b"".join((STATUS_LINES[status], *map(format_field, fields), b"\r\n", content))
        )
        self._gate.record(exchange, status, self._client)
        self._state.total_requests += 1
        self._may_close = True
        self._idle_since, self._idle_timeout = self._loop.time(), KEEP_ALIVE_SECONDS
        if close:
            self._close()
            return
        if self._queue:
            self._queue[0].started = perf_counter()  # time in the queue does not count
        if status == Overloaded.status and exchange.handler is not None:
            self._rest()

    def _abandon(self, exchange: Exchange) -> None:
        """Free and record a request that its client no longer waits for."""
        exchange.release()
        self._gate.record(exchange, CLIENT_CLOSED_REQUEST, self._client)

    def _close(self) -> None:
        """Close the connection; if the client may still be sending, read for a second before.

        Closing a socket with unread data resets the connection, and the client may then lose the
        last answer.
        """
        if self._closing:
            return
        self._closing = True
        sending = (
            self._receiving or bool(self._queue) or bool(self._unparsed) or self._parsing_ended
        )
        self._release_all()
        if sending and not self._half_closed:
            self._transport.write_eof()
            self._transport.resume_reading()
            self._loop.call_later(LINGER_SECONDS, self._transport.close)
        else:
            self._transport.close()

    def _release_all(self) -> None:
        """Free what the connection holds. Its requests get no answer any more."""
        self._admission.forget(self)
        self._parser = None  # it refers back to us: the memory would wait for the garbage collector
        self._headers, self._unparsed = {}, EMPTY
        self._unfinished_bytes = 0
        for exchange in self._queue:
            if self._answering and exchange is self._queue[0]:
                exchange.client_left = True  # its task abandons it
                exchange.cancel()
            else:
                self._abandon(exchange)
        self._queue.clear()
        self._admission.budget.give_back(self._held_bytes)
        self._held_bytes = 0

    def _update_held_bytes(self) -> None:
        """Count in the budget what waits here. If the budget is full, end the connection."""
        held = self._unfinished_bytes + QUEUED_REQUEST_BYTES * max(0, len(self._queue) - 1)
        if self._receiving:
            head = FIELD_MEMORY_BYTES * len(self._headers)
            if self._incoming is None:
                held += head
            else:  # the head is complete, and no longer among the unfinished bytes
                held += max(0, head + self._head_bytes - USUAL_HEAD_BYTES)
        if self._unparsed:
            held += len(cast(bytes, self._unparsed.obj))  # a view keeps the whole object alive
        if not self._writable:
            held += self._transport.get_write_buffer_size()
        if held == self._held_bytes or self._closing:
            return
        more, self._held_bytes = held - self._held_bytes, held
        try:
            self._admission.budget.take(more)
        except Overloaded as error:
            if not self._writable:
                self._transport.abort()
                return
            dropped = len(self._queue) - self._answering
            for _ in range(dropped):
                self._queue.pop().release()
            if dropped:
                fields = {"client": self._client, "count": dropped}
                logger.info("queued requests are dropped", extra={"fields": fields})
            self._incoming = None
            self._refuse_last(error)
            self._admission.budget.give_back(self._held_bytes)
            self._held_bytes = 0
            self._answer_next()

    def _check_idle(self) -> None:
        """Close the connection if its client has sent or read nothing for too long."""
        unsent = self._transport.get_write_buffer_size()
        if unsent and unsent == self._unsent_bytes:
            self._transport.abort()  # `close` would first wait for the client to read
            return
        self._unsent_bytes = unsent
        idle = self._loop.time() - self._idle_since
        if not self._queue and idle >= self._idle_timeout and not self._closing:
            if self._receiving:
                self.evict(SlowRequest("The request came too slowly; send all of it at once."))
            else:
                self._close()
        self._schedule_idle_check()

    def _schedule_idle_check(self) -> None:
        self._idle_timer = self._loop.call_later(self._check_seconds, self._check_idle)

    def _probe(self) -> None:
        """Find out whether a half-closed client still waits for its answer.

        A client that closes only its sending side and one that closes the connection send the same
        packet. So we send an interim answer, which every client must accept (RFC 9110, section
        15.2): if the client is gone, its system answers with a reset.
        """
        if self._closing or not self._queue:
            return
        if self._transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._transport.abort()
            return
        if self._writable:  # else unread answers probe for us, and `_check_idle` watches them
            self._transport.write(CONTINUE)
        self._loop.call_later(PROBE_SECONDS, self._probe)


def _new_parser(connection: Connection) -> HttpRequestParser:
    parser = HttpRequestParser(connection)
    # Otherwise bytes after a request with `Connection: close` count as an invalid request.
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


def _check_head(version: str, headers: Mapping[bytes, bytes]) -> None:
    """Check what httptools does not.

    Raises:
        UnsupportedVersion: the request is not HTTP/1.1 or 1.0.
        BadRequest: `Host` is missing, repeated or invalid (RFC 9112, section 3.2).
        UnsupportedTransferCoding: the transfer coding is not `chunked`.
    """
    if version not in ("1.1", "1.0"):
        raise UnsupportedVersion("Send the request as HTTP/1.1.")
    host = headers.get(b"host", b"" if version == "1.0" else None)
    if host is None or not is_host(host):
        raise BadRequest("Send one Host field, with a valid host.", code="invalid_http")
    coding = headers.get(b"transfer-encoding")
    if coding is not None and coding.strip().lower() != b"chunked":
        raise UnsupportedTransferCoding("Send the body plain, or with Content-Encoding: gzip.")


def _split_target(url: bytes) -> tuple[str, bytes]:
    """Return the decoded path and the raw query of a request target.

    Raises:
        BadRequest: the target is invalid. A fragment is (RFC 9112, section 3.2).
    """
    if b"#" in url:
        raise _invalid_http()
    if not url.startswith(b"/"):
        try:
            parsed = parse_url(url)
        except HttpParserError:
            raise _invalid_http() from None
        path, query = parsed.path or b"/", parsed.query or b""
    else:
        path, _, query = url.partition(b"?")
    text = path.decode("latin-1")
    return unquote(text) if "%" in text else text, query


def _invalid_http() -> BadRequest:
    return BadRequest("The request is not valid HTTP.", code="invalid_http")


def _head_too_large() -> HeadersTooLarge:
    return HeadersTooLarge(
        f"The header fields are too large; send at most {MAX_HEAD_BYTES:,} bytes of them."
    )
