"""uvicorn, with what it leaves out: draining, limits on a request's head, our error shape."""

import asyncio
import contextlib
import gc
import logging
import math
import os
import resource
import signal
import socket
from time import monotonic
from types import FrameType
from typing import Any

import uvicorn
from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.app import create_app
from service.errors import BadRequest, HeadersTooLarge, ServiceError, SlowRequest
from service.http.exchange import Receive, Scope, Send
from service.http.gate import Gate
from service.model.classifier import Classifier
from service.settings import Settings
from service.telemetry.metrics import MULTIPROCESS

KEEP_ALIVE_SECONDS = (
    75  # longer than load balancers keep idle connections, so that they close first
)
HEAD_SECONDS = 10.0
LOOK_EVERY_SECONDS = 5.0
MAX_HEAD_BYTES = 32_768

logger = logging.getLogger("service")


class StartError(Exception):
    """The server cannot start; the message is one sentence that says why."""


def bind(settings: Settings) -> socket.socket:
    """Take the port, without listening yet: at `::` of both IP families, or of the one there is.

    Raises:
        StartError: the address is in use or not ours.
    """
    address = f"{settings.host}:{settings.port}"
    every = settings.host == "::"
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            "0.0.0.0" if every and not _has_ipv6() else settings.host,  # noqa: S104 - as asked
            settings.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if every and family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(where)
    except (OSError, UnicodeError) as exc:  # a name with an empty label is no Unicode to Python
        raise _cannot_listen(address, exc) from exc
    return listener


def _has_ipv6() -> bool:
    """Tell whether the kernel has IPv6: `socket.has_ipv6` speaks only of the interpreter."""
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError:
        return False
    return True


def url(listener: socket.socket) -> str:
    """Return where a bound socket listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _cannot_listen(address: str, exc: Exception) -> StartError:
    reason = getattr(exc, "strerror", None) or "no such host"
    return StartError(
        f"Cannot listen on {address} ({reason}): free the port, or set BNLENET_HOST and"
        " BNLENET_PORT to another."
    )


def run(settings: Settings, listener: socket.socket, supervisor: int | None = None) -> None:
    """Load the model and serve it until a signal ends it.

    Args:
        settings: what the environment decided.
        listener: a bound socket.
        supervisor: stop when this is no longer the parent process; None for none.

    Raises:
        ModelError: the model cannot be served.
        StartError: another process took the port while the model was loaded, or there is nowhere
            to keep the metrics.
    """
    directory = os.environ.get(MULTIPROCESS)
    if directory is not None and not os.access(directory, os.W_OK):
        raise StartError(
            f"{MULTIPROCESS} is {directory}, which is no directory that can be written:"
            " unset it, or make that directory."
        )
    app = create_app(
        settings, Classifier.load(settings.model_path, settings.device, settings.model_name)
    )
    try:
        listener.listen()  # here, where its failure can still be told in a sentence
    except OSError as exc:
        raise _cannot_listen(url(listener), exc) from exc
    gc.collect()
    gc.freeze()  # what lives as long as the process need not be looked through again and again
    # As many connections as we are allowed; where even that is refused, as many as we have.
    with contextlib.suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    Server(app, settings, supervisor).run([listener])


class Server(uvicorn.Server):
    """A server that, told to stop, first says so at `/readyz` and goes on answering for a while.

    Args:
        gate: the application.
        settings: what the environment decided.
        supervisor: stop when this is no longer the parent process; None for none.
    """

    def __init__(self, gate: Gate, settings: Settings, supervisor: int | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                gate,
                http=Connection,
                ws="none",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(settings.request_timeout_seconds) + 1,
            )
        )
        self._gate = gate
        self._drain_seconds = settings.drain_seconds
        self._stop_at = math.inf
        self._supervisor = supervisor

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start answering, and say where."""
        await super().startup(sockets)
        for listener in sockets or []:
            logger.info("ready", extra={"fields": {"url": url(listener)}})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; when forced to, tell the framework all the same, else it logs a failure."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Drain at the first SIGTERM; stop at once at SIGINT or a second signal."""
        if sig == signal.SIGTERM and not self._gate.draining:
            self._gate.draining = True
            self._stop_at = monotonic() + self._drain_seconds
        else:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether it is time to stop."""
        orphaned = self._supervisor is not None and os.getppid() != self._supervisor
        if monotonic() >= self._stop_at or orphaned:
            self._gate.draining = True
            self.should_exit = True
        return await super().on_tick(counter)


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with a limit on the size of a request's head and on its time.

    uvicorn times out idle connections only after a first answer, with a new timer for each answer
    (six per cent of a small request's cost), and its parser takes heads of any size. Here one
    timer looks at the connection from time to time. What is not HTTP gets our error shape.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """Begin to wait for a first request."""
        super().connection_made(transport)
        self._in_body = False
        self._head_bytes = 0
        self._unsent = 0
        self._head_seconds = min(HEAD_SECONDS, self.app.timeout)
        self._patience = self._head_seconds
        self._waiting_since = self.loop.time()
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop looking, and let the request that is being answered know."""
        self._watch.cancel()
        if self.pipeline:  # else uvicorn does so; it knows only the last that came
            self._current.disconnected = True
        super().connection_lost(exc)
        if not self._answered():
            self.app.leave(self._current.scope)

    def data_received(self, data: bytes) -> None:
        """Parse what came; refuse a head, or fields after a body, that go on for too long."""
        size = len(data)
        cycle = self.cycle
        before = len(cycle.body) if self._in_body else None
        if self._awaits_head():
            if self._head_bytes == 0:
                self._waiting_since = self.loop.time()
                self._patience = self._head_seconds
            self._head_bytes += size
        while data:
            try:
                super().data_received(data)
                break
            except HttpParserUpgrade as offer:
                data = self._without_offer() + data[offer.args[0] :]
        same = self._in_body and cycle is self.cycle
        if same and len(cycle.body) == before and not cycle.response_started:
            self._head_bytes += size  # fields after the body, or what goes with a piece's length
        elif not self._awaits_head():
            self._head_bytes = 0
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(HeadersTooLarge(TOO_LARGE))

    def _should_upgrade(self) -> bool:
        """Hold back a request that offers another protocol; `CONNECT` is no offer."""
        return self.parser.get_method() != b"CONNECT"

    def handle_websocket_upgrade(self) -> None:
        """Let `data_received` see the offer, whichever protocol it is of."""
        raise  # noqa: PLE0704 - called while the parser's exception is handled

    def _without_offer(self) -> bytes:
        """Return the head just parsed without its offer, for a new parser.

        Java's client sends its first request so, and we may ignore it (RFC 9110, section 7.8). But
        the parser takes all that comes after such a head, its body too, for the other protocol.
        """
        version = self.parser.get_http_version().encode()
        head = [self.scope["method"].encode(), b" ", self.url, b" HTTP/", version, b"\r\n"]
        for name, value in self.scope["headers"]:
            if name != b"upgrade":
                head += [name, b": ", value, b"\r\n"]
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        return b"".join([*head, b"\r\n"])

    def on_headers_complete(self) -> None:
        """Take what follows for a body."""
        super().on_headers_complete()
        self._in_body = True
        self.headers = []  # those after a body must not change what was decided by its head

    def on_message_complete(self) -> None:
        """Take what follows for another head."""
        self._in_body = False
        super().on_message_complete()
        if not self.pipeline:  # who does not read does not see that the client leaves
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Go on to the next request, as uvicorn does, but without a timer for the wait."""
        self.server_state.total_requests += 1
        self._head_bytes = 0
        self._waiting_since = self.loop.time()
        self._patience = KEEP_ALIVE_SECONDS
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def _answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _awaits_head(self) -> bool:
        """Tell whether what comes next is a head; of a refused upload, a body may still come."""
        return not self._in_body and self._answered()

    def _look(self) -> None:
        """Close the connection if no request has come, or no answer been taken, for too long."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent == self._unsent:
            self.transport.abort()  # closing would wait for a client that does not read
            return
        self._unsent = unsent
        waited = self.loop.time() - self._waiting_since
        if self._answered() and waited >= self._patience and not self.transport.is_closing():
            if self._head_bytes:
                self._refuse(SlowRequest("The request came too slowly; send all of it at once."))
            else:
                self.transport.close()
        self._look_later()

    def _look_later(self) -> None:
        seconds = min(LOOK_EVERY_SECONDS, self._head_seconds)
        self._watch = self.loop.call_later(seconds, self._look)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's signature
        """Answer what is not HTTP, but not before or within the answers to what came before it."""
        cycle = self.cycle
        if self._answered() or (
            cycle.more_body and not cycle.response_started and not self.pipeline
        ):
            self._refuse(BadRequest("The request is not valid HTTP.", code="invalid_http"))
        else:
            cycle.keep_alive = False
            self.flow.pause_reading()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._current = cycle
        scope = cycle.scope
        if self._head_bytes > MAX_HEAD_BYTES and _head_size(scope) > MAX_HEAD_BYTES:
            app = self._refuse_head
        else:
            self.app.arrive(scope)
        super()._start_asgi_task(cycle, app)

    async def _refuse_head(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        body, status, headers = self.app.refuse(HeadersTooLarge(TOO_LARGE))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _refuse(self, error: ServiceError) -> None:
        answer = self.app.refuse(error)
        headers = [*self.server_state.default_headers, *answer.headers]
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[answer.status] + head + b"\r\n" + answer.body)
        self.transport.close()


TOO_LARGE = f"The header fields are too large; send at most {MAX_HEAD_BYTES:,} bytes of them."


def _head_size(scope: Scope) -> int:
    target = len(scope["raw_path"]) + len(scope["query_string"])
    return target + sum(len(name) + len(value) for name, value in scope["headers"])
