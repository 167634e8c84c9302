"""Can batch norm replace dropout? Exercise 6, and the claim that batch norm regularises.

The fits use 5,000 images, so that a network of this size can overfit. They use Adam, because
without batch norm plain SGD stays at chance for more steps than these fits have.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch
from matplotlib.figure import Figure

from training.dataset import FashionMNIST
from training.evaluation.card import table
from training.evaluation.intervals import mean_interval, paired_difference
from training.model import initialise
from training.studies.fits import (
    batch_norm,
    lenet,
    recalibrated,
    samples,
    scores,
    steps_per_epoch,
    train,
)
from training.studies.study import (
    HELD_OUT,
    RECOMPUTED,
    SEEDS,
    Line,
    Report,
    Scale,
    Study,
    Task,
    arms,
    by_seed,
)

NORMS = {"batch norm": batch_norm, "none": None}
SHARES = (0.0, 0.2, 0.5)


def tasks(scale: Scale) -> list[Task]:
    """Return a fit for each norm, share of dropout and seed, on 5,000 images."""
    if not scale.quick:
        scale = replace(scale, images=5_000, epochs=40)
    return arms(scale, norm=list(NORMS), dropout=SHARES)


def measure(data: FashionMNIST, task: Task) -> Line:
    """Fit LeNet with this norm and share of dropout."""
    parts = samples(data, task["images"])
    network = lenet([NORMS[task["norm"]]] * 4, dropout=task["dropout"])
    initialise(network, task["seed"])
    torch.manual_seed(task["seed"])  # dropout draws from the global generator
    train(
        network,
        parts.train,
        seed=task["seed"],
        steps=task["epochs"] * steps_per_epoch(parts.train, 128),
        optimizer=torch.optim.Adam(network.parameters(), lr=0.003),
    )
    return scores(recalibrated(network, parts.train), parts)


def report(lines: Sequence[Line]) -> Report:
    """Return the accuracies and gaps of all six arms."""

    def held_out(norm: str, dropout: float) -> list[float]:
        return by_seed(lines, "held_out", norm=norm, dropout=dropout)

    def gap(norm: str, dropout: float) -> list[float]:
        fitted = by_seed(lines, "train", norm=norm, dropout=dropout)
        return [a - b for a, b in zip(fitted, held_out(norm, dropout), strict=True)]

    best = {norm: max(SHARES, key=lambda share: fmean(held_out(norm, share))) for norm in NORMS}
    swap = paired_difference(held_out("batch norm", 0.0), held_out("none", best["none"]))
    narrower = paired_difference(gap("batch norm", 0.0), gap("none", 0.0))
    verdict = (
        "Yes, here" if swap.low > 0 else "No" if swap.high < 0 else "The figures show no difference"
    )
    gap_change = (
        "narrows it"
        if narrower.high < 0
        else "widens it"
        if narrower.low > 0
        else "does not measurably change it"
    )
    answer = (
        f"{verdict}: without dropout, the network with batch norm is right on "
        f"{fmean(held_out('batch norm', 0.0)):.3f} of the held-out images, {swap:+.4f} compared "
        f"with the best network without batch norm (dropout {best['none']:g}). A regulariser "
        f"narrows the gap between fitted and held-out images; batch norm {gap_change} "
        f"({narrower:+.4f})."
    )
    rows = [
        [
            norm,
            f"{share:g}",
            f"{fmean(by_seed(lines, 'train', norm=norm, dropout=share)):.4f}",
            f"{mean_interval(held_out(norm, share)):.4f}",
            f"{paired_difference(held_out(norm, share), held_out(norm, 0.0)):+.4f}"
            if share
            else "",
            f"{mean_interval(gap(norm, share)):.4f}",
            f"{fmean(by_seed(lines, 'test', norm=norm, dropout=share)):.4f}",
        ]
        for norm in NORMS
        for share in SHARES
    ]
    heading = ["norm", "dropout", "fitted images", "held out", "by dropout", "gap", "test"]
    return Report(
        answer,
        f"""{table(heading, rows)}

- Dropout: the share of activations that it sets to zero in training, after the two hidden linear
  layers.
- By dropout: the paired difference of the held-out accuracy from no dropout.
- Gap: accuracy on the fitted images minus that on the held-out ones. A small gap can also mean that
  a network has not learnt much: compare the fitted images.""",
        "Mean accuracy with its interval, by the share of activations that dropout sets to zero. "
        "The distance between the two lines of a panel is the gap.",
        f"{lines[0]['images']:,} training images, {lines[0]['epochs']} epochs of Adam with batches "
        "of 128 and a learning rate of 0.003 (without batch norm, plain SGD stays at chance for "
        f"longer), {len(gap('none', 0.0))} seeds. {RECOMPUTED} {HELD_OUT} {SEEDS}",
    )


def draw(lines: Sequence[Line], figure: Figure) -> None:
    """Draw fitted and held-out accuracy by share of dropout."""
    figure.set_size_inches(8, 3.2)
    for axes, norm in zip(figure.subplots(1, 2, sharey=True), NORMS, strict=True):
        for key, label in (("train", "fitted images"), ("held_out", "held-out images")):
            values = [mean_interval(by_seed(lines, key, norm=norm, dropout=s)) for s in SHARES]
            axes.errorbar(
                SHARES,
                [v.mean for v in values],
                [v.half_width for v in values],
                marker="o",
                capsize=3,
                label=label,
            )
        axes.set(title="no batch norm" if norm == "none" else norm, xlabel="share dropped")
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="accuracy")
    figure.axes[0].legend(fontsize=8)


STUDY = Study(
    "dropout",
    "Can batch norm replace dropout?",
    "exercise 6, and the claim that batch norm regularises",
    tasks,
    measure,
    report,
    draw,
)
