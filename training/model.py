"""BN-LeNet: LeNet with batch normalisation before every sigmoid, as in the chapter."""

from collections import OrderedDict
from typing import Literal

import torch
from torch import nn

from training.batch_norm import BatchNorm, NormLayer


class BNLeNet(nn.Sequential):
    """The chapter's network: 44,878 parameters, no padding, sigmoids and average pooling.

    Input: floats [n, 1, 28, 28] in [0, 1] (the data set's bytes divided by 255). Output: logits
    [n, 10].

    Args:
        batch_norm: the batch-norm layer: ours ("scratch") or torch's ("torch").

    Raises:
        ValueError: `batch_norm` has another value.
    """

    conv1: nn.Conv2d
    norm1: NormLayer
    conv2: nn.Conv2d
    norm2: NormLayer
    linear1: nn.Linear
    norm3: NormLayer
    linear2: nn.Linear
    norm4: NormLayer
    linear3: nn.Linear

    def __init__(self, batch_norm: Literal["scratch", "torch"] = "torch") -> None:
        def norm(channels: int, dims: Literal[2, 4]) -> NormLayer:
            if batch_norm == "scratch":
                return BatchNorm(channels, dims)
            return nn.BatchNorm2d(channels) if dims == 4 else nn.BatchNorm1d(channels)

        if batch_norm not in ("scratch", "torch"):
            raise ValueError(f"batch_norm must be 'scratch' or 'torch', not {batch_norm!r}")
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(1, 6, kernel_size=5),
                norm1=norm(6, 4),
                sigmoid1=nn.Sigmoid(),
                pool1=nn.AvgPool2d(2),
                conv2=nn.Conv2d(6, 16, kernel_size=5),
                norm2=norm(16, 4),
                sigmoid2=nn.Sigmoid(),
                pool2=nn.AvgPool2d(2),
                flatten=nn.Flatten(),
                linear1=nn.Linear(256, 120),
                norm3=norm(120, 2),
                sigmoid3=nn.Sigmoid(),
                linear2=nn.Linear(120, 84),
                norm4=norm(84, 2),
                sigmoid4=nn.Sigmoid(),
                linear3=nn.Linear(84, 10),
            )
        )


def initialise(model: nn.Module, seed: int) -> None:
    """Draw new weights and biases from `seed`, in place, for a model on the CPU.

    Weights are Xavier-uniform (Glorot and Bengio, 2010), as in the chapter. Biases are uniform
    within 1 / sqrt(fan in), as by torch's default. The global generator is not used.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            if layer.bias is not None:
                bound = layer.weight[0].numel() ** -0.5
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def norm_layers(model: nn.Module) -> dict[str, NormLayer]:
    """Return the batch-norm layers, ours or torch's, by name, in the order of the network."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, NormLayer)}
