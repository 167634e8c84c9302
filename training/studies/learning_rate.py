"""How large can the learning rate be, with and without batch norm (exercise 2).

The study counts the steps of a fit to 70 % accuracy, at each rate of a logarithmic grid. It also
finds the largest rate at which a fit reaches 70 %, by bisection. The accuracy is on 1,000 held-out
images, normalised by their own statistics, because moving averages would lag behind.
"""

import math
from collections.abc import Sequence
from statistics import fmean, median

import torch
from matplotlib.figure import Figure
from torch import nn

from training.dataset import FashionMNIST
from training.evaluation.card import table
from training.evaluation.intervals import Interval, mean_interval, paired_difference
from training.model import initialise
from training.studies.fits import Sample, Samples, batch_norm, lenet, samples, train
from training.studies.study import SEEDS, Line, Report, Scale, Study, Task, arms, by_seed

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
NORMS = {"with": batch_norm, "without": None}
OPTIMIZERS = ("sgd", "adam")
GOAL = 0.7
LOOK_EVERY = 20
LOWEST, HIGHEST = 0.001, 1000.0


def tasks(scale: Scale) -> list[Task]:
    """Return a fit for each cell of the grid, and a bisection for each arm and optimiser."""
    cap = LOOK_EVERY if scale.quick else 2000
    rates = RATES[::4] if scale.quick else RATES
    common = {"norm": list(NORMS), "optimizer": OPTIMIZERS, "cap": [cap]}
    halvings = [1 if scale.quick else 7]
    return arms(scale, rate=rates, **common) + arms(scale, halvings=halvings, **common)


def measure(data: FashionMNIST, task: Task) -> Line:
    """Count the steps to 70 % at a rate, or find the largest rate that reaches 70 %."""
    parts = samples(data, task["images"])
    if "rate" in task:
        return {"steps": steps_to_goal(parts, task, task["rate"])}
    low, high = LOWEST, HIGHEST
    for _ in range(task["halvings"]):
        middle = math.sqrt(low * high)
        if steps_to_goal(parts, task, middle) is not None:
            low = middle
        else:
            high = middle
    return {"largest": low, "above": high}


def steps_to_goal(parts: Samples, task: Task, rate: float) -> int | None:
    """Return the number of steps to 70 %; None if the fit does not reach it within the cap."""
    network = lenet([NORMS[task["norm"]]] * 4)
    initialise(network, task["seed"])
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[task["optimizer"]]
    probe = Sample(parts.held_out.pixels[:1000], parts.held_out.labels[:1000])
    reached: list[int] = []

    def look(step: int, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if step % LOOK_EVERY == 0 and batch_accuracy(network, probe) >= GOAL:
            reached.append(step)
        return bool(reached)

    train(
        network,
        parts.train,
        seed=task["seed"],
        steps=task["cap"],
        optimizer=made(network.parameters(), lr=rate),
        after_step=look,
    )
    return reached[0] if reached else None


@torch.no_grad()
def batch_accuracy(network: nn.Module, sample: Sample) -> float:
    """Return the accuracy on one batch, normalised by its own statistics."""
    answers = network.train()(sample.pixels.float() / 255).argmax(1)
    share: float = (answers == sample.labels).double().mean().item()
    return share


def report(lines: Sequence[Line]) -> Report:
    """Return the largest rates, and the median steps by rate."""
    limits = [line for line in lines if "halvings" in line]
    grid = [line for line in lines if "rate" in line]
    logs = {
        (norm, optimizer): [
            math.log10(value)
            for value in by_seed(limits, "largest", norm=norm, optimizer=optimizer)
        ]
        for norm in NORMS
        for optimizer in OPTIMIZERS
    }
    largest = {arm: mean_interval(values) for arm, values in logs.items()}
    ratio = {
        optimizer: _times(paired_difference(logs["with", optimizer], logs["without", optimizer]))
        for optimizer in OPTIMIZERS
    }
    fewest = {
        norm: min(
            (found for rate in RATES if (found := _median(grid, norm, "sgd", rate)) is not None),
            default=None,
        )
        for norm in NORMS
    }
    cap = lines[0]["cap"]
    quickest = " and ".join(
        (f"not within {cap:,} steps" if steps is None else f"in {steps:,.0f} steps")
        + f" {norm} batch norm"
        for norm, steps in fewest.items()
    )
    answer = (
        f"With batch norm, the largest learning rate that reaches 70 % is {ratio['sgd']} "
        f"that without it for plain SGD, and {ratio['adam']} for Adam. At the best rate of the "
        f"grid, SGD reaches 70 % {quickest}."
    )
    rows = [
        [
            f"{norm} batch norm, {optimizer}",
            f"{10**value.mean:.3g}",
            f"{10**value.low:.3g} to {10**value.high:.3g}",
        ]
        for (norm, optimizer), value in largest.items()
    ]
    rates = sorted({line["rate"] for line in grid})
    steps = [
        [f"{rate:g}"]
        + [
            _count(_median(grid, norm, optimizer, rate))
            for optimizer in OPTIMIZERS
            for norm in NORMS
        ]
        for rate in rates
    ]
    heading = [f"{optimizer}, {norm}" for optimizer in OPTIMIZERS for norm in NORMS]
    return Report(
        answer,
        f"""## The largest rate that reaches 70 % within {cap:,} steps

{table(["fit", "geometric mean", "95 % interval"], rows)}

## Steps to 70 %: the median over the seeds

{table(["rate", *heading], steps)}

A dash means that half of the fits or more did not reach 70 % within {cap:,} steps.""",
        "A point for each fit that reaches 70 %: its steps, by learning rate, on logarithmic axes. "
        "A dashed line is the largest rate that reaches 70 %.",
        f"{lines[0]['images']:,} training images, batches of 128, at most {cap:,} steps, "
        f"{len(by_seed(limits, 'largest', norm='with', optimizer='sgd'))} seeds. The accuracy is "
        f"measured every {LOOK_EVERY} steps on 1,000 held-out training images, normalised by their "
        f"own statistics. {SEEDS}",
    )


def _times(log: Interval) -> str:
    """Return a ratio and its interval, from those of its decimal logarithm."""
    ratio, low, high = (
        f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
        for value in (10**log.mean, 10**log.low, 10**log.high)
    )
    return f"{ratio} times (95 % interval {low} to {high})"


def _median(lines: Sequence[Line], norm: str, optimizer: str, rate: float) -> float | None:
    steps = by_seed(lines, "steps", norm=norm, optimizer=optimizer, rate=rate)
    middle = median(math.inf if count is None else count for count in steps) if steps else math.inf
    return None if math.isinf(middle) else middle


def _count(steps: float | None) -> str:
    return "–" if steps is None else f"{steps:,.0f}"  # noqa: RUF001 - the dash of tables


def draw(lines: Sequence[Line], figure: Figure) -> None:
    """Draw the steps to 70 % by rate, and the largest rates as vertical lines."""
    figure.set_size_inches(9, 3.4)
    for axes, optimizer in zip(figure.subplots(1, 2, sharey=True), OPTIMIZERS, strict=True):
        for norm, colour in zip(NORMS, ("tab:blue", "tab:orange"), strict=True):
            chosen = [x for x in lines if (x["norm"], x["optimizer"]) == (norm, optimizer)]
            trained = [x for x in chosen if "rate" in x and x["steps"] is not None]
            rates, steps = [x["rate"] for x in trained], [x["steps"] for x in trained]
            axes.scatter(rates, steps, color=colour, s=14, label=f"{norm} batch norm")
            limit = fmean(math.log10(x["largest"]) for x in chosen if "halvings" in x)
            axes.axvline(10**limit, color=colour, linestyle="--")
        axes.set(xscale="log", yscale="log", title=optimizer, xlabel="learning rate")
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="steps to 70 %")
    figure.axes[0].legend(fontsize=8)


STUDY = Study(
    "learning-rate",
    "How large can the learning rate be?",
    "exercise 2",
    tasks,
    measure,
    report,
    draw,
)
