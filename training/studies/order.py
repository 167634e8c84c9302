"""Batch norm before or after the activation, with or without the bias before it (exercise 1).

In both positions it folds exactly. Batch norm before the sigmoid folds into the layer before it
(`training/folding.py`), batch norm after the sigmoid into the next layer (`fold_forward`). Average
pooling may lie between, because it commutes with an affine map of a channel. Padding may not: its
zeros would have to become the channel's shift.
"""

import copy
from collections.abc import Sequence
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import nn

from training.batch_norm import NormLayer, affine, statistics
from training.dataset import FashionMNIST
from training.evaluation.card import table
from training.evaluation.intervals import mean_interval, paired_difference
from training.studies.fits import batch_norm, fitted, lenet, samples, scores
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


@torch.no_grad()
def fold_forward(network: nn.Sequential) -> nn.Sequential:
    """Return a new network without batch norm: each one is folded into the next affine layer.

    For `y = s * a + t` after the activation, `W y + b = (W diag(s)) a + (b + W t)`. Average pooling
    and flattening may lie between the two. Computed in float64 and cast back once.

    Raises:
        ValueError: the network is in training mode, another kind of layer lies between the two, or
            the next layer pads its input.
    """
    if network.training:
        raise ValueError("cannot fold a network in training mode: call eval() first")
    folded = nn.Sequential()
    scale = shift = None
    for name, original in network.named_children():
        if isinstance(original, NormLayer):
            (gamma, beta), (mean, variance) = affine(original), statistics(original)
            scale = gamma.double() / torch.sqrt(variance.double() + original.eps)
            shift = beta.double() - mean.double() * scale
            continue
        layer = copy.deepcopy(original)
        if scale is not None and shift is not None:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                _absorb(layer, scale, shift)
                scale = shift = None
            elif not isinstance(layer, nn.AvgPool2d | nn.Flatten | nn.Dropout):
                raise ValueError(f"a batch norm cannot be folded through {layer}")
            elif isinstance(layer, nn.AvgPool2d) and layer.padding != 0:
                raise ValueError("a batch norm cannot be folded through padding")
        folded.add_module(name, layer)
    return folded.eval()


def _absorb(layer: nn.Conv2d | nn.Linear, scale: torch.Tensor, shift: torch.Tensor) -> None:
    if isinstance(layer, nn.Conv2d) and layer.padding != (0, 0):
        raise ValueError("a batch norm cannot be folded through padding")
    weight = layer.weight.double()
    inputs = weight.shape[1] // len(scale)  # of one channel: after flattening, several
    scale, shift = scale.repeat_interleave(inputs), shift.repeat_interleave(inputs)
    per_input = (1, -1) + (1,) * (weight.ndim - 2)
    bias = (weight * shift.view(per_input)).flatten(1).sum(1)
    if layer.bias is not None:
        bias += layer.bias.double()
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
    layer.weight.copy_((weight * scale.view(per_input)).to(layer.weight.dtype))


def tasks(scale: Scale) -> list[Task]:
    """Return a fit for each seed and arm: before with a bias, before without, and after."""
    before = arms(scale, position=["before"], bias=[True, False])
    return before + arms(scale, position=["after"], bias=[True])


def measure(data: FashionMNIST, task: Task) -> Line:
    """Fit LeNet with batch norm in this position; after the sigmoid, also measure the fold."""
    parts = samples(data, task["images"])
    after = task["position"] == "after"
    network = lenet([batch_norm] * 4, after_activation=after, bias=task["bias"])
    network = fitted(network, parts.train, seed=task["seed"], epochs=task["epochs"])
    line: Line = dict(scores(network, parts))
    if after:
        images = parts.test.pixels[:1000].float() / 255
        with torch.no_grad():
            exact = copy.deepcopy(network).double()(images.double())
            line["fold_error"] = (fold_forward(network)(images) - exact).abs().max().item()
    return line


def report(lines: Sequence[Line]) -> Report:
    """Return each arm's accuracy, the paired differences, and the fold's error."""

    def value(position: str, bias: bool) -> list[float]:
        return by_seed(lines, "held_out", position=position, bias=bias)

    idle = paired_difference(value("before", False), value("before", True))
    moved = paired_difference(value("after", True), value("before", True))
    error = max(line["fold_error"] for line in lines if "fold_error" in line)
    verdict = "Either: the accuracies are not measurably different"
    if moved.excludes(0):
        verdict = "After: it is more accurate" if moved.mean > 0 else "Before: it is more accurate"
    answer = (
        f"{verdict} (after minus before: {moved:+.4f}). The bias before a batch norm is not "
        f"needed, because batch norm subtracts it: without it, accuracy changes by {idle:+.4f}. "
        f"Batch norm after the activation folds too, into the next layer: no logit changes by more "
        f"than {error:.0e}."
    )
    rows = [
        [
            f"{position} the sigmoid, {'with' if bias else 'without'} bias",
            f"{mean_interval(value(position, bias)):.4f}",
            f"{fmean(by_seed(lines, 'test', position=position, bias=bias)):.4f}",
        ]
        for position in ("before", "after")
        for bias in (True, False)
        if value(position, bias)
    ]
    return Report(
        answer,
        f"""{table(["batch norm", "held-out accuracy", "test"], rows)}

The bias has no effect because the batch norm of `x + c` is the batch norm of `x`: the mean
contains `c`, and is subtracted. So the bias has gradient zero, and in prediction the moving mean
absorbs it. With the sigmoid between the two this does not hold, so batch norm after the sigmoid is
only measured with the bias.

Both folds are exact. With fixed mean `m` and variance `v`, batch norm multiplies a channel by
`s = gamma / sqrt(v + eps)` and adds `t = beta - m s`. Before the activation, it goes into the layer
before it: `s(Wu + b) + t = (sW)u + (sb + t)`. After the activation `a`, it goes into the next
layer: `W(sa + t) + b = (W diag(s))a + (Wt + b)`. `tests/training/studies/test_layers.py` checks
both to the last digits of float64.""",
        "A point for each seed.",
        f"{lines[0]['images']:,} training images, {lines[0]['epochs']} epochs of SGD with batches "
        f"of 128 and a learning rate of 0.1, {len(value('before', True))} seeds. {RECOMPUTED} "
        f"{HELD_OUT} {SEEDS} One exception: a network without the bias draws fewer random numbers, "
        "so from conv2 on its weights start elsewhere.",
    )


def draw(lines: Sequence[Line], figure: Figure) -> None:
    """Draw each arm's accuracy, a point for each seed."""
    figure.set_size_inches(8, 2.4)
    axes = figure.subplots()
    names = []
    for y, (position, bias) in enumerate((("before", True), ("before", False), ("after", True))):
        values = by_seed(lines, "held_out", position=position, bias=bias)
        axes.scatter(values, [y] * len(values), alpha=0.6)
        names.append(f"{position}, {'with' if bias else 'without'} bias")
    axes.set_yticks(range(3), names)
    axes.invert_yaxis()
    axes.set(xlabel="held-out accuracy")
    axes.grid(alpha=0.3)


STUDY = Study(
    "order",
    "Before or after the activation, and is the bias before it needed?",
    "exercise 1",
    tasks,
    measure,
    report,
    draw,
)
