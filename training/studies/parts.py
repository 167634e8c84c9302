"""Which part of batch norm does the work (exercises 4 and 5).

Batch norm subtracts the batch's mean, divides by its standard deviation, then scales by gamma and
shifts by beta. Every arm leaves out one part: the division, the subtraction, or the learning of
gamma, of beta, or of both.
"""

from collections.abc import Sequence
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from training.batch_norm import BatchNorm
from training.dataset import FashionMNIST
from training.evaluation.card import table
from training.evaluation.intervals import mean_interval, paired_difference
from training.studies.fits import Norm, batch_norm, fitted, lenet, samples, scores
from training.studies.study import TOO_SHORT, Line, Report, Scale, Study, Task, arms, by_seed


class MeanOnly(BatchNorm):
    """Batch norm that subtracts the mean and does not divide."""

    def forward(self, x: Tensor) -> Tensor:
        """Subtract the mean of the batch, or in prediction the moving mean."""
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = (1, -1) + (1,) * (x.ndim - 2)
        mean = x.mean(axes) if self.training else self.moving_mean
        if self.training:
            self.moving_mean.lerp_(mean.detach(), 1 - self.momentum)
        return self.gamma.view(shape) * (x - mean.view(shape)) + self.beta.view(shape)


class VarianceOnly(BatchNorm):
    """Batch norm that divides by the standard deviation and does not subtract the mean."""

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the standard deviation about the mean; the mean itself is not subtracted."""
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = (1, -1) + (1,) * (x.ndim - 2)
        variance = x.var(axes, correction=0) if self.training else self.moving_variance
        if self.training:
            self.moving_variance.lerp_(variance.detach(), 1 - self.momentum)
        scale = self.gamma * torch.rsqrt(variance + self.eps)
        return scale.view(shape) * x + self.beta.view(shape)


def fixed(gamma: bool, beta: bool) -> Norm:
    """Return a function that makes batch norms with gamma fixed at 1, beta fixed at 0, or both."""

    def make(channels: int, dims: int) -> nn.Module:
        layer = batch_norm(channels, dims)
        layer.weight.requires_grad_(not gamma)
        layer.bias.requires_grad_(not beta)
        return layer

    return make


FAILED = 0.2
"""Twice the accuracy of guessing: below it, a fit has not learnt."""

NORMS: dict[str, Norm | None] = {
    "full": batch_norm,
    "mean only": lambda channels, dims: MeanOnly(channels, 4 if dims == 4 else 2),
    "variance only": lambda channels, dims: VarianceOnly(channels, 4 if dims == 4 else 2),
    "gamma fixed": fixed(gamma=True, beta=False),
    "beta fixed": fixed(gamma=False, beta=True),
    "both fixed": fixed(gamma=True, beta=True),
    "none": None,
}


def tasks(scale: Scale) -> list[Task]:
    """Return a fit for each arm and seed."""
    return arms(scale, norm=list(NORMS))


def measure(data: FashionMNIST, task: Task) -> Line:
    """Fit LeNet with this normalisation in all four places."""
    parts = samples(data, task["images"])
    network = lenet([NORMS[task["norm"]]] * 4)
    return scores(fitted(network, parts.train, seed=task["seed"], epochs=task["epochs"]), parts)


def report(lines: Sequence[Line]) -> Report:
    """Return each arm's accuracy, and its paired difference from full batch norm."""
    full = by_seed(lines, "held_out", norm="full")
    loss = {
        n: paired_difference(by_seed(lines, "held_out", norm=n), full) for n in NORMS if n != "full"
    }
    mean, variance = loss["mean only"], loss["variance only"]
    apart = paired_difference(
        by_seed(lines, "held_out", norm="mean only"),
        by_seed(lines, "held_out", norm="variance only"),
    )
    needed = [
        part for part, change in (("division", mean), ("subtraction", variance)) if change.high < 0
    ]
    verdict = "The figures do not show which part matters most"
    if apart.excludes(0) and needed:
        verdict = f"The {'division' if apart.mean < 0 else 'subtraction'} matters most"
    elif needed:
        verdict = (
            f"The {' and the '.join(needed)} {'are' if needed[1:] else 'is'} needed, but the "
            "figures do not show which part matters most"
        )
    affine = loss["both fixed"]
    failed = {
        norm: f"{sum(value < FAILED for value in by_seed(lines, 'held_out', norm=norm))} of "
        f"{len(full)} fits stay below {FAILED:.0%}"
        for norm in ("mean only", "variance only")
    }
    answer = (
        f"{verdict}: without the division, accuracy changes by {mean:+.3f} and "
        f"{failed['mean only']}; without the subtraction, it changes by {variance:+.3f} and "
        f"{failed['variance only']}. With gamma fixed at 1 and beta at 0 it changes by "
        f"{affine:+.3f}{'' if affine.excludes(0) else ', which may be chance'}."
    )
    rows = [
        [
            name,
            f"{mean_interval(by_seed(lines, 'held_out', norm=name)):.4f}",
            f"{loss[name]:+.4f}" if name in loss else "",
            f"{fmean(by_seed(lines, 'test', norm=name)):.4f}",
        ]
        for name in NORMS
    ]
    heading = ["arm", "held-out accuracy", "paired difference from full", "test"]
    return Report(
        answer,
        f"""{table(heading, rows)}

- Full: subtract the batch's mean, divide by its standard deviation, multiply by gamma, add beta.
- Mean only: without the division. Variance only: without the subtraction.
- Gamma fixed: it stays 1. Beta fixed: it stays 0. Both fixed: both stay so.
- None: no batch norm.

{TOO_SHORT}""",
        "A point for each seed. Points of failed fits lie at 0.1, on top of each other.",
    )


def draw(lines: Sequence[Line], figure: Figure) -> None:
    """Draw each arm's accuracy, a point for each seed."""
    figure.set_size_inches(8, 3)
    axes = figure.subplots()
    for y, name in enumerate(NORMS):
        values = by_seed(lines, "held_out", norm=name)
        axes.scatter(values, [y] * len(values), alpha=0.6)
    axes.set_yticks(range(len(NORMS)), list(NORMS))
    axes.invert_yaxis()
    axes.set(xlabel="held-out accuracy")
    axes.grid(alpha=0.3)


STUDY = Study(
    "parts",
    "Which part of batch norm does the work?",
    "exercises 4 and 5",
    tasks,
    measure,
    report,
    draw,
)
