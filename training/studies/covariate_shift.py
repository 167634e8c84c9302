"""Does batch norm work by reducing internal covariate shift? The chapter discusses this.

The study follows Santurkar et al., "How Does Batch Normalization Help Optimization?" (2018). It
measures the drift of the pre-activations during a fit, and the change of the loss along the
gradient. One arm adds noise after batch norm, which brings the shift back.
"""

import copy
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
from training.studies.fits import Norm, Sample, batch_norm, lenet, samples, train
from training.studies.learning_rate import batch_accuracy
from training.studies.study import SEEDS, Line, Report, Scale, Study, Task, arms, by_seed

RATE = 0.5
LOOK_EVERY = 25
STEP_SIZES = (0.1, 0.25, 0.5, 1.0, 2.0)
"""The steps along the negative gradient at which the loss is measured."""


class Jitter(nn.Module):
    """Scales and shifts every channel by random amounts, new ones in each training step.

    The scale is 1 + N(0, 0.5), the shift N(0, 0.5), so any two steps differ by a covariate shift.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift in training; return `x` in prediction."""
        if not self.training:
            return x
        shape = (1, x.shape[1]) + (1,) * (x.ndim - 2)
        return x * (1 + 0.5 * torch.randn(shape)) + 0.5 * torch.randn(shape)


def noisy(channels: int, dims: int) -> nn.Module:
    """Make a batch norm that `Jitter` follows."""
    return nn.Sequential(batch_norm(channels, dims), Jitter())


NORMS: dict[str, Norm | None] = {
    "batch norm": batch_norm,
    "batch norm, then noise": noisy,
    "none": None,
}


def tasks(scale: Scale) -> list[Task]:
    """Return a fit for each arm and seed."""
    return arms(scale, norm=list(NORMS), steps=[50 if scale.quick else 1500])


def measure(data: FashionMNIST, task: Task) -> Line:
    """Fit; every 25 steps, measure the drift, the loss along the gradient and the accuracy."""
    parts = samples(data, task["images"])
    torch.manual_seed(task["seed"])  # the noise draws from the global generator
    network = lenet([NORMS[task["norm"]]] * 4)
    initialise(network, task["seed"])
    probe = Sample(parts.held_out.pixels[:1000], parts.held_out.labels[:1000])
    images, labels = probe.pixels.float() / 255, probe.labels
    drifts: list[float] = []
    ranges: list[float] = []
    reached: list[int] = []
    before: Tensor | None = None

    def look(step: int, _: float) -> bool:
        nonlocal before
        if step % LOOK_EVERY:
            return False
        now = last_pre_activation(network, images)
        if before is not None:
            shift = (now.mean(0) - before.mean(0)).abs() / before.std(0).clamp_min(1e-6)
            drifts.append(shift.mean().item())
        before = now
        ranges.append(loss_range(network, images, labels))
        if not reached and batch_accuracy(network, probe) >= 0.7:
            reached.append(step)
        return False

    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    train(
        network,
        parts.train,
        seed=task["seed"],
        steps=task["steps"],
        optimizer=optimizer,
        after_step=look,
    )
    return {
        "drift": fmean(drifts),
        "range": fmean(ranges),
        "steps_to_70": reached[0] if reached else None,
        "accuracy": batch_accuracy(network, probe),
    }


@torch.no_grad()
def last_pre_activation(network: nn.Sequential, images: Tensor) -> Tensor:
    """Return the input [n, 84] of the last sigmoid, with the statistics of these images."""
    network.train()
    x = images
    for name, layer in network.named_children():
        if name == "sigmoid4":
            return x
        x = layer(x)
    raise AssertionError("the network has no sigmoid4")


def loss_range(network: nn.Sequential, images: Tensor, labels: Tensor) -> float:
    """Return the range of the loss along its own negative gradient, in nats.

    This is the largest minus the smallest loss over `STEP_SIZES` (Santurkar et al., section 3.1).
    The network does not change.
    """
    network = copy.deepcopy(network).train()
    loss = F.cross_entropy(network(images), labels)
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    losses, at = [loss.item()], 0.0
    with torch.no_grad():
        for size in STEP_SIZES:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=size - at)
            at = size
            losses.append(F.cross_entropy(network(images), labels).item())
    return max(losses) - min(losses)


def report(lines: Sequence[Line]) -> Report:
    """Return drift, range of the loss and speed of each arm."""

    def value(norm: str, figure: str) -> list[float]:
        return by_seed(lines, figure, norm=norm)

    plain, noise, none = NORMS
    more = paired_difference(value(noise, "drift"), value(plain, "drift"))
    cost = paired_difference(value(noise, "accuracy"), value(plain, "accuracy"))
    gain = paired_difference(value(noise, "accuracy"), value(none, "accuracy"))
    drifts = {norm: fmean(value(norm, "drift")) for norm in NORMS}
    above = paired_difference(value(noise, "drift"), value(none, "drift"))
    verdict, rest = "These figures do not decide it", ""
    if min(more.low, gain.low, above.low) > 0:
        verdict = "No"
    elif above.high < 0:
        rest = (
            f" But without batch norm they move by {drifts[none]:.2g}, so less drift can still be "
            "the reason."
        )
    answer = (
        f"{verdict}: with noise after batch norm, the means of the last hidden layer's units move "
        f"by {drifts[noise]:.2g} standard deviations in {LOOK_EVERY} steps instead of "
        f"{drifts[plain]:.2g}; the accuracy at the end is {cost:+.3f} compared with batch norm "
        f"alone, and {gain:+.3f} compared with no batch norm.{rest} The name does not fit: "
        '"covariate shift" is a change of the inputs between training and use.'
    )
    smoother = paired_difference(value(plain, "range"), value(none, "range"))
    smooth = "smaller" if smoother.high < 0 else "not measurably smaller"
    harm = "costs accuracy" if cost.high < 0 else "does no measurable harm"
    rows = []
    for norm in NORMS:
        steps = [s for s in by_seed(lines, "steps_to_70", norm=norm) if s is not None]
        count = len(value(norm, "drift"))
        rows.append(
            [
                norm,
                f"{mean_interval(value(norm, 'drift')):.3f}",
                f"{mean_interval(value(norm, 'range')):.3f}",
                f"{fmean(steps):,.0f} ({len(steps)} of {count})" if steps else f"none of {count}",
                f"{mean_interval(value(norm, 'accuracy')):.4f}",
            ]
        )
    heading = ["arm", "drift", "range of the loss", "steps to 70 %", "accuracy at the end"]
    return Report(
        answer,
        f"""{table(heading, rows)}

- Drift: how far the mean of a unit of the last hidden layer moves in {LOOK_EVERY} steps, in
  standard deviations of that unit; the mean over units and steps. Behind a batch norm without
  noise, the mean of these images is beta, so there the drift is the change of beta.
- Range of the loss: the largest minus the smallest loss along its own negative gradient, for
  steps of up to {max(STEP_SIZES):g}; the mean during the fit. It is {smooth} with batch norm than
  without ({smoother:+.3f}). A small range means a smooth loss, as Santurkar et al. found for batch
  norm, or a flat one: without batch norm, the gradient is nearly zero for a long time.
- Steps to 70 %: the mean over the fits that reach this accuracy, and how many do.
- Noise: in every training step, each channel behind a batch norm is multiplied by a random number
  (mean 1, standard deviation 0.5), and another (mean 0, standard deviation 0.5) is added.

The experiment is that of [Santurkar et al., 2018](https://arxiv.org/abs/1805.11604). They find that
noise does hardly any harm; here, where the accuracy is measured with the noise, it {harm}.

As the chapter says, the name "covariate shift" does not fit the drift: it means that the inputs'
distribution changes between training and use, while the rule for the labels stays the same.""",
        "A point for each fit. Right is more drift (logarithmic scale), up is more accuracy.",
        f"{lines[0]['images']:,} training images, {lines[0]['steps']:,} steps of SGD with batches "
        f"of 128 and a learning rate of {RATE:g}, {len(value(plain, 'drift'))} seeds. All figures "
        f"are of 1,000 held-out training images, normalised by their own statistics, with the "
        f"noise. {SEEDS}",
    )


def draw(lines: Sequence[Line], figure: Figure) -> None:
    """Draw drift against final accuracy."""
    figure.set_size_inches(7, 3)
    axes = figure.subplots()
    for norm in NORMS:
        axes.scatter(
            by_seed(lines, "drift", norm=norm), by_seed(lines, "accuracy", norm=norm), label=norm
        )
    axes.set(
        xscale="log",
        xlabel=f"drift: standard deviations in {LOOK_EVERY} steps",
        ylabel="accuracy at the end",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


STUDY = Study(
    "covariate-shift",
    "Does batch norm work by reducing internal covariate shift?",
    "the discussion at the end",
    tasks,
    measure,
    report,
    draw,
)
