"""Moving averages against statistics of the whole training set, after every epoch of many fits.

`python -m training study statistics` runs it; docs/studies/statistics.md is its page.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any

import torch
from matplotlib.figure import Figure

from training.dataset import FashionMNIST
from training.evaluation.card import table
from training.evaluation.pictures import save_figure
from training.fitting.fit import fit
from training.fitting.images import on_device
from training.fitting.population import population_statistics, with_statistics
from training.fitting.recipes import Recipe
from training.fitting.scoring import evaluate
from training.fitting.step import Fitting
from training.studies.records import Records, in_words

KINDS = {"moving": "moving averages", "few": "2,432 images", "population": "all 60,000 images"}
FEW = 2_432
"""As many images as the moving averages effectively see: weights 0.1 * 0.9^k have the variance of
an equal mean of (1 + 0.9) / (1 - 0.9) = 19 batches of 128."""
LAST = 5
"""How many epochs at the end of each fit the spread is taken over."""


@dataclass(frozen=True)
class Spread:
    """How test accuracy varies over the last epochs of several fits; shares from 0 to 1.

    Attributes:
        mean: over seeds and epochs.
        between_epochs: standard deviation within a fit; root mean square over the fits.
        between_seeds: standard deviation at one epoch; root mean square over the epochs.
        largest_jump: from one epoch to the next, up or down, in any fit.
        lowest: the worst epoch of all.
    """

    mean: float
    between_epochs: float
    between_seeds: float
    largest_jump: float
    lowest: float


def measure(
    data: FashionMNIST,
    recipe: Recipe,
    seed: int,
    records: Records,
    on_line: Callable[[dict[str, Any]], None] = lambda _: None,
) -> None:
    """Fit the recipe; after each epoch record the test scores by statistics.

    Epochs that the records have already are not measured again. A fit that was begun but not ended
    is repeated, which on a CPU gives the same bits.
    """
    known = {line["epoch"] for line in records.lines if line["seed"] == seed}
    if known == set(range(1, recipe.epochs + 1)):
        return
    images, _ = on_device(data.train, "cpu")
    test = on_device(data.test, "cpu")

    def on_batch(fitting: Fitting, epoch: int, seen: int) -> None:
        if seen < len(images) or epoch in known:
            return
        model, generator = fitting.result(), torch.Generator().manual_seed(epoch)
        few = images[torch.randperm(len(images), generator=generator)[:FEW]]
        line: dict[str, Any] = {"seed": seed, "epoch": epoch}
        line["moving"] = asdict(evaluate(model, *test))
        for kind, sample in (("few", few), ("population", images)):
            other = with_statistics(model, population_statistics(model, sample))
            line[kind] = asdict(evaluate(other, *test))
        records.add(line)
        on_line(line)

    fit(data, recipe, seed=seed, on_batch=on_batch)


def accuracies(
    lines: Sequence[dict[str, Any]], seeds: Sequence[int], kind: str
) -> list[list[float]]:
    """Return the accuracies of one kind of statistics by seed and epoch."""
    ordered = sorted(lines, key=lambda line: int(line["epoch"]))
    return [[line[kind]["accuracy"] for line in ordered if line["seed"] == s] for s in seeds]


def spread(curves: Sequence[Sequence[float]]) -> Spread:
    """Summarise accuracies by seed and epoch; at least two of each."""
    ends = [curve[-LAST:] for curve in curves]
    return Spread(
        mean=fmean(map(fmean, ends)),
        between_epochs=fmean(map(variance, ends)) ** 0.5,
        between_seeds=fmean(map(variance, zip(*ends, strict=True))) ** 0.5,
        largest_jump=max(abs(b - a) for end in ends for a, b in pairwise(end)),
        lowest=min(map(min, ends)),
    )


def page(records: Records, seeds: Sequence[int]) -> str:
    """Return the study's page in Markdown."""
    curves = {kind: accuracies(records.lines, seeds, kind) for kind in KINDS}
    spreads = [asdict(spread(curves[kind])) for kind in KINDS]
    epochs, recipe = records.conditions["epochs"], records.conditions["recipe"]
    summary = [
        [name.replace("_", " "), *(f"{each[name]:.4f}" for each in spreads)] for name in spreads[0]
    ]
    for row, name in zip(summary, spreads[0], strict=True):
        is_spread = name not in ("mean", "lowest")
        row.append(f"{spreads[0][name] / spreads[-1][name]:.1f} times" if is_spread else "")
    final = [[str(s), *(f"{curves[k][i][-1]:.4f}" for k in KINDS)] for i, s in enumerate(seeds)]
    for name, statistic in (("mean", fmean), ("standard deviation", stdev)):
        column = [statistic([curve[-1] for curve in curves[kind]]) for kind in KINDS]
        final.append([name, *(f"{value:.4f}" for value in column)])
    return f"""# Moving averages against statistics of the whole training set

Recipe `{recipe}`, {len(seeds)} seeds, {epochs} epochs. After each epoch the same weights are
tested three times on the {records.conditions["test_images"]:,} test images: with the moving \
averages that training left;
with statistics recomputed over {FEW:,} training images drawn at random, about as many as a moving
average with momentum 0.9 and batches of 128 effectively holds; and over all \
{records.conditions["images"]:,} of them
(`population_statistics` in `training/fitting/population.py`).

![Test accuracy by epoch, a line for each seed](statistics.png)

## The last {min(LAST, epochs)} epochs

{table(["test accuracy", *KINDS.values(), "shrinks by"], summary)}

"Between epochs" is the standard deviation within a fit, "between seeds" that at one epoch; both are
root mean squares, over the fits and over the epochs. "Largest jump" is from one epoch to the next.

## After the last epoch

{table(["seed", *KINDS.values()], final)}

## How it was measured

{in_words(records.conditions)}.

```sh
python -m training study statistics --seeds {",".join(map(str, seeds))} --epochs {epochs} \
--out runs/statistics
```

Every measurement is a line of [statistics.jsonl](statistics.jsonl).
"""


def draw(records: Records, seeds: Sequence[int], out: Path) -> None:
    """Draw the families of curves, side by side on one scale."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for axes, (kind, name) in zip(panels, KINDS.items(), strict=True):
        for seed, curve in zip(seeds, accuracies(records.lines, seeds, kind), strict=True):
            axes.plot(range(1, len(curve) + 1), curve, marker=".", label=f"seed {seed}")
        axes.set(title=name, xlabel="epoch")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="test accuracy")
    panels[-1].legend(fontsize=8, loc="lower right")
    save_figure(figure, out)
