"""Which web pages may call (CORS, fetch.spec.whatwg.org): those of the origins that are set."""

from collections.abc import Iterable, Mapping

from service.errors import BadRequest
from service.http.exchange import Answer, Headers

ALLOWED = (
    b"Authorization, Content-Type, Content-Encoding, Inference-Header-Content-Length,"
    b" X-Request-ID, traceparent, tracestate"
)
EXPOSED = b"Inference-Header-Content-Length, Retry-After, X-Request-ID"


class CrossOrigin:
    """Gives answers the fields that let a page read them.

    Args:
        origins: whose pages may call; `*` for all, none for no other origin's.
    """

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)

    def fields(self, headers: Mapping[bytes, bytes]) -> Headers:
        """Return what to add to the answer to a request with these header fields."""
        if not self._origins:
            return []
        any_origin = b"*" in self._origins
        origin = headers.get(b"origin")
        fields = [] if any_origin else [(b"vary", b"Origin")]
        if origin is not None and (any_origin or origin in self._origins):
            allowed = b"*" if any_origin else origin
            fields.append((b"access-control-allow-origin", allowed))
            fields.append((b"access-control-expose-headers", EXPOSED))
        return fields

    def preflight(self, method: str, headers: Mapping[bytes, bytes]) -> Answer | None:
        """Answer a browser that asks what a page may do; it sends no key with that.

        Returns:
            None for any other request.

        Raises:
            BadRequest: pages of that origin may not call.
        """
        if (
            method != "OPTIONS"
            or not self._origins
            or b"access-control-request-method" not in headers
        ):
            return None
        if not self._origins & {b"*", headers.get(b"origin")}:
            raise BadRequest("This origin may not call; see BNLENET_CORS_ORIGINS.", code="cors")
        return Answer(
            b"",
            headers=[
                (b"access-control-allow-methods", b"GET, POST"),
                (b"access-control-allow-headers", ALLOWED),
                (b"access-control-max-age", b"600"),
            ],
        )
