"""Classifies files for the command line, in this process or by asking a running service."""

import glob
import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from http.client import HTTPException
from io import TextIOWrapper
from pathlib import Path
from time import monotonic
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import click
from pydantic import ValidationError
from rich.bar import Bar
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from rich.text import Text

from service.errors import ServiceError
from service.pictures.conversion import Preprocessing, read_picture
from service.pictures.decoding import SUFFIXES
from service.routes.prediction import Prediction
from service.settings import Settings

MAX_BYTES = 100 * 2**20  # of a file; no picture within the decoder's limits needs more
PROGRESS_AFTER_SECONDS = 2.0
TIMEOUT_SECONDS = 30.0
BAR_WIDTH = 24

Classify = Callable[[bytes], Prediction]
"""Classifies a picture's file, or raises FileError."""


class FileError(Exception):
    """A file cannot be read or classified.

    Args:
        message: one sentence for the user.
        code: a snake_case name for programs: the service's own, or one of this module's:
            unreadable_file, no_pictures, unreachable, refused.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class Outcome(NamedTuple):
    """A file's name as given, and its prediction or the reason why there is none."""

    file: str
    result: Prediction | FileError


def local(settings: Settings, preprocessing: Preprocessing, top_k: int) -> Classify:
    """Return a function that classifies pictures in this process.

    Raises:
        ModelError: a model cannot be loaded.
    """
    from service.model.classifier import load_classifiers  # noqa: PLC0415 - `remote` needs no ONNX Runtime

    of_pixels, of_pictures = load_classifiers(
        settings.model_paths, settings.device, settings.model_name
    )

    def classify(data: bytes) -> Prediction:
        try:
            image = read_picture(data, preprocessing, limited=False)
        except ServiceError as exc:
            raise FileError(exc.message, exc.code) from exc
        classifier = of_pixels if image.preprocessing == "none" else of_pictures
        probabilities = classifier.probabilities(image.images)
        return Prediction.of(classifier.info, probabilities, image, top_k)

    return classify


def remote(url: str, settings: Settings, preprocessing: Preprocessing, top_k: int) -> Classify:
    """Return a function that sends pictures to the service at this http or https address."""
    query = urlencode({"top_k": top_k, "preprocessing": preprocessing})
    target = f"{url.rstrip('/')}/predict?{query}"

    def classify(data: bytes) -> Prediction:
        # The service finds the format in the content. The type says only: read it as a picture.
        request = Request(target, data, {"Content-Type": "image/unknown"})  # noqa: S310 - checked where the option is read
        if settings.api_key is not None:
            # urllib sends header fields in Latin-1: these characters become the key's UTF-8 bytes.
            key = f"Bearer {settings.api_key.get_secret_value()}".encode().decode("latin-1")
            request.add_unredirected_header("Authorization", key)
        try:
            with urlopen(request, timeout=TIMEOUT_SECONDS) as response:  # noqa: S310 - the request above, http or https
                body = response.read()
        except HTTPError as exc:
            raise _refusal(exc) from None
        except (OSError, HTTPException, UnicodeError) as exc:  # UnicodeError: a host like a..b
            reason = getattr(exc, "reason", exc)
            reason = getattr(reason, "strerror", None) or reason
            message = f"The service at {url} cannot be reached: {reason}."
            raise FileError(message, "unreachable") from None
        try:
            return Prediction.model_validate_json(body, strict=True)
        except ValidationError:  # another server may have the same path
            raise FileError(f"The server at {url} is not this service.", "unreachable") from None

    return classify


def _refusal(response: HTTPError) -> FileError:
    try:
        with response:
            body = json.load(response)
        # The user knows the body as a file.
        return FileError(body["error"].replace("The body", "The file"), body["code"])
    except (ValueError, KeyError, TypeError, AttributeError):  # a proxy answered
        return FileError(f"The answer was {response.code} {response.reason}.", "refused")


def run(arguments: Sequence[str], classify: Classify, *, as_json: bool) -> bool:
    """Classify pictures one after the other, and print each result.

    A terminal gets a table. A pipe gets lines with tabs: file, label, confidence.

    Args:
        arguments: files, folders, glob patterns, or `-` for standard input.
        classify: classifies one picture.
        as_json: print lines of JSON instead, errors too.

    Returns:
        whether every picture was classified.
    """
    table = None
    if sys.stdout.isatty() and not as_json:
        # In a narrow terminal, long names break over lines and the bar gets shorter.
        table = Table(
            Column("File", overflow="fold"),
            Column("Label", no_wrap=True),
            Column("Confidence", justify="right", no_wrap=True),
            "",
        )
        table.box, table.pad_edge = None, False
    with_progress = sys.stderr.isatty() and not (as_json and sys.stdout.isatty())
    files = [file for argument in arguments for file in _files(argument)]
    outcomes: Iterable[Outcome] = (_outcome(file, classify) for file in files)
    if with_progress:
        outcomes = _with_progress(outcomes, len(files))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the encoding may lack a name's letters, or bars
    failures = 0
    try:
        for outcome in outcomes:
            file, result = outcome
            failures += isinstance(result, FileError)
            if as_json:
                click.echo(_json(outcome))
            elif isinstance(result, FileError):
                click.echo(f"Error: {_printable(file)}: {result.message}", err=True)
            elif table is not None:
                _add_rows(table, file, result)
            else:
                for one in result.predictions:
                    click.echo(f"{_printable(file)}\t{one.label}\t{one.probability:.4f}")
    finally:  # also after Ctrl-C
        if table is not None and table.row_count:
            Console().print(table)
    return failures == 0


def _files(argument: str) -> list[str | Outcome]:
    """Return the files that an argument stands for, or the outcome that says why there are none.

    A folder stands for the pictures in it, sorted; a glob pattern for its matches, as in a shell.
    """
    path = Path(argument)
    files: list[str | Outcome]
    try:
        if argument != "-" and path.is_dir():
            files = [
                str(file)
                for file in sorted(path.iterdir())
                if file.suffix.lower() in SUFFIXES and file.is_file() and file.name[0] != "."
            ]
            endings = ", ".join(SUFFIXES)
            nothing = f"The folder has no pictures; their names end in {endings}."
        elif glob.has_magic(argument) and not path.exists():
            matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
            files = [file for match in matches for file in _files(match)]
            nothing = "No file matches this pattern."
        else:
            return [argument]
    except OSError as exc:
        return [Outcome(argument, _unreadable("folder", exc))]
    return files or [Outcome(argument, FileError(nothing, "no_pictures"))]


def _outcome(file: str | Outcome, classify: Classify) -> Outcome:
    if isinstance(file, Outcome):
        return file
    try:
        with click.open_file(file, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise FileError(f"The file has more than {MAX_BYTES:,} bytes.", "payload_too_large")
        if not data:
            raise FileError("The file is empty.", "unreadable_file")
        return Outcome(file, classify(data))
    except OSError as exc:
        return Outcome(file, _unreadable("file", exc))
    except FileError as error:
        return Outcome(file, error)


def _unreadable(what: str, exc: OSError) -> FileError:
    return FileError(f"The {what} cannot be read: {exc.strerror or exc}.", "unreadable_file")


def _json(outcome: Outcome) -> str:
    file, result = outcome
    if isinstance(result, FileError):
        content = {"error": result.message, "code": result.code}
    else:
        content = result.model_dump(exclude_none=True)
    return json.dumps({"file": file, **content})  # in ASCII, so that it carries every name exactly


def _printable(file: str) -> str:
    """Return a file's name without characters that control a terminal or break a line."""
    unsafe = {"Cc", "Cs", "Zl", "Zp"}
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in unsafe else c for c in file
    )


def _add_rows(table: Table, file: str, prediction: Prediction) -> None:
    """Add one row for each class; the first has the file's name and the notes."""
    cell, doubt = Text(_printable(file)), ""
    for note in prediction.notes or ():
        cell.append(f"\n{note}", style="dim")
        if note.startswith("Not sure"):
            doubt = "perhaps "
    for one in prediction.predictions:
        bar = Bar(1, 0, one.probability, width=BAR_WIDTH, color="dark_orange")
        table.add_row(cell, Text(f"{doubt}{one.label}"), f"{one.probability:.1%}", bar)
        cell, doubt = Text(), ""


def _with_progress(outcomes: Iterable[Outcome], total: int) -> Iterator[Outcome]:
    """Pass outcomes on. After PROGRESS_AFTER_SECONDS, show a progress bar on standard error."""
    begin = monotonic()
    # Standard output may be a file; by default, rich would print its lines to the terminal.
    console = Console(stderr=True)
    progress = Progress(console=console, transient=True, redirect_stdout=False)
    task = progress.add_task("Classifying", total=total)
    try:
        for outcome in outcomes:
            yield outcome
            progress.advance(task)
            if monotonic() - begin > PROGRESS_AFTER_SECONDS:
                progress.start()
    finally:
        progress.stop()
