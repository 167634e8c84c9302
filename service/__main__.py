"""The command line: `python -m service` serves, `classify` classifies files; see `--help`."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NoReturn
from urllib.parse import urlsplit

import click

from service import __version__
from service.model.artefact import ModelError, read_files

if TYPE_CHECKING:
    from service.settings import Settings

OPTIONS = (  # of `serve`; an option replaces the environment variable of its name
    ("--host", None, "127.0.0.1", "The address to listen on."),
    ("--port", click.IntRange(0, 65535), "8000", "The port to listen on; 0 takes any free one."),
    ("--workers", click.IntRange(1, 64), "1", "The number of worker processes."),
)


def serve_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `serve` to a command."""
    for name, kind, default, text in reversed(OPTIONS):
        replaced = f"Replaces BNLENET_{name[2:].upper()}.  [default: {default}]"
        option = click.option(name, type=kind, help=f"{text} {replaced}")
        command = option(command)
    return command


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@serve_options
@click.version_option(__version__, prog_name="bn-lenet")
@click.pass_context
def main(context: click.Context, /, **options: str | int | None) -> None:
    """Classify images of garments. Without a command: serve over HTTP."""
    if sys.stderr is None:  # closed, as by `2>&-`; the first file that opens now takes its number
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if context.invoked_subcommand is None:
        context.invoke(serve, **options)
    elif any(value is not None for value in options.values()):
        raise click.UsageError("Write --host, --port and --workers after `serve`.")


@main.command()
@serve_options
def serve(**options: str | int | None) -> None:
    """Serve the model and its page over HTTP.

    The environment variables BNLENET_* have more settings; the README lists them.
    """
    for name, value in options.items():
        if value is not None:  # worker processes read the environment too
            os.environ[f"BNLENET_{name.upper()}"] = str(value)
    _serve()


@main.command(hidden=True)
@click.argument("supervisor", type=int)
@click.argument("descriptors", type=int, nargs=-1)
def worker(supervisor: int, descriptors: tuple[int, ...]) -> None:
    """Serve on inherited sockets, as one of a supervisor's processes."""
    _serve(supervisor, descriptors)


def _http_url(_: click.Context, __: click.Parameter, url: str | None) -> str | None:
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        complete = parts.hostname and parts.port != 0 and " " not in url
    except ValueError as exc:  # a port that is not a number, or half an IPv6 address
        raise click.BadParameter(f"not a valid URL: {exc}") from None
    if not complete or parts.scheme not in ("http", "https"):
        raise click.BadParameter("write a URL with a host, such as http://127.0.0.1:8000")
    return url


# click would refuse all photos when it cannot read one; `classify` reports each.
@main.command()
@click.argument(
    "photos", metavar="PHOTO...", nargs=-1, required=True, type=click.Path(readable=False)
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one line of JSON for each photo, with notes."
)
@click.option(
    "--top-k",
    type=click.IntRange(1, 10),
    default=1,
    show_default=True,
    help="How many classes to list.",
)
@click.option(
    "--preprocessing",
    type=click.Choice(["auto", "none", "dataset"]),
    default="auto",
    show_default=True,
    help="`none` takes only 28x28 8-bit grayscale, as it is; `dataset` converts every photo as the"
    " data set was made; `auto` does `none` where it can, else `dataset`.",
)
@click.option(
    "--url",
    callback=_http_url,
    help="Ask the running service at this URL. If it needs a key, set BNLENET_API_KEY.",
)
def classify(
    photos: tuple[str, ...],
    as_json: bool,
    top_k: int,
    preprocessing: Literal["auto", "none", "dataset"],
    url: str | None,
) -> None:
    """Classify photos of garments.

    PHOTO is a file, a folder (for the pictures in it), a glob pattern, or `-` (for standard
    input).

    A terminal gets a table. A pipe gets lines with tabs: file, label, confidence. If a photo
    cannot be classified, the others still are, and the exit status is 1.
    """
    from service.classify import local, remote, run  # noqa: PLC0415 - serving needs none of it
    from service.pictures.decoding import configure_pillow  # noqa: PLC0415 - as above

    settings = _settings()
    for warning in settings.unknown_variables():
        click.echo(f"Warning: {warning}", err=True)
    configure_pillow()
    try:
        arguments = settings, preprocessing, top_k
        classify_one = remote(url, *arguments) if url else local(*arguments)
    except ModelError as exc:
        _fail(str(exc), 2)
    sys.exit(not run(photos, classify_one, as_json=as_json))


def _settings() -> "Settings":
    from service.settings import Settings, SettingsError  # noqa: PLC0415 - check the options first

    try:
        return Settings.from_environment()
    except SettingsError as exc:
        _fail(str(exc), 2)


def _serve(supervisor: int | None = None, inherited: tuple[int, ...] = ()) -> None:
    if os.getpid() == 1:  # in a container; the kernel drops its signals that have no handler
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    settings = _settings()

    try:
        from service.http import server  # noqa: PLC0415 - brings uvicorn
    except ImportError as exc:  # it may be a version of uvicorn that the service does not know
        _fail(str(exc), 1)
    from service.http.channel import Channel, SupervisorError  # noqa: PLC0415 - as above
    from service.http.workers import START_FAILED, supervise  # noqa: PLC0415 - as above
    from service.telemetry import logs  # noqa: PLC0415 - check the settings before loading all this

    logs.configure(settings)
    try:
        if supervisor is not None:
            line, listener, *others = (socket.socket(fileno=number) for number in inherited)
            channel = Channel(line)
            files = channel.receive_models()
        else:
            for warning in settings.unknown_variables():
                logging.getLogger("service").warning(warning)
            channel, files, others = None, None, []
            listener = server.bind(settings)
            if settings.workers > 1:
                files = read_files(settings.model_paths)
                sys.exit(supervise(settings.workers, listener, files, server.page(listener)))
        from service.app import create_app  # noqa: PLC0415 - brings FastAPI; a supervisor needs none
        from service.model.classifier import load_classifiers  # noqa: PLC0415 - brings ONNX Runtime; likewise

        classifiers = load_classifiers(
            settings.model_paths, settings.device, settings.model_name, files
        )
        app = create_app(settings, *classifiers, channel)
        server.run(app, settings, listener, supervisor, channel, others)
    except (ModelError, server.StartError, SupervisorError) as exc:
        _fail(str(exc), START_FAILED)


def _fail(sentence: str, status: int) -> NoReturn:
    click.echo(f"Error: {sentence}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
