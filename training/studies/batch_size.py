"""What one image's answer owes to its company, when batch norm predicts with batch statistics.

`python -m training study batch-size RUN` runs it; docs/studies/batch-size.md is its page.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from training.dataset import Split
from training.evaluation.card import table
from training.evaluation.pictures import save_figure
from training.fitting.images import on_device
from training.fitting.scoring import predict
from training.model import BNLeNet
from training.studies.records import Records, in_words

SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
ORDERS = 5
COMPANY = {"any": "images of any class", "same": "images of its own class"}


def batches(labels: Tensor, size: int, company: str, seed: int) -> list[Tensor]:
    """Return all row numbers once, in random order, in batches of `size`; the rest is smaller.

    `company` "any" draws from all rows, "same" fills a batch from one class.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    groups = (
        [order]
        if company == "any"
        else [order[labels[order] == c] for c in sorted(set(labels.tolist()))]
    )
    return [batch for group in groups for batch in torch.split(group, size)]


@torch.no_grad()
def answers(model: BNLeNet, images: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Return the class numbers, int64 [n], that batch statistics give uint8 images in batches."""
    model = copy.deepcopy(model).train()
    found = torch.empty(len(images), dtype=torch.int64)
    for rows in parts:
        found[rows] = model(images[rows].float() / 255).argmax(1)
    return found


def measure(
    model: BNLeNet,
    test: Split,
    records: Records,
    on_line: Callable[[dict[str, Any]], None] = lambda _: None,
) -> None:
    """Record accuracies, and shares of answers that differ from those of fixed statistics.

    "unstable" is the share of images whose answer is not the same in all `ORDERS` orders.
    """
    images, labels = on_device(test, "cpu")
    fixed = predict(model, images).argmax(1)
    for company in COMPANY:
        for size in SIZES:
            if any((line["company"], line["size"]) == (company, size) for line in records.lines):
                continue
            found = torch.stack(
                [
                    answers(model, images, batches(labels, size, company, seed))
                    for seed in range(ORDERS)
                ]
            )
            line = {
                "company": company,
                "size": size,
                "accuracy": _shares(found == labels),
                "changed": _shares(found != fixed),
                "unstable": (found != found[0]).any(0).double().mean().item(),
                "fixed": (fixed == labels).double().mean().item(),
            }
            records.add(line)
            on_line(line)


def _shares(found: Tensor) -> list[float]:
    shares: list[float] = found.double().mean(1).tolist()
    return shares


def page(records: Records) -> str:
    """Return the study's page in Markdown."""
    fixed = records.lines[0]["fixed"]
    by = {(line["company"], line["size"]): line for line in records.lines}
    rows = []
    for size in SIZES:
        figures = [fmean(by[c, size][k]) for c in COMPANY for k in ("accuracy", "changed")]
        figures.insert(2, by["any", size]["unstable"])
        rows.append([str(size), *(f"{figure:.4f}" for figure in figures)])
    rows.append(["fixed statistics", f"{fixed:.4f}", "0", "0", f"{fixed:.4f}", "0"])
    heading = ["batch size", "accuracy", "changed", "unstable"]
    heading += ["one class a batch: accuracy", "changed"]
    return f"""# One image and its batch

The model of checkpoint `{records.conditions["checkpoint"][:12]}` answers all \
{records.conditions["test_images"]:,} test images in batches, each
normalised by its own mean and variance, as in training; then once with the fixed statistics that
the exported file carries. Images are dealt into batches at random, {ORDERS} times: from the
whole test set, or so that a batch holds one class only.

![Accuracy and share of changed answers by batch size](batch-size.png)

{table(heading, rows)}

"Changed" is the share of answers that differ from those of the fixed statistics, "unstable" the
share of images that do not get the same answer in all {ORDERS} deals. Means over the deals. A
batch of one has no answer: in a linear layer its variance is zero. The last batch of a deal may be
smaller than the others.

## How it was measured

{in_words(records.conditions)}.

```sh
python -m training study batch-size models/run --out runs/batch-size
```

Every deal is in a line of [batch-size.jsonl](batch-size.jsonl).
"""


def draw(records: Records, out: Path) -> None:
    """Draw accuracy, and the share of changed answers, by batch size."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for company, name in COMPANY.items():
        lines = [line for line in records.lines if line["company"] == company]
        sizes = [line["size"] for line in lines]
        for axes, key in ((left, "accuracy"), (right, "changed")):
            axes.plot(sizes, [fmean(line[key]) for line in lines], marker=".", label=f"with {name}")
    left.axhline(records.lines[0]["fixed"], color="black", linestyle="--", label="fixed statistics")
    for axes, label in ((left, "test accuracy"), (right, "share of changed answers")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, SIZES)
        axes.set(xlabel="batch size", ylabel=label, ylim=(0, 1))
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    save_figure(figure, out)
