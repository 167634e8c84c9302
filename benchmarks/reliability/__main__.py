"""Runs the campaigns one by one, and prints their findings.

    python -m benchmarks.reliability                      all campaigns, about an hour
    python -m benchmarks.reliability soak --minutes 30    one campaign
    python -m benchmarks.reliability --quick              a little of everything, under a minute

A finished campaign is appended to `docs/reliability.jsonl` at once; the tables of
`docs/reliability.md` come from this file. A campaign that the file has is not run again, unless you
name it or give `--again`; so an interrupted run can be continued. --quick writes nothing, unless
--out names a file. Exit status 1 means that a goal was missed.
"""

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.load import BenchmarkError
from benchmarks.page import with_section
from benchmarks.reliability.report import (
    BEGIN,
    CAMPAIGNS,
    END,
    Options,
    Record,
    append,
    machine,
    read,
    section,
)

FILE = Path(__file__).parents[2] / "docs" / "reliability.jsonl"


@click.command()
@click.argument("names", metavar="[CAMPAIGN]...", nargs=-1, type=click.Choice(list(CAMPAIGNS)))
@click.option("--minutes", default=30.0, show_default=True, help="The length of the soak.")
@click.option(
    "--inputs",
    type=click.IntRange(1),
    help="The number of inputs, requests, files or kills.  [default: the campaign's own]",
)
@click.option("--quick", is_flag=True, help="A little of everything, without containers.")
@click.option("--again", is_flag=True, help="Also run the campaigns that the file has.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each campaign.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to append to.  [default: docs/reliability.jsonl]",
)
def main(
    names: tuple[str, ...],
    minutes: float,
    inputs: int | None,
    quick: bool,
    again: bool,
    as_json: bool,
    out: Path | None,
) -> None:
    """Try to break the service, the decoders, the model file and the fits."""
    out = out or (None if quick else FILE)
    known = read(out) if out else {}
    chosen = names or tuple(name for name in CAMPAIGNS if not (quick and name == "scale"))
    options = Options(minutes, inputs, quick)
    found, failed = [], []
    for name in chosen:
        if name in known and not (again or names):
            found.append(known[name])
            continue
        try:
            with Console(stderr=True).status(name):
                found.append(_run(name, options))
        except BenchmarkError as exc:  # the other campaigns still run
            failed.append(f"{name}: {exc}")
            continue
        if out:
            append(out, found[-1])
            page = out.with_suffix(".md")
            if page.exists():
                old, text = page.read_text(encoding="utf-8"), section(read(out))
                page.write_text(with_section(old, text, BEGIN, END), encoding="utf-8")
        if as_json:
            click.echo(json.dumps(asdict(found[-1]), ensure_ascii=False))
    if not as_json:
        _show(found)
    if failed:
        raise click.ClickException("\n".join(failed))
    sys.exit(any(row.met is False for record in found for row in record.rows))


def _run(name: str, options: Options) -> Record:
    """Run one campaign; its module is imported only now, because some import torch."""
    command = f"python -m benchmarks.reliability {name}"
    if name == "soak" and not options.quick:
        command += f" --minutes {options.minutes:g}"
    command += f" --inputs {options.inputs}" if options.inputs else ""
    command += " --quick" if options.quick else ""
    conditions, begin = machine(), time.monotonic()
    rows = tuple(import_module(f"benchmarks.reliability.{name}").run(options))
    return Record(name, command, conditions, round(time.monotonic() - begin, 1), rows)


def _show(records: Iterable[Record]) -> None:
    table = Table("campaign", "", "figure", "goal", "")
    for record in records:
        for row in record.rows:
            table.add_row(record.campaign, row.what, row.figure, row.goal, row.verdict)
        table.add_section()
    Console(width=150, highlight=False).print(table)


if __name__ == "__main__":
    main()
