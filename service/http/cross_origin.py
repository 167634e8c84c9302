"""Cross-origin resource sharing (CORS, fetch.spec.whatwg.org): which web pages may call."""

from collections.abc import Iterable, Mapping

from service.errors import BadRequest
from service.http.exchange import Answer, Headers

ALLOWED = (
    b"Authorization, Content-Type, Content-Encoding, Inference-Header-Content-Length,"
    b" X-Request-ID, traceparent, tracestate"
)
EXPOSED = b"Inference-Header-Content-Length, Retry-After, X-Request-ID"


class CrossOrigin:
    """Makes the header fields that let web pages of other origins read the answers.

    Args:
        origins: those whose pages may call; `*` allows all. Without any, CORS is off.
    """

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)

    def headers(self, headers: Mapping[bytes, bytes]) -> Headers:
        """Return the header fields to add to the answer, from those of the request."""
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
        """Answer a preflight: a browser asks so, without the API key, whether a page may call.

        Returns:
            the answer, or None if the request is not a preflight or CORS is off.

        Raises:
            BadRequest: pages of this origin may not call.
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
