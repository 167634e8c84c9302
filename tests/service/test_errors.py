"""The error tree is complete and consistent, and needs no framework."""

import re
import subprocess
import sys

from service import errors
from service.errors import ServiceError


def tree() -> list[type[ServiceError]]:
    return [ServiceError, *ServiceError.__subclasses__()]


def test_every_error_has_an_error_status_and_a_code_of_its_own() -> None:
    assert all(400 <= kind.status < 600 for kind in tree())
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", kind.code) for kind in tree())
    assert len({kind.code for kind in tree()}) == len(tree())


def test_every_error_has_the_status_and_the_code_that_clients_know() -> None:
    """Both are part of the API: a change breaks clients."""
    assert {kind.__name__: (kind.status, kind.code) for kind in tree()} == {
        "ServiceError": (500, "internal_error"),
        "BadRequest": (400, "bad_request"),
        "Unauthorized": (401, "unauthorized"),
        "NotFound": (404, "not_found"),
        "MethodNotAllowed": (405, "method_not_allowed"),
        "SlowRequest": (408, "request_timeout"),
        "LengthRequired": (411, "length_required"),
        "PayloadTooLarge": (413, "payload_too_large"),
        "UnsupportedMediaType": (415, "unsupported_media_type"),
        "InvalidInput": (422, "invalid_input"),
        "HeadersTooLarge": (431, "headers_too_large"),
        "UnsupportedTransferCoding": (501, "unsupported_transfer_coding"),
        "Overloaded": (503, "overloaded"),
        "NotReady": (503, "not_ready"),
        "DeadlineExceeded": (504, "deadline_exceeded"),
        "UnsupportedVersion": (505, "unsupported_http_version"),
    }


def test_a_plain_error_has_its_class_code_and_no_headers() -> None:
    headers = {"Allow": "GET"}
    plain, given = errors.NotFound("Not here."), errors.NotFound("Not here.", headers=headers)
    assert (plain.message, plain.code, plain.headers) == ("Not here.", "not_found", {})
    given.headers["Other"] = "x"
    assert headers == {"Allow": "GET"}


def test_a_message_code_and_headers_can_be_given() -> None:
    error = errors.Overloaded("Come back.", code="busy", headers={"Retry-After": "1"})
    assert (str(error), error.code, error.headers) == ("Come back.", "busy", {"Retry-After": "1"})
    assert errors.Overloaded.code == "overloaded"


def test_the_module_imports_no_framework() -> None:
    code = "import sys, service.errors; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"fastapi", "starlette", "pydantic", "numpy"} & set(loaded.stdout.split())
