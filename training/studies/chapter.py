"""The chapter's own run: its recipe as printed, on all 60,000 images, for ten epochs.

The study gives loss and accuracy by epoch as the chapter draws them, gamma and beta of the first
layer, and images a second. As in the chapter, the test accuracy is with the moving averages.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from matplotlib.figure import Figure

from training.batch_norm import affine
from training.dataset import FashionMNIST
from training.evaluation.card import table
from training.evaluation.intervals import mean_interval
from training.model import initialise, norm_layers
from training.studies.fits import accuracy, batch_norm, batches, lenet, samples, steps_per_epoch
from training.studies.study import Line, Report, Scale, Study, Task, arms


def tasks(scale: Scale) -> list[Task]:
    """Return one fit for each seed."""
    if not scale.quick:
        scale = replace(scale, images=60_000, epochs=10)
    return arms(scale)


def measure(data: FashionMNIST, task: Task) -> Line:
    """Fit as the chapter does; evaluate at the end of each epoch."""
    parts = samples(data, task["images"])
    network = lenet([batch_norm] * 4)
    initialise(network, task["seed"])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    feed = batches(parts.train, 128, task["seed"])
    steps = steps_per_epoch(parts.train, 128)
    line: Line = {"losses": [], "accuracies": [], "seconds": []}
    for _ in range(task["epochs"]):
        network.train()
        begin = time.perf_counter()
        total = 0.0
        for _ in range(steps):
            images, labels = next(feed)
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images), labels)
            loss.backward()  # type: ignore[no-untyped-call] # torch forgot
            optimizer.step()
            total += loss.item()
        line["seconds"].append(time.perf_counter() - begin)
        line["losses"].append(total / steps)
        line["accuracies"].append(accuracy(network, parts.test))
    gamma, beta = affine(next(iter(norm_layers(network).values())))
    return line | {"gamma": gamma.tolist(), "beta": beta.tolist()}


def report(lines: Sequence[Line]) -> Report:
    """Return the curves as a table, and the first layer's gamma and beta."""
    last = mean_interval([line["accuracies"][-1] for line in lines])
    epochs = len(lines[0]["losses"])
    rate = max(line["images"] / seconds for line in lines for seconds in line["seconds"])
    lowest = min(min(line["accuracies"][1:] or line["accuracies"]) for line in lines)
    answer = (
        f"With {epochs} epochs of the chapter's recipe, the test accuracy is {last:.3f}. It varies "
        f"between epochs: the lowest after any epoch from the second on is {lowest:.3f}. In "
        f"the quickest epoch, one thread of a CPU trains {rate:,.0f} images a second."
    )
    rows = [
        [
            str(epoch + 1),
            f"{mean_interval([line['losses'][epoch] for line in lines]):.4f}",
            f"{mean_interval([line['accuracies'][epoch] for line in lines]):.4f}",
        ]
        for epoch in range(epochs)
    ]
    norms = [
        [
            str(line["seed"]),
            *(f"{g:.2f}, {b:+.2f}" for g, b in zip(line["gamma"], line["beta"], strict=True)),
        ]
        for line in lines
    ]
    channels = [f"channel {index}" for index in range(len(lines[0]["gamma"]))]
    gammas, betas = ([value for line in lines for value in line[n]] for n in ("gamma", "beta"))
    return Report(
        answer,
        f"""{table(["epoch", "training loss", "test accuracy"], rows)}

## Gamma and beta of the first layer

Every cell has gamma, then beta. They start at 1 and 0. After the fits, gamma is
{min(gammas):.2f} to {max(gammas):.2f}, and beta {min(betas):+.2f} to {max(betas):+.2f}.

{table(["seed", *channels], norms)}""",
        "Left: the mean loss of an epoch's batches (cross-entropy with the natural logarithm, in "
        "nats). Right: the test accuracy after each epoch. A line for each seed.",
        f"{lines[0]['images']:,} training images, {epochs} epochs, batches of 128, SGD with a "
        f"learning rate of 0.1 (the chapter's for PyTorch and MXNet), {len(lines)} seeds. As in "
        "the chapter, the test accuracy is with the moving averages. A seed decides the first "
        "weights and the order of the images; ± is a 95 % t-interval over the seeds.",
    )


def draw(lines: Sequence[Line], figure: Figure) -> None:
    """Draw loss and accuracy by epoch, a line for each seed."""
    figure.set_size_inches(8, 3)
    left, right = figure.subplots(1, 2)
    for line in lines:
        epochs = range(1, len(line["losses"]) + 1)
        left.plot(epochs, line["losses"], marker=".", label=f"seed {line['seed']}")
        right.plot(epochs, line["accuracies"], marker=".")
    left.set(xlabel="epoch", ylabel="training loss (nats)")
    right.set(xlabel="epoch", ylabel="test accuracy")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)


STUDY = Study(
    "chapter",
    "What does the chapter's own run give?",
    "its recipe as printed",
    tasks,
    measure,
    report,
    draw,
    timed=True,
)
