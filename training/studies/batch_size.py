"""Do batches of 50 to 100 images inject just the right amount of noise? The chapter claims so.

The study has three sweeps: batch sizes at equal epochs, batch sizes at equal steps, and ghost batch
norm (Hoffer et al., 2017): batches of 256 whose statistics are computed over groups of images. Only
the last sweep changes the noise of the statistics without changing the optimisation.
"""

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
    Line,
    Report,
    Scale,
    Study,
    Task,
    arms,
    by_seed,
)

SIZES = (2, 8, 32, 64, 128, 512, 2048, 4096)
GROUPS = (2, 4, 8, 16, 32, 64, 128, 256)
GHOST_BATCH = 256
STEPS = 300
SWEEPS = {
    "equal epochs": "batch size, equal epochs",
    "equal steps": "batch size, equal steps",
    "ghost": f"group size, batches of {GHOST_BATCH}",
}


def normalise_in_groups(x: Tensor, layer: nn.BatchNorm1d | nn.BatchNorm2d, group: int) -> Tensor:
    """Normalise a batch in groups of `group` images; every group has its own mean and variance."""
    return torch.cat(
        [
            F.batch_norm(part, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
            for part in torch.split(x, group)
        ]
    )


class GhostNorm1d(nn.BatchNorm1d):
    """torch's batch norm, with training statistics of groups of the batch; input [n, C]."""

    group = GHOST_BATCH

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [n, C]."""
        return normalise_in_groups(x, self, self.group) if self.training else super().forward(x)


class GhostNorm2d(nn.BatchNorm2d):
    """torch's batch norm, with training statistics of groups of the batch; input [n, C, H, W]."""

    group = GHOST_BATCH

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [n, C, H, W]."""
        return normalise_in_groups(x, self, self.group) if self.training else super().forward(x)


def ghost_norm(group: int) -> Norm:
    """Return a function that makes ghost batch norms for groups of `group` images."""

    def make(channels: int, dims: int) -> nn.Module:
        layer = GhostNorm2d(channels) if dims == 4 else GhostNorm1d(channels)
        layer.group = group
        return layer

    return make


def tasks(scale: Scale) -> list[Task]:
    """Return the fits of all three sweeps."""
    sizes, groups = (SIZES[::3], GROUPS[::4]) if scale.quick else (SIZES, GROUPS)
    return (
        arms(scale, sweep=["equal epochs"], size=sizes)
        + arms(scale, sweep=["equal steps"], size=sizes, steps=[4 if scale.quick else STEPS])
        + arms(scale, sweep=["ghost"], size=groups)
    )


def measure(data: FashionMNIST, task: Task) -> Line:
    """Fit LeNet with batches of this size, or with groups of this size in batches of 256."""
    parts = samples(data, task["images"])
    is_ghost = task["sweep"] == "ghost"
    network = lenet([ghost_norm(task["size"]) if is_ghost else batch_norm] * 4)
    initialise(network, task["seed"])
    batch_size = GHOST_BATCH if is_ghost else task["size"]
    steps = task.get("steps", task["epochs"] * steps_per_epoch(parts.train, batch_size))
    train(network, parts.train, seed=task["seed"], steps=steps, batch_size=batch_size)
    return scores(recalibrated(network, parts.train), parts)


def report(lines: Sequence[Line]) -> Report:
    """Return the accuracy by size in each sweep."""

    def value(sweep: str, size: int) -> list[float]:
        return by_seed(lines, "held_out", sweep=sweep, size=size)

    sizes = {
        sweep: sorted({line["size"] for line in lines if line["sweep"] == sweep})
        for sweep in SWEEPS
    }
    best = {s: max(sizes[s], key=lambda n, s=s: fmean(value(s, n))) for s in SWEEPS}  # type: ignore[misc] # a default binds the loop's value
    whole, right = max(sizes["ghost"]), best["ghost"]
    # Bonferroni's interval, because the best of several sizes is chosen on the same fits.
    confidence = 1 - 0.05 / max(1, len(sizes["ghost"]) - 1)
    noise = paired_difference(value("ghost", right), value("ghost", whole), confidence)
    if right == whole:
        verdict = "No"
        found = "the statistics of the whole batch are best, so more noise does not help"
    else:
        helps = noise.low > 0
        verdict = "Not measurably"
        if helps:
            verdict = "Yes" if 50 <= right <= 100 else f"Noise helps, but the best size is {right}"
        found = (
            f"the statistics of groups of {right} images are best, {noise:+.4f} compared with the "
            f"whole batch, so noise alone {'helps' if helps else 'does not measurably help'}"
        )
    answer = (
        f"{verdict}: with batches of {GHOST_BATCH}, {found}. The best batch size is "
        f"{best['equal epochs']:,} at equal epochs and {best['equal steps']:,} at equal steps, but "
        f"the batch size changes the optimisation as well as the noise."
    )
    tables = "\n\n".join(
        f"## {name[0].upper()}{name[1:]}\n\n"
        + table(
            ["size", "held-out accuracy", "test"],
            [
                [
                    f"{size:,}",
                    f"{mean_interval(value(sweep, size)):.4f}",
                    f"{fmean(by_seed(lines, 'test', sweep=sweep, size=size)):.4f}",
                ]
                for size in sizes[sweep]
            ],
        )
        for sweep, name in SWEEPS.items()
    )
    notes = f"""- Equal epochs: smaller batches make more steps. Equal steps: they see fewer images.
- Group size: the batches have {GHOST_BATCH} images, but mean and variance are of groups of this
  size ([ghost batch norm](https://arxiv.org/abs/1705.08741)). Only the statistics' noise changes.
- The interval in the answer is Bonferroni's: wider, because the best of
  {len(sizes["ghost"]) - 1} group sizes is chosen on the same fits."""
    return Report(
        answer,
        f"{tables}\n\n{notes}",
        "Mean held-out accuracy with its interval, by batch size (left, middle) and by the number "
        "of images that share their statistics (right). Sizes are on a logarithmic scale.",
        f"{lines[0]['images']:,} training images, SGD with a learning rate of 0.1, "
        f"{len(value('ghost', whole))} seeds. Equal epochs: {lines[0]['epochs']}. Equal steps: "
        f"{max(line.get('steps', 0) for line in lines)}. {RECOMPUTED} {HELD_OUT} {SEEDS}",
    )


def draw(lines: Sequence[Line], figure: Figure) -> None:
    """Draw accuracy by size, a panel for each sweep."""
    figure.set_size_inches(9, 3)
    for axes, (sweep, name) in zip(figure.subplots(1, 3), SWEEPS.items(), strict=True):
        sizes = sorted({line["size"] for line in lines if line["sweep"] == sweep})
        values = [mean_interval(by_seed(lines, "held_out", sweep=sweep, size=n)) for n in sizes]
        axes.errorbar(
            sizes, [v.mean for v in values], [v.half_width for v in values], marker="o", capsize=3
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes[::2], [str(size) for size in sizes[::2]])
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="held-out accuracy")


STUDY = Study(
    "batch-size",
    "Do batches of 50 to 100 inject just the right noise?",
    "the claim that such sizes do",
    tasks,
    measure,
    report,
    draw,
)
