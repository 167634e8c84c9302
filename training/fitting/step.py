"""One training step. Its tensors keep their addresses, so that a CUDA graph can replay it."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from training.batch_norm import NormLayer
from training.fitting import batch_last
from training.fitting.muon import Muon
from training.fitting.recipes import Recipe
from training.model import BNLeNet, initialise


class Fitting:
    """The state of a fit: model, optimisers, moving average, and the sums of the current epoch.

    Every tensor that a step reads or writes keeps its address. So a CUDA graph can capture the
    step, a resumed fit copies its state into these tensors, and no step waits for the device.

    Attributes:
        model: the network that the steps train.
        average: moving average of its weights and statistics, float32 [number of all elements].
        augmentation: the random changes of the current epoch.
        generator: draws the order of the images and the augmentation.
        schedule: float32 [3, steps]. The rows: the learning rate (of SGD or Muon); the learning
            rate of AdamW, next to Muon; the share of the new weights in the average.
        steps_done: the number of steps since the fit began, int64 [1].
        learning_rates: the two learning rates of the last step, float32 [2].
        loss: sum of the losses of this epoch's images, float64 [].
        correct: number of right answers to this epoch's images, int64 [].
        finite_steps: this epoch's steps before the loss became infinite or NaN, int64 [].
    """

    def __init__(
        self,
        recipe: Recipe,
        images: Tensor,
        labels: Tensor,
        seed: int = 0,
        batch_norm: Literal["scratch", "torch"] = "torch",
    ) -> None:
        self.recipe, self.images, self.labels, self.seed = recipe, images, labels, seed
        self.augmentation = recipe.augmentation_in(1)
        device = images.device
        self.generator = torch.Generator(device)
        self.model = BNLeNet(batch_norm)
        initialise(self.model, seed)
        self.model.to(device)
        for layer, following in pairwise(self.model.children()):
            # The norm subtracts the mean, and this bias with it, so the bias's gradient is only
            # rounding error. AdamW would amplify it to steps too fast for the moving means.
            if isinstance(following, NormLayer) and isinstance(layer.bias, Tensor):
                layer.bias.requires_grad_(False)
        self.average = parameters_to_vector(_floats(self.model)).detach()
        self._averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.forward: Callable[[Tensor], Tensor] = self.model
        if device.type == "cpu" and batch_norm == "torch":
            # The same values, to rounding, in a memory layout that suits a CPU.
            self.forward = partial(batch_last.forward, self.model)
        steps = recipe.epochs * math.ceil(len(images) / recipe.batch_size)
        averaged_steps = max(recipe.averaging * steps, 1.0)
        rates = [recipe.learning_rate * recipe.rate(step / steps) for step in range(steps)]
        others = [recipe.other_learning_rate * recipe.rate(step / steps) for step in range(steps)]
        shares = [max(1 / averaged_steps, 1 / (step + 1)) for step in range(steps)]
        self.schedule = torch.tensor([rates, others, shares], device=device)
        self.steps_done = torch.zeros(1, dtype=torch.int64, device=device)
        self.learning_rates = torch.zeros(2, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.finite_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.optimizers = self._optimizers()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Make the optimisers and their state, which torch would make in the first step only."""
        recipe, (rate, other_rate) = self.recipe, self.learning_rates.unbind()
        matrices: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                (matrices if parameter.ndim > 1 else vectors).append(parameter)
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
            optimizer.step()  # with a learning rate of zero: makes the state, changes no weight
            for state in optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
        return optimizers

    def tensors(self) -> dict[str, Tensor]:
        """Return, by name, all tensors that a step changes and that the next epoch needs."""
        tensors = {"steps_done": self.steps_done}
        tensors |= {f"model.{name}": t for name, t in self.model.state_dict().items()}
        if self.recipe.averaging:
            tensors["average"] = self.average
        for name, parameter in self.model.named_parameters():
            for optimizer in self.optimizers:
                for kind, tensor in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer.{name}.{kind}"] = tensor
        return tensors

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums that a step adds to; each epoch starts them at zero."""
        return self.loss, self.correct, self.finite_steps

    def result(self) -> BNLeNet:
        """Return the model to evaluate and save: the average so far, or the last weights."""
        if not self.recipe.averaging:
            return self.model
        tensors = list(_floats(self._averaged))
        parts = torch.split(self.average, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
        return self._averaged

    def begin(self, epoch: int) -> Tensor:
        """Prepare epoch 1, 2, ...; return the order of its images, int64 [images].

        The generator gets a new seed in each epoch, so that a resumed fit draws the same numbers.
        """
        self.generator.manual_seed((self.seed << 20) + epoch)
        for tensor in self.sums():
            tensor.zero_()
        self.model.train()
        self.augmentation = self.recipe.augmentation_in(epoch)
        return torch.randperm(len(self.labels), generator=self.generator, device=self.labels.device)

    def step(self, rows: Tensor) -> None:
        """Train one step on the images with these indices, int64 [n].

        The CPU calls this function; a GPU replays it as a CUDA graph.
        """
        # Clamped: the warm-up before a capture may run beyond the last step.
        step = self.steps_done.clamp(max=self.schedule.shape[1] - 1)
        now = self.schedule.index_select(1, step)[:, 0]
        self.learning_rates.copy_(now[:2])
        labels = self.labels.index_select(0, rows)
        images = self.images.index_select(0, rows).float().div_(255)
        images = self.augmentation(images, self.generator)

        logits = self.forward(images)
        loss = F.cross_entropy(logits, labels)
        for parameter in self.model.parameters():
            parameter.grad = None
        torch.autograd.backward([loss])
        for optimizer in self.optimizers:
            optimizer.step()

        with torch.no_grad():
            if self.recipe.averaging:
                self.average.lerp_(parameters_to_vector(_floats(self.model)), now[2])
            self.loss += loss.detach() * len(rows)
            self.correct += (logits.argmax(1) == labels).sum()
            self.finite_steps += self.loss - self.loss == 0  # false for infinity and NaN
            self.steps_done += 1

    def finite(self) -> Tensor:
        """Return whether loss, weights and statistics are all finite: bool [], on the device.

        The loss does not show the last step's weights, or a variance too large for float32.
        """
        tensors = [self.loss, *_floats(self.model)]
        return torch.stack([tensor.isfinite().all() for tensor in tensors]).all()


def _floats(model: nn.Module) -> Iterator[Tensor]:
    """Yield a model's weights and statistics, but not its integer counts of batches."""
    yield from model.parameters()
    yield from (buffer for buffer in model.buffers() if buffer.is_floating_point())


@contextmanager
def unchanged(fitting: Fitting) -> Iterator[None]:
    """At the end of the block, undo all changes of its steps to `fitting`."""
    tensors = [*fitting.sums(), fitting.learning_rates, *fitting.tensors().values()]
    before = [tensor.clone() for tensor in tensors]
    state = fitting.generator.get_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        fitting.generator.set_state(state)
