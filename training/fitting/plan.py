"""What a fit is asked for, made complete and checked before anything is written."""

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
"""The schedule holds a column for each step in memory."""
MIN_IMAGES_PER_THREAD = 64
"""With fewer images a thread, handing out the work costs more than the thread gains.

Measured with two threads on two cores: 1.3 times the speed of one at batch 128, 1.8 at 512.
"""


class FitError(Exception):
    """The fit cannot start or go on; the message is one sentence that says what to do."""


def check(recipe: Recipe, images: int, holdout: int = 0) -> None:
    """Refuse what cannot be trained on so many images.

    Raises:
        FitError: nothing would be left to train on, some batch would hold a single image, whose
            variance in a linear layer is zero, or the schedule would not fit into memory.
    """
    if not 0 <= holdout < images - 1:
        raise FitError(
            f"--holdout must leave images to train on, 0 to {images - 2:,}: not {holdout:,}."
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
    """Return how many cores this process may use, as its affinity and its container allow."""
    return int(cpu_count())


def threads_for(recipe: Recipe, device: str, processes: int = 1) -> int:
    """Return how many threads a fit is fastest with, where `processes` fits run at once."""
    if device != "cpu":
        return 1
    return max(1, min(cores() // processes, recipe.batch_size // MIN_IMAGES_PER_THREAD))


def versions() -> dict[str, str]:
    """Return the versions that the weights depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with its build, such as +cu130
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
        seed: of the weights, the order of the images and the augmentation.
        device: "auto" is CUDA where torch finds it.
        batch_norm: whose layer normalises.
        holdout: how many of the last training images are kept for validation.
        threads: how many torch computes with; None: `threads_for` the recipe.
        processes: how many such runs are to be fitted at once.

    Raises:
        FitError: no CUDA device, where one is asked for.
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
    """Refuse a configuration for a GPU where there is none.

    Raises:
        FitError: torch finds no CUDA device.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise FitError("torch finds no CUDA device here: use --device cpu, or auto.")


def resumed_run(folder: Path, wanted: Mapping[str, Any]) -> Run:
    """Return a run to be continued with its own settings.

    Args:
        folder: of the run.
        wanted: settings that it must have, by name of a field of `Config` or of `Recipe`;
            "recipe" is the recipe's name. A device "auto" is any.

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
    """Make the run folder of the one seed, or FOLDER-SEED for each of several.

    Args:
        folder: of the one run; of several, what their folders' names begin with.
        config: of the runs, but for the seed.
        seeds: at least one.
        images: how many there are to train on and to hold out of.

    Raises:
        FitError: such a fit is impossible; see `check`.
        RunError: one of the folders holds something; then none is made.
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
