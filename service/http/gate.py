"""Where every request goes: to the handler of its hot path, or to the framework.

FastAPI's own machinery takes longer than the model: the same handlers answered 12,766 requests a
second from the table here and 5,580 through FastAPI's routing (784 bytes, 16 connections, one core;
`python -m benchmarks.serving` has both rows). So the busiest routes (the hot paths) are looked up
in a table, and everything else goes on to FastAPI. Both ways get the same request id, API key
check, errors, metrics and log line; the hot paths also get admission and a deadline. FastAPI
documents the hot paths and can serve them with the very same handlers; a test holds the two ways
against each other.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter
from typing import NamedTuple

from service.errors import DeadlineExceeded, ServiceError
from service.http import framework
from service.http.admission import Admission
from service.http.api_key import ApiKey
from service.http.cross_origin import CrossOrigin
from service.http.exchange import UNMATCHED, Answer, Exchange, Handler, Headers, error_answer
from service.http.request_ids import RequestIds, trace_id
from service.settings import Settings
from service.telemetry.metrics import Metrics

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
PROBES = frozenset({"/livez", "/readyz", "/metrics"})  # asked all day long
LOGGED_PATH = 200  # characters of a path that is nobody's
CLIENT_GONE = 499  # nginx's status for the log; nobody receives it
GONE = Answer(b"", CLIENT_GONE)

access = logging.getLogger("service.access")
logger = logging.getLogger("service")


class HotPath(NamedTuple):
    """A route that does not go through the framework.

    Attributes:
        handler: answers its requests.
        body_limit: returns the most bytes that a body may have, by the header fields; raises
            UnsupportedMediaType where no body of that type is taken.
    """

    handler: Handler
    body_limit: Callable[[Mapping[bytes, bytes]], int]


class Gate:
    """Dispatches requests, and turns all that can happen to them into answers.

    Args:
        application: the ASGI application that answers what is no hot path.
        hot_paths: by method and exact path.
        admission: decides what may be inside.
        open_paths: paths that need no API key; one that ends in `*` stands for all that begin so.
        settings: the key, and the origins that may call.
        metrics: counts every request.

    Attributes:
        application, hot_paths, admission: as given.
    """

    def __init__(
        self,
        application: framework.Application,
        hot_paths: Mapping[tuple[str, str], HotPath],
        admission: Admission,
        open_paths: Iterable[str],
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self.application = application
        self.hot_paths = dict(hot_paths)
        self.admission = admission
        key = settings.api_key
        self._api_key = ApiKey(None if key is None else key.get_secret_value(), open_paths)
        self._open_paths = frozenset(open_paths)
        self._cross_origin = CrossOrigin(settings.cors_origins)
        self._request_ids = RequestIds()
        self._metrics = metrics

    def open(self, exchange: Exchange) -> None:
        """Decide by its head what becomes of a request.

        What is refused, or needs no handler, gets its answer at once; what goes to a hot path gets
        its handler and the limit of its body. The rest goes to the framework, without its body.
        """
        headers = exchange.headers
        exchange.request_id = self._request_ids.of(headers)
        exchange.trace_id = trace_id(headers)
        hot_path = self.hot_paths.get((exchange.method, exchange.path))
        try:
            if hot_path is not None:
                exchange.route = exchange.path
                exchange.handler, body_limit = hot_path
            elif exchange.path in self._open_paths:
                exchange.route = exchange.path  # the pages have no template
            exchange.answer = self._cross_origin.preflight(exchange.method, headers)
            if exchange.answer is None:
                self._api_key.check(exchange.path, headers)
                if hot_path is not None and exchange.announces_body():
                    most = self.admission.budget.max_bytes
                    exchange.limit_body(min(body_limit(headers), most))
        except ServiceError as error:
            exchange.answer = self.refuse(error, exchange)

    def enter(self, exchange: Exchange) -> None:
        """Let a request in that has all that its answer needs; else give it its refusal."""
        if exchange.handler is not None:
            try:
                self.admission.enter(exchange)
            except ServiceError as error:
                exchange.answer = self.refuse(error, exchange)

    async def answer(self, exchange: Exchange) -> Answer:
        """Return the answer to a request that was let in."""
        exchange.task = asyncio.current_task()
        try:
            if exchange.handler is None:
                return await framework.ask(self.application, exchange)
            try:
                if exchange.gone:
                    return GONE
                answer = await exchange.handler(exchange)
            finally:
                self.admission.leave(exchange)
            if perf_counter() - exchange.started > self.admission.timeout:
                raise _too_late()
            return answer
        except ServiceError as error:
            return self.refuse(error, exchange)
        except asyncio.CancelledError:
            if not exchange.expired or exchange.task is None:
                raise
            exchange.task.uncancel()
            return GONE if exchange.gone else self.refuse(_too_late(), exchange)
        except Exception:  # a bug of ours: the log gets its traceback, the client does not
            fields = {"request_id": exchange.request_id.decode("ascii")}
            logger.exception("failure", extra={"fields": fields})
            failure = ServiceError("The server failed; if it goes on, report the request id.")
            return self.refuse(failure, exchange)

    def refuse(self, error: ServiceError, exchange: Exchange) -> Answer:
        """Return the answer to a request that is refused; count it."""
        self._metrics.rejected(error.code)
        exchange.error_code = error.code
        return error_answer(error, exchange.request_id)

    def refuse_unread(self, error: ServiceError, headers: Mapping[bytes, bytes]) -> Exchange:
        """Return an exchange, answered, for what cannot be read as a request.

        Args:
            error: why not.
            headers: the header fields that could be read.
        """
        exchange = Exchange("OTHER", "", b"", headers, self.admission.budget)
        exchange.keep_alive = False
        exchange.request_id = self._request_ids.of(headers)
        exchange.answer = self.refuse(error, exchange)
        return exchange

    def fields(self, exchange: Exchange) -> Headers:
        """Return the header fields that every answer carries."""
        request_id = (b"x-request-id", exchange.request_id)
        return [request_id, *self._cross_origin.fields(exchange.headers)]

    def record(self, exchange: Exchange, status: int, client: str | None = None) -> None:
        """Count an answer that was sent, or that its client did not wait for; log it.

        Args:
            exchange: the request.
            status: of the answer.
            client: the client's address.
        """
        seconds = perf_counter() - exchange.started
        method = exchange.method if exchange.method in METHODS else "OTHER"
        self._metrics.request(exchange.route, method, status, seconds)
        level = logging.DEBUG if exchange.route in PROBES else logging.INFO
        if access.isEnabledFor(level):
            fields = {
                "request_id": exchange.request_id.decode("ascii"),
                "client": client,
                "method": method,
                "route": exchange.route,
                "status": status,
                "milliseconds": round(seconds * 1e3, 3),
            }
            if exchange.route == UNMATCHED and exchange.path:
                fields["path"] = exchange.path[:LOGGED_PATH]
            if exchange.error_code is not None:
                fields["code"] = exchange.error_code
            if exchange.trace_id is not None:
                fields["trace_id"] = exchange.trace_id
            access.log(level, "request", extra={"fields": fields})


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("The answer was not ready in time; try again later.")
