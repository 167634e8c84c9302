"""The command `python -m training study`: parses, shows progress, prints answers."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.atomic import write_whole
from training.dataset import load
from training.studies import STUDIES
from training.studies.runner import begin, missing, overview, run, write
from training.studies.study import QUICK, Line, Scale


@click.command("study")
@click.argument("names", metavar="NAME...", nargs=-1, type=click.Choice(list(STUDIES)))
@click.option("--list", "show", is_flag=True, help="List the studies and their questions.")
@click.option("--all", "everything", is_flag=True, help="Run all studies.")
@click.option(
    "--seeds", type=click.IntRange(2), help="The number of fits of each arm.  [default: 5]"
)
@click.option(
    "--quick",
    is_flag=True,
    help="Tiny fits, to show that a study runs; their answers mean nothing.",
)
@click.option(
    "--jobs",
    type=click.IntRange(-1),
    default=-1,
    show_default=True,
    help="The number of processes; -1 means one for each core.",
)
@click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Send the fits to this Dask scheduler, instead of local processes.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/studies"),
    show_default=True,
    help="The folder for pages, figures and measurements.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each study.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder with the data set's four files.",
)
def study(
    names: tuple[str, ...],
    show: bool,
    everything: bool,
    seeds: int | None,
    quick: bool,
    jobs: int,
    cluster: str | None,
    out: Path,
    as_json: bool,
    data_dir: Path | None,
) -> None:
    """Answer questions about batch norm by experiment.

    A study writes NAME.md, NAME.png, NAME.jsonl and the overview README.md. If it is stopped, the
    next run continues it: finished fits are not repeated.
    """
    if show:
        for known in STUDIES.values():
            click.echo(f"{known.name:20} {known.title}")
        return
    chosen = list(STUDIES) if everything else list(dict.fromkeys(names))
    if not chosen:
        raise click.UsageError("name a study, or use --all; --list shows them.")
    if jobs == 0:
        raise click.UsageError("--jobs must be -1 or at least 1.")
    scale = QUICK if quick else Scale()
    if seeds is not None:
        scale = replace(scale, seeds=seeds)
    digest, console = load(data_dir).sha256, Console(stderr=True)
    for name in chosen:
        records = begin(STUDIES[name], out, digest)
        todo = len(missing(STUDIES[name], records, scale))
        columns = (
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(
            *columns, console=console, disable=not (todo and console.is_terminal)
        ) as progress:
            bar = progress.add_task(name, total=todo)

            def advance(_: Line, progress: Progress = progress, bar: object = bar) -> None:
                progress.advance(bar)  # type: ignore[arg-type] # rich's TaskID is an int

            run(
                STUDIES[name],
                records,
                scale,
                data_dir=data_dir,
                jobs=jobs,
                cluster=cluster,
                on_line=advance,
            )
        report = write(STUDIES[name], records, scale, out)
        write_whole(out / "README.md", overview(STUDIES.values(), out).encode())
        if as_json:
            click.echo(json.dumps({"study": name, "answer": report.answer, "scale": asdict(scale)}))
        else:
            click.echo(f"{name}: {report.answer}\n  {out / name}.md")
