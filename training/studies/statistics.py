"""Moving averages, compared with statistics of the whole training set, after each epoch.

Moving averages do not influence training, so one fit gives those of every momentum. The spread
between epochs is measured after the learning trend of the last epochs is subtracted.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from training.batch_norm import set_statistics
from training.dataset import FashionMNIST
from training.evaluation.card import table
from training.evaluation.intervals import Interval, mean_interval, paired_difference
from training.model import initialise, norm_layers
from training.studies.fits import (
    Sample,
    accuracy,
    batch_norm,
    lenet,
    recalibrated,
    samples,
    steps_per_epoch,
    train,
)
from training.studies.study import SEEDS, Line, Report, Scale, Study, Task, arms

MOMENTA = (0.5, 0.8, 0.9, 0.95, 0.99)
"""Shares of the old value in the new moving average; the chapter's is 0.9."""
FEW = 2_432
"""The number of images that moving averages with momentum 0.9 effectively use: with weights
0.1 * 0.9^k, an average has the variance of an equal mean of (1 + 0.9) / (1 - 0.9) = 19 batches."""
LAST = 5
"""The number of epochs, at the end of each fit, in the tables."""
KINDS = {
    **{f"momentum {momentum}": f"moving averages, momentum {momentum}" for momentum in MOMENTA},
    "few": f"{FEW:,} images",
    "all": "all training images",
}
CHAPTER = "momentum 0.9"


class MovingAverages:
    """The moving averages of every batch norm, with several momenta at once."""

    def __init__(self, network: nn.Sequential) -> None:
        self._network = network
        self._values: dict[str, list[list[Tensor]]] = {}
        for name, layer in norm_layers(network).items():
            channels = layer.num_features
            self._values[name] = [[torch.zeros(channels), torch.ones(channels)] for _ in MOMENTA]
            layer.register_forward_pre_hook(
                lambda layer, inputs, name=name: self._update(name, layer, inputs[0])
            )

    def _update(self, name: str, layer: nn.Module, x: Tensor) -> None:
        if layer.training:
            axes = [axis for axis in range(x.ndim) if axis != 1]
            variance, mean = torch.var_mean(x.detach(), axes, correction=0)
            for momentum, (moving_mean, moving_variance) in zip(
                MOMENTA, self._values[name], strict=True
            ):
                moving_mean.lerp_(mean, 1 - momentum)
                moving_variance.lerp_(variance, 1 - momentum)

    def applied(self, index: int) -> nn.Sequential:
        """Return a copy of the network with the moving averages of one momentum."""
        network = copy.deepcopy(self._network).eval()
        with torch.no_grad():
            for name, layer in norm_layers(network).items():
                set_statistics(layer, *self._values[name][index])
        return network


def tasks(scale: Scale) -> list[Task]:
    """Return one fit for each seed, by the chapter's recipe."""
    if not scale.quick:
        scale = replace(scale, images=50_000, epochs=10)
    return arms(scale)


def measure(data: FashionMNIST, task: Task) -> Line:
    """Fit; after each epoch, score the same weights with each kind of statistics."""
    parts = samples(data, task["images"])
    network = lenet([batch_norm] * 4)
    initialise(network, task["seed"])
    averages = MovingAverages(network)
    steps = steps_per_epoch(parts.train, 128)
    line: Line = {kind: [] for kind in KINDS}

    def look(step: int, _: float) -> bool:
        if step % steps == 0:
            for index, momentum in enumerate(MOMENTA):
                score = accuracy(averages.applied(index), parts.held_out)
                line[f"momentum {momentum}"].append(score)
            generator = torch.Generator().manual_seed(step)
            rows = torch.randperm(len(parts.train.labels), generator=generator)[:FEW]
            few = Sample(parts.train.pixels[rows], parts.train.labels[rows])
            line["few"].append(accuracy(recalibrated(network, few), parts.held_out))
            line["all"].append(accuracy(recalibrated(network, parts.train), parts.held_out))
            network.train()
        return False

    train(network, parts.train, seed=task["seed"], steps=steps * task["epochs"], after_step=look)
    return line


def spread_between_epochs(curve: Sequence[float]) -> float:
    """Return the standard deviation of a fit's last epochs around their own straight line."""
    last = np.array(curve[-LAST:])
    epochs = np.arange(len(last))
    if len(last) < 3:
        return float(last.std())
    residuals = last - np.polyval(np.polyfit(epochs, last, 1), epochs)
    return float(np.sqrt((residuals**2).sum() / (len(last) - 2)))


def ratio(lines: Sequence[Line], kind: str) -> tuple[float, float, float]:
    """Return how many times the spread between epochs is that of "all": mean, low, high.

    Geometric mean over the seeds, with the t-interval of the logarithms.
    """
    logs = [
        math.log(
            max(spread_between_epochs(line[kind]), 1e-6)
            / max(spread_between_epochs(line["all"]), 1e-6)
        )
        for line in lines
    ]
    value = mean_interval(logs)
    return math.exp(value.mean), math.exp(value.low), math.exp(min(value.high, 700))


def report(lines: Sequence[Line]) -> Report:
    """Return mean, spreads and ratios for each kind of statistics."""
    means = {k: mean_interval([fmean(line[k][-LAST:]) for line in lines]) for k in KINDS}
    seeds = {k: stdev([line[k][-1] for line in lines]) for k in KINDS}
    chapter, low, high = ratio(lines, CHAPTER)

    def over_chapter(kind: str) -> Interval:
        return paired_difference(
            [fmean(line[kind][-LAST:]) for line in lines],
            [fmean(line[CHAPTER][-LAST:]) for line in lines],
        )

    gain = over_chapter("all")
    verdict = "Neither is measurably better"
    if gain.excludes(0):
        kind = "Statistics of the whole training set" if gain.mean > 0 else "Moving averages"
        verdict = f"{kind} are better"
    others = [kind for kind in KINDS if kind.startswith("momentum") and kind != CHAPTER]
    best = max(others, key=lambda kind: means[kind].mean)
    better = over_chapter(best)
    helps = "helps" if better.low > 0 else "does not measurably help"
    answer = (
        f"{verdict} (held-out accuracy, whole set minus moving averages with momentum 0.9: "
        f"{gain:+.4f}). Between epochs, the accuracy with moving averages varies {chapter:.1f} "
        f"times as much (95 % interval {low:.1f} to {high:.1f}). "
        f"Another momentum {helps} (the best, {best.removeprefix('momentum ')}: {better:+.4f})."
    )
    rows = []
    for kind, name in KINDS.items():
        times, lowest, highest = ratio(lines, kind)
        shown = f"{times:.1f} ({lowest:.1f} to {highest:.1f})" if kind != "all" else "1"
        between = fmean(spread_between_epochs(line[kind]) for line in lines)
        worst = min(min(line[kind][-LAST:]) for line in lines)
        rows.append(
            [
                name,
                f"{means[kind]:.4f}",
                f"{between:.4f}",
                shown,
                f"{seeds[kind]:.4f}",
                f"{worst:.4f}",
            ]
        )
    heading = [
        "statistics",
        "held-out accuracy",
        "between epochs",
        "ratio to all images",
        "between seeds",
        "lowest",
    ]
    return Report(
        answer,
        f"""## The last {min(LAST, len(lines[0]["all"]))} epochs

{table(heading, rows)}

- Held-out accuracy: the mean over these epochs and the seeds.
- Between epochs: the standard deviation of a fit's accuracies about a straight line through them;
  the mean over the seeds. Ratio: how many times the spread of all training images it is, the
  geometric mean over the seeds, with its 95 % interval.
- Between seeds: the standard deviation after the last epoch. Lowest: of any seed in these epochs.
- {FEW:,} images: as many as moving averages with momentum 0.9 effectively use, but seen with the
  final weights. If this row is as good as that of all images, moving averages do not lack images;
  they are out of date.""",
        "A panel for each kind of statistics, a line for each seed. The first three panels are "
        "moving averages with this share of the old value (momentum); the last has the statistics "
        "of all training images. The weights are the same in all panels.",
        f"The chapter's recipe: {lines[0]['images']:,} training images, {lines[0]['epochs']} "
        "epochs of SGD with batches of 128 and a learning rate of 0.1, "
        f"{len(lines)} seeds. Moving averages do not influence training, so each fit is judged "
        'with every kind of statistics. "Held out" are the last 10,000 training images, which no '
        f"fit sees. {SEEDS}",
    )


def draw(lines: Sequence[Line], figure: Figure) -> None:
    """Draw accuracy by epoch for four kinds of statistics, a line for each seed."""
    shown = ("momentum 0.5", CHAPTER, "momentum 0.99", "all")
    figure.set_size_inches(10, 2.8)
    for axes, kind in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
        for line in lines:
            axes.plot(range(1, len(line[kind]) + 1), line[kind], marker=".")
        axes.set(title=KINDS[kind].removeprefix("moving averages, "), xlabel="epoch")
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="held-out accuracy")


STUDY = Study(
    "statistics",
    "Moving averages, or statistics of the whole training set?",
    "prediction with batch norm",
    tasks,
    measure,
    report,
    draw,
)
