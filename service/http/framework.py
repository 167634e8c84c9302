"""Calls an ASGI application, such as FastAPI, with one request and collects its answer."""

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
CONNECTION_FIELDS = frozenset({b"content-length", b"connection"})  # `Connection` adds these


async def call(application: Application, exchange: Exchange) -> Answer:
    """Return the application's answer, and set the exchange's route to the path's template.

    The exchange is in the ASGI scope; routes that need the body take it from there, and `receive`
    gives an empty one.
    """
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        # HEAD is GET without content (RFC 9110, section 9.3.2): the connection leaves it out.
        "method": "GET" if exchange.method == "HEAD" else exchange.method,
        # Starlette's patterns end in `$`, which also matches before a final line feed.
        "path": exchange.path.replace("\n", "%0A"),
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
        await application(scope, receive, send)
    finally:
        exchange.route = getattr(scope.get("route"), "path", exchange.route)
    fields = [field for field in headers if field[0] not in CONNECTION_FIELDS]
    return Answer(b"".join(body), status, fields)
