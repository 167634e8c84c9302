"""Fit BN-LeNet by a recipe: the loop, evaluation, and statistics of the whole data set."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from torch import Tensor, nn

from training import batch_last, side_by_side
from training.augmentation import Augmentation
from training.batch_norm import NormLayer, set_statistics
from training.dataset import FashionMNIST, Split
from training.evaluation import confusion_matrix
from training.model import BNLeNet, initialise, norm_layers
from training.muon import Muon
from training.recipes import NO_AUGMENTATION, RECIPES, Recipe
from training.run import MOMENTS, Run

__all__ = ["RECIPES", "Epoch", "FitError", "Fitted", "Recipe", "Score", "evaluate", "fit"]

Moments = dict[str, tuple[Tensor, Tensor]]
"""Mean and variance [C] of the input of every batch-norm layer, by the layer's name."""


class FitError(Exception):
    """The fit cannot start or go on; the message is one sentence that says why."""


@dataclass(frozen=True)
class Score:
    """A model on a split: share of right answers (0 to 1) and mean cross-entropy (nats)."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Epoch:
    """One line of metrics.jsonl: accuracies from 0 to 1, the loss in nats, times by the clock.

    `accuracy` is that on the images held out (the test set when none are), with moving statistics;
    nothing is chosen by it. `learning_rate` is that of the last step; `images_per_second` counts
    those of all seeds trained side by side.
    """

    epoch: int
    loss: float
    train_accuracy: float
    accuracy: float
    learning_rate: float
    images_per_second: float
    seconds: float


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


class Fitting:
    """A fit under way: every tensor that a step reads or writes keeps its place.

    So the step can be captured in a CUDA graph, a fit resumed by copying into these tensors, and
    nothing inside an epoch waits for the device. Of several seeds, the networks are views of
    `model`, which holds them side by side.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: Tensor,
        labels: Tensor,
        seeds: Sequence[int] = (0,),
        batch_norm: Literal["scratch", "torch"] = "torch",
    ) -> None:
        self.recipe, self.images, self.labels, self.seeds = recipe, images, labels, seeds
        self.augmentation = recipe.augmentation_in(1)  # the loop keeps it up to date
        device = images.device
        self.generators = [torch.Generator(device) for _ in seeds]
        self.networks = [BNLeNet(batch_norm) for _ in seeds]
        for network, seed in zip(self.networks, seeds, strict=True):
            initialise(network, seed)
            network.to(device)
            for layer, following in pairwise(network.children()):
                # The norm's mean takes this bias away: its gradient is zero but for rounding, which
                # AdamW would blow up into steps that the moving means do not keep up with.
                if isinstance(following, NormLayer) and isinstance(layer.bias, Tensor):
                    layer.bias.requires_grad_(False)
        self.averages = [copy.deepcopy(n).eval().requires_grad_(False) for n in self.networks]
        self.model, self.average = self.networks[0], self.averages[0]
        self.forward: Callable[[Tensor], Tensor] = self.model
        if len(seeds) > 1:
            self.model = side_by_side.stack(self.networks)
            self.average = side_by_side.stack(self.averages)
            self.forward = partial(side_by_side.forward, self.model)
        elif device.type == "cpu" and batch_norm == "torch":
            # The same numbers by another memory layout, twice as fast on a CPU core.
            self.forward = partial(batch_last.forward, self.model)
        # What depends on the number of the step is looked up in a table on the device.
        steps = recipe.epochs * math.ceil(len(images) / recipe.batch_size)
        reach = max(recipe.averaging * steps, 1.0)
        rates = [recipe.learning_rate * recipe.rate(step / steps) for step in range(steps)]
        others = [recipe.other_learning_rate * recipe.rate(step / steps) for step in range(steps)]
        shares = [max(1 / reach, 1 / (step + 1)) for step in range(steps)]
        self.schedule = torch.tensor([rates, others, shares], device=device)
        self.done = torch.zeros(1, dtype=torch.int64, device=device)
        self.learning_rates = torch.zeros(2, device=device)
        # Sums since the epoch began, a place for each seed; of steps, those before any divergence.
        self.loss = torch.zeros(len(seeds), dtype=torch.float64, device=device)
        self.correct = torch.zeros(len(seeds), dtype=torch.int64, device=device)
        self.finite_steps = torch.zeros(len(seeds), dtype=torch.int64, device=device)
        self.optimizers = self._optimizers()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Make the optimisers, their state included, which torch would make in the first step."""
        recipe, (rate, other_rate) = self.recipe, self.learning_rates.unbind()
        matrices: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for parameter, own in zip(
            self.model.parameters(), self.networks[0].parameters(), strict=True
        ):
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                (matrices if own.ndim > 1 else vectors).append(parameter)
        decaying = {"params": matrices, "weight_decay": recipe.weight_decay}
        constant = {"params": vectors, "weight_decay": 0.0}
        adamw = partial(torch.optim.AdamW, betas=(0.9, 0.99), fused=True, capturable=True)
        optimizers: list[torch.optim.Optimizer]
        match recipe.optimizer:
            case "sgd":
                optimizers = [torch.optim.SGD([decaying, constant], lr=rate, fused=True)]
            case "adamw":
                optimizers = [adamw([decaying, constant], lr=rate)]
            case "muon":
                *hidden, last = matrices
                optimizers = [
                    Muon(hidden, lr=rate, weight_decay=recipe.weight_decay),
                    adamw([*vectors, last], lr=other_rate, weight_decay=0.0),
                ]
        for optimizer in optimizers:
            optimizer.step()  # at a learning rate of zero
            for state in optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
        return optimizers

    def tensors(self, place: int = 0) -> dict[str, Tensor]:
        """Return, by name, all tensors that a step changes and that outlive the epoch.

        Those of the seed at `place`, in shapes and names as if it were fitted alone; views.
        """
        tensors = {"done": self.done}
        model, average = self.networks[place], self.averages[place]
        tensors |= {f"model.{name}": t for name, t in model.state_dict().items()}
        if self.recipe.averaging:
            tensors |= {f"average.{name}": t for name, t in average.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for optimizer in self.optimizers:
                for kind, tensor in optimizer.state.get(parameter, {}).items():
                    joined = len(self.seeds) > 1 and tensor.ndim > 0  # a count is everybody's
                    tensors[f"optimizer.{name}.{kind}"] = tensor[place] if joined else tensor
        return tensors

    @property
    def results(self) -> list[BNLeNet]:
        """The models that the fit is for, one a seed."""
        return self.averages if self.recipe.averaging else self.networks

    def step(self, rows: Tensor) -> None:
        """Take one step on the images of these indices, int64 [n]; of S seeds, [S, n].

        This one function is the training: the CPU calls it, a CUDA graph replays it.
        """
        recipe, n, rows = self.recipe, rows.shape[-1], rows.flatten()
        # At most the last: a capture warms up by steps that may be beyond the end.
        now = self.schedule.index_select(1, self.done.clamp(max=self.schedule.shape[1] - 1))[:, 0]
        self.learning_rates.copy_(now[:2])
        labels = self.labels.index_select(0, rows)
        images = self.images.index_select(0, rows).float().div_(255)
        parts = zip(torch.split(images, n), self.generators, strict=True)
        images = torch.cat([self.augmentation(part, generator) for part, generator in parts])

        logits = self.forward(images)
        loss = self._losses(logits, labels)
        for parameter in self.model.parameters():
            parameter.grad = None
        torch.autograd.backward([loss], [torch.ones_like(loss)])  # their sum's
        for optimizer in self.optimizers:
            optimizer.step()

        with torch.no_grad():
            if recipe.averaging:
                for mean, new in zip(
                    self._floats(self.average), self._floats(self.model), strict=True
                ):
                    mean.lerp_(new, now[2])
            self.loss += loss.detach() * n
            self.correct += (logits.argmax(1) == labels).view(-1, n).sum(1)
            self.finite_steps += self.loss - self.loss == 0  # not of infinity, not of NaN
            self.done += 1

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return each seed's mean cross-entropy, [S]."""
        if len(self.seeds) == 1:
            return F.cross_entropy(logits, labels)[None]
        each = F.cross_entropy(logits, labels, reduction="none")
        return each.view(len(self.seeds), -1).mean(1)

    @staticmethod
    def _floats(model: nn.Module) -> Iterator[Tensor]:
        yield from model.parameters()
        yield from (buffer for buffer in model.buffers() if buffer.is_floating_point())


class Captured:
    """`Fitting.step` as CUDA graphs, one for each shape of step and kind of augmentation.

    A net this small is bound by launching kernels; a replay launches all of a step's at once.
    """

    def __init__(self, fitting: Fitting) -> None:
        self.fitting = fitting
        self.graphs: dict[tuple[int, Augmentation], tuple[Tensor, torch.cuda.CUDAGraph]] = {}
        recipe = fitting.recipe
        order = torch.arange(len(fitting.labels)).repeat(len(fitting.seeds), 1)
        for epoch in (recipe.epochs, 1):  # the first last: where a fit begins
            fitting.augmentation = recipe.augmentation_in(epoch)
            for rows in torch.split(order, recipe.batch_size, dim=1):
                key = rows.shape[1], fitting.augmentation
                if key not in self.graphs:
                    self.graphs[key] = self._capture(rows.contiguous().to(fitting.labels))

    def __call__(self, rows: Tensor) -> None:
        """Do what `Fitting.step` does."""
        static, graph = self.graphs[rows.shape[-1], self.fitting.augmentation]
        static.copy_(rows)
        graph.replay()

    def _capture(self, rows: Tensor) -> tuple[Tensor, torch.cuda.CUDAGraph]:
        with unchanged(self.fitting):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch forgot
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # the libraries choose their algorithms here
                for _ in range(3):
                    self.fitting.step(rows)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            if self.fitting.augmentation != NO_AUGMENTATION:  # else nothing is drawn
                for generator in self.fitting.generators:
                    graph.register_generator_state(generator)
            with torch.cuda.graph(graph):
                self.fitting.step(rows)
        return rows, graph


@contextmanager
def unchanged(fitting: Fitting) -> Iterator[None]:
    """Undo, at the end, all that steps did to `fitting`."""
    changing = [fitting.loss, fitting.correct, fitting.finite_steps]
    for place in range(len(fitting.seeds)):
        changing += fitting.tensors(place).values()
    before = [tensor.clone() for tensor in changing]
    states = [generator.get_state() for generator in fitting.generators]
    yield
    with torch.no_grad():
        for tensor, value in zip(changing, before, strict=True):
            tensor.copy_(value)
    for generator, state in zip(fitting.generators, states, strict=True):
        generator.set_state(state)


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
        history[place] = [Epoch(**line) for line in run.load_state(fitting.tensors(place))]
    step = Captured(fitting) if images.is_cuda else fitting.step
    ready = time.perf_counter()

    for epoch in range(len(history[0]) + 1, recipe.epochs + 1):
        start = time.perf_counter()
        # Seeded anew in every epoch, so that a resumed fit needs no history.
        for seed, generator in zip(seeds, fitting.generators, strict=True):
            generator.manual_seed((seed << 20) + epoch)
        order = torch.stack(
            [torch.randperm(kept, generator=g, device=device) for g in fitting.generators]
        )
        for sums in (fitting.loss, fitting.correct, fitting.finite_steps):
            sums.zero_()
        fitting.model.train()
        fitting.augmentation = recipe.augmentation_in(epoch)
        seen = 0
        for rows in torch.split(order, recipe.batch_size, dim=1):
            step(rows)
            seen += rows.shape[1]
            if not images.is_cuda:
                stop_if_diverged(fitting, epoch)
                if on_batch:
                    on_batch(fitting, epoch, seen)
        stop_if_diverged(fitting, epoch, weights=True)
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
            lines = [asdict(line) for line in history[place]]
            run.save_epoch(lines, fitting.results[place].state_dict(), fitting.tensors(place))
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
            variance in a linear layer is zero, or several seeds would share our own batch norm.
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


def stop_if_diverged(fitting: Fitting, epoch: int, weights: bool = False) -> None:
    """Wait for the device, and stop the fit if a loss, or a weight that it led to, is not finite.

    Raises:
        FitError: it was not.
    """
    checked = [fitting.loss, *(fitting.model.parameters() if weights else ())]
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
