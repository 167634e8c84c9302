"""The command line: `python -m service` serves the model; `--help` tells the rest."""

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
    # Imported here, so that a wrong setting is told before the slow imports.
    from service.settings import Settings, SettingsError  # noqa: PLC0415

    try:
        settings = Settings.from_environment()
    except SettingsError as exc:
        _fail(str(exc), 2)

    from service import logs  # noqa: PLC0415 - as above
    from service.classifier import ModelError  # noqa: PLC0415 - as above
    from service.server import StartError, bind  # noqa: PLC0415 - as above
    from service.server import serve as run  # noqa: PLC0415 - as above

    logs.configure(settings)
    try:
        run(settings, bind(settings))
    except (ModelError, StartError) as exc:
        _fail(str(exc), 1)


def _fail(sentence: str, status: int) -> NoReturn:
    click.echo(f"Error: {sentence}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
