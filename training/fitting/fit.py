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
        population: statistics of the whole training set, augmented as in the last epochs.
        epochs: the metrics of each epoch.
        scores: on the held-out images (without any, on the test set), by batch-norm statistics:
            "moving"; "population"; and, if the recipe augments, "clean": those of the training
            set without augmentation.
        confusion: counts of the same images with the recipe's statistics: rows are the true
            classes, columns the answers.
        temperature: the best one on the held-out images; without any, the recipe's.
        seconds: wall-clock time of "setup", "fit" (evaluation included) and "statistics".
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
    """Fit a model; the same arguments and number of threads give the same bits on the same CPU.

    Args:
        data: the data set.
        recipe: how to fit.
        seed: decides the weights, the order of the images and the augmentation.
        device: "cpu" or "cuda".
        batch_norm: the batch-norm layer: ours ("scratch") or torch's ("torch").
        holdout: validate on this many training images, the last ones; the test set is then not
            used.
        graphs: on a GPU, replay the steps as CUDA graphs if a replay equals an eager step.
        run: the folder to write to; if it holds an unfinished fit, that fit is continued.
        on_batch: called after every step with the epoch and the number of images seen in it. Only
            on the CPU: on a GPU it would wait for the device.
        on_epoch: called after every epoch, when the run folder is up to date.

    Raises:
        FitError: the batch size or hold-out is impossible, or the loss became infinite or NaN.
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
    """Return the images to train on, and those to evaluate on: held out, or the test set."""
    if not holdout:
        return data.train, data.test
    images, labels = data.train.images, data.train.labels
    kept = len(labels) - holdout
    return Split(images[:kept], labels[:kept]), Split(images[kept:], labels[kept:])


def _on_host(*figures: Tensor) -> list[float]:
    """Read numbers of any type from the device in one transfer, so that an epoch waits once."""
    read: list[float] = torch.stack([figure.double() for figure in figures]).tolist()
    return read


def _conclude(
    fitting: Fitting,
    history: Sequence[Epoch],
    judged: tuple[Tensor, Tensor],
    held_out: bool,
    seconds: dict[str, float],
) -> Fitted:
    """Compute the whole training set's statistics; score the model with each kind of statistics."""
    start = time.perf_counter()
    recipe, images = fitting.recipe, fitting.images
    model = copy.deepcopy(fitting.result()).eval().requires_grad_(False)
    augmentation = recipe.augmentation_in(recipe.epochs)  # as in the last steps
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
    """Return the error of a fit whose loss, weights or statistics became infinite or NaN."""
    steps = fitting.schedule.shape[1] // fitting.recipe.epochs
    step = min(int(fitting.finite_steps) + 1, steps)
    last = f"Epoch {epoch - 1} was the last good one." if epoch > 1 else "No epoch was completed."
    return FitError(
        f"the loss became infinite or NaN in epoch {epoch}, step {step} of {steps}: lower the "
        f"learning rate. {last}"
    )
