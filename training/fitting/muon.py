"""Muon, the optimiser of the hidden weights: momentum, made orthogonal before each step."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum (Jordan et al., "Muon", 2024).

    A convolution's kernels [out, in, h, w] are treated as a matrix [out, in h w]. Each step is
    scaled by sqrt(max(1, rows / columns)), and the weights decay by `lr * weight_decay`. torch's
    own Muon cannot be used here: it takes no convolutions and no learning rate on the device, and
    it computes in bfloat16.

    Args:
        parameters: weights [out, in] or [out, in, h, w].
        lr: learning rate, a tensor [] on the device of the weights, read at every step.
        weight_decay: see above.
        momentum: share of the old momentum in the new one.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: Tensor,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override] # torch's takes a closure and returns its loss
        """Move every weight that has a gradient."""
        for group in self.param_groups:
            rate, keep = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - keep)
                ahead = weight.grad.lerp(state["momentum"], keep)
                ahead = ahead.flatten(1)
                scale = max(1.0, ahead.shape[-2] / ahead.shape[-1]) ** 0.5
                weight.mul_(1 - rate * group["weight_decay"])
                weight.sub_(orthogonalise(ahead).view_as(weight) * (rate * scale))


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return approximately U V^T for a matrix U S V^T: the singular values become about 0.7-1.2.

    This is a Newton-Schulz iteration; Jordan et al. tuned its coefficients for speed.
    """
    x: Tensor = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if tall else x
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide.mT if tall else wide
