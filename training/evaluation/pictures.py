"""Pictures of a fit: curves by epoch, the confusion matrix, batch norm's gamma and beta."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from training.atomic import write_whole
from training.batch_norm import affine
from training.dataset import CLASS_NAMES
from training.fitting.run import Epoch, Run
from training.model import BNLeNet, norm_layers

AffineParameters = dict[str, tuple[list[float], list[float]]]
"""Gamma and beta, a number for each channel, by the layer's name."""


def affine_parameters(model: BNLeNet) -> AffineParameters:
    """Return the learnt gamma and beta of every batch-norm layer, by its name."""
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
    """Draw the learnt gamma and beta of every batch-norm layer, channel by channel."""
    parameters = affine_parameters(model)
    figure = Figure(figsize=(9, 2.2 * len(parameters)), layout="constrained")
    for axes, (name, (gamma, beta)) in zip(
        figure.subplots(len(parameters), 1), parameters.items(), strict=True
    ):
        channels = np.arange(len(gamma))
        axes.bar(channels - 0.2, gamma, width=0.4, label="gamma")
        axes.bar(channels + 0.2, beta, width=0.4, label="beta")
        axes.set(title=name, xlim=(-1, len(gamma)))
        axes.axhline(0, color="black", linewidth=0.5)
    figure.axes[0].legend()
    save_figure(figure, out)


def save_figure(figure: Figure, out: Path) -> None:
    """Write a figure as PNG, under any file name; the same figure gives the same bytes."""
    drawn = BytesIO()
    # The version of the software that drew it would change the bytes.
    figure.savefig(drawn, format="png", dpi=110, metadata={"Software": None})
    write_whole(out, drawn.getvalue())
