"""Pictures of a fit: curves by epoch, confusion, confidence, batch norm's gamma and beta."""

import copy
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from training.atomic import write_whole
from training.batch_norm import affine
from training.dataset import CLASS_NAMES
from training.evaluation.confidence import Labels, Probabilities, answered, answered_curve
from training.fitting.run import Epoch, Run
from training.model import BNLeNet, norm_layers

AffineParameters = dict[str, tuple[list[float], list[float]]]
"""By the layer's name: gamma and beta, with a number for each channel."""


def affine_parameters(model: BNLeNet) -> AffineParameters:
    """Return the learnt gamma and beta of every batch-norm layer, by the layer's name."""
    pairs = {name: affine(layer) for name, layer in norm_layers(model).items()}
    return {name: (gamma.tolist(), beta.tolist()) for name, (gamma, beta) in pairs.items()}


def draw_run(run: Run) -> None:
    """Draw a complete run's pictures into its folder: curves, confusion matrix, gamma and beta."""
    draw_curves(run.metrics(), run.folder / "curves.png")
    draw_confusion(run.results()["confusion"], run.folder / "confusion.png")
    draw_norms(run.model(), run.folder / "norms.png")


def draw_curves(metrics: Sequence[Epoch], out: Path) -> None:
    """Draw loss and accuracies by epoch, from the lines of metrics.jsonl."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [line.epoch for line in metrics]
    left.plot(epochs, [line.loss for line in metrics], marker=".")
    left.set(xlabel="epoch", ylabel="training loss (nats)")
    right.plot(epochs, [line.train_accuracy for line in metrics], marker=".", label="training")
    right.plot(epochs, [line.accuracy for line in metrics], marker=".", label="evaluation")
    right.set(xlabel="epoch", ylabel="accuracy")
    right.legend()
    save_figure(figure, out)


def draw_confusion(confusion: Sequence[Sequence[int]], out: Path) -> None:
    """Draw a confusion matrix [10, 10]: rows are the true classes, columns the answers."""
    counts = np.array(confusion)
    figure = Figure(figsize=(7, 6.2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(10), CLASS_NAMES, rotation=45, ha="right")
    axes.set_yticks(range(10), CLASS_NAMES)
    axes.set(xlabel="answer", ylabel="true class")
    for (row, column), count in np.ndenumerate(counts):
        shade = "white" if count > counts[row].sum() / 2 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=shade, fontsize=8)
    save_figure(figure, out)


def draw_norms(model: BNLeNet, out: Path) -> None:
    """Draw gamma against beta: one panel for each batch-norm layer, one point for each channel."""
    parameters = affine_parameters(model)
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    panels = figure.subplots(1, len(parameters), sharex=True, sharey=True)
    for axes, (name, (gamma, beta)) in zip(panels, parameters.items(), strict=True):
        axes.scatter(beta, gamma, s=14, alpha=0.7)
        axes.set(title=f"{name}, {len(gamma)} channels", xlabel="beta (shift)")
        axes.axvline(0, color="black", linewidth=0.5)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="gamma (scale)")
    save_figure(figure, out)


def draw_confidence(probabilities: Probabilities, labels: Labels, out: Path) -> None:
    """Draw the accuracy of the answers against the share of images that get one.

    Each point of the line is a threshold of confidence. The dots are `THRESHOLDS`.
    """
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*answered_curve(probabilities, labels), linewidth=1.2)
    for one in answered(probabilities, labels):
        if one.accuracy is not None:
            axes.plot(one.share, one.accuracy, "o", color="C0", markersize=4)
            axes.annotate(
                f"{one.threshold:g}",
                (one.share, one.accuracy),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set(xlabel="share of images answered", ylabel="accuracy of the answers", xlim=(0, 1.05))
    axes.grid(alpha=0.3)
    save_figure(figure, out)


@torch.no_grad()
def draw_unit(model: BNLeNet, images: NDArray[np.uint8], out: Path) -> None:
    """Draw one unit's values before and after its batch norm, in training and in prediction.

    Args:
        model: in prediction mode; it is not changed.
        images: uint8 [n, 28, 28], at least 128 of them.
        out: the PNG file.
    """
    pixels = torch.from_numpy(images)[:, None].float() / 255
    names = [name for name, _ in model.named_children()]
    layer = model.norm3
    before = nn.Sequential(*list(model.children())[: names.index("norm3")])(pixels)
    batch = before[:128]
    trained = copy.deepcopy(layer).train()(batch)
    values = {
        "before the layer": before,
        "after it, in training\n(a batch of 128, its own statistics)": trained,
        "after it, in prediction\n(fixed statistics)": layer(before),
    }
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (title, found) in zip(panels, values.items(), strict=True):
        unit = found[:, 0].numpy()
        axes.hist(unit, bins=40, density=True)
        axes.set(
            title=title,
            xlabel=f"first unit of norm3: mean {unit.mean():.2f}, deviation {unit.std():.2f}",
        )
        axes.title.set_fontsize(9)
        axes.xaxis.label.set_fontsize(8)
    panels[0].set(ylabel="density")
    save_figure(figure, out)


def save_figure(figure: Figure, out: Path) -> None:
    """Write a figure as PNG, with any file name; the same figure gives the same bytes."""
    drawn = BytesIO()
    # Without this, matplotlib writes its version, which changes the bytes.
    figure.savefig(drawn, format="png", dpi=110, metadata={"Software": None})
    write_whole(out, drawn.getvalue())
