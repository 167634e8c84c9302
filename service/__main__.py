"""The command line: `python -m service` serves, `classify` classifies files; see `--help`."""

import socket
import sys
from typing import TYPE_CHECKING, Literal, NoReturn
from urllib.parse import urlsplit

import click

from service.model.artefact import ModelError, read_file

if TYPE_CHECKING:
    from service.settings import Settings


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Classify images of garments. Without a command: serve over HTTP."""
    if context.invoked_subcommand is None:
        context.invoke(serve)


@main.command()
def serve() -> None:
    """Serve the model over HTTP. The environment variables BNLENET_* say how."""
    _serve()


@main.command(hidden=True)
@click.argument("supervisor", type=int)
@click.argument("descriptors", type=int, nargs=-1)
def worker(supervisor: int, descriptors: tuple[int, ...]) -> None:
    """Serve on inherited sockets, as one of a supervisor's processes."""
    _serve(supervisor, descriptors)


def _http_only(_: click.Context, __: click.Parameter, url: str | None) -> str | None:
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        sound = parts.hostname and parts.port != 0 and " " not in url
    except ValueError as exc:  # of a port that is no number, or half an IPv6 address
        raise click.BadParameter(f"it is no address: {exc}") from None
    if not sound or parts.scheme not in ("http", "https"):
        raise click.BadParameter("it must begin with http:// or https:// and a host's name")
    return url


@main.command()
@click.argument("photos", metavar="PHOTO...", nargs=-1, required=True, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each photo.")
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
    help="`dataset` converts photos as the data set was made, `none` takes only 28x28 8-bit"
    " grayscale, `auto` takes that as it is and converts the rest.",
)
@click.option(
    "--url",
    callback=_http_only,
    help="Ask the service at this address instead, with the key in BNLENET_API_KEY if it is set.",
)
def classify(
    photos: tuple[str, ...],
    as_json: bool,
    top_k: int,
    preprocessing: Literal["auto", "none", "dataset"],
    url: str | None,
) -> None:
    """Tell which garments PHOTOs show; `-` is standard input.

    A terminal gets a table; a pipe gets columns between tabs: file, label, confidence. When a
    photo cannot be read or classified, the others still are, and the exit status is 1.
    """
    from service.classify import local, remote, run  # noqa: PLC0415 - serving needs none of it

    settings = _settings()
    if url is not None:
        ask = remote(url, settings, preprocessing, top_k)
    else:
        from service.pictures.decoding import configure_pillow  # noqa: PLC0415 - brings Pillow; --url needs none

        configure_pillow()
        try:
            ask = local(settings, preprocessing, top_k)
        except ModelError as exc:
            _fail(str(exc), 2)
    sys.exit(not run(photos, ask, as_json=as_json))


def _settings() -> "Settings":
    from service.settings import Settings, SettingsError  # noqa: PLC0415 - a wrong option is told first

    try:
        return Settings.from_environment()
    except SettingsError as exc:
        _fail(str(exc), 2)


def _serve(supervisor: int | None = None, inherited: tuple[int, ...] = ()) -> None:
    settings = _settings()

    try:
        from service.http import server  # noqa: PLC0415 - brings uvicorn
    except ImportError as exc:  # which may be a version that we do not know
        _fail(str(exc), 1)
    from service.http.channel import Channel, SupervisorError  # noqa: PLC0415 - as above
    from service.http.workers import START_FAILED, supervise  # noqa: PLC0415 - as above
    from service.telemetry import logs  # noqa: PLC0415 - a wrong setting is told before all this is loaded

    logs.configure(settings)
    try:
        if supervisor is not None:
            line, listener, *others = (socket.socket(fileno=number) for number in inherited)
            channel = Channel(line)
            data = channel.receive_model()
        else:
            channel, data, others = None, None, []
            listener = server.bind(settings)
            if settings.workers > 1:
                _, data = read_file(settings.model_path)
                sys.exit(supervise(settings.workers, listener, data))
        from service.app import create_app  # noqa: PLC0415 - brings FastAPI; a supervisor needs none
        from service.model.classifier import Classifier  # noqa: PLC0415 - brings ONNX Runtime; neither does it need this

        model = Classifier.load(settings.model_path, settings.device, settings.model_name, data)
        app = create_app(settings, model, channel)
        server.run(app, settings, listener, supervisor, channel, others)
    except (ModelError, server.StartError, SupervisorError) as exc:
        _fail(str(exc), START_FAILED)


def _fail(sentence: str, status: int) -> NoReturn:
    click.echo(f"Error: {sentence}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
