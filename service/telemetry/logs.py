"""Log lines as text or as JSON; uvicorn's lines have the same form."""

import json
import logging
import os
import re
import sys
import time
from typing import Any

import click
import orjson

from service.settings import Settings

PLAIN = re.compile(r"[!#-~]+").fullmatch  # printable ASCII without spaces and quotation marks
STYLES: dict[int, dict[str, Any]] = {
    logging.DEBUG: {"dim": True},
    logging.INFO: {"fg": "green"},
    logging.WARNING: {"fg": "yellow"},
    logging.ERROR: {"fg": "red", "bold": True},
}


class JSONFormatter(logging.Formatter):
    """Writes a JSON object a line. The record's `fields` become members of the object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
        line: dict[str, Any] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class TextFormatter(logging.Formatter):
    """Writes time, level, message, then `name=value` for each of the record's `fields`.

    Args:
        colour: colour the level and dim the time, for a terminal.
    """

    def __init__(self, *, colour: bool = False) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        when, level = _timestamp(record), f"{record.levelname.lower():7}"
        if self._colour:
            when = click.style(when, dim=True)
            level = click.style(level, **STYLES.get(record.levelno, {}))
        fields = [f" {k}={_text(v)}" for k, v in getattr(record, "fields", {}).items()]
        line = f"{when} {level} {record.getMessage()}{''.join(fields)}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure(settings: Settings) -> None:
    """Write log lines and warnings to standard error, in the format and from the level set."""
    handler = logging.StreamHandler(sys.stderr)
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")  # see no-color.org
    json_lines = settings.log_format == "json"
    handler.setFormatter(JSONFormatter() if json_lines else TextFormatter(colour=colour))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    logging.captureWarnings(True)
    for chatty in ("asyncio", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # python_multipart logs every damaged form as a warning, and then raises the same to us.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


def _text(value: object) -> str:
    """Return a field's value without spaces and control characters; quote it if it has any."""
    if not isinstance(value, str):
        return str(value)
    return value if PLAIN(value) else json.dumps(value)


def _timestamp(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"
