"""Images a second of three training loops (ours, plain, the chapter's), and seconds to accuracy.

    python -m benchmarks.training            about three minutes on one quiet core
    python -m benchmarks.training --quick    a quarter of a minute, without the seconds to accuracy

All loops train the chapter's network by the chapter's recipe in one process, on one CPU thread
unless --threads says otherwise; `benchmarks.gpu` measures a GPU. A round measures every row once,
on a quarter of an epoch and of the test set, so that a change of the machine's speed affects all
rows. Ratios are computed within a round; the tables have the medians of the rounds. The last line
of the output is JSON.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import click
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.dataset import DatasetError, FashionMNIST, Split, load
from training.fitting.fit import diverged, fit
from training.fitting.graphs import fastest_step
from training.fitting.images import on_device
from training.fitting.precision import full_precision
from training.fitting.recipes import RECIPES, Recipe
from training.fitting.run import Epoch
from training.fitting.scoring import evaluate
from training.fitting.step import Fitting
from training.model import BNLeNet, initialise

BATCH_SIZES = (128, 512)
CHAPTER = RECIPES["chapter"]
LONG = replace(CHAPTER, epochs=20)
"""Long enough for a test accuracy of 0.87, which comes in a jump."""
SHORT = replace(RECIPES["best"], epochs=10, batch_size=256)
"""Recipe `best`, about as short as it can be for a test accuracy of 0.90."""


class Loop(Protocol):
    """A training loop: it trains for an epoch, and evaluates."""

    def train(self) -> None:
        """Train for an epoch; a GPU may not have finished when this returns."""

    def evaluate(self) -> float:
        """Return the accuracy on the test set."""


class Ours:
    """Our loop: `Fitting.step` as `fit` uses it; on a GPU, as a CUDA graph."""

    def __init__(self, data: FashionMNIST, batch_size: int, device: str) -> None:
        recipe = replace(CHAPTER, batch_size=batch_size)
        self.fitting = Fitting(recipe, *on_device(data.train, device))
        self.test = on_device(data.test, device)
        self.step = fastest_step(self.fitting) if device == "cuda" else self.fitting.step

    def train(self) -> None:
        """Train for an epoch as `fit` does."""
        fitting = self.fitting
        fitting.steps_done.zero_()
        for rows in torch.split(fitting.begin(1), fitting.recipe.batch_size):
            self.step(rows)
            if not fitting.labels.is_cuda and not fitting.loss.isfinite():
                raise diverged(fitting, 1)
        if not fitting.finite():
            raise diverged(fitting, 1)

    def evaluate(self) -> float:
        """Return the accuracy on the test set, which is in memory."""
        return evaluate(self.fitting.model, *self.test).accuracy


class Plain:
    """The plainest eager loop: floats in memory, no metrics, no wait for the device."""

    def __init__(self, data: FashionMNIST, batch_size: int, device: str) -> None:
        images, self.labels = on_device(data.train, device)
        self.images = images.float() / 255
        # torch's own generator cannot be used any more if a capture has failed before.
        self.generator = torch.Generator(images.device).manual_seed(0)
        self.test = on_device(data.test, device)
        self.batch_size = batch_size
        self.model, self.optimizer = chapter_model(device)

    def train(self) -> None:
        """Take an epoch's steps."""
        self.model.train()
        device = self.labels.device
        order = torch.randperm(len(self.labels), generator=self.generator, device=device)
        for rows in torch.split(order, self.batch_size):
            loss = F.cross_entropy(self.model(self.images[rows]), self.labels[rows])
            self.optimizer.zero_grad()
            torch.autograd.backward([loss])
            self.optimizer.step()

    def evaluate(self) -> float:
        """Return the accuracy on the test set, which is in memory."""
        return evaluate(self.model, *self.test).accuracy


class Chapter:
    """The chapter's loop: a DataLoader of pictures, copies to the device, metrics in every batch.

    It follows d2l's `train_ch6` and torchvision's `FashionMNIST` with `ToTensor`. On a GPU, four
    processes load images, as in d2l; on one core they would only cost time.
    """

    def __init__(self, data: FashionMNIST, batch_size: int, device: str) -> None:
        self.device = torch.device(device)
        self.model, self.optimizer = chapter_model(device)
        workers = 4 if device == "cuda" else 0
        self.train_iter, self.test_iter = (
            DataLoader(Pictures(split), batch_size, shuffle=shuffle, num_workers=workers)
            for split, shuffle in ((data.train, True), (data.test, False))
        )

    def train(self) -> None:
        """Take an epoch's steps; sum the losses and the right answers."""
        self.model.train()
        totals = [0.0, 0.0, 0.0]
        for x, y in self.train_iter:
            self.optimizer.zero_grad()
            images, labels = x.to(self.device), y.to(self.device)
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
            torch.autograd.backward([loss])
            self.optimizer.step()
            with torch.no_grad():
                new = (float(loss * len(y)), self._correct(logits, labels), len(y))
                totals = [a + b for a, b in zip(totals, new, strict=True)]

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the accuracy on the test set, loaded in the same way as the training set."""
        self.model.eval()
        right, count = 0.0, 0
        for x, y in self.test_iter:
            right += self._correct(self.model(x.to(self.device)), y.to(self.device))
            count += len(y)
        return right / count

    @staticmethod
    def _correct(logits: Tensor, labels: Tensor) -> float:
        return float((logits.argmax(1) == labels).sum())


class Pictures(Dataset[tuple[Tensor, int]]):
    """A split as in torchvision: one PIL image at a time, converted to a tensor of floats."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture = np.array(Image.fromarray(self.split.images[i]))
        return torch.from_numpy(picture)[None].float().div(255), int(self.split.labels[i])


def chapter_model(device: str) -> tuple[BNLeNet, torch.optim.Optimizer]:
    """Return the chapter's network, with torch's layers, and its optimiser."""
    model = BNLeNet()
    initialise(model, 0)
    model.to(device)
    return model, torch.optim.SGD(model.parameters(), lr=CHAPTER.learning_rate)


OURS, PLAIN = "ours", "plain eager"
LOOPS: dict[str, Callable[[FashionMNIST, int, str], Loop]] = {
    OURS: Ours,
    PLAIN: Plain,
    "the chapter's": Chapter,
}


@dataclass
class Row:
    """A loop, with a batch size and a device; `seconds` has training and evaluation by round."""

    name: str
    batch_size: int
    device: str
    images: int
    loop: Loop
    seconds: list[tuple[float, float]] = field(default_factory=list)
    accuracy: float = 0.0

    def measure(self) -> None:
        """Train and evaluate once."""
        start = time.perf_counter()
        self.loop.train()
        if self.device == "cuda":
            torch.cuda.synchronize()
        trained = time.perf_counter()
        self.accuracy = self.loop.evaluate()
        self.seconds.append((trained - start, time.perf_counter() - trained))

    @property
    def training_rate(self) -> float:
        """Training images a second, without the time of evaluation."""
        return median(self.images / training for training, _ in self.seconds)

    @property
    def rate(self) -> float:
        """Training images a second, with the time of evaluation."""
        return median(self.images / sum(pair) for pair in self.seconds)

    def ratio(self, other: "Row") -> float:
        """Return how many times as fast as `other` this is, evaluation included."""
        pairs = zip(other.seconds, self.seconds, strict=True)
        return median(sum(theirs) / sum(ours) for theirs, ours in pairs)


@click.command()
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="The number of measurements of every row.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--quick", is_flag=True, help="One short round, without the seconds to accuracy.")
@click.option("--json", "as_json", is_flag=True, help="Print only the line of JSON.")
def main(rounds: int, threads: int, quick: bool, as_json: bool) -> None:
    """Measure how fast the network trains, compared with the usual loops."""
    try:
        data = load()
    except DatasetError as exc:
        raise click.ClickException(str(exc)) from exc
    torch.set_num_threads(threads)
    load_before = os.getloadavg()[0]
    rounds = 1 if quick else rounds
    with Progress(console=Console(stderr=True), transient=True, disable=as_json) as progress:
        rows = measure_loops(data, "cpu", BATCH_SIZES, rounds, 24 if quick else 4, progress)
        reached = []
        if not quick:
            for recipe, goals in ((LONG, (0.87,)), (SHORT, (0.87, 0.90))):
                reached += time_to_accuracy(data, recipe, goals, progress)
    document = {
        "benchmark": "training",
        "machine": machine(load_before),
        "rounds": rounds,
        "rows": [medians(row, rows) for row in rows],
        "accuracy": reached,
    }
    if not as_json:
        show(document)
    print(json.dumps(document))


@full_precision()
def measure_loops(
    data: FashionMNIST,
    device: str,
    batch_sizes: Sequence[int],
    rounds: int,
    share: int,
    progress: Progress,
    names: Collection[str] = LOOPS,
) -> list[Row]:
    """Measure all loops in turn, without TF32; the first round is a warm-up and is not used.

    Args:
        data: the data set.
        device: "cpu" or "cuda".
        batch_sizes: the batch sizes of every loop.
        rounds: the number of rounds.
        share: a round uses 1 / `share` of an epoch and of the test set.
        progress: shows the progress.
        names: the loops to measure.
    """
    part = replace(data, train=first(data.train, share), test=first(data.test, share))
    rows = [
        Row(name, size, device, len(part.train.labels), LOOPS[name](part, size, device))
        for size in batch_sizes
        for name in names
    ]
    task = progress.add_task("", total=(rounds + 1) * len(rows))
    for turn in range(rounds + 1):
        for row in rows:
            words = f"round {turn}: {row.name}, batch {row.batch_size}, {row.device}"
            progress.update(task, description=words)
            row.measure()
            progress.advance(task)
    for row in rows:
        del row.seconds[0]
    progress.remove_task(task)
    return rows


def first(split: Split, share: int) -> Split:
    """Return the first of `share` equal parts of a split."""
    count = len(split.labels) // share
    return Split(split.images[:count], split.labels[:count])


class Reached(Exception):  # noqa: N818 - not an error: it ends a fit
    """Ends a fit that has reached its last goal."""


def time_to_accuracy(
    data: FashionMNIST, recipe: Recipe, goals: Sequence[float], progress: Progress
) -> list[dict[str, Any]]:
    """Fit until the test accuracy, with moving statistics, has reached rising goals.

    Returns:
        for each goal: goal, recipe, its epochs and batch size; the epoch that reached the goal; and
        the wall-clock seconds, from uint8 arrays in memory on. Epoch and seconds are None if the
        goal was not reached.
    """
    asked = {
        "recipe": recipe.name,
        "of_epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
    }
    found: list[dict[str, Any]] = [{"goal": g, "seconds": None, "epochs": None} for g in goals]
    task = progress.add_task(f"to {goals[-1]} by {recipe.name}", total=recipe.epochs)
    start = time.perf_counter()

    def on_epoch(line: Epoch) -> None:
        progress.update(task, completed=line.epoch)
        for one in found:
            if not one["epochs"] and line.accuracy >= one["goal"]:
                one.update(seconds=time.perf_counter() - start, epochs=line.epoch)
        if found[-1]["epochs"]:
            raise Reached

    with suppress(Reached):  # only `on_epoch` above raises it
        fit(data, recipe, on_epoch=on_epoch)
    progress.remove_task(task)
    return [asked | one for one in found]


def medians(row: Row, rows: list[Row]) -> dict[str, Any]:
    """Return a row's medians; `of_plain` is the ratio to the plain eager loop."""
    (plain,) = (
        r for r in rows if (r.name, r.batch_size, r.device) == (PLAIN, row.batch_size, row.device)
    )
    return {
        "loop": row.name,
        "batch_size": row.batch_size,
        "device": row.device,
        "training_images_per_second": round(row.training_rate),
        "images_per_second": round(row.rate),
        "of_plain": round(row.ratio(plain), 3),
        "accuracy": row.accuracy,
    }


def show(document: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(width=110, highlight=False)
    console.print(" · ".join(f"{name} {value}" for name, value in document["machine"].items()))
    table = Table(
        *("device", "batch", "loop", "images/s", "with evaluation", "of plain", "epoch"),
        title="the chapter's recipe, training images a second by the clock",
    )
    for row in document["rows"]:
        table.add_row(
            *(row["device"], str(row["batch_size"]), row["loop"]),
            f"{row['training_images_per_second']:,}",
            f"{row['images_per_second']:,}",
            f"{row['of_plain']:.2f}",
            f"{60_000 / row['images_per_second']:.2f} s",
        )
    console.print(table)

    if document["accuracy"]:
        table = Table("test accuracy", "by", "epochs", "seconds", title="by our loop, seed 0")
        for reached in document["accuracy"]:
            epochs, seconds = reached["epochs"], reached["seconds"]
            table.add_row(
                f"{reached['goal']:.2f}",
                "{recipe}, {of_epochs} epochs, batch {batch_size}".format(**reached),
                str(epochs or "not reached"),
                f"{seconds:.1f}" if seconds else "",
            )
        console.print(table)
        console.print(
            "With the chapter's recipe, the other loops need as many epochs, but more seconds."
        )


def machine(load_before: float) -> dict[str, str]:
    """Return machine, versions, and the load average before: above 0.5, do not use the figures."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} used",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "load average": f"{load_before:.1f}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


if __name__ == "__main__":
    main()
