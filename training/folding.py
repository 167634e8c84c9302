"""Folding: merges every batch norm into the convolution or linear layer before it."""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from training.batch_norm import NormLayer, affine, statistics


def fold_parameters(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of one layer that replaces a layer and its batch norm.

    `gamma * (W x + b - mean) / sqrt(variance + eps) + beta = W' x + b'` with
    `s = gamma / sqrt(variance + eps)`, `W' = s W` along the output axis and
    `b' = (b - mean) s + beta`. Computed in float64, and cast once to the dtype of `weight`.

    Args:
        weight: [C, ...]; the first axis is the output channels or units.
        bias: [C]; None counts as zero.
        gamma: scale [C].
        beta: shift [C].
        mean: [C], the mean that prediction uses.
        variance: [C], the variance that prediction uses.
        eps: added to the variance, inside the root.
    """
    scale = gamma.double() / torch.sqrt(variance.double() + eps)
    offset = -mean.double() if bias is None else bias.double() - mean.double()
    folded_weight = scale.view(-1, *[1] * (weight.ndim - 1)) * weight.double()
    return folded_weight.to(weight.dtype), (offset * scale + beta.double()).to(weight.dtype)


def fold_batch_norm(model: nn.Sequential) -> nn.Sequential:
    """Return a new model without batch norm that predicts what `model` predicts.

    The argument does not change, and shares no tensor with the result. Layers keep their names and
    dtype.

    Raises:
        ValueError: the model is in training mode (batch norm is then not a fixed affine map), a
            batch norm does not directly follow a convolution or linear layer, or a batch norm is
            inside another module.
    """
    if any(layer.training for layer in model.modules()):
        raise ValueError("cannot fold a model in training mode: call eval() first")
    folded: OrderedDict[str, nn.Module] = OrderedDict()
    # Not named_children(): it skips a layer that the model uses a second time.
    for name, layer in model.named_modules(remove_duplicate=False):
        if not name or "." in name:  # the model itself, or a layer inside a layer
            continue
        if not isinstance(layer, NormLayer):
            if any(isinstance(deeper, NormLayer) for deeper in layer.modules()):
                raise ValueError(
                    f"cannot fold a batch norm inside {name}: make it a direct layer of the model"
                )
            folded[name] = copy.deepcopy(layer)
            continue
        previous = next(reversed(folded.values()), None)
        if not isinstance(previous, nn.Conv2d | nn.Linear):
            raise ValueError(
                f"cannot fold {name}: it must directly follow a convolution or linear layer"
            )
        weight, bias = fold_parameters(
            previous.weight, previous.bias, *affine(layer), *statistics(layer), layer.eps
        )
        previous.weight, previous.bias = nn.Parameter(weight), nn.Parameter(bias)
    return nn.Sequential(folded).eval()
