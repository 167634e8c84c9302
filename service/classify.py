"""Classifies files for the command line: here, or by asking a running service."""

import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from io import TextIOWrapper
from time import monotonic
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import click
from rich.bar import Bar
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from rich.text import Text

from service.errors import ServiceError
from service.pictures.conversion import Preprocessing, read_picture
from service.settings import Settings

MAX_BYTES = 100 * 2**20  # of a file; no picture within the decoder's limits needs more
PROGRESS_AFTER_SECONDS = 2.0
TIMEOUT_SECONDS = 30.0
BAR_WIDTH = 24

Ask = Callable[[bytes], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What came of one file.

    Attributes:
        file: its name as given.
        answer: as `POST /predict` gives it; None after an error.
        error: why there is no answer.
    """

    file: str
    answer: dict[str, Any] | None = None
    error: ServiceError | None = None


def local(settings: Settings, preprocessing: Preprocessing, top_k: int) -> Ask:
    """Return what classifies a picture's bytes in this process.

    Raises:
        ModelError: the model cannot be loaded.
    """
    from service.model.classifier import Classifier  # noqa: PLC0415 - `remote` needs no ONNX Runtime
    from service.routes.prediction import Renderer  # noqa: PLC0415 - `remote` needs no framework

    classifier = Classifier.load(settings.model_path, settings.device, settings.model_name)
    render = Renderer(classifier.info)

    def ask(data: bytes) -> dict[str, Any]:
        image = read_picture(data, preprocessing, limited=False)
        probabilities = classifier.probabilities(image.images)
        answer: dict[str, Any] = json.loads(render(probabilities, image, top_k, echo=False))
        return answer

    return ask


def remote(url: str, settings: Settings, preprocessing: Preprocessing, top_k: int) -> Ask:
    """Return what sends a picture's bytes to the service at an address of http or https."""
    query = urlencode({"top_k": top_k, "preprocessing": preprocessing})
    target = f"{url.rstrip('/')}/predict?{query}"

    def ask(data: bytes) -> dict[str, Any]:
        # The service goes by the content; the type only says that it is to be read as a picture.
        request = Request(target, data, {"Content-Type": "image/unknown"})  # noqa: S310 - checked where the option is read
        if settings.api_key is not None:
            # Header fields are sent in Latin-1, the letters whose bytes are the key's UTF-8.
            key = f"Bearer {settings.api_key.get_secret_value()}".encode().decode("latin-1")
            request.add_unredirected_header("Authorization", key)
        try:
            with urlopen(request, timeout=TIMEOUT_SECONDS) as response:  # noqa: S310 - the request above, http or https
                body = response.read()
        except HTTPError as exc:
            raise _refusal(exc) from None
        except (OSError, HTTPException, UnicodeError) as exc:  # the last: of a host like a..b
            reason = getattr(exc, "reason", exc)
            reason = getattr(reason, "strerror", None) or reason
            raise ServiceError(
                f"The service at {url} cannot be reached: {reason}.", code="unreachable"
            ) from None
        try:
            answer: dict[str, Any] = json.loads(body)
            for each in answer["predictions"]:  # other services have the path, too
                if not isinstance(each["label"], str) or not isinstance(each["probability"], float):
                    raise TypeError("no prediction")
        except (ValueError, TypeError, KeyError):
            raise ServiceError(
                f"What answers at {url} is not this service.", code="unreachable"
            ) from None
        return answer

    return ask


def _refusal(response: HTTPError) -> ServiceError:
    try:
        with response:
            body = json.load(response)
        sentence = body["error"].replace("The body", "The file")  # which is what the user knows
        return ServiceError(sentence, code=body["code"])
    except (ValueError, KeyError, TypeError, AttributeError):  # of a proxy in between
        return ServiceError(f"The answer was {response.code} {response.reason}.", code="refused")


def run(files: Sequence[str], ask: Ask, *, as_json: bool) -> bool:
    """Classify files one after the other, and print what comes of each.

    A terminal gets a table, anything else lines of columns between tabs: file, label, confidence.

    Args:
        files: paths; `-` is standard input.
        ask: classifies a picture's bytes.
        as_json: print lines of JSON, errors among them, instead.

    Returns:
        whether all of them were classified.
    """
    table = None
    if sys.stdout.isatty() and not as_json:
        # In a narrow terminal names break, for their ends tell them apart; the bar gives way.
        table = Table(
            Column("File", overflow="fold"),
            Column("Label", no_wrap=True),
            Column("Confidence", justify="right", no_wrap=True),
            "",
        )
        table.box, table.pad_edge = None, False
    with_progress = sys.stderr.isatty() and not (as_json and sys.stdout.isatty())
    outcomes: Iterable[Outcome] = (_classify(file, ask) for file in files)
    if with_progress:
        outcomes = _with_progress(outcomes, len(files))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a name or bar that it has no letters for
    failures = 0
    try:
        for outcome in outcomes:
            failures += outcome.error is not None
            if as_json:
                click.echo(_json(outcome))
            elif outcome.error is not None:
                click.echo(f"Error: {_shown(outcome.file)}: {outcome.error.message}", err=True)
            elif table is not None:
                _add_rows(table, outcome)
            else:
                click.echo("\n".join("\t".join(row) for row in _rows(outcome)))
    finally:  # when interrupted, too
        if table is not None and table.row_count:
            Console().print(table)
    return failures == 0


def _classify(file: str, ask: Ask) -> Outcome:
    try:
        with click.open_file(file, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ServiceError(
                f"The file has more than {MAX_BYTES:,} bytes.", code="payload_too_large"
            )
        if not data:
            raise ServiceError("The file is empty.", code="unreadable_file")
        return Outcome(file, ask(data))
    except OSError as exc:
        sentence = f"The file cannot be read: {exc.strerror or exc}."
        return Outcome(file, error=ServiceError(sentence, code="unreadable_file"))
    except ServiceError as error:
        return Outcome(file, error=error)


def _json(outcome: Outcome) -> str:
    content = outcome.answer
    if outcome.error is not None:
        content = {"error": outcome.error.message, "code": outcome.error.code}
    return json.dumps({"file": outcome.file, **(content or {})})  # ASCII: any name, to the letter


def _shown(file: str) -> str:
    """Return a file's name without what would steer a terminal or break a line."""
    steering = {"Cc", "Cs", "Zl", "Zp"}
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in steering else c for c in file
    )


def _rows(outcome: Outcome) -> Iterator[tuple[str, str, str]]:
    for each in (outcome.answer or {})["predictions"]:
        yield _shown(outcome.file), each["label"], f"{each['probability']:.4f}"


def _add_rows(table: Table, outcome: Outcome) -> None:
    """Add the classes of one file; its name and the notes stand beside the first."""
    answer = outcome.answer or {}
    cell = Text(_shown(outcome.file))
    for note in answer.get("notes", ()):
        cell.append(f"\n{note}", style="dim")
    for each in answer["predictions"]:
        probability = each["probability"]
        bar = Bar(1, 0, probability, width=BAR_WIDTH, color="dark_orange")
        table.add_row(cell, Text(each["label"]), f"{probability:.1%}", bar)
        cell = Text()


def _with_progress(outcomes: Iterable[Outcome], total: int) -> Iterator[Outcome]:
    """Pass outcomes on, and show a bar on standard error when it takes long."""
    begin = monotonic()
    # Standard output may be a file: the bar must not draw what goes there to the terminal.
    console = Console(stderr=True)
    with_bar = Progress(console=console, transient=True, redirect_stdout=False)
    task = with_bar.add_task("Classifying", total=total)
    try:
        for outcome in outcomes:
            yield outcome
            with_bar.advance(task)
            if monotonic() - begin > PROGRESS_AFTER_SECONDS:
                with_bar.start()
    finally:
        with_bar.stop()
