"""Batch normalisation: the mathematics as a pure function, and a layer with its state.

Ioffe and Szegedy, "Batch Normalization" (2015), algorithms 1 and 2.
"""

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn


class Normalised(NamedTuple):
    """What `batch_norm` returns: the output, and the updated statistics for prediction."""

    output: Tensor
    moving_mean: Tensor
    moving_variance: Tensor


def batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moving_mean: Tensor,
    moving_variance: Tensor,
    *,
    training: bool,
    eps: float = 1e-5,
    momentum: float = 0.9,
) -> Normalised:
    """Normalise every channel of `x`, then scale it by `gamma` and shift it by `beta`.

    `y = gamma * (x - mean) / sqrt(variance + eps) + beta`. In training, mean and (biased)
    variance are the batch's, over every axis except the second, and the moving statistics
    move towards them. In prediction, mean and variance are the moving statistics, which do not
    change.

    `momentum` is the chapter's: it multiplies the OLD value,
    `moving = momentum * moving + (1 - momentum) * batch`. torch's `momentum` multiplies the
    new value, so 0.9 here is 0.1 there. The moving variance here averages the batch's biased
    variance (divided by n); torch's averages the unbiased one (divided by n - 1).

    Args:
        x: floats [n, C] from a linear layer, or [n, C, H, W] from a convolution.
        gamma: scale [C].
        beta: shift [C].
        moving_mean: [C]; no gradient flows into it.
        moving_variance: [C]; no gradient flows into it.
        training: batch statistics (True) or moving statistics (False).
        eps: added to the variance, inside the root.
        momentum: share of the old value in the new moving statistics, 0 to 1.

    Raises:
        ValueError: `x` is neither 2-D nor 4-D, or a training batch has fewer than two values per
            channel: one value always has variance zero, and without values the mean is NaN.
    """
    if x.ndim not in (2, 4):
        raise ValueError(f"batch norm takes 2-D or 4-D input, not {x.ndim}-D")
    axes = [axis for axis in range(x.ndim) if axis != 1]
    per_channel = (1, -1) + (1,) * (x.ndim - 2)
    if training:
        if x.numel() < 2 * x.shape[1]:
            raise ValueError(
                f"batch norm cannot train on a batch of shape {tuple(x.shape)}: it needs at least "
                "two values per channel; use larger batches, or call eval()"
            )
        variance, mean = torch.var_mean(x, dim=axes, correction=0)
        moving_mean = momentum * moving_mean + (1 - momentum) * mean.detach()
        moving_variance = momentum * moving_variance + (1 - momentum) * variance.detach()
    else:
        mean, variance = moving_mean, moving_variance
    normalised = (x - mean.view(per_channel)) / torch.sqrt(variance + eps).view(per_channel)
    output = gamma.view(per_channel) * normalised + beta.view(per_channel)
    return Normalised(output, moving_mean, moving_variance)


class BatchNorm(nn.Module):
    """`batch_norm` as a layer, with the chapter's arguments.

    `self.training` decides the mode. The moving statistics are registered buffers: they are
    saved, loaded and moved with the model. They are updated in place, and no value is read back
    from the device, so that a CUDA graph can capture a training step.

    Args:
        num_features: channels or units, C.
        num_dims: 2 for input [n, C], 4 for input [n, C, H, W].
        eps: added to the variance, inside the root.
        momentum: share of the old value in the new moving statistics, 0 to 1.
    """

    moving_mean: Tensor
    moving_variance: Tensor

    def __init__(
        self, num_features: int, num_dims: Literal[2, 4], eps: float = 1e-5, momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.num_features, self.num_dims = num_features, num_dims
        self.eps, self.momentum = eps, momentum
        self.gamma = nn.Parameter(torch.ones(num_features))
        self.beta = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("moving_mean", torch.zeros(num_features))
        self.register_buffer("moving_variance", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, and in training update the moving statistics.

        Raises:
            ValueError: `x` does not have `num_dims` dimensions and `num_features` channels, or a
                training batch has fewer than two values per channel.
        """
        if x.ndim != self.num_dims or x.shape[1] != self.num_features:
            raise ValueError(
                f"this layer takes {self.num_dims}-D input of {self.num_features} channels, "
                f"not {tuple(x.shape)}"
            )
        output, mean, variance = batch_norm(
            x,
            self.gamma,
            self.beta,
            self.moving_mean,
            self.moving_variance,
            training=self.training,
            eps=self.eps,
            momentum=self.momentum,
        )
        if self.training:
            self.moving_mean.copy_(mean)
            self.moving_variance.copy_(variance)
        return output

    def extra_repr(self) -> str:
        """Describe the arguments, for `print(model)`."""
        return f"{self.num_features}, {self.num_dims}, eps={self.eps}, momentum={self.momentum}"


NormLayer: TypeAlias = BatchNorm | nn.BatchNorm1d | nn.BatchNorm2d
"""A batch-norm layer, ours or torch's; the functions below accept both."""


def affine(layer: NormLayer) -> tuple[Tensor, Tensor]:
    """Return the layer's learnt scale and shift, gamma and beta [C]; not copies.

    Raises:
        ValueError: the layer is torch's and has none (affine=False).
    """
    if isinstance(layer, BatchNorm):
        return layer.gamma, layer.beta
    if not layer.affine:
        raise ValueError("this batch norm has no gamma and beta (affine=False)")
    return layer.weight, layer.bias


def statistics(layer: NormLayer) -> tuple[Tensor, Tensor]:
    """Return the mean and variance [C] that prediction uses; not copies.

    Raises:
        ValueError: the layer is torch's and has none (track_running_stats=False).
    """
    if isinstance(layer, BatchNorm):
        return layer.moving_mean, layer.moving_variance
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError("this batch norm has no statistics (track_running_stats=False)")
    return layer.running_mean, layer.running_var


def set_statistics(layer: NormLayer, mean: Tensor, variance: Tensor) -> None:
    """Overwrite in place the mean and variance [C] that prediction uses."""
    for old, new in zip(statistics(layer), (mean, variance), strict=True):
        old.copy_(new)
