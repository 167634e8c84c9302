"""The errors that a request can end with: one small tree, each class with its status and code.

This module knows no framework; `service.http.exchange.error_answer` turns an error into an answer.
"""

# ruff: noqa: N818 - the classes have HTTP's names for these errors

from collections.abc import Mapping
from typing import ClassVar

INTERNAL_ERROR = "The server failed. If it fails again, report the request id."


class ServiceError(Exception):
    """An error that becomes the answer to a request.

    Args:
        message: one sentence for the client: what to do, and no internals.
        code: a snake_case name that is more exact than the class's own.
        headers: header fields that the answer must have.
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
    """The request is malformed: its JSON, form, query, encoding or HTTP itself."""

    status = 400
    code = "bad_request"


class Unauthorized(ServiceError):
    """The API key is missing or wrong."""

    status = 401
    code = "unauthorized"


class NotFound(ServiceError):
    """The path has no route, or the model does not exist."""

    status = 404
    code = "not_found"


class MethodNotAllowed(ServiceError):
    """The path exists, but not for this method."""

    status = 405
    code = "method_not_allowed"


class SlowRequest(ServiceError):
    """The client did not send the whole request in time."""

    status = 408
    code = "request_timeout"


class LengthRequired(ServiceError):
    """The route needs a body, and the request announces none."""

    status = 411
    code = "length_required"


class PayloadTooLarge(ServiceError):
    """The body is over its limit, as sent or when decompressed."""

    status = 413
    code = "payload_too_large"


class UnsupportedMediaType(ServiceError):
    """The content type, content encoding or image format is not supported."""

    status = 415
    code = "unsupported_media_type"


class InvalidInput(ServiceError):
    """The request is well-formed, but its image or a parameter has a wrong value."""

    status = 422
    code = "invalid_input"


class HeadersTooLarge(ServiceError):
    """The header fields of the request are over their limit."""

    status = 431
    code = "headers_too_large"


class UnsupportedTransferCoding(ServiceError):
    """The body has a transfer coding other than chunked."""

    status = 501
    code = "unsupported_transfer_coding"


class Overloaded(ServiceError):
    """Too many requests are in flight, or too many bytes are held; the client may try again."""

    status = 503
    code = "overloaded"


class NotReady(ServiceError):
    """The server is draining, or its supervisor does not answer; send requests elsewhere."""

    status = 503
    code = "not_ready"


class DeadlineExceeded(ServiceError):
    """The answer was not ready before the deadline of the request."""

    status = 504
    code = "deadline_exceeded"


class UnsupportedVersion(ServiceError):
    """The request has an HTTP version other than 1.1 and 1.0."""

    status = 505
    code = "unsupported_http_version"
