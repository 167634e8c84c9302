"""Fit BN-LeNet by a recipe: the loop for one seed, and the scores at its end."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from training.dataset import FashionMNIST, Split
from training.fitting.graphs import fastest_step
from training.fitting.images import on_device
from training.fitting.plan import FitError, check
from training.fitting.population import Moments, population_statistics, with_statistics
from training.fitting.precision import full_precision
from training.fitting.recipes import NO_AUGMENTATION, Recipe
from training.fitting.run import MOMENTS, Epoch, Run
from training.fitting.scoring import (
    Score,
    accuracy,
    best_temperature,
    confusion_matrix,
    evaluate,
    predict,
)
from training.fitting.step import Fitting
from training.model import BNLeNet


@dataclass(frozen=True)
class Fitted:
    """A finished fit.

    Attributes:
        model: in prediction mode, with the moving statistics.
        population: statistics of the whole training set, changed as in the last epochs.
        epochs: what happened.
        scores: on the images held out (the test set when none are), by the statistics used:
            "moving"; "population"; and "clean", the training set's without augmentation, when the
            recipe augments.
        confusion: images on the same, with the recipe's statistics: rows are the true classes,
            columns the answers.
        temperature: the one that fits the images held out best; the recipe's when none are.
        seconds: by the clock: "setup", "fit" (evaluation included), "statistics".
    """

    model: BNLeNet
    population: Moments
    epochs: tuple[Epoch, ...]
    scores: dict[str, Score]
    confusion: list[list[int]]
    temperature: float
    seconds: dict[str, float]


@full_precision()
def fit(
    data: FashionMNIST,
    recipe: Recipe,
    *,
    seed: int = 0,
    device: str = "cpu",
    batch_norm: Literal["scratch", "torch"] = "torch",
    holdout: int = 0,
    graphs: bool = True,
    run: Run | None = None,
    on_batch: Callable[[Fitting, int, int], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Fitted:
    """Fit a model; the same arguments and number of threads give the same bits on one CPU.

    Args:
        data: the data set.
        recipe: how to fit.
        seed: of the weights, the order of the images and the augmentation.
        device: "cpu" or "cuda".
        batch_norm: whose layer normalises.
        holdout: how many of the last training images are kept for validation; then the test set
            is not touched.
        graphs: on a GPU, replay the steps as CUDA graphs where they prove to be the same.
        run: the folder to write to; a fit that it holds already is continued.
        on_batch: called after every step with the epoch and the number of images seen in it, on
            the CPU only: on a GPU looking would mean waiting.
        on_epoch: called after every epoch, when the run folder is up to date.

    Raises:
        FitError: an impossible batch size or hold-out, or the loss is no longer finite.
        RunError: the run folder cannot be resumed.
    """
    began = time.perf_counter()
    check(recipe, len(data.train.labels), holdout)
    training, judged = _split(data, holdout)
    images, labels = on_device(training, device)
    judged_images, judged_labels = on_device(judged, device)
    fitting = Fitting(recipe, images, labels, seed, batch_norm)
    history = run.load_state(fitting.tensors()) if run else []
    step = fastest_step(fitting) if images.is_cuda and graphs else fitting.step
    ready = time.perf_counter()

    for epoch in range(len(history) + 1, recipe.epochs + 1):
        start = time.perf_counter()
        seen = 0
        for rows in torch.split(fitting.begin(epoch), recipe.batch_size):
            step(rows)
            seen += len(rows)
            if not images.is_cuda:
                if not fitting.loss.isfinite():
                    raise diverged(fitting, epoch)
                if on_batch:
                    on_batch(fitting, epoch, seen)
        model = fitting.result()
        right = accuracy(predict(model, judged_images), judged_labels)
        loss, correct, share, rate, finite = _on_host(
            fitting.loss, fitting.correct, right, fitting.learning_rates[0], fitting.finite()
        )
        if not finite:
            raise diverged(fitting, epoch)
        seconds = time.perf_counter() - start
        history.append(
            Epoch(
                epoch,
                loss=loss / len(labels),
                train_accuracy=correct / len(labels),
                accuracy=share,
                learning_rate=rate,
                images_per_second=len(labels) / seconds,
                seconds=seconds,
            )
        )
        if run:
            run.save_epoch(history, model.state_dict(), fitting.tensors())
        if on_epoch:
            on_epoch(history[-1])

    finished = time.perf_counter()
    seconds_so_far = {"setup": ready - began, "fit": finished - ready}
    judged_on = judged_images, judged_labels
    fitted = _conclude(fitting, history, judged_on, holdout > 0, seconds_so_far)
    if run:
        _complete(run, fitted, "held-out images" if holdout else "test set")
    return fitted


def _split(data: FashionMNIST, holdout: int) -> tuple[Split, Split]:
    """Return the images to train on, and those to judge by: held out, or else the test set."""
    if not holdout:
        return data.train, data.test
    images, labels = data.train.images, data.train.labels
    kept = len(labels) - holdout
    return Split(images[:kept], labels[:kept]), Split(images[kept:], labels[kept:])


def _on_host(*figures: Tensor) -> list[float]:
    """Read numbers of any type from the device at once: an epoch waits for it one time only."""
    read: list[float] = torch.stack([figure.double() for figure in figures]).tolist()
    return read


def _conclude(
    fitting: Fitting,
    history: Sequence[Epoch],
    judged: tuple[Tensor, Tensor],
    held_out: bool,
    seconds: dict[str, float],
) -> Fitted:
    """Take the statistics of the whole training set, and judge by each kind of statistics."""
    start = time.perf_counter()
    recipe, images = fitting.recipe, fitting.images
    model = copy.deepcopy(fitting.result()).eval().requires_grad_(False)
    augmentation = recipe.augmentation_in(recipe.epochs)  # what the weights met last
    population = population_statistics(model, images, augmentation, fitting.seed)
    models = {"moving": model, "population": with_statistics(model, population)}
    if augmentation != NO_AUGMENTATION:
        models["clean"] = with_statistics(model, population_statistics(model, images))
    exported = models[recipe.statistics]
    answers = predict(exported, judged[0]).argmax(1)
    return Fitted(
        model,
        population,
        tuple(history),
        {name: evaluate(other, *judged) for name, other in models.items()},
        confusion_matrix(answers.cpu().numpy(), judged[1].cpu().numpy()).tolist(),
        best_temperature(exported, *judged) if held_out else recipe.temperature,
        seconds | {"statistics": time.perf_counter() - start},
    )


def _complete(run: Run, fitted: Fitted, judged_on: str) -> None:
    """Write the last checkpoint, with the population statistics, and the results."""
    named = {
        f"population.{layer}.{kind}": tensor.float()
        for layer, moments in fitted.population.items()
        for kind, tensor in zip(MOMENTS, moments, strict=True)
    }
    run.save_checkpoint(fitted.model.state_dict() | named)
    run.finish(
        {
            "judged_on": judged_on,
            "scores": {name: asdict(score) for name, score in fitted.scores.items()},
            "confusion": fitted.confusion,
            "temperature": fitted.temperature,
            "seconds": fitted.seconds,
        }
    )


def diverged(fitting: Fitting, epoch: int) -> FitError:
    """Return the error of a fit whose loss, weights or statistics are no longer finite."""
    steps = fitting.schedule.shape[1] // fitting.recipe.epochs
    step = min(int(fitting.finite_steps) + 1, steps)
    last = (
        f"The checkpoint of epoch {epoch - 1} is kept." if epoch > 1 else "No epoch was complete."
    )
    return FitError(
        f"the loss is no longer finite in epoch {epoch}, step {step} of {steps}: lower the "
        f"learning rate. {last}"
    )
