"""Log lines have one form, whoever writes them."""

import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from service.settings import Settings
from service.telemetry import logs


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def write(capsys: pytest.CaptureFixture[str], **settings: str) -> list[str]:
    logs.configure(Settings(**settings))  # type: ignore[arg-type] # pydantic checks them
    logging.getLogger("service.access").info("request", extra={"fields": {"status": 200}})
    logging.getLogger("uvicorn.error").warning("Invalid %s", "request")
    try:
        raise ValueError("a line\nand another")
    except ValueError:
        logging.getLogger("service").exception("failure", extra={"fields": {"request_id": "x"}})
    return capsys.readouterr().err.splitlines()


def test_json_lines_are_json_objects(capsys: pytest.CaptureFixture[str]) -> None:
    access, server, failure = map(json.loads, write(capsys, log_format="json"))
    assert access.pop("time").endswith("Z")
    assert access == {
        "level": "info",
        "logger": "service.access",
        "message": "request",
        "status": 200,
    }
    assert (server["logger"], server["message"]) == ("uvicorn.error", "Invalid request")
    assert failure["request_id"] == "x"
    assert "ValueError: a line\nand another" in failure["exception"]


def test_text_lines_are_for_the_eye(capsys: pytest.CaptureFixture[str]) -> None:
    access, server, *failure = write(capsys, log_format="text")
    assert access.endswith(" info    request status=200")
    assert server.endswith(" warning Invalid request")
    assert failure[0].endswith(" error   failure request_id=x")
    assert failure[-1] == "and another"


def test_a_form_that_the_parser_complains_of_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings())
    logging.getLogger("python_multipart.multipart").error("No boundary given")
    assert capsys.readouterr().err == ""


def test_warnings_are_lines_in_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        logs.configure(Settings(log_format="json"))
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert line["level"] == "warning"
    assert "DeprecationWarning: old" in line["message"]


def test_warning_leaves_out_the_access_log(capsys: pytest.CaptureFixture[str]) -> None:
    server, *_ = write(capsys, log_level="warning", log_format="json")
    assert json.loads(server)["logger"] == "uvicorn.error"
