"""The command line: `python -m service` serves the model; `--help` tells the rest."""

import socket
import sys
from typing import NoReturn

import click


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Classify images of garments. Without a command: serve over HTTP."""
    if context.invoked_subcommand is None:
        context.invoke(serve)


@main.command()
def serve() -> None:
    """Serve the model over HTTP; the environment variables BNLENET_* say how."""
    _serve(None)


@main.command(hidden=True)
@click.argument("descriptor", type=int)
def worker(descriptor: int) -> None:
    """Serve on an inherited socket, as one of several processes."""
    _serve(socket.socket(fileno=descriptor))


def _serve(inherited: socket.socket | None) -> None:
    # Imported here: other commands need none of it, and a wrong setting is told at once.
    from service.settings import Settings, SettingsError  # noqa: PLC0415

    try:
        settings = Settings.from_environment()
    except SettingsError as exc:
        _fail(str(exc), 2)

    from service import logs  # noqa: PLC0415
    from service.classifier import ModelError  # noqa: PLC0415
    from service.server import StartError, bind, run  # noqa: PLC0415
    from service.workers import START_FAILED, supervise  # noqa: PLC0415

    logs.configure(settings)
    try:
        listener = inherited or bind(settings)
        if inherited is None and settings.workers > 1:
            sys.exit(supervise(settings.workers, listener))
        run(settings, listener, supervised=inherited is not None)
    except (ModelError, StartError) as exc:
        _fail(str(exc), START_FAILED)


def _fail(sentence: str, status: int) -> NoReturn:
    click.echo(f"Error: {sentence}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
