"""Works out what a request costs, and what a million a second take, from measured figures.

    python -m benchmarks.capacity --price 0.03                    the table at another price
    python -m benchmarks.capacity --write docs/operations.md      the page's table

The figures are read from docs/performance.md; nothing is measured here.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.page import with_section
from benchmarks.reliability.traffic import good

PERFORMANCE = Path(__file__).parents[1] / "docs" / "performance.md"
MODEL = r"\(([\d.]+) µs against"  # an image's share of the model's step
BEGIN = "<!-- capacity: written by `python -m benchmarks.capacity --write docs/operations.md` -->\n"
END = "<!-- capacity: end -->"
CORES = 16  # of a node, with a worker on each
USED = 0.6  # of a core: where the autoscaler in deploy/kubernetes adds a pod
DOLLARS = 0.05  # for a core and hour: an assumption, not a quotation
WANTED = 1_000_000  # requests a second
MOST_MEGABYTES = 150  # above idle, whatever clients send: tests hold it
HEADINGS = (
    "µs of a core",
    "a second: a core at its limit",
    f"a node of {CORES} cores at {USED:.0%}",
    "nodes for a million",
    "$ an hour",
    "bytes sent",
    "Gbit/s into such a node",
)
PHOTOGRAPH = "`/predict`, JPEG photograph of 640 pixels"
SENT = {
    "`/predict`, 784 bytes": "784 bytes",
    "`/predict`, JSON": "JSON",
    "`/predict`, PNG": "PNG",
    "Open Inference Protocol, JSON": "OIP JSON",
    "Open Inference Protocol, binary": "OIP binary",
    PHOTOGRAPH: "JPEG photograph",
}
"""What `benchmarks.reliability.traffic` calls the rows."""


@dataclass(frozen=True)
class Cost:
    """What one request takes: its form, and microseconds of a core."""

    form: str
    microseconds: float

    def per_node(self) -> float:
        """Return the requests a second of a node whose cores are used as far as planned."""
        return CORES * USED * 1e6 / self.microseconds

    def nodes(self) -> int:
        """Return how many nodes the wanted requests take."""
        return math.ceil(WANTED / self.per_node())


def costs(page: str) -> Iterator[Cost]:
    """Read what requests cost from the page of measured figures.

    A worker that 16 connections keep busy uses one core, so a request takes the inverse of its
    rate. A photograph adds the conversion, and its mirror image to the model's run.

    Raises:
        ValueError: the page lacks a figure.
    """
    rates = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if cells[:2] == ["1", "p50"]:
            column = 1 + cells.index("16")
        elif line.startswith(("| `/predict`", "| Open Inference")):
            rates[cells[0]] = float(cells[column].replace(",", ""))
    if not rates:
        raise ValueError("the page has no rates of /predict")
    for form, rate in rates.items():
        yield Cost(form, 1e6 / rate)
    decoding = 1000 * _figure(r"\(([\d.]+) against [\d.]+ ms of processor time", page)
    model = _figure(MODEL, page)
    yield Cost(PHOTOGRAPH, decoding + 1e6 / next(iter(rates.values())) + model)


def _figure(pattern: str, page: str) -> float:
    found = re.search(pattern, page.replace("\n", " "))
    if found is None:
        raise ValueError(f"the page has nothing like {pattern}")
    return float(found[1])


def table(page: str, price: float = DOLLARS) -> str:
    """Return the tables, from the page of measured figures and dollars for a core and hour."""
    found = [*costs(page)]
    # Two digits: other versions of Pillow write files that are a little larger or smaller.
    sizes = {name: int(float(f"{len(request):.1e}")) for name, request in good().items()}
    lines = [["a request", *HEADINGS]]
    for cost in found:
        size = sizes[SENT[cost.form]]
        lines.append(
            [
                cost.form,
                f"{cost.microseconds:,.0f}",
                f"{1e6 / cost.microseconds:,.0f}",
                f"{cost.per_node():,.0f}",
                f"{cost.nodes():,}",
                f"{cost.nodes() * CORES * price:,.2f}",
                f"{size:,}",
                f"{cost.per_node() * size * 8 / 1e9:.1f}",
            ]
        )
    idle = CORES * _figure(r"resident memory ≤ 150 MB \| ([\d.]+)", page) / 1000
    model = _figure(MODEL, page)
    whole, photograph = found[0].microseconds, found[-1].microseconds
    others = [
        ["", "computed"],
        ["memory of a node, idle", f"{idle:.1f} GB"],
        ["memory of a node, at most", f"{idle + CORES * MOST_MEGABYTES / 1000:.1f} GB"],
        [
            f"a GPU that took no time: {found[0].form}",
            f"{whole / (whole - model):.2f} times as many",
        ],
        [
            "a GPU that took no time: photographs",
            f"{photograph / (photograph - 2 * model):.2f} times as many",
        ],
    ]
    return f"{_table(lines)}\n{_table(others)}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = (f"| {' | '.join(line)} |\n" for line in lines)
    return "".join([head, f"|{' --- |' * len(lines[0])}\n", *rest])


@click.command()
@click.option("--price", default=DOLLARS, show_default=True, help="Dollars for a core and hour.")
@click.option(
    "--write", type=click.Path(path_type=Path, dir_okay=False), help="Put the table into this page."
)
def main(price: float, write: Path | None) -> None:
    """Print what requests cost, and what a million a second take."""
    text = table(PERFORMANCE.read_text(encoding="utf-8"), price)
    if write:
        page = with_section(write.read_text(encoding="utf-8"), text, BEGIN, END)
        write.write_text(page, encoding="utf-8")
    click.echo(text, nl=False)


if __name__ == "__main__":
    main()
