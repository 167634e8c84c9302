"""The small fits of the studies: LeNet with any normalisation, and a plain loop.

The loop is the chapter's: softmax cross-entropy, pixels divided by 255, a new random order in each
epoch. Arms with the same seed start from the same weights and see the images in the same order.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from torch import Tensor, nn

from training.dataset import FashionMNIST, Split
from training.fitting.population import population_statistics, with_statistics
from training.model import initialise, norm_layers

Norm = Callable[[int, int], nn.Module]
"""Makes a normalisation layer from the number of channels and of dimensions, 2 or 4."""

HELD_OUT = 10_000
"""Studies make comparisons on this many training images, the last ones; the test set decides
nothing."""


def batch_norm(channels: int, dims: int) -> nn.Module:
    """Make torch's batch norm, which the chapter's concise version uses."""
    return nn.BatchNorm2d(channels) if dims == 4 else nn.BatchNorm1d(channels)


def lenet(
    norms: Sequence[Norm | None],
    *,
    after_activation: bool = False,
    bias: bool = True,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return the chapter's LeNet with a normalisation, or none, in each of four places.

    Args:
        norms: the normalisations after conv1, conv2, linear1 and linear2.
        after_activation: normalise after the sigmoid instead of before it.
        bias: whether a layer directly before a normalisation has a bias.
        dropout: share of the hidden linear layers' activations that training drops.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()

    def block(number: int, name: str, layer: nn.Module, channels: int, dims: int) -> None:
        norm = norms[number - 1]
        layers[name] = layer
        if norm is not None and not after_activation:
            layers[f"norm{number}"] = norm(channels, dims)
        layers[f"sigmoid{number}"] = nn.Sigmoid()
        if norm is not None and after_activation:
            layers[f"norm{number}"] = norm(channels, dims)
        if dims == 4:
            layers[f"pool{number}"] = nn.AvgPool2d(2)
        elif dropout:
            layers[f"dropout{number}"] = nn.Dropout(dropout)

    biases = [bias or norm is None or after_activation for norm in norms]
    block(1, "conv1", nn.Conv2d(1, 6, 5, bias=biases[0]), 6, 4)
    block(2, "conv2", nn.Conv2d(6, 16, 5, bias=biases[1]), 16, 4)
    layers["flatten"] = nn.Flatten()
    block(3, "linear1", nn.Linear(256, 120, bias=biases[2]), 120, 2)
    block(4, "linear2", nn.Linear(120, 84, bias=biases[3]), 84, 2)
    layers["linear3"] = nn.Linear(84, 10)
    return nn.Sequential(layers)


@dataclass(frozen=True)
class Sample:
    """Images and labels as tensors.

    Attributes:
        pixels: uint8 [n, 1, 28, 28].
        labels: int64 [n].
    """

    pixels: Tensor
    labels: Tensor

    @classmethod
    def of(cls, split: Split, start: int, end: int) -> "Sample":
        """Take the images of a split from `start` to before `end`."""
        pixels = torch.from_numpy(split.images[start:end])[:, None]
        return cls(pixels, torch.from_numpy(split.labels[start:end]).long())


@dataclass(frozen=True)
class Samples:
    """The three samples of a study: to fit on, to compare on, and to report the test accuracy."""

    train: Sample
    held_out: Sample
    test: Sample


def samples(data: FashionMNIST, images: int) -> Samples:
    """Return the first `images` training images, the held-out ones, and the test set.

    A small fit gets fewer held-out and test images: at most ten times `images`.
    """
    count = len(data.train.labels)
    held_out = min(HELD_OUT, count - images, 10 * images)
    test = min(len(data.test.labels), 10 * images)
    return Samples(
        Sample.of(data.train, 0, images),
        Sample.of(data.train, count - held_out, count),
        Sample.of(data.test, 0, test),
    )


def batches(sample: Sample, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end: floats [n, 1, 28, 28] in [0, 1], and labels [n].

    Each epoch has a new random order. A last batch of one image is left out, because batch norm
    cannot train on it.
    """
    images = sample.pixels.float().div_(255)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.split(torch.randperm(len(images), generator=generator), batch_size):
            if len(rows) > 1 or batch_size == 1:
                yield images[rows], sample.labels[rows]


def steps_per_epoch(sample: Sample, batch_size: int) -> int:
    """Return how many batches an epoch of `batches` has."""
    whole, rest = divmod(len(sample.labels), batch_size)
    return whole + (rest > 1 or (rest == 1 and batch_size == 1))


def train(
    network: nn.Sequential,
    sample: Sample,
    *,
    seed: int,
    steps: int,
    batch_size: int = 128,
    optimizer: torch.optim.Optimizer | None = None,
    after_step: Callable[[int, float], bool] | None = None,
) -> None:
    """Fit a network in place.

    Args:
        network: returns logits [n, 10].
        sample: the images to fit on.
        seed: decides the order of the images.
        steps: the number of steps.
        batch_size: images in a step.
        optimizer: None means the chapter's SGD with a learning rate of 0.1.
        after_step: called with the number of steps done and the loss; stops the fit by returning
            True.
    """
    optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=0.1)
    network.train()
    for step, (images, labels) in zip(
        range(1, steps + 1), batches(sample, batch_size, seed), strict=False
    ):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()  # type: ignore[no-untyped-call] # torch forgot
        optimizer.step()
        if after_step and after_step(step, loss.item()):
            break


def fitted(
    network: nn.Sequential, sample: Sample, *, seed: int, epochs: int, batch_size: int = 128
) -> nn.Sequential:
    """Initialise a network from `seed`, fit it as the chapter does, and recalibrate it."""
    initialise(network, seed)
    steps = epochs * steps_per_epoch(sample, batch_size)
    train(network, sample, seed=seed, steps=steps, batch_size=batch_size)
    return recalibrated(network, sample)


def recalibrated(network: nn.Sequential, sample: Sample) -> nn.Sequential:
    """Return a copy whose batch norms have the statistics of all images of `sample`.

    The spread between seeds is then a fifth of the spread with moving averages, so a study needs
    fewer fits. A network without batch norm is returned as it is.
    """
    network.eval()
    if not norm_layers(network):
        return network
    moments = population_statistics(network, sample.pixels)
    return with_statistics(network, moments).eval()


@torch.no_grad()
def accuracy(network: nn.Module, sample: Sample) -> float:
    """Return the share of right answers in prediction mode, 0 to 1."""
    network.eval()
    right = 0
    for pixels, labels in zip(
        torch.split(sample.pixels, 1000), torch.split(sample.labels, 1000), strict=True
    ):
        right += int((network(pixels.float().div_(255)).argmax(1) == labels).sum())
    return right / len(sample.labels)


def scores(network: nn.Sequential, parts: Samples) -> dict[str, float]:
    """Return the accuracies on the fitted, held-out and test images."""
    return {
        "train": accuracy(network, parts.train),
        "held_out": accuracy(network, parts.held_out),
        "test": accuracy(network, parts.test),
    }
