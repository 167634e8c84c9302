"""Asks an ASGI application, such as FastAPI, for the answer to a request that has arrived."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from service.http.exchange import Answer, Exchange

Message = MutableMapping[str, Any]
Application = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[Message]],
        Callable[[Message], Awaitable[None]],
    ],
    Awaitable[None],
]
OURS = frozenset({b"content-length", b"connection"})  # fields that the connection adds itself


async def ask(framework: Application, exchange: Exchange) -> Answer:
    """Return the application's whole answer; set the exchange's route to the path's template.

    The application finds the exchange in its scope, and gets no body of its own: what reads one
    reads it from there.
    """
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        # RFC 9110, 9.3.2: as GET, but the connection sends no content
        "method": "GET" if exchange.method == "HEAD" else exchange.method,
        "path": exchange.path,
        "raw_path": exchange.path.encode(),
        "root_path": "",
        "query_string": exchange.query_string,
        "headers": list(exchange.headers.items()),
        "exchange": exchange,
    }
    status, headers, body = 500, [], []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message["headers"])
        else:
            body.append(message.get("body", b""))

    try:
        await framework(scope, receive, send)
    finally:
        exchange.route = getattr(scope.get("route"), "path", exchange.route)
    return Answer(b"".join(body), status, [field for field in headers if field[0] not in OURS])
