"""Fit BN-LeNet by a recipe: the loop, evaluation, and statistics of the whole data set."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from torch import Tensor, nn

from training.batch_norm import set_statistics
from training.dataset import FashionMNIST, Split
from training.evaluation.measures import confusion_matrix
from training.fitting.augmentation import Augmentation
from training.fitting.recipes import NO_AUGMENTATION, Recipe
from training.fitting.run import MOMENTS, Epoch, Run
from training.fitting.step import Captured, Fitting
from training.model import BNLeNet, norm_layers

Moments = dict[str, tuple[Tensor, Tensor]]
"""Mean and variance [C] of the input of every batch-norm layer, by the layer's name."""


MOST_STEPS = 5_000_000
"""A schedule has a column for each, in memory."""


class FitError(Exception):
    """The fit cannot start or go on; the message is one sentence that says why."""


@dataclass(frozen=True)
class Score:
    """A model on a split: share of right answers (0 to 1) and mean cross-entropy (nats)."""

    accuracy: float
    loss: float


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


def fit(
    data: FashionMNIST,
    recipe: Recipe,
    *,
    seed: int = 0,
    device: str = "cpu",
    batch_norm: Literal["scratch", "torch"] = "torch",
    holdout: int = 0,
    run: Run | None = None,
    on_batch: Callable[[Fitting, int, int], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Fitted:
    """Fit a model; the same arguments give the same weights, bit for bit on the CPU.

    Args:
        data: the data set.
        recipe: how to fit.
        seed: of the weights, the order of the images and the augmentation.
        device: "cpu" or "cuda".
        batch_norm: whose layer normalises.
        holdout: how many of the last training images are kept for validation; then the test set
            is not touched.
        run: the folder to write to; a fit that it holds already is continued.
        on_batch: called after every step with the epoch and the number of images seen in it, on
            the CPU only: on a GPU looking would mean waiting.
        on_epoch: called after every epoch, when the run folder is up to date.

    Raises:
        FitError: an impossible batch size or hold-out, or the loss is no longer finite.
        RunError: the run folder cannot be resumed.
    """
    (fitted,) = fit_side_by_side(
        data,
        recipe,
        [seed],
        device=device,
        batch_norm=batch_norm,
        holdout=holdout,
        runs=[run] if run else [],
        on_batch=on_batch,
        on_epoch=(lambda lines: on_epoch(lines[0])) if on_epoch else None,
    )
    return fitted


def fit_side_by_side(
    data: FashionMNIST,
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    device: str = "cpu",
    batch_norm: Literal["scratch", "torch"] = "torch",
    holdout: int = 0,
    runs: Sequence[Run] = (),
    on_batch: Callable[[Fitting, int, int], None] | None = None,
    on_epoch: Callable[[list[Epoch]], None] | None = None,
) -> list[Fitted]:
    """Do what `fit` does for every seed, all in the same steps; `runs` has a new folder for each.

    Each model is, to float tolerance, the one that `fit` gives, and each folder what `fit` writes:
    when interrupted, each is continued by itself.
    """
    began = time.perf_counter()
    check(recipe, len(data.train.labels), holdout, len(seeds), batch_norm)
    kept = len(data.train.labels) - holdout
    images, labels = on_device(Split(data.train.images[:kept], data.train.labels[:kept]), device)
    judged = on_device(
        Split(data.train.images[kept:], data.train.labels[kept:]) if holdout else data.test, device
    )
    fitting = Fitting(recipe, images, labels, seeds, batch_norm)
    history: list[list[Epoch]] = [[] for _ in seeds]
    for place, run in enumerate(runs):
        history[place] = run.load_state(fitting.tensors(place))
    step = Captured(fitting) if images.is_cuda else fitting.step
    ready = time.perf_counter()

    for epoch in range(len(history[0]) + 1, recipe.epochs + 1):
        start = time.perf_counter()
        seen = 0
        for rows in torch.split(fitting.begin(epoch), recipe.batch_size, dim=1):
            step(rows)
            seen += rows.shape[1]
            if not images.is_cuda:
                stop_if_diverged(fitting, epoch)
                if on_batch:
                    on_batch(fitting, epoch, seen)
        stop_if_diverged(fitting, epoch, thorough=True)
        fitted = time.perf_counter() - start  # the device has caught up: its answer is here
        for place, network in enumerate(fitting.results):
            history[place].append(
                Epoch(
                    epoch,
                    loss=fitting.loss[place].item() / kept,
                    train_accuracy=fitting.correct[place].item() / kept,
                    accuracy=evaluate(network, *judged).accuracy,
                    learning_rate=fitting.learning_rates[0].item(),
                    images_per_second=kept * len(seeds) / fitted,
                    seconds=time.perf_counter() - start,
                )
            )
        for place, run in enumerate(runs):
            model, state = fitting.results[place].state_dict(), fitting.tensors(place)
            run.save_epoch(history[place], model, state)
        if on_epoch:
            on_epoch([lines[-1] for lines in history])

    seconds = {"setup": ready - began, "fit": time.perf_counter() - ready}
    return [
        _conclude(
            recipe,
            *(network, seed, lines, images, judged, holdout, seconds),
            run=runs[place] if runs else None,
        )
        for place, (network, seed, lines) in enumerate(
            zip(fitting.results, seeds, history, strict=True)
        )
    ]


def _conclude(
    recipe: Recipe,
    network: BNLeNet,
    seed: int,
    epochs: Sequence[Epoch],
    images: Tensor,
    judged: tuple[Tensor, Tensor],
    holdout: int,
    seconds: dict[str, float],
    run: Run | None,
) -> Fitted:
    """Take the statistics of the whole data set, judge by each kind, complete the run folder."""
    finished = time.perf_counter()
    model = copy.deepcopy(network).eval().requires_grad_(False)
    augmentation = recipe.augmentation_in(recipe.epochs)  # what the weights met last
    population = population_statistics(model, images, augmentation, seed)
    models = {"moving": model, "population": with_statistics(model, population)}
    if augmentation != NO_AUGMENTATION:
        models["clean"] = with_statistics(model, population_statistics(model, images))
    answers = predict(models[recipe.statistics], judged[0]).argmax(1)
    result = Fitted(
        model,
        population,
        tuple(epochs),
        {name: evaluate(other, *judged) for name, other in models.items()},
        confusion_matrix(answers.cpu().numpy(), judged[1].cpu().numpy()).tolist(),
        best_temperature(models[recipe.statistics], *judged) if holdout else recipe.temperature,
        seconds | {"statistics": time.perf_counter() - finished},
    )
    if run:
        named = {
            f"population.{layer}.{kind}": tensor.float()
            for layer, moments in population.items()
            for kind, tensor in zip(MOMENTS, moments, strict=True)
        }
        run.save_checkpoint(model.state_dict() | named)
        run.finish(
            {
                "judged_on": "held-out images" if holdout else "test set",
                "scores": {name: asdict(score) for name, score in result.scores.items()},
                "confusion": result.confusion,
                "temperature": result.temperature,
                "seconds": result.seconds,
            }
        )
    return result


def check(
    recipe: Recipe, images: int, holdout: int = 0, seeds: int = 1, batch_norm: str = "torch"
) -> None:
    """Refuse what cannot be trained.

    Raises:
        FitError: nothing would be left to train on, some batch would hold a single image, whose
            variance in a linear layer is zero, several seeds would share our own batch norm, or
            the schedule would not fit into memory.
    """
    if seeds > 1 and batch_norm == "scratch":
        raise FitError("several seeds at once need torch's batch norm: leave --batch-norm out.")
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
    if steps > MOST_STEPS:
        raise FitError(f"{steps:,} steps are more than {MOST_STEPS:,}: lower --epochs.")


def stop_if_diverged(fitting: Fitting, epoch: int, thorough: bool = False) -> None:
    """Wait for the device, and stop the fit if a loss is not finite.

    At the end of an epoch (`thorough`) also if a weight or moving statistic is not: those of the
    last step, and a variance too large for its type, under which the loss stays finite.

    Raises:
        FitError: it was not.
    """
    checked = [fitting.loss, *(fitting.model.state_dict().values() if thorough else ())]
    if not all(tensor.isfinite().all() for tensor in checked):
        steps = fitting.schedule.shape[1] // fitting.recipe.epochs
        raise FitError(
            f"the loss is no longer finite in epoch {epoch}, step "
            f"{min(int(fitting.finite_steps.min()) + 1, steps)} of {steps}: lower the learning "
            "rate. "
            + (
                f"The checkpoint of epoch {epoch - 1} is kept."
                if epoch > 1
                else "No epoch was complete."
            )
        )


def on_device(split: Split, device: str) -> tuple[Tensor, Tensor]:
    """Return images uint8 [n, 1, 28, 28] and labels int64 [n] on a device."""
    images = torch.from_numpy(split.images).to(device)[:, None]
    return images, torch.from_numpy(split.labels).to(device, torch.int64)


def batches(images: Tensor) -> Iterator[Tensor]:
    """Yield floats in [0, 1] from uint8 images, in order."""
    size = 10_000 if images.is_cuda else 250  # on a CPU what fits its cache is twice as fast
    for batch in torch.split(images, size):
        yield batch.float().div_(255)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits, float32 [n, 10], of uint8 images [n, 1, 28, 28], in prediction mode."""
    training = model.training
    model.eval()
    logits = torch.cat([model(batch) for batch in batches(images)])
    model.train(training)
    return logits


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> Score:
    """Score a model in prediction mode on uint8 images [n, 1, 28, 28] and labels int64 [n]."""
    logits = predict(model, images)
    loss = F.cross_entropy(logits.double(), labels)
    return Score((logits.argmax(1) == labels).double().mean().item(), loss.item())


def best_temperature(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the temperature, to 0.01, with the least cross-entropy of softmax(logits / T).

    Guo et al., "On Calibration of Modern Neural Networks" (2017), section 4.2. To be used on images
    that the model was not fitted on.
    """
    logits = predict(model, images).double()
    candidates = [t / 100 for t in range(40, 251)]
    return min(candidates, key=lambda t: F.cross_entropy(logits / t, labels).item())


@torch.no_grad()
def population_statistics(
    model: BNLeNet, images: Tensor, augmentation: Augmentation | None = None, seed: int = 0
) -> Moments:
    """Return the mean and (biased) variance of each batch norm's input over all images.

    Layer by layer: each layer's statistics are taken with those of the layers before it already
    replaced, from float64 sums of x and x^2 over uint8 images [n, 1, 28, 28]: every image counts
    the same (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3). An augmentation
    gives one random view of each image, the same for all layers. The model itself is not changed.
    """
    model = copy.deepcopy(model).eval()
    found: Moments = {}
    for name, layer in norm_layers(model).items():
        names = [child for child, _ in model.named_children()]
        before = list(model.children())[: names.index(name)]
        generator = torch.Generator(images.device).manual_seed(seed)
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in batches(images):
            x = augmentation(batch, generator) if augmentation else batch
            for child in before:
                x = child(x)
            x = x.double().flatten(2) if x.ndim > 2 else x.double()[:, :, None]
            count += x.shape[0] * x.shape[2]
            total = total.to(x) + x.sum((0, 2))
            squares = squares.to(x) + x.square().sum((0, 2))
        mean = total / count
        found[name] = (mean, (squares / count - mean.square()).clamp_min(0))
        set_statistics(layer, *found[name])
    return found


@torch.no_grad()
def with_statistics(model: BNLeNet, moments: Moments) -> BNLeNet:
    """Return a copy of the model that predicts with these statistics."""
    model = copy.deepcopy(model)
    for name, layer in norm_layers(model).items():
        set_statistics(layer, *moments[name])
    return model
