"""What a study is: a question, the tasks that answer it, and the page that says the answer.

A study is one file of this folder. It names its tasks; `runner.py` measures them, on all cores
or on a cluster, and never one twice; the study then turns the measurements into an answer, tables
and a figure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from training.dataset import FashionMNIST

Task = dict[str, Any]
"""All that decides one measurement, as JSON values: the arm, the seed, the size of the fit."""

Line = dict[str, Any]
"""A task together with what was measured: one line of the study's JSON lines."""


@dataclass(frozen=True)
class Scale:
    """How large a study's fits are.

    Attributes:
        images: how many training images are fitted, from the first on.
        epochs: passes over them.
        seeds: how many fits of each arm.
        quick: whether this only shows that the study runs from end to end.
    """

    images: int = 20_000
    epochs: int = 5
    seeds: int = 5
    quick: bool = False


QUICK = Scale(images=512, epochs=1, seeds=2, quick=True)


@dataclass(frozen=True)
class Report:
    """What a study found.

    Attributes:
        answer: the answer in one or two sentences, with its figures.
        body: Markdown: method, tables, what follows from them.
    """

    answer: str
    body: str


@dataclass(frozen=True)
class Study:
    """A question and how it is answered.

    Attributes:
        name: what the command line calls it; also the name of its files.
        title: the question, as a heading.
        source: where the chapter asks it.
        tasks: names the measurements to take at a scale; equal tasks give equal figures, times
            apart.
        measure: takes one measurement, on one thread.
        report: turns the measurements into an answer.
        draw: draws the measurements.
        timed: whether it measures times, so that its tasks must run one after the other.
    """

    name: str
    title: str
    source: str
    tasks: Callable[[Scale], Sequence[Task]]
    measure: Callable[[FashionMNIST, Task], Line]
    report: Callable[[Sequence[Line]], Report]
    draw: Callable[[Sequence[Line], Figure], None]
    timed: bool = False


def arms(scale: Scale, **choices: Sequence[Any]) -> list[Task]:
    """Return a task for every combination of the choices and every seed.

    Seeds vary slowest: a study that is stopped early has all arms of the first seeds.
    """
    tasks: list[Task] = [{}]
    for name, values in {"seed": range(scale.seeds), **choices}.items():
        tasks = [task | {name: value} for task in tasks for value in values]
    return [task | {"images": scale.images, "epochs": scale.epochs} for task in tasks]


def by_seed(lines: Sequence[Line], figure: str, **arm: Any) -> list[float]:
    """Return one figure of one arm, in the order of the seeds."""
    chosen = [line for line in lines if arm.items() <= line.items()]
    return [line[figure] for line in sorted(chosen, key=lambda line: int(line["seed"]))]
