"""Dispatches every request: to the handler of its hot path, or to FastAPI.

The busiest routes, the hot paths, stand in a table here, because FastAPI's routing takes longer
than the model: the same handlers answered 11,881 requests a second from the table, and 5,235
through FastAPI (784 bytes, 16 connections, one core; `python -m benchmarks.serving` measures both).

Every request gets a request id, the API key check, the same errors, metrics and a log line. Those
of hot paths also get admission control and a deadline. FastAPI documents the hot paths and could
serve them with the same handlers; a test compares the answers of both.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter
from typing import NamedTuple

from service.errors import INTERNAL_ERROR, DeadlineExceeded, ServiceError
from service.http import framework
from service.http.admission import Admission
from service.http.api_key import ApiKey
from service.http.cross_origin import CrossOrigin
from service.http.exchange import (
    CLIENT_CLOSED_REQUEST,
    UNMATCHED,
    Answer,
    Exchange,
    Handler,
    Headers,
    error_answer,
)
from service.http.request_ids import RequestIds, trace_id
from service.settings import Settings
from service.telemetry.metrics import Metrics

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
PROBES = frozenset({"/livez", "/readyz", "/metrics"})  # asked every few seconds: logged at debug
MAX_LOGGED_PATH = 200  # characters of a path that has no route
CLIENT_LEFT = Answer(b"", CLIENT_CLOSED_REQUEST)

access = logging.getLogger("service.access")
logger = logging.getLogger("service")


class HotPath(NamedTuple):
    """A route that bypasses FastAPI.

    Attributes:
        handler: answers the route's requests.
        body_limit: returns the most bytes that a body with these header fields may have; raises
            UnsupportedMediaType if the route does not accept its content type.
    """

    handler: Handler
    body_limit: Callable[[Mapping[bytes, bytes]], int]


class Gate:
    """Dispatches requests, and turns every result and error into an answer.

    Args:
        application: the ASGI application that answers all requests but those of hot paths.
        hot_paths: by method and exact path.
        admission: limits the requests of hot paths.
        open_paths: paths that need no API key; one that ends in `*` is a prefix.
        settings: the API key, and the origins that may call.
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

    def dispatch(self, exchange: Exchange) -> None:
        """Choose the handler from the request's head, or refuse the request.

        A hot path's request gets its handler and the limit of its body. A refusal or a CORS
        preflight gets its answer. All other requests go to the framework, without their body.
        """
        headers = exchange.headers
        exchange.request_id = self._request_ids.choose(headers)
        exchange.trace_id = trace_id(headers)
        hot_path = self.hot_paths.get((exchange.method, exchange.path))
        try:
            if hot_path is not None:
                exchange.route = exchange.path
                exchange.handler, body_limit = hot_path
            elif exchange.path in self._open_paths:
                exchange.route = exchange.path  # FastAPI reports no template for /openapi.json
            exchange.answer = self._cross_origin.preflight(exchange.method, headers)
            if exchange.answer is None:
                self._api_key.check(exchange.path, headers)
                if hot_path is not None and exchange.announces_body():
                    max_bytes = self.admission.budget.max_bytes
                    exchange.limit_body(min(body_limit(headers), max_bytes))
        except ServiceError as error:
            exchange.answer = self.refuse(error, exchange)

    def admit(self, exchange: Exchange) -> None:
        """Count a hot path's complete request as in flight, or refuse it."""
        if exchange.handler is not None:
            try:
                self.admission.admit(exchange)
            except ServiceError as error:
                exchange.answer = self.refuse(error, exchange)

    async def answer(self, exchange: Exchange) -> Answer:
        """Return the answer to an admitted request: its handler's, the framework's or an error."""
        exchange.task = asyncio.current_task()
        try:
            if exchange.handler is None:
                return await framework.call(self.application, exchange)
            try:
                if exchange.client_left:
                    return CLIENT_LEFT
                answer = await exchange.handler(exchange)
            finally:
                self.admission.finish(exchange)
            if perf_counter() - exchange.started > self.admission.timeout:
                raise _too_late()
            return answer
        except ServiceError as error:
            return self.refuse(error, exchange)
        except asyncio.CancelledError:
            if not exchange.cancelled or exchange.task is None:
                raise  # not by us: the event loop is ending
            exchange.task.uncancel()
            return CLIENT_LEFT if exchange.client_left else self.refuse(_too_late(), exchange)
        except Exception:  # a bug of ours: its traceback goes to the log, not to the client
            fields = {"request_id": exchange.request_id.decode("ascii")}
            logger.exception("failure", extra={"fields": fields})
            failure = ServiceError(INTERNAL_ERROR)
            return self.refuse(failure, exchange)

    def refuse(self, error: ServiceError, exchange: Exchange) -> Answer:
        """Return an error as the request's answer, and count it."""
        self._metrics.count_refusal(error.code)
        exchange.error_code = error.code
        return error_answer(error, exchange.request_id)

    def refuse_head(self, error: ServiceError, headers: Mapping[bytes, bytes]) -> Exchange:
        """Return an answered exchange for a request whose head is incomplete or invalid.

        Args:
            error: what is wrong with the head.
            headers: the header fields that could be parsed.
        """
        exchange = Exchange("OTHER", "", b"", headers, self.admission.budget)
        exchange.keep_alive = False
        exchange.request_id = self._request_ids.choose(headers)
        exchange.answer = self.refuse(error, exchange)
        return exchange

    def common_headers(self, exchange: Exchange) -> Headers:
        """Return the header fields that every answer has: the request id, and those for CORS."""
        request_id = (b"x-request-id", exchange.request_id)
        return [request_id, *self._cross_origin.headers(exchange.headers)]

    def record(self, exchange: Exchange, status: int, client: str | None = None) -> None:
        """Count and log a request that is finished: answered, or given up by its client.

        Args:
            exchange: the request.
            status: the answer's status, or CLIENT_CLOSED_REQUEST.
            client: the client's address.
        """
        seconds = perf_counter() - exchange.started
        method = exchange.method if exchange.method in METHODS else "OTHER"
        self._metrics.count_request(exchange.route, method, status, seconds)
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
                fields["path"] = exchange.path[:MAX_LOGGED_PATH]
            if exchange.error_code is not None:
                fields["code"] = exchange.error_code
            if exchange.trace_id is not None:
                fields["trace_id"] = exchange.trace_id
            access.log(level, "request", extra={"fields": fields})


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("The answer was not ready in time; try again later.")
