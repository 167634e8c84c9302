"""Several BN-LeNets trained at once as one grouped network, for a GPU that one leaves idle.

Each keeps its own weights, order of images, augmentation and statistics, and fits as it would alone
to float tolerance; only the number of kernels is shared.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from torch import Tensor

from training.batch_norm import BatchNorm, NormLayer, affine, statistics
from training.model import BNLeNet


def stack(networks: Sequence[BNLeNet]) -> BNLeNet:
    """Return a holder of S networks: each of its tensors, [S, ...], joins theirs by that name.

    The networks become views of it, so that what trains the whole trains them. It is to be run by
    `forward` below, not called.
    """
    whole = copy.deepcopy(networks[0])
    parts = [network.state_dict(keep_vars=True) for network in networks]
    for name, joined in whole.state_dict(keep_vars=True).items():
        joined.data = torch.stack([part[name].detach() for part in parts])
        for part, view in zip(parts, joined.detach(), strict=True):
            part[name].data = view
    return whole


def forward(whole: BNLeNet, images: Tensor) -> Tensor:
    """Return logits [S n, 10] of `images` [S n, 1, 28, 28], n in turn for each of S networks.

    As a call of each network would; in training it updates the moving statistics.

    Raises:
        ValueError: the networks' batch norm is not torch's.
    """
    networks = len(whole.linear3.bias)
    n = len(images) // networks
    x = images.view(networks, n, 28, 28).transpose(0, 1)  # a channel, or a group of them, each
    for convolution, norm in ((whole.conv1, whole.norm1), (whole.conv2, whole.norm2)):
        weight, bias = convolution.weight.flatten(0, 1), convolution.bias
        x = F.conv2d(x, weight, bias.flatten() if bias is not None else None, groups=networks)
        x = F.avg_pool2d(torch.sigmoid(_normalise(x, norm)), 2)
    x = x.view(n, networks, -1).transpose(0, 1)
    for linear, norm in ((whole.linear1, whole.norm3), (whole.linear2, whole.norm4)):
        x = torch.baddbmm(linear.bias[:, None], x, linear.weight.mT).transpose(0, 1)
        x = torch.sigmoid(_normalise(x.flatten(1), norm)).view_as(x).transpose(0, 1)
    x = torch.baddbmm(whole.linear3.bias[:, None], x, whole.linear3.weight.mT)
    return x.flatten(0, 1)


def _normalise(x: Tensor, norm: NormLayer) -> Tensor:
    """Batch norm of [n, S C, ...] by statistics [S, C]: a channel knows nothing of the others."""
    if isinstance(norm, BatchNorm):
        raise ValueError("networks are trained side by side with torch's batch norm")
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    mean, variance, gamma, beta = (t.view(-1) for t in (*statistics(norm), *affine(norm)))
    momentum = norm.momentum or 0.0
    return F.batch_norm(x, mean, variance, gamma, beta, norm.training, momentum, norm.eps)
