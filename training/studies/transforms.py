"""Other transforms of a batch (exercise 8): whitening, probability integral, sparsity.

- Whitening uses the full covariance of the channels, by its Cholesky factor.
- The probability integral transform applies the normal distribution function to the normalised
  values, so that a normal unit becomes uniform; then gamma and beta follow, as in batch norm.
- The sparsity regulariser is batch norm with an L1 penalty on the hidden activations.
"""

import time
from collections.abc import Sequence
from statistics import fmean

import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from matplotlib.figure import Figure
from torch import Tensor, nn

from training.dataset import FashionMNIST
from training.evaluation.card import table
from training.evaluation.intervals import mean_interval, paired_difference
from training.model import initialise
from training.studies.fits import Norm, batch_norm, batches, lenet, samples, scores, steps_per_epoch
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

PENALTY = 1e-3
ARMS = ("batch norm", "whitening", "probability integral", "sparsity")


class Whitening(nn.Module):
    """Subtract the mean and multiply by the inverse Cholesky factor of the covariance.

    Args:
        channels: C; input [n, C] or [n, C, H, W].
        eps: added to the covariance's diagonal.
    """

    mean: Tensor
    covariance: Tensor

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps, self.momentum = eps, 0.9
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("covariance", torch.eye(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Whiten the channels, then scale and shift them."""
        rows = x.movedim(1, -1).reshape(-1, x.shape[1])
        if self.training:
            mean, covariance = rows.mean(0), torch.cov(rows.T, correction=0)
            self.mean.lerp_(mean.detach(), 1 - self.momentum)
            self.covariance.lerp_(covariance.detach(), 1 - self.momentum)
        else:
            mean, covariance = self.mean, self.covariance
        factor = torch.linalg.cholesky(covariance + self.eps * torch.eye(len(mean)))
        white = torch.linalg.solve_triangular(factor, (rows - mean).T, upper=False).T
        white = white * self.gamma + self.beta
        shaped: Tensor = white.reshape(x.movedim(1, -1).shape).movedim(-1, 1)
        return shaped


class ProbabilityIntegral(nn.Module):
    """Batch norm, then the normal distribution function.

    For normal input the result is uniform on [0, 1]; it is scaled to mean 0 and variance 1.
    """

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if dims == 4 else nn.BatchNorm1d(channels)
        self.norm.weight.requires_grad_(False)
        self.norm.bias.requires_grad_(False)
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Transform, then scale and shift."""
        uniform = (torch.special.ndtr(self.norm(x)) - 0.5) * 12**0.5
        shape = (1, -1) + (1,) * (x.ndim - 2)
        output: Tensor = self.gamma.view(shape) * uniform + self.beta.view(shape)
        return output


NORMS: dict[str, Norm] = {
    "batch norm": batch_norm,
    "whitening": lambda channels, _: Whitening(channels),
    "probability integral": ProbabilityIntegral,
    "sparsity": batch_norm,
}


def tasks(scale: Scale) -> list[Task]:
    """Return a fit for each transform and seed."""
    return arms(scale, transform=list(ARMS))


def measure(data: FashionMNIST, task: Task) -> Line:
    """Fit LeNet with this transform in all four places, and measure the time of a step."""
    parts = samples(data, task["images"])
    network = lenet([NORMS[task["transform"]]] * 4)
    initialise(network, task["seed"])
    hidden: list[Tensor] = []
    if task["transform"] == "sparsity":
        for layer in network:
            if isinstance(layer, nn.Sigmoid):
                layer.register_forward_hook(lambda _, __, output: hidden.append(output))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    steps = task["epochs"] * steps_per_epoch(parts.train, 128)
    network.train()
    feed = batches(parts.train, 128, task["seed"])
    begin = time.perf_counter()
    for _ in range(steps):
        images, labels = next(feed)
        hidden.clear()
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        for activations in hidden:
            loss = loss + PENALTY * activations.abs().flatten(1).sum(1).mean()
        loss.backward()  # type: ignore[no-untyped-call] # torch forgot
        optimizer.step()
    seconds = time.perf_counter() - begin
    hidden.clear()
    recalibrate(network, parts.train.pixels)
    return {**scores(network, parts), "ms_per_step": 1e3 * seconds / steps}


@torch.no_grad()
def recalibrate(network: nn.Module, pixels: Tensor) -> None:
    """Replace moving statistics by equal means over batches of 1,000 images."""
    network.train()
    for count, part in enumerate(torch.split(pixels, 1000), 1):
        for layer in network.modules():
            if isinstance(layer, Whitening):
                layer.momentum = 1 - 1 / count
            elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.momentum = 1 / count
        network(part.float() / 255)
    network.eval()


def report(lines: Sequence[Line]) -> Report:
    """Return accuracy, gap and time of each transform."""

    def value(name: str, figure: str = "held_out") -> list[float]:
        return by_seed(lines, figure, transform=name)

    change = {
        name: paired_difference(value(name), value("batch norm"))
        for name in ARMS
        if name != ARMS[0]
    }
    steps = zip(value("whitening", "ms_per_step"), value("batch norm", "ms_per_step"), strict=True)
    slower = mean_interval([white / plain for white, plain in steps])
    gaps = {
        name: [a - b for a, b in zip(value(name, "train"), value(name), strict=True)]
        for name in ARMS
    }
    narrower = paired_difference(gaps["sparsity"], gaps["batch norm"])
    acts = "acts" if narrower.high < 0 else "does not measurably act"
    works = {
        name: "is more accurate than batch norm"
        if difference.low > 0
        else "is less accurate than batch norm"
        if difference.high < 0
        else "is not measurably different from batch norm"
        for name, difference in change.items()
    }
    answer = (
        f"Whitening {works['whitening']} ({change['whitening']:+.4f}), and its step takes "
        f"{slower:.2f} times as long. The probability integral transform "
        f"{works['probability integral']} ({change['probability integral']:+.4f}). The sparsity "
        f"penalty {acts} as a regulariser: the gap changes by {narrower:+.4f}, and accuracy by "
        f"{change['sparsity']:+.4f}."
    )
    rows = [
        [
            name,
            f"{mean_interval(value(name)):.4f}",
            f"{change[name]:+.4f}" if name in change else "",
            f"{mean_interval(gaps[name]):.4f}",
            f"{mean_interval(value(name, 'ms_per_step')):.2f}",
            f"{fmean(value(name, 'test')):.4f}",
        ]
        for name in ARMS
    ]
    heading = ["transform", "held-out accuracy", "paired difference", "gap", "ms a step", "test"]
    return Report(
        answer,
        f"""{table(heading, rows)}

- Whitening: subtract the mean, and multiply by the inverse Cholesky factor of the channels' full
  covariance. Then the channels have variance 1 and are uncorrelated. A batch of 128 images barely
  suffices for the covariance of 120 units, so 0.001 is added to its diagonal.
- Probability integral: batch norm, then the normal distribution function. A normal unit becomes
  uniform on 0 to 1, which is then scaled to mean 0 and variance 1.
- Sparsity: batch norm, and the loss has a penalty: {PENALTY:g} times the sum of an image's hidden
  activations.
- Gap: accuracy on the fitted images minus that on the held-out ones. Regularisers narrow it.""",
        "A point for each seed. To the right is slower, up is more accurate.",
        f"{lines[0]['images']:,} training images, {lines[0]['epochs']} epochs of SGD with batches "
        f"of 128 and a learning rate of 0.1, {len(gaps['sparsity'])} seeds. Times are of one "
        f"thread, with one fit after the other. {RECOMPUTED} {HELD_OUT} {SEEDS}",
    )


def draw(lines: Sequence[Line], figure: Figure) -> None:
    """Draw accuracy against milliseconds a step."""
    figure.set_size_inches(7, 3)
    axes = figure.subplots()
    for name in ARMS:
        chosen = {"transform": name}
        axes.scatter(
            by_seed(lines, "ms_per_step", **chosen),
            by_seed(lines, "held_out", **chosen),
            label=name,
        )
    axes.set(xlim=(0, None), xlabel="milliseconds a step", ylabel="held-out accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


STUDY = Study(
    "transforms",
    "Whitening, probability integral, sparsity: do other transforms work?",
    "exercise 8",
    tasks,
    measure,
    report,
    draw,
    timed=True,
)
