"""Computes what a request costs, and what a million requests a second need.

    python -m benchmarks.capacity --price 0.03                    the tables for another price
    python -m benchmarks.capacity --write docs/operations.md      writes the tables of the page

The figures come from docs/serving.json and docs/performance.md; nothing is measured here.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.page import with_section
from benchmarks.reliability.traffic import good

DOCS = Path(__file__).parents[1] / "docs"
PERFORMANCE, RECORD = DOCS / "performance.md", DOCS / "serving.json"
BEGIN = "<!-- capacity: written by `python -m benchmarks.capacity --write docs/operations.md` -->\n"
END = "<!-- capacity: end -->"
CORES = 16  # of a node, with one worker on every core
USED = 0.6  # of a core: above it, the autoscaler in deploy/kubernetes adds a pod
DOLLARS = 0.05  # for a core and hour: an assumption, not a quotation
WANTED = 1_000_000  # requests a second
EXTRA_MEGABYTES = 150  # of a worker, under any load: tests check this limit
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
FORMS = {
    "`/predict`, 784 bytes": "784 bytes",
    "`/predict`, JSON": "JSON",
    "`/predict`, PNG": "PNG",
    "Open Inference Protocol, JSON": "OIP JSON",
    "Open Inference Protocol, binary": "OIP binary",
}
"""The name of a form of request here, and in `benchmarks.serving` and the reliability traffic."""


@dataclass(frozen=True)
class Cost:
    """The cost of a request: its form, and the microseconds of a core."""

    form: str
    microseconds: float

    def per_node(self) -> float:
        """Return the requests a second of a node whose cores are busy for the share `USED`."""
        return CORES * USED * 1e6 / self.microseconds

    def nodes(self) -> int:
        """Return how many nodes `WANTED` requests a second need."""
        return math.ceil(WANTED / self.per_node())


def costs(record: Mapping[str, Any], page: str) -> Iterator[Cost]:
    """Return the costs of all forms of request.

    A worker that 16 connections keep busy uses one core, so a request costs the inverse of its
    rate. A photograph costs its conversion, a request of 784 bytes, and a second image for the
    model (the mirror image).

    Args:
        record: docs/serving.json.
        page: docs/performance.md, for the time of the conversion.

    Raises:
        ValueError: the page lacks the time of the conversion.
        KeyError: the record lacks a figure.
    """
    found = [
        Cost(form, 1e6 / record["rows"][name]["16"]["rate"])
        for form, name in FORMS.items()
        if name in record["rows"]
    ]
    conversion = 1000 * _figure(r"\(([\d.]+) against [\d.]+ ms of processor time", page)
    yield from found
    yield Cost(PHOTOGRAPH, conversion + found[0].microseconds + _model_microseconds(record))


def _model_microseconds(record: Mapping[str, Any]) -> float:
    """Return the model's time for one image, with 16 connections."""
    return float(record["model_step"]["16"]["an_image"]) / 1000


def _figure(pattern: str, page: str) -> float:
    found = re.search(pattern, page.replace("\n", " "))
    if found is None:
        raise ValueError(f"the page has nothing like {pattern}")
    return float(found[1])


def table(record: Mapping[str, Any], page: str, price: float = DOLLARS) -> str:
    """Return the tables; `costs` explains the arguments, `price` is dollars for a core and hour."""
    found = [*costs(record, page)]
    # Two digits, because the size of a file differs a little between versions of Pillow.
    sizes = {name: int(float(f"{len(request):.1e}")) for name, request in good().items()}
    lines = [["a request", *HEADINGS]]
    for cost in found:
        size = sizes[FORMS.get(cost.form, "JPEG photograph")]
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
    idle = CORES * record["memory_megabytes"]["BN-LeNet"] / 1000
    model = _model_microseconds(record)
    whole, photograph = found[0].microseconds, found[-1].microseconds
    others = [
        ["", "computed"],
        ["memory of a node, idle", f"{idle:.1f} GB"],
        ["memory of a node, at most", f"{idle + CORES * EXTRA_MEGABYTES / 1000:.1f} GB"],
        [
            f"with a GPU that needs no time: {found[0].form}",
            f"{whole / (whole - model):.2f} times as many",
        ],
        [
            "with a GPU that needs no time: photographs",
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
    "--write",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the tables into this page.",
)
def main(price: float, write: Path | None) -> None:
    """Print what requests cost, and what a million requests a second need."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    text = table(record, PERFORMANCE.read_text(encoding="utf-8"), price)
    if write:
        page = with_section(write.read_text(encoding="utf-8"), text, BEGIN, END)
        write.write_text(page, encoding="utf-8")
    click.echo(text, nl=False)


if __name__ == "__main__":
    main()
