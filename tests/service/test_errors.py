"""The error tree: complete, consistent, and free of any framework."""

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


def test_the_tree_covers_the_design() -> None:
    designed = {400, 401, 404, 405, 408, 411, 413, 415, 422, 503, 504}
    assert designed <= {kind.status for kind in tree()}


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
