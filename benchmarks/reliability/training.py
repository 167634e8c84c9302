"""Fits that are killed at fifty random moments and resumed must give the bytes of a whole fit."""

import json
import multiprocessing
import time
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from benchmarks.reliability.report import Options, Row
from benchmarks.reliability.small_training import small
from training.fitting.fit import fit
from training.fitting.plan import new_config
from training.fitting.recipes import RECIPES
from training.fitting.run import Run

TIMES = ("images_per_second", "seconds")  # these differ between equal fits


def run(options: Options) -> list[Row]:
    """Fit once without interruption; then, for every kill, start, kill and resume a new fit."""
    kills = options.count(50, 2)
    epochs = 4 if options.quick else 12
    random = Random(0)  # noqa: S311 - nothing is kept secret with it
    with TemporaryDirectory() as root:
        whole = _new_run(Path(root) / "whole", epochs)
        seconds = _fit(whole)
        expected = contents(whole)
        interrupted = other = 0
        for number in range(kills):
            killed = _new_run(Path(root) / str(number), epochs)
            _fit(killed, after=random.random() * seconds)
            interrupted += not killed.complete
            if not killed.complete:
                _fit(killed)
            other += contents(killed) != expected
    return [
        Row("kills; of these before the fit was complete", f"{kills:,}; {interrupted:,}"),
        Row.at_most("resumed fits with other weights, losses or results", other, 0),
    ]


def contents(run: Run) -> dict[str, object]:
    """Return the contents of a complete run folder, without the times."""
    results = run.results()
    epochs = [json.loads(line) for line in _text(run, "metrics.jsonl").splitlines()]
    return {
        "weights": (run.folder / "checkpoint.safetensors").read_bytes(),
        "results": {name: value for name, value in results.items() if name not in TIMES},
        "metrics": [{k: v for k, v in epoch.items() if k not in TIMES} for epoch in epochs],
        "configuration": _text(run, "config.json"),
        "files": sorted(path.name for path in run.folder.iterdir() if path.name[0] != "."),
    }


def _text(run: Run, name: str) -> str:
    return (run.folder / name).read_text()


def _new_run(folder: Path, epochs: int) -> Run:
    recipe = replace(RECIPES["best"], epochs=epochs, finish=0.5, batch_size=128, averaging=0.4)
    return Run.create(folder, new_config(recipe, small().sha256, device="cpu", threads=1))


def _fit(run: Run, after: float | None = None) -> float:
    """Fit in a separate process, and kill it after `after` seconds; return the seconds taken.

    The process is forked from one that has imported torch.

    Raises:
        RuntimeError: the fit failed without being killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # torch's optimisers import it late
    ready = context.Event()
    process = context.Process(target=_fit_here, args=(run.folder, ready))
    process.start()
    ready.wait()
    begin = time.monotonic()
    process.join(after)
    if after is not None:
        process.kill()
        process.join()
    elif process.exitcode:
        raise RuntimeError(f"a fit ended with {process.exitcode}")
    return time.monotonic() - begin


def _fit_here(folder: Path, ready: Event) -> None:
    import torch  # noqa: PLC0415 - only this process needs it

    torch.set_num_threads(1)
    run = Run(folder)
    ready.set()
    fit(small(), run.config().recipe, run=run)
