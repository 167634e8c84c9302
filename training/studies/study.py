"""What a study is: a question, the tasks that answer it, and the page with the answer.

A study is one file of this folder. It lists its tasks; `runner.py` measures each of them once, on
all cores or on a cluster. Then the study turns the measurements into an answer, tables and a
figure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from training.dataset import FashionMNIST

Task = dict[str, Any]
"""The parameters of one measurement, as JSON values: the arm, the seed, the size of the fit."""

Line = dict[str, Any]
"""A task and its measured figures: one line of the study's JSON lines."""


@dataclass(frozen=True)
class Scale:
    """The size of a study's fits.

    Attributes:
        images: the number of training images, the first ones.
        epochs: passes over them.
        seeds: the number of fits of each arm.
        quick: whether the run only shows that the study works from end to end.
    """

    images: int = 20_000
    epochs: int = 5
    seeds: int = 5
    quick: bool = False


QUICK = Scale(images=512, epochs=1, seeds=2, quick=True)

# Sentences of several pages; a study with a method of its own takes those that hold for it.
RECOMPUTED = (
    "Before a network is judged, its batch norms get the statistics of its training images."
)
HELD_OUT = (
    '"Held out" are the last 10,000 training images, which no fit sees; "test" is the accuracy on '
    "the test set, and no choice was made by it."
)
SEEDS = (
    "A seed decides the first weights and the order of the images. Fits with the same seed share "
    "both, and a paired difference compares them seed by seed. ± is a 95 % t-interval over the "
    "seeds."
)
TOO_SHORT = (
    "Without batch norm, fits of this length stay at chance (0.1); "
    "[longer ones](covariate-shift.md) learn. So the figures show how fast a network learns, not "
    "how good it becomes."
)


@dataclass(frozen=True)
class Report:
    """The result of a study.

    Attributes:
        answer: the answer, with its figures; the first sentence answers the question.
        body: Markdown: the tables, with explanations.
        caption: what the figure shows, and what one point or line of it is.
        method: how it was measured; by default these are the fits of `fits.fitted`.
    """

    answer: str
    body: str
    caption: str
    method: str = ""


@dataclass(frozen=True)
class Study:
    """A question, and the functions that answer it.

    Attributes:
        name: its name on the command line and in file names.
        title: the question, as a heading.
        source: where the chapter asks the question.
        tasks: lists the measurements at a scale; equal tasks give equal figures, except times.
        measure: takes one measurement, on one thread.
        report: turns the measurements into an answer and a page.
        draw: draws the measurements.
        timed: whether it measures times; then its tasks run one after the other.
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

    Seeds vary slowest, so a study that is stopped early has all arms of the first seeds.
    """
    tasks: list[Task] = [{}]
    for name, values in {"seed": range(scale.seeds), **choices}.items():
        tasks = [task | {name: value} for task in tasks for value in values]
    return [task | {"images": scale.images, "epochs": scale.epochs} for task in tasks]


def by_seed(lines: Sequence[Line], figure: str, **arm: Any) -> list[float]:
    """Return one figure of one arm, in the order of the seeds."""
    chosen = [line for line in lines if arm.items() <= line.items()]
    return [line[figure] for line in sorted(chosen, key=lambda line: int(line["seed"]))]
