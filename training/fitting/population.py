"""Batch norm's statistics over the whole training set, to replace the moving averages."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from training.batch_norm import set_statistics
from training.fitting.augmentation import Augmentation
from training.fitting.images import batches
from training.fitting.precision import full_precision
from training.model import norm_layers

Network = TypeVar("Network", bound=nn.Sequential)
Moments = dict[str, tuple[Tensor, Tensor]]
"""Mean and variance [C] of the input of every batch-norm layer, by the layer's name."""


@torch.no_grad()
@full_precision()
def population_statistics(
    model: nn.Sequential, images: Tensor, augmentation: Augmentation | None = None, seed: int = 0
) -> Moments:
    """Return the mean and (biased) variance of each batch norm's input over all images.

    This works layer by layer: when a layer's statistics are computed, the layers before it already
    have their new ones. The sums of x and x^2 are in float64, over uint8 images [n, 1, 28, 28], and
    every image counts the same (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021,
    section 3). An augmentation gives one random view of each image, the same for all layers. The
    model itself does not change.
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
def with_statistics(model: Network, moments: Moments) -> Network:
    """Return a copy of the model with these statistics."""
    model = copy.deepcopy(model)
    for name, layer in norm_layers(model).items():
        set_statistics(layer, *moments[name])
    return model
