"""Everything that needs a GPU: tests, speed of training and serving, agreement with the CPU.

    python -m benchmarks.gpu                          about five minutes, on a machine with a GPU
    python -m benchmarks.gpu --device cpu --quick     the same parts on the CPU, in seconds

`make gpu` installs the packages and writes the table into docs/performance.md. A part that fails is
reported in one line; the other parts still run, and so does the same part on the other device.
Prints the table; the last line of the output is JSON. Serving needs `wrk` and two cores.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.load import BenchmarkError, Cores, Requests, Server, free_port, measure, serving
from benchmarks.page import with_section
from benchmarks.training import CHAPTER, OURS, PLAIN, first, machine, measure_loops
from service.model.artefact import check_artefact, read_file
from service.model.classifier import Classifier, Device
from service.settings import Settings
from training.dataset import DatasetError, FashionMNIST, load
from training.fitting.fit import fit

ROOT = Path(__file__).parents[1]
TESTS = "tests/training/fitting/test_graphs.py"
BATCH_SIZES = (128, 512, 2048)
CONNECTIONS = (1, 16, 256)
BEGIN, END = "<!-- gpu: written by `make gpu` -->\n", "<!-- gpu: end -->"
MISSING = "not measured"

PASSED = "tests that need a GPU"
FIT = f"chapter recipe, {CHAPTER.epochs} epochs with evaluation, seconds"
SETUP = "data to the device and capture, seconds"
FIRST_SETUP = "the same in the first fit of a process, seconds"
SELF_TEST = "largest error on the file's self-test"
DIFFERENCE = "largest difference from the CPU's probabilities"
OTHER_CLASSES = "test images with another class than on the CPU"


def trained(loop: str, batch_size: int) -> str:
    """Return the name of a training row, in images a second."""
    return f"images a second, batch {batch_size:,}, {loop}"


def served(connections: int) -> str:
    """Return the name of a serving row, in requests a second."""
    return f"requests a second, {connections} connection{'s' * (connections > 1)}"


GOALS = {
    PASSED: "pass",
    FIT: "< 1.5 (stretch 0.7)",
    SETUP: "",
    FIRST_SETUP: "",
    **{
        trained(loop, size): "> 1,200,000" if loop == OURS and size >= 512 else ""
        for size in BATCH_SIZES
        for loop in (OURS, PLAIN)
    },
    **{served(connections): "" for connections in CONNECTIONS},
    SELF_TEST: "≤ 1e-05",
    DIFFERENCE: "",
    OTHER_CLASSES: "0",
}
"""Every row of the table, in order, with its goal on a GPU."""

Figures = dict[str, dict[str, str]]
"""Formatted figures by row and device."""


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option(
    "--quick", is_flag=True, help="A little of everything, to check that every part runs."
)
@click.option(
    "--write",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the table into this page.",
)
def main(device: Device, quick: bool, write: Path | None) -> None:
    """Run the GPU's tests, and measure training, serving and agreement on it."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(
            "torch finds no CUDA device here: install its CUDA build (make gpu RUNTIME=gpu), or "
            "try --device cpu --quick."
        )
    try:
        data = load()
    except DatasetError as exc:
        raise click.ClickException(str(exc)) from exc
    if quick:
        data = replace(data, train=first(data.train, 24), test=first(data.test, 24))
    torch.set_num_threads(1)  # as in the other tables of the CPU
    load_before = os.getloadavg()[0]
    devices: list[Device] = ["cpu"] if device == "cpu" else ["cpu", "cuda"]
    figures: Figures = {}
    failed = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        parts: dict[str, Callable[[], Figures]] = {"tests": partial(run_tests, device)}
        for each in devices:
            parts[f"fits on {each}"] = partial(time_fits, data, each, quick)
            parts[f"training on {each}"] = partial(time_steps, data, each, quick, progress)
            parts[f"serving on {each}"] = partial(time_serving, data, each, quick)
        parts["agreement"] = partial(compare, data, device)
        for name, part in parts.items():
            task = progress.add_task(name, total=None)
            try:
                for row, found in part().items():
                    figures.setdefault(row, {}).update(found)
            except Exception as exc:  # the other parts still run
                failed.append(f"{name}: {_one_line(exc)}")
            progress.remove_task(task)
    conditions = machine(load_before)
    text = table(figures, device, conditions)
    if write:
        page = with_section(write.read_text(encoding="utf-8"), text, BEGIN, END)
        write.write_text(page, encoding="utf-8")
    click.echo(text)
    click.echo(json.dumps({"benchmark": "gpu", "machine": conditions, "rows": figures}))
    if failed:
        raise click.ClickException("\n".join(failed))


def _one_line(error: Exception) -> str:
    """Return the first line of an error; if a server did not start, also the last of its output."""
    first_line, *others = str(error).splitlines() or [type(error).__name__]
    return " ".join(
        [first_line, *others[-1:]] if isinstance(error, BenchmarkError) else [first_line]
    )


def run_tests(device: str) -> Figures:
    """Run the tests that need a GPU; without a GPU, pytest skips them.

    Raises:
        BenchmarkError: a test fails.
    """
    command = ["-m", "pytest", "-q", "-k", "on_a_gpu", "-p", "no:cacheprovider", TESTS]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    *_, last = ["", *(done.stdout or done.stderr).strip().splitlines()]
    if done.returncode:
        raise BenchmarkError(f"{last}: run pytest {TESTS}")
    return {PASSED: {device: last.split(" in ")[0]}}


def time_fits(data: FashionMNIST, device: str, quick: bool) -> Figures:
    """Fit the chapter's recipe twice; return wall-clock times, with evaluation.

    The first fit of a process also starts CUDA and its libraries.
    """
    recipe = replace(CHAPTER, epochs=1) if quick else CHAPTER
    start, again = (fit(data, recipe, device=device).seconds for _ in range(2))
    return {
        FIT: {device: f"{again['fit']:.2f}"},
        SETUP: {device: f"{again['setup']:.2f}"},
        FIRST_SETUP: {device: f"{start['setup']:.2f}"},
    }


def time_steps(data: FashionMNIST, device: str, quick: bool, progress: Progress) -> Figures:
    """Return images a second of our loop and the plain eager loop, without evaluation."""
    share = 4 if device == "cpu" and not quick else 1
    rows = measure_loops(
        data, device, BATCH_SIZES, 1 if quick else 5, share, progress, (OURS, PLAIN)
    )
    return {
        trained(row.name, row.batch_size): {device: f"{row.training_rate:,.0f}"} for row in rows
    }


def time_serving(data: FashionMNIST, device: Device, quick: bool) -> Figures:
    """Return how many 784-byte requests a second the service answers, and their latency.

    Raises:
        BenchmarkError: `wrk` or a second core is missing, or the service did not start.
    """
    cores = Cores.choose()
    bodies = [image.tobytes() for image in data.test.images[:1000]]
    requests = Requests("/predict", {"Content-Type": "application/octet-stream"}, bodies)
    figures: Figures = {}
    with requests.folder, serve(device, cores) as server:
        for connections in CONNECTIONS:
            sample = measure(server, requests, connections, 1 if quick else 3, cores)
            figure = f"{sample.rate:,.0f}, p50 {sample.p50:.2f} ms"
            figures[served(connections)] = {device: figure}
    return figures


def serve(device: Device, cores: Cores) -> AbstractContextManager[Server]:
    """Run the service on this device."""
    port = free_port()
    settings = {"DEVICE": device, "PORT": str(port), "LOG_LEVEL": "warning", "DRAIN_SECONDS": "0"}
    return serving(
        [sys.executable, "-m", "service"],
        cores=cores,
        port=port,
        ready="/readyz",
        environment={f"BNLENET_{name}": value for name, value in settings.items()},
    )


def compare(data: FashionMNIST, device: Device) -> Figures:
    """Compare the served file on the device with its self-test, and with the CPU's answers.

    Raises:
        ModelError: the file cannot run on the device, or fails its self-test.
    """
    path, content = read_file(Settings().model_path)
    test = check_artefact(path, content).self_test
    there, here = (Classifier.load(path, name) for name in (device, "cpu"))
    pixels = np.frombuffer(test.pixels, np.uint8).reshape(-1, 1, 28, 28)
    error = np.abs(there.probabilities(pixels) - np.array(test.probabilities)).max()
    images = data.test.images[:, np.newaxis]
    ours, theirs = (classifier.probabilities(images) for classifier in (there, here))
    return {
        SELF_TEST: {device: f"{error:.1e}"},
        DIFFERENCE: {device: f"{np.abs(ours - theirs).max():.1e}"},
        OTHER_CLASSES: {device: str((ours.argmax(1) != theirs.argmax(1)).sum())},
    }


def table(
    figures: Figures, device: str = "cuda", conditions: Mapping[str, str] | None = None
) -> str:
    """Return the table of docs/performance.md, with machine and versions."""
    lines = [
        ["", "GPU" if device == "cuda" else "CPU", "CPU of the same machine", "goal"],
        ["---"] * 4,
    ]
    for name, goal in GOALS.items():
        found = figures.get(name, {})
        cpu = found.get("cpu", "") if device != "cpu" else ""
        lines.append([name, found.get(device, MISSING), cpu, goal])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    where = ", ".join(f"{name} {value}" for name, value in (conditions or {}).items())
    return f"{rows}\n\nMeasured on: {where or 'nothing yet'}.\n"


if __name__ == "__main__":
    main()
