"""Layer, group and instance norm instead of batch norm, also with batches of 1 and 2.

They compute their statistics over one image, so they train with a batch of any size, and predict
as they train. Sources: Ba et al. (2016), Wu and He (2018), Ulyanov et al. (2016).
"""

from collections.abc import Sequence
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import nn

from training.dataset import FashionMNIST
from training.evaluation.card import table
from training.evaluation.intervals import mean_interval, paired_difference
from training.model import initialise
from training.studies.fits import (
    Norm,
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
    TOO_SHORT,
    Line,
    Report,
    Scale,
    Study,
    Task,
    arms,
    by_seed,
)

SIZES = {128: 0.1, 2: 0.01, 1: 0.01}
"""The learning rate by batch size: noisy gradients need a lower one."""


MARGIN = 0.01
"""The loss of accuracy up to which another norm counts as equally good."""


def layer_norm(channels: int, dims: int) -> nn.Module:  # noqa: ARG001 - a `Norm`
    """Make a layer norm over all channels and positions of an image."""
    return nn.GroupNorm(1, channels)


def group_norm(channels: int, dims: int) -> nn.Module:
    """Make a group norm: 2 groups of channels after a convolution, 4 of units."""
    return nn.GroupNorm(2 if dims == 4 else 4, channels)


def instance_norm(channels: int, dims: int) -> nn.Module:
    """Make an instance norm; none for a linear layer, whose units have one value for each image."""
    return nn.InstanceNorm2d(channels, affine=True) if dims == 4 else nn.Identity()


NORMS: dict[str, Norm | None] = {
    "batch": batch_norm,
    "layer": layer_norm,
    "group": group_norm,
    "instance": instance_norm,
    "none": None,
}


def tasks(scale: Scale) -> list[Task]:
    """Return a fit for each norm, batch size and seed; batch norm cannot have a batch of 1."""
    return [
        task
        for task in arms(scale, norm=list(NORMS), batch_size=list(SIZES))
        if (task["norm"], task["batch_size"]) != ("batch", 1)
    ]


def measure(data: FashionMNIST, task: Task) -> Line:
    """Fit LeNet with this norm and batch size; small batches get one epoch."""
    parts = samples(data, task["images"])
    network = lenet([NORMS[task["norm"]]] * 4)
    initialise(network, task["seed"])
    size = task["batch_size"]
    epochs = task["epochs"] if size > 2 else 1
    train(
        network,
        parts.train,
        seed=task["seed"],
        steps=epochs * steps_per_epoch(parts.train, size),
        batch_size=size,
        optimizer=torch.optim.SGD(network.parameters(), lr=SIZES[size]),
    )
    return scores(recalibrated(network, parts.train), parts)


def report(lines: Sequence[Line]) -> Report:
    """Return the accuracy of each norm at each batch size."""

    def value(norm: str, size: int) -> list[float]:
        return by_seed(lines, "held_out", norm=norm, batch_size=size)

    others = ("layer", "group", "instance")
    best = max(others, key=lambda norm: fmean(value(norm, 128)))
    pair, single = (max(others, key=lambda norm: fmean(value(norm, size))) for size in (2, 1))
    ahead = paired_difference(value(pair, 2), value("batch", 2))
    change = paired_difference(value(best, 128), value("batch", 128))
    if change.low > 0:
        verdict = "They do better"
    elif change.high < 0:
        verdict = "No"
    else:
        verdict = "Yes, here" if change.low > -MARGIN else "These figures do not decide it"
    answer = (
        f"{verdict}: with batches of 128, the accuracy of the best other norm ({best}) is "
        f"{mean_interval(value(best, 128)):.3f}, {change:+.3f} compared with batch norm. With "
        f"batches of 2, {pair} norm has {mean_interval(value(pair, 2)):.3f}, {ahead:+.3f} compared "
        f"with batch norm. With a batch of 1, batch norm cannot train, and {single} norm has "
        f"{mean_interval(value(single, 1)):.3f}."
    )
    rows = [
        [
            norm,
            *(
                f"{mean_interval(value(norm, size)):.4f}" if value(norm, size) else "cannot train"
                for size in SIZES
            ),
            f"{fmean(by_seed(lines, 'test', norm=norm, batch_size=128)):.4f}",
        ]
        for norm in NORMS
    ]
    heading = ["norm", *(f"batch of {size}" for size in SIZES), "test, batch of 128"]
    return Report(
        answer,
        f"""Held-out accuracy:

{table(heading, rows)}

All of them subtract a mean and divide by a standard deviation. They differ in the values that these
are computed over:

- Batch norm: one channel, all images of the batch.
- Layer norm: all channels of one image ([Ba et al., 2016](https://arxiv.org/abs/1607.06450)).
- Group norm: a group of channels of one image; here 2 groups after a convolution, 4 after a linear
  layer ([Wu and He, 2018](https://arxiv.org/abs/1803.08494)).
- Instance norm: one channel of one image; here only after convolutions, because a linear layer has
  one value there ([Ulyanov et al., 2016](https://arxiv.org/abs/1607.08022)).

{TOO_SHORT}""",
        "A point for each seed.",
        f"{lines[0]['images']:,} training images, plain SGD: {lines[0]['epochs']} epochs with "
        f"batches of 128 and a learning rate of {SIZES[128]:g}, one epoch with smaller batches and "
        f"a learning rate of {SIZES[1]:g}; {len(value('batch', 128))} seeds. {RECOMPUTED} "
        f"{HELD_OUT} {SEEDS}",
    )


def draw(lines: Sequence[Line], figure: Figure) -> None:
    """Draw each norm's accuracy, in groups by batch size."""
    figure.set_size_inches(8, 3.2)
    axes = figure.subplots()
    for index, norm in enumerate(NORMS):
        for x, size in enumerate(SIZES):
            values = by_seed(lines, "held_out", norm=norm, batch_size=size)
            axes.scatter(
                [x + (index - 2) * 0.12] * len(values),
                values,
                color=f"C{index}",
                label=norm if x == 0 else None,
                s=16,
            )
    axes.set_xticks(range(len(SIZES)), [f"batch of {size}" for size in SIZES])
    axes.set(ylabel="held-out accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


STUDY = Study(
    "other-norms",
    "Do other normalisations do as well?",
    "the discussion names layer normalisation as an alternative",
    tasks,
    measure,
    report,
    draw,
)
