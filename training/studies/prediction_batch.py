"""What if prediction used the statistics of its own batch (the chapter's two modes).

A model answers the test images in batches, normalised by the mean and variance of the batch; then
once with fixed statistics. The batches are drawn at random from all classes, or from one class
only.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from training.dataset import FashionMNIST
from training.evaluation.card import table
from training.fitting.run import Run
from training.studies.fits import batch_norm, fitted, lenet, samples
from training.studies.study import Line, Report, Scale, Study, Task, arms, by_seed

COMMITTED = Path(__file__).parents[2] / "models" / "run"
MODELS = {"committed": "the committed model", "chapter": "the chapter's recipe"}
KINDS = {"any": "images of any class", "same": "images of one class"}
SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 10_000)


def draw_batches(labels: Tensor, size: int, among: str, seed: int) -> list[Tensor]:
    """Return batches of row numbers: every row once, in random order; the last may be smaller.

    A last batch of one image joins the batch before it, because its variance would be zero.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    groups = [order]
    if among == "same":
        groups = [order[labels[order] == c] for c in sorted(set(labels.tolist()))]
    batches: list[Tensor] = []
    for group in groups:
        parts = list(torch.split(group, size))
        if len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        batches += parts
    return batches


@torch.no_grad()
def answers(model: nn.Module, images: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Return the answers, int64 [n], to uint8 images [n, 1, 28, 28] with batch statistics."""
    model = copy.deepcopy(model).train()
    found = torch.empty(len(images), dtype=torch.int64)
    for rows in parts:
        found[rows] = model(images[rows].float() / 255).argmax(1)
    return found


def tasks(scale: Scale) -> list[Task]:
    """Return a task for each model, kind of batch and random order; it covers all sizes.

    The seeds are the random orders.
    """
    sizes = SIZES[::3] if scale.quick else SIZES
    return [
        task | {"sizes": list(sizes)} for task in arms(scale, model=list(MODELS), among=list(KINDS))
    ]


def measure(data: FashionMNIST, task: Task) -> Line:
    """Answer the test images in batches of all sizes, in one random order."""
    parts = samples(data, task["images"])
    if task["model"] == "committed":
        run = Run(COMMITTED)
        model: nn.Sequential = run.model(run.config().recipe.statistics)
    else:
        model = lenet([batch_norm] * 4)
        model = fitted(model, parts.train, seed=0, epochs=task["epochs"])
    pixels, labels = parts.test.pixels, parts.test.labels
    with torch.no_grad():
        fixed = torch.cat([model(p.float() / 255).argmax(1) for p in torch.split(pixels, 1000)])
    line: Line = {"fixed": _share(fixed == labels), "accuracy": [], "changed": []}
    for size in task["sizes"]:
        found = answers(model, pixels, draw_batches(labels, size, task["among"], task["seed"]))
        line["accuracy"].append(_share(found == labels))
        line["changed"].append(_share(found != fixed))
    return line


def _share(found: Tensor) -> float:
    return found.double().mean().item()


def report(lines: Sequence[Line]) -> Report:
    """Return accuracy and share of changed answers by batch size, for both models."""
    sizes = lines[0]["sizes"]

    def value(model: str, among: str, figure: str, index: int) -> float:
        by_order: list[Any] = by_seed(lines, figure, model=model, among=among)
        return fmean(values[index] for values in by_order)

    last = len(sizes) - 1
    fixed = {m: by_seed(lines, "fixed", model=m)[0] for m in MODELS}
    answer = (
        f"An answer would depend on the other images of its batch. In batches of {sizes[0]}, the "
        f"accuracy of the committed model is {value('committed', 'any', 'accuracy', 0):.4f} "
        f"instead of {fixed['committed']:.4f}. If a batch is all images of one class, it is "
        f"{value('committed', 'same', 'accuracy', last):.4f}. With the whole test set as one "
        f"batch, {value('committed', 'any', 'changed', last):.1%} of its answers change, and "
        f"{value('chapter', 'any', 'changed', last):.1%} of the answers of a model by the "
        "chapter's recipe."
    )
    body = ""
    for model, name in MODELS.items():
        rows = [
            [
                f"{size:,}",
                *(
                    f"{value(model, among, figure, index):.4f}"
                    for among in KINDS
                    for figure in ("accuracy", "changed")
                ),
            ]
            for index, size in enumerate(sizes)
        ]
        rows.append(["fixed statistics", f"{fixed[model]:.4f}", "0", f"{fixed[model]:.4f}", "0"])
        heading = ["batch", "accuracy", "changed", "one class a batch: accuracy", "changed"]
        body += f"## {name[0].upper()}{name[1:]}\n\n{table(heading, rows)}\n\n"
    spread = max(
        max(orders) - min(orders)
        for model in MODELS
        for among in KINDS
        for figure in ("accuracy", "changed")
        for orders in zip(*by_seed(lines, figure, model=model, among=among), strict=True)
    )
    count = len(by_seed(lines, "fixed", model="committed", among="any"))
    return Report(
        answer,
        body
        + '"Changed" is the share of answers that differ from those with the fixed statistics. '
        f"Figures are means over {count} random orders; between the orders, none differs by more "
        f"than {spread:.4f}. A batch of one class cannot be larger than the class. Answers of the "
        "committed model change even with the largest batch, because it was fitted on augmented "
        "images (shifted and brightened at random): plain images have other statistics.",
        "The share of changed answers by batch size, on logarithmic axes. A line is the mean over "
        "the random orders; the band around it, from their lowest to their highest, is narrow.",
        f"Every test image is answered once in each of {count} random orders. The committed model "
        "is that of `models/run`. The other model is fitted by the chapter's recipe on "
        f"{lines[0]['images']:,} training images for {lines[0]['epochs']} epochs; its fixed "
        "statistics are those of these images.",
    )


def draw(lines: Sequence[Line], figure: Figure) -> None:
    """Draw the share of changed answers by batch size, on logarithmic axes."""
    figure.set_size_inches(9, 3.2)
    sizes = lines[0]["sizes"]
    for axes, (model, name) in zip(figure.subplots(1, 2, sharey=True), MODELS.items(), strict=True):
        for among, label in KINDS.items():
            orders: list[Any] = by_seed(lines, "changed", model=model, among=among)
            means = [fmean(d[i] for d in orders) for i in range(len(sizes))]
            low = [min(d[i] for d in orders) for i in range(len(sizes))]
            high = [max(d[i] for d in orders) for i in range(len(sizes))]
            axes.plot(sizes, means, marker=".", label=label)
            axes.fill_between(sizes, low, high, alpha=0.3)
        axes.set(xscale="log", yscale="log", title=name, xlabel="images in a batch")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7)
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.3g}")
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="share of changed answers")
    figure.axes[0].legend(fontsize=8)


STUDY = Study(
    "prediction-batch",
    "What if prediction used the statistics of its own batch?",
    "the two modes of the layer",
    tasks,
    measure,
    report,
    draw,
)
