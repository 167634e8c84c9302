"""Compares the library's batch norm with ours: is it the same, and much faster.

The study compares the loss curves, then the times, in alternating blocks. Its page also lists what
the library's layer offers beyond ours (exercise 7).
"""

import time
from collections.abc import Sequence
from statistics import median

import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from matplotlib.figure import Figure
from torch import nn

from training.batch_norm import BatchNorm
from training.dataset import FashionMNIST
from training.evaluation.card import table
from training.evaluation.intervals import mean_interval
from training.model import initialise
from training.studies.fits import Norm, batch_norm, batches, lenet, samples
from training.studies.study import Line, Report, Scale, Study, Task, arms, by_seed


def scratch(channels: int, dims: int) -> nn.Module:
    """Make our own layer, which has the chapter's arguments."""
    return BatchNorm(channels, 4 if dims == 4 else 2)


NORMS: dict[str, Norm] = {"scratch": scratch, "library": batch_norm}
BLOCKS, STEPS = 10, 40


def tasks(scale: Scale) -> list[Task]:
    """Return one measurement for each seed."""
    blocks = [2 if scale.quick else BLOCKS]
    return arms(scale, blocks=blocks, steps=[4 if scale.quick else STEPS])


def measure(data: FashionMNIST, task: Task) -> Line:
    """Fit both from the same weights on the same batches, in alternating blocks."""
    parts = samples(data, task["images"])
    networks = {name: lenet([norm] * 4) for name, norm in NORMS.items()}
    feeds = {name: batches(parts.train, 128, task["seed"]) for name in NORMS}
    losses: dict[str, list[float]] = {name: [] for name in NORMS}
    times: dict[str, list[float]] = {name: [] for name in NORMS}
    optimizers = {}
    for name, network in networks.items():
        initialise(network, task["seed"])
        optimizers[name] = torch.optim.SGD(network.train().parameters(), lr=0.1)
    for _ in range(task["blocks"]):
        for name, network in networks.items():
            begin = time.perf_counter()
            for _ in range(task["steps"]):
                images, labels = next(feeds[name])
                optimizers[name].zero_grad()
                loss = F.cross_entropy(network(images), labels)
                loss.backward()  # type: ignore[no-untyped-call] # torch forgot
                optimizers[name].step()
                losses[name].append(loss.item())
            times[name].append(1e3 * (time.perf_counter() - begin) / task["steps"])
    gap = max(abs(a - b) for a, b in zip(losses["scratch"], losses["library"], strict=True))
    return {
        "largest_gap": gap,
        "curve": losses["scratch"],
        "other_curve": losses["library"],
        **{f"ms_{name}": median(times[name]) for name in NORMS},
        "ratio": median(a / b for a, b in zip(times["scratch"], times["library"], strict=True)),
    }


OPTIONS = table(
    ["option of torch's layer", "what it does", "ours"],
    [
        ["`eps=1e-5`", "is added to the variance, inside the root", "the same"],
        [
            "`momentum=0.1`",
            "share of the NEW value in the moving statistics",
            "0.9, of the old value",
        ],
        ["`momentum=None`", "a plain mean over all batches so far", "no"],
        ["`affine=False`", "no gamma and beta", "no"],
        [
            "`track_running_stats=False`",
            "no moving statistics: prediction uses the batch's statistics too",
            "no",
        ],
        ["`BatchNorm1d` on [n, C, L]", "a channel's statistics over images and positions", "no"],
        ["`BatchNorm3d`", "for volumes and video, [n, C, D, H, W]", "no"],
        ["`LazyBatchNorm2d`", "takes the number of channels from the first batch", "no"],
        ["`SyncBatchNorm`", "statistics over all processes of a distributed fit", "no"],
        ["`eval()`", "prediction with the moving statistics", "the same"],
    ],
)


def report(lines: Sequence[Line]) -> Report:
    """Return the largest gap of the losses, and the ratio of the times."""
    ratio = mean_interval(by_seed(lines, "ratio"))
    gap = max(by_seed(lines, "largest_gap"))
    steps = len(lines[0]["curve"])
    speed = "not measurably faster"
    if ratio.excludes(1):
        speed = "faster" if ratio.mean > 1 else "slower"
    answer = (
        f"The library's layer gives the same losses and is {speed}: a step with our layer takes "
        f"{ratio:.2f} times as long. In {steps} steps from the same weights, the losses differ by "
        f"at most {gap:.0e}."
    )
    names = {"scratch": "ours, from scratch", "library": "the library's"}
    rows = [[names[n], f"{mean_interval(by_seed(lines, f'ms_{n}')):.2f}"] for n in NORMS]
    return Report(
        answer,
        f"""{table(["layer", "ms a step"], rows)}

The chapter explains the difference by compiled code. But the operations of our layer are compiled
too; Python only calls them one by one. So a likelier reason is memory: our layer reads and writes
the activations once for each operation, the library's layer fewer times. This study does not
measure the reason.

## What the library's layer offers (exercise 7)

{OPTIONS}""",
        "Left: the training loss by step with both layers, of the first seed; the lines coincide "
        "(cross-entropy with the natural logarithm, in nats). Right: the time of a step, with its "
        "interval over the seeds.",
        f"{lines[0]['images']:,} training images, batches of 128, SGD with a learning rate of 0.1, "
        f"{len(lines)} seeds, one thread. A step is forward pass, backward pass and update. Blocks "
        f"of {lines[0]['steps']} steps alternate between the layers, {lines[0]['blocks']} of each; "
        "a seed's ratio is the median over pairs of neighbouring blocks. A seed decides the first "
        "weights and the order of the images; ± is a 95 % t-interval over the seeds.",
    )


def draw(lines: Sequence[Line], figure: Figure) -> None:
    """Draw both loss curves of the first seed, and the times of all."""
    figure.set_size_inches(8, 3)
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    left.plot(lines[0]["curve"], label="ours")
    left.plot(lines[0]["other_curve"], linestyle="--", label="the library's")
    left.set(xlabel="step", ylabel="training loss (nats)")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    times = [mean_interval(by_seed(lines, f"ms_{name}")) for name in NORMS]
    right.bar(
        ["ours", "the library's"],
        [time.mean for time in times],
        yerr=[time.half_width for time in times],
        capsize=4,
    )
    right.set(ylabel="milliseconds a step")


STUDY = Study(
    "from-scratch",
    "Is the library's layer the same, and much faster?",
    "the concise implementation, and exercise 7",
    tasks,
    measure,
    report,
    draw,
    timed=True,
)
