"""All log lines have one form: ours and the libraries'."""

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
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


def test_text_lines_have_level_message_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    access, server, *failure = write(capsys, log_format="text")
    assert access.endswith(" info    request status=200")
    assert server.endswith(" warning Invalid request")
    assert failure[0].endswith(" error   failure request_id=x")
    assert failure[-1] == "and another"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set a time zone other than UTC."""
    monkeypatch.setenv("TZ", "IST-5:30")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("form", ["text", "json"])
def test_times_are_utc_to_the_millisecond(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(log_format=form))  # type: ignore[arg-type] # both are right
    record = logging.LogRecord("a", logging.INFO, "", 0, "a", None, None)
    record.created, record.msecs = 1_753_000_000.0, 7.9
    logging.getLogger().handle(record)
    (line,) = capsys.readouterr().err.splitlines()
    time_of_line = json.loads(line)["time"] if form == "json" else line.split()[0]
    assert time_of_line == "2025-07-20T08:26:40.007Z"


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_field_that_json_does_not_know_is_written_as_text(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(Settings(log_format=form))  # type: ignore[arg-type] # both are right
    logging.getLogger("a").info("b", extra={"fields": {"path": Path("/c"), "n": 1}})
    (line,) = capsys.readouterr().err.splitlines()
    if form == "json":
        assert (json.loads(line)["path"], json.loads(line)["n"]) == ("/c", 1)
    else:
        assert line.endswith(" info    b path=/c n=1")


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_the_level_is_the_least_serious_one(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(log_level=level))  # type: ignore[arg-type] # all are right
    for name in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger("service"), name)("said")
    lines = capsys.readouterr().err.splitlines()
    order = ["debug", "info", "warning", "error"]
    assert [line.split()[1] for line in lines] == order[order.index(level) :]


def test_other_libraries_log_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(log_level="debug"))
    for name in ("asyncio", "PIL.PngImagePlugin"):
        logging.getLogger(name).info("chatter")
        logging.getLogger(name).warning("trouble")
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == ["trouble"] * 2


def test_a_second_configuration_does_not_double_the_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure(Settings())
    logs.configure(Settings())
    logging.getLogger("service").info("said")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_text_lines_have_colours_only_in_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write(capsys, log_format="text")[0]
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True, raising=False)
    coloured = write(capsys, log_format="text")[0]
    monkeypatch.setenv("NO_COLOR", "1")
    without = write(capsys, log_format="text")[0]
    json_line = write(capsys, log_format="json")[0]
    assert "\x1b[32m" in coloured
    assert click.unstyle(coloured)[24:] == plain[24:] == without[24:]  # after the time
    assert "\x1b" not in plain + without + json_line


@pytest.mark.parametrize(
    ("level", "style"),
    [
        (logging.DEBUG, {"dim": True}),
        (logging.INFO, {"fg": "green"}),
        (logging.WARNING, {"fg": "yellow"}),
        (logging.ERROR, {"fg": "red", "bold": True}),
        (logging.CRITICAL, {}),
    ],
)
def test_a_terminal_shows_how_serious_a_line_is(level: int, style: dict[str, Any]) -> None:
    record = logging.LogRecord("a", level, "", 0, "said", None, None)
    plain = logs.TextFormatter().format(record)
    when, name = plain.split()[:2]
    coloured = logs.TextFormatter(colour=True).format(record)
    assert coloured == f"{click.style(when, dim=True)} {click.style(f'{name:7}', **style)} said"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("/predict", "/predict"),
        (0.25, "0.25"),
        ("a b", '"a b"'),
        ('"', '"\\""'),
        ("", '""'),
        ("a\nb=\x1b[31m\u202eä", '"a\\nb=\\u001b[31m\\u202e\\u00e4"'),
    ],
)
def test_a_field_cannot_forge_a_line(value: object, written: str) -> None:
    record = logging.makeLogRecord({"msg": "request", "fields": {"path": value}})
    assert logs.TextFormatter().format(record).endswith(f" request path={written}")


def test_damaged_forms_are_not_logged_by_their_parser(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_the_level_warning_hides_the_access_log(capsys: pytest.CaptureFixture[str]) -> None:
    server, *_ = write(capsys, log_level="warning", log_format="json")
    assert json.loads(server)["logger"] == "uvicorn.error"
