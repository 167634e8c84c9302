"""Every way a request can fail: one small tree, each class with its status and its code.

Nothing here knows a framework; `service.http.gate` turns these into answers.
"""

# ruff: noqa: N818 - the classes carry the names that HTTP gives these answers

from collections.abc import Mapping
from typing import ClassVar


class ServiceError(Exception):
    """A request that gets an error as its answer.

    Args:
        message: one sentence for the client, which says what to do and gives away no internals.
        code: a more exact snake_case name than the class's own.
        headers: header fields that the answer must carry.
    """

    status: ClassVar[int] = 500
    code: str = "internal_error"

    def __init__(
        self, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.headers = dict(headers or {})


class BadRequest(ServiceError):
    """The request cannot be read: not the JSON, gzip, form or query it says it is."""

    status = 400
    code = "bad_request"


class Unauthorized(ServiceError):
    """The API key is missing or wrong."""

    status = 401
    code = "unauthorized"


class NotFound(ServiceError):
    """There is nothing at this path, or no such model."""

    status = 404
    code = "not_found"


class MethodNotAllowed(ServiceError):
    """The path exists, for other methods."""

    status = 405
    code = "method_not_allowed"


class SlowRequest(ServiceError):
    """The client did not send the whole request in time."""

    status = 408
    code = "request_timeout"


class LengthRequired(ServiceError):
    """A body is needed and the request announces none."""

    status = 411
    code = "length_required"


class PayloadTooLarge(ServiceError):
    """The body, or what is packed in it, exceeds the limit."""

    status = 413
    code = "payload_too_large"


class UnsupportedMediaType(ServiceError):
    """A content type, content encoding or image format that is not served."""

    status = 415
    code = "unsupported_media_type"


class InvalidInput(ServiceError):
    """Readable, but not an image that the model takes, or a parameter out of its range."""

    status = 422
    code = "invalid_input"


class HeadersTooLarge(ServiceError):
    """The request's header fields exceed the limit."""

    status = 431
    code = "headers_too_large"


class UnsupportedTransferCoding(ServiceError):
    """The body is encoded for its transfer, in another way than chunked."""

    status = 501
    code = "unsupported_transfer_coding"


class Overloaded(ServiceError):
    """As many requests are inside as are allowed: come back soon."""

    status = 503
    code = "overloaded"


class NotReady(ServiceError):
    """The server is starting or draining and should get no new traffic."""

    status = 503
    code = "not_ready"


class DeadlineExceeded(ServiceError):
    """The answer would come later than the deadline for the whole request."""

    status = 504
    code = "deadline_exceeded"


class UnsupportedVersion(ServiceError):
    """The request is in another version of HTTP."""

    status = 505
    code = "unsupported_http_version"
