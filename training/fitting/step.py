"""One step of a fit, whose tensors all keep their places: called on a CPU, replayed on a GPU."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from torch import Tensor, nn

from training.batch_norm import NormLayer
from training.fitting import batch_last, side_by_side
from training.fitting.augmentation import Augmentation
from training.fitting.muon import Muon
from training.fitting.recipes import NO_AUGMENTATION, Recipe
from training.model import BNLeNet, initialise


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
        self.augmentation = recipe.augmentation_in(1)  # `begin` keeps it up to date
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
        optimizers: list[torch.optim.Optimizer]
        match recipe.optimizer:
            case "sgd":
                decaying = {"params": matrices, "weight_decay": recipe.weight_decay}
                groups: list[dict[str, Any]] = [decaying, {"params": vectors}]
                optimizers = [torch.optim.SGD(groups, lr=rate, fused=True)]
            case "muon":
                *hidden, last = matrices
                optimizers = [
                    Muon(hidden, lr=rate, weight_decay=recipe.weight_decay),
                    torch.optim.AdamW(
                        [*vectors, last],
                        lr=other_rate,
                        betas=(0.9, 0.99),
                        weight_decay=0.0,
                        fused=True,
                        capturable=True,
                    ),
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

    def begin(self, epoch: int) -> Tensor:
        """Make ready for epoch 1, 2, ...; return the order of its images, int64 [S, images].

        All chance is seeded anew, so that a resumed fit needs no history.
        """
        for seed, generator in zip(self.seeds, self.generators, strict=True):
            generator.manual_seed((seed << 20) + epoch)
        for sums in (self.loss, self.correct, self.finite_steps):
            sums.zero_()
        self.model.train()
        self.augmentation = self.recipe.augmentation_in(epoch)
        images, device = len(self.labels), self.labels.device
        orders = [torch.randperm(images, generator=g, device=device) for g in self.generators]
        return torch.stack(orders)

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
