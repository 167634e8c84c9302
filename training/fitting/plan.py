"""The options of a fit, completed and checked before anything is written."""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from joblib import cpu_count

from training.fitting.recipes import Recipe
from training.fitting.run import Config, Run, RunError

MAX_STEPS = 5_000_000
"""The limit of steps: the schedule has a column in memory for each of them."""
MIN_IMAGES_PER_THREAD = 64
"""With fewer images, a further thread costs more than it gains.

Measured on two cores: two threads are 1.3 times as fast as one at batch 128, 1.8 times at 512.
"""


class FitError(Exception):
    """The fit cannot start or continue; the message is one sentence that says what to do."""


def check(recipe: Recipe, images: int, holdout: int = 0) -> None:
    """Refuse a recipe that cannot be trained on this many images.

    Raises:
        FitError: no image is left to train on, a batch would have a single image (its variance in
            a linear layer is zero), or the schedule would not fit into memory.
    """
    if not 0 <= holdout < images - 1:
        raise FitError(
            f"--holdout must leave images to train on: use 0 to {images - 2:,}, not {holdout:,}."
        )
    if recipe.batch_size < 2:
        raise FitError("batch norm needs at least two images a batch: raise --batch-size.")
    if (images - holdout) % recipe.batch_size == 1:
        raise FitError(
            f"a batch size of {recipe.batch_size} leaves a last batch of one image, which batch "
            "norm cannot train on: choose another --batch-size."
        )
    steps = recipe.epochs * math.ceil((images - holdout) / recipe.batch_size)
    if steps > MAX_STEPS:
        raise FitError(f"{steps:,} steps are more than {MAX_STEPS:,}: lower --epochs.")


def cores() -> int:
    """Return how many cores this process may use, by its affinity and its container."""
    return int(cpu_count())


def threads_for(recipe: Recipe, device: str, processes: int = 1) -> int:
    """Return the fastest number of threads for a fit when `processes` fits run at once."""
    if device != "cpu":
        return 1
    return max(1, min(cores() // processes, recipe.batch_size // MIN_IMAGES_PER_THREAD))


def versions() -> dict[str, str]:
    """Return the versions of the software that the weights depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the build, such as +cu130
        "numpy": np.__version__,
    }


def new_config(
    recipe: Recipe,
    dataset_sha256: str,
    *,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    batch_norm: Literal["scratch", "torch"] = "torch",
    holdout: int = 0,
    threads: int | None = None,
    processes: int = 1,
) -> Config:
    """Return the configuration of a new run on this machine.

    Args:
        recipe: how to fit.
        dataset_sha256: `FashionMNIST.sha256`.
        seed: decides the weights, the order of the images and the augmentation.
        device: "auto" is CUDA if torch finds a CUDA device, else the CPU.
        batch_norm: the batch-norm layer: ours ("scratch") or torch's ("torch").
        holdout: validate on this many training images, the last ones.
        threads: CPU threads of torch; None chooses by `threads_for`.
        processes: how many such runs are fitted at once.

    Raises:
        FitError: `device` is "cuda", and torch finds no CUDA device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    config = Config(
        recipe=recipe,
        seed=seed,
        device=device,
        batch_norm=batch_norm,
        holdout=holdout,
        threads=threads or threads_for(recipe, device, processes),
        dataset_sha256=dataset_sha256,
        versions=versions(),
    )
    check_device(config)
    return config


def check_device(config: Config) -> None:
    """Refuse a configuration for a GPU if there is none.

    Raises:
        FitError: torch finds no CUDA device.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise FitError("torch finds no CUDA device here: use --device cpu, or auto.")


def resumed_run(folder: Path, wanted: Mapping[str, Any]) -> Run:
    """Return an unfinished run, to be continued with its own settings.

    Args:
        folder: the run's folder.
        wanted: settings that the run must have, by the name of a field of `Config` or `Recipe`;
            "recipe" is the recipe's name. The device "auto" matches any device.

    Raises:
        RunError: this is not a run folder, the run is complete, or one of the settings differs.
        FitError: the run needs a CUDA device, and torch finds none.
    """
    run = Run(folder)
    config = run.config()
    if run.complete:
        raise RunError(f"the run in {folder} is complete: there is nothing to resume.")
    own = {**asdict(config), **asdict(config.recipe), "recipe": config.recipe.name}
    for name, value in wanted.items():
        if value != own[name] and (name, value) != ("device", "auto"):
            raise RunError(
                f"the run was started with {name.replace('_', ' ')} {own[name]}, "
                f"not {value}: resume it with its own settings."
            )
    check_device(config)
    return run


def create_runs(folder: Path, config: Config, seeds: Sequence[int], images: int) -> list[Run]:
    """Make a run folder: `folder` for one seed, FOLDER-SEED for each of several seeds.

    Args:
        folder: the folder of the one run, or the beginning of all folders' names.
        config: the configuration of all runs; its seed is replaced.
        seeds: at least one.
        images: the number of training images, those held out included.

    Raises:
        FitError: such a fit is impossible; see `check`.
        RunError: one of the folders is not empty; then no folder is made.
    """
    check(config.recipe, images, config.holdout)
    folders = [folder]
    if len(seeds) > 1:
        folders = [folder.with_name(f"{folder.name}-{seed}") for seed in seeds]
    for path in folders:
        Run(path).must_be_new()
    return [
        Run.create(path, replace(config, seed=seed))
        for path, seed in zip(folders, seeds, strict=True)
    ]
