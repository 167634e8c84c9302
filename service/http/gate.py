"""What every request passes beneath the framework.

FastAPI's own machinery takes about 65 microseconds a request, more than the model. So the
busiest routes (the hot paths) are looked up here, in a table, and everything else goes on to
FastAPI. Both ways get the same request id, API key check, errors, metrics and log line; the hot
paths also get admission and a deadline. FastAPI documents the hot paths and can serve them with
the very same handlers; a test holds the two ways against each other.
"""

import asyncio
import contextlib
import hmac
import logging
import os
import re
from collections.abc import Awaitable, Callable
from itertools import count
from time import perf_counter

import orjson

from service.errors import (
    BadRequest,
    DeadlineExceeded,
    Overloaded,
    ServiceError,
    SlowRequest,
    Unauthorized,
)
from service.http.exchange import (
    JSON,
    Answer,
    ClientGone,
    Exchange,
    Headers,
    Message,
    Receive,
    Room,
    Scope,
    Send,
)
from service.settings import Settings
from service.telemetry.metrics import Metrics

Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Handler = Callable[[Exchange], Awaitable[Answer]]

SOUND_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}").fullmatch
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
CLOSE = (b"connection", b"close")
CLIENT_GONE = 499  # nginx's status for the log; nobody receives it
CROSS_ORIGIN_HEADERS = (
    b"Authorization, Content-Type, Content-Encoding, Inference-Header-Content-Length, X-Request-ID"
)
CROSS_ORIGIN_EXPOSED = b"Inference-Header-Content-Length, Retry-After, X-Request-ID"
BODIES_IN_MEMORY = 8  # of the largest size, while they come in
SLOW_AFTER_SECONDS = 2.0
SWEEP_SECONDS = 0.1
LINGER_SECONDS = 1.0

access = logging.getLogger("service.access")
logger = logging.getLogger("service")


def error_answer(error: ServiceError, request_id: bytes) -> Answer:
    """Return the one shape of every error answer."""
    body = {"error": error.message, "code": error.code, "request_id": request_id.decode("ascii")}
    headers = [(k.lower().encode(), v.encode()) for k, v in error.headers.items()]
    return Answer(orjson.dumps(body), error.status, JSON + headers)


class Gate:
    """The ASGI application: the hot paths, and the framework behind them.

    Args:
        framework: answers whatever is no hot path.
        open_paths: paths that need no API key; one that ends in `*` stands for all it begins.
        settings: limits, key, origins.
        metrics: is told of every request.

    Attributes:
        framework: as given.
        hot_paths: handlers by method and exact path.
        draining: the server is about to stop; every answer closes its connection.
        in_flight: requests to hot paths that have arrived and have no answer yet.
        timeout: the seconds that a request may take; the server gives its head no more.
    """

    def __init__(
        self,
        framework: Application,
        open_paths: frozenset[str],
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self.framework = framework
        self.hot_paths: dict[tuple[str, str], Handler] = {}
        self.draining = False
        self.in_flight = 0
        self._metrics = metrics
        most = settings.max_body_bytes
        self._room = Room(most, BODIES_IN_MEMORY * most, self._make_room)
        self._max_in_flight = settings.max_in_flight
        self.timeout = settings.request_timeout_seconds
        self._key: bytes | None = None
        if settings.api_key is not None:
            self._key = settings.api_key.get_secret_value().encode()
        self._open_paths = frozenset(path for path in open_paths if path[-1] != "*")
        self._open_prefixes = tuple(path[:-1] for path in open_paths if path[-1] == "*")
        self._origins = frozenset(origin.encode() for origin in settings.cors_origins)
        self._id_prefix = os.urandom(6).hex().encode()
        self._id_count = count(1)
        self._inside: dict[Exchange, None] = {}  # in order of arrival
        self._sweep_timer: asyncio.TimerHandle | None = None

    def arrive(self, scope: Scope) -> None:
        """Note a request's arrival. The server calls this before the request waits its turn."""
        handler = self.hot_paths.get((scope["method"], scope["path"]))
        if handler is not None:
            self.in_flight += 1
        scope["arrival"] = perf_counter(), handler, self.in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or pass on the framework's start and end."""
        if scope["type"] != "http":
            await self.framework(scope, receive, send)
            return
        if "arrival" not in scope:
            self.arrive(scope)
        started, handler, position = scope["arrival"]
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id")
        if request_id is None or not SOUND_REQUEST_ID(request_id):
            request_id = self._make_id()
        exchange = Exchange(scope, receive, headers, request_id, started, self._room)
        if handler is None:
            route, status = await self._delegate(exchange, send)
        else:
            try:
                answer = await self._work(handler, exchange, position)
            finally:
                self.in_flight -= 1
            route, status = scope["path"], answer.status
            await self._send(answer, exchange, send)
        seconds = perf_counter() - started
        self._record(request_id, scope["method"], route, status, seconds)
        if exchange.closing:
            await self._linger(exchange, send)

    def leave(self, scope: Scope) -> None:
        """Do no more for a request; the server calls this when its client has left."""
        # Looked for, as a scope that knew its exchange would be a cycle for each request, left to
        # the garbage collector: that costs three per cent.
        for exchange in self._inside:
            if exchange.scope is scope:
                exchange.gone = True
                self._expire(exchange)
                break

    def refuse(self, error: ServiceError) -> Answer:
        """Return the whole answer to what the server could not take for a request; record it."""
        request_id = self._make_id()
        self._metrics.rejected(error.code)
        self._record(request_id, "OTHER", "unmatched", error.status, 0.0)
        body, status, headers = error_answer(error, request_id)
        length = (b"content-length", b"%d" % len(body))
        return Answer(body, status, [*headers, length, (b"x-request-id", request_id), CLOSE])

    async def _work(self, handler: Handler, exchange: Exchange, position: int) -> Answer:
        """Let a hot path's handler answer, within admission and deadline."""
        try:
            self._authorize(exchange)
            if position > self._max_in_flight and not self._make_room():
                raise Overloaded(
                    "The server is at its limit; try again in a second.",
                    headers={"Retry-After": "1"},
                )
            exchange.task = asyncio.current_task()
            self._inside[exchange] = None
            if self._sweep_timer is None:
                self._sweep()
            answer = await handler(exchange)
            if perf_counter() - exchange.started > self.timeout:
                raise self._too_late(exchange)
            return answer
        except ServiceError as error:
            return self._refuse(error, exchange)
        except ClientGone:
            return Answer(b"", CLIENT_GONE)
        except asyncio.CancelledError:
            if not exchange.expired or exchange.task is None:
                raise
            exchange.task.uncancel()
            if exchange.gone:
                return Answer(b"", CLIENT_GONE)
            return self._refuse(self._too_late(exchange), exchange)
        except Exception:  # a bug of ours: logged with its traceback, told without
            return self._refuse(self._failure(exchange), exchange)
        finally:
            self._inside.pop(exchange, None)

    async def _delegate(self, exchange: Exchange, send: Send) -> tuple[str, int]:
        """Let the framework answer; return the route's template and the status."""
        scope = exchange.scope
        scope["exchange"] = exchange
        status = 0

        async def send_tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                exchange.closing = exchange.unread()
                message["headers"] = [*message["headers"], *self._tail(exchange)]
            elif exchange.closing:
                message["more_body"] = True  # the end comes after the rest of the request
            await send(message)

        try:
            if self._is_preflight(exchange):
                answer = self._preflight(exchange)
            else:
                self._authorize(exchange)
                await self.framework(scope, exchange.receive, send_tagged)
                answer = None
        except ServiceError as error:
            answer = self._refuse(error, exchange)
        except Exception:  # as in _work
            answer = self._refuse(self._failure(exchange), exchange)
        if answer is not None and status == 0:
            status = answer.status
            await self._send(answer, exchange, send)
        path: str = scope["path"]
        fixed = path if path in self._open_paths else "unmatched"  # the docs have no template
        template: str = getattr(scope.get("route"), "path", fixed)
        return template, status

    async def _send(self, answer: Answer, exchange: Exchange, send: Send) -> None:
        body = answer.body
        exchange.closing = not exchange.complete and exchange.unread()
        headers = [
            *answer.headers,
            (b"content-length", b"%d" % len(body)),
            *self._tail(exchange),
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": exchange.closing})

    async def _linger(self, exchange: Exchange, send: Send) -> None:
        """Close a connection whose request was not read to its end.

        The answer is out, but closing at once with unread data would reset the connection, and
        the client might never see the answer. So what comes is thrown away for a moment.
        """
        with contextlib.suppress(TimeoutError):  # it had its moment
            async with asyncio.timeout(LINGER_SECONDS):
                while (await exchange.receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})

    def _tail(self, exchange: Exchange) -> Headers:
        """Return the header fields that every answer carries."""
        headers = [(b"x-request-id", exchange.request_id)]
        if self.draining or exchange.closing or exchange.expired:
            headers.append(CLOSE)
        if self._origins:
            headers += self._cross_origin(exchange)
        return headers

    def _cross_origin(self, exchange: Exchange) -> Headers:
        any_origin = b"*" in self._origins
        origin = exchange.headers.get(b"origin")
        headers = [] if any_origin else [(b"vary", b"Origin")]
        if origin is not None and (any_origin or origin in self._origins):
            allowed = b"*" if any_origin else origin
            headers.append((b"access-control-allow-origin", allowed))
            headers.append((b"access-control-expose-headers", CROSS_ORIGIN_EXPOSED))
        return headers

    def _is_preflight(self, exchange: Exchange) -> bool:
        """Tell whether a browser asks what other origins may do; it sends no key with that."""
        asked = b"access-control-request-method" in exchange.headers
        return asked and bool(self._origins) and exchange.scope["method"] == "OPTIONS"

    def _preflight(self, exchange: Exchange) -> Answer:
        if not self._origins & {b"*", exchange.headers.get(b"origin")}:
            raise BadRequest("This origin may not call; see BNLENET_CORS_ORIGINS.", code="cors")
        headers = [
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", CROSS_ORIGIN_HEADERS),
            (b"access-control-max-age", b"600"),
        ]
        return Answer(b"", 200, headers)

    def _authorize(self, exchange: Exchange) -> None:
        if self._key is None:
            return
        path = exchange.scope["path"]
        if path in self._open_paths or path.startswith(self._open_prefixes):
            return
        scheme, _, given = exchange.headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            raise Unauthorized(
                "Send the API key as `Authorization: Bearer KEY`.",
                headers={"WWW-Authenticate": 'Bearer realm="bn-lenet"'},
            )

    def _make_room(self) -> bool:
        """Send the oldest slow sender away; tell whether there was one."""
        now = perf_counter()
        for exchange in self._inside:
            if now - exchange.started < SLOW_AFTER_SECONDS:
                break
            if not exchange.complete and not exchange.expired:
                self._expire(exchange)
                return True
        return False

    def _sweep(self) -> None:
        """End requests past their deadline. One timer for all costs less than one for each."""
        now = perf_counter()
        for exchange in self._inside:
            if now - exchange.started < self.timeout:
                break
            self._expire(exchange)
        self._metrics.in_flight.set(self.in_flight)
        self._sweep_timer = None
        if self._inside:
            loop = asyncio.get_running_loop()
            self._sweep_timer = loop.call_later(SWEEP_SECONDS, self._sweep)

    def _expire(self, exchange: Exchange) -> None:
        if exchange.task is not None and not exchange.expired:
            exchange.expired = True
            exchange.task.cancel()

    def _too_late(self, exchange: Exchange) -> ServiceError:
        if exchange.complete:
            return DeadlineExceeded("The answer was not ready in time; try again later.")
        return SlowRequest("The request came too slowly; send all of it at once.")

    def _failure(self, exchange: Exchange) -> ServiceError:
        """Log the exception being handled; the client learns only how to ask about it."""
        request_id = exchange.request_id.decode("ascii")
        logger.exception("failure", extra={"fields": {"request_id": request_id}})
        return ServiceError("The server failed; if it goes on, report the request id.")

    def _refuse(self, error: ServiceError, exchange: Exchange) -> Answer:
        self._metrics.rejected(error.code)
        return error_answer(error, exchange.request_id)

    def _make_id(self) -> bytes:
        return b"%s-%x" % (self._id_prefix, next(self._id_count))

    def _record(
        self, request_id: bytes, method: str, route: str, status: int, seconds: float
    ) -> None:
        method = method if method in METHODS else "OTHER"
        self._metrics.request(route, method, status, seconds)
        if access.isEnabledFor(logging.INFO):
            fields = {
                "request_id": request_id.decode("ascii"),
                "method": method,
                "route": route,
                "status": status,
                "milliseconds": round(seconds * 1e3, 3),
            }
            access.info("request", extra={"fields": fields})
