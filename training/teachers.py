"""What several fitted models say on average, for one model of the same kind to learn from."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from training.batch_last import tile_weight, tiles
from training.folding import fold_batch_norm
from training.model import BNLeNet


class Teachers:
    """Fitted models, asked for their mean prediction.

    It knows more than a label does: how much a shirt looks like a T-shirt, and that an odd label is
    odd (Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015). It is
    asked about the very images that the student sees, changed as they are for it (Beyer et al.,
    "Knowledge distillation: A good teacher is patient and consistent", 2022).

    Label smoothing is undone: a model fitted to labels of which a share was spread over all ten
    classes predicts what it believes with the same share spread.

    Args:
        models: in prediction mode; they are folded, not changed.
        smoothing: that share, for each model.
    """

    def __init__(self, models: Sequence[BNLeNet], smoothing: Sequence[float]) -> None:
        self._nets = [fold_batch_norm(model).requires_grad_(False) for model in models]
        self._smoothing = smoothing

    def to(self, device: torch.device) -> Self:
        """Move them to where the student learns."""
        self._nets = [net.to(device) for net in self._nets]
        return self

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._nets)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the mean probabilities [n, 10] for images, floats [n, 1, 28, 28] in [0, 1]."""
        columns = tiles(images.permute(1, 2, 3, 0).contiguous())
        answers = []
        for net, share in zip(self._nets, self._smoothing, strict=True):
            answer = predict(net, columns, len(images))
            sharp = (answer - share / 10).clamp_min(0) / (1 - share)
            answers.append(sharp / sharp.sum(0))
        return torch.stack(answers).mean(0).t()


def predict(net: nn.Sequential, columns: Tensor, n: int) -> Tensor:
    """Return a folded network's probabilities [10, n], from the `tiles` of its n images."""
    first, second = (layer for layer in net if isinstance(layer, nn.Conv2d))
    *hidden, last = (layer for layer in net if isinstance(layer, nn.Linear))
    x = _pooled(first, columns).view(-1, 12, 12, n)
    x = _pooled(second, tiles(x)).view(-1, n)
    for layer in hidden:
        x = torch.addmm(layer.bias[:, None], layer.weight, x).sigmoid_()
    return torch.addmm(last.bias[:, None], last.weight, x).softmax(0)


def _pooled(convolution: nn.Conv2d, columns: Tensor) -> Tensor:
    """Convolve, apply the sigmoid and pool: [C, h * h * n], as `batch_last.forward` does."""
    assert convolution.bias is not None  # noqa: S101 - for the type checker: the fold gives one
    bias = convolution.bias.repeat_interleave(4)[:, None]
    x = torch.addmm(bias, tile_weight(convolution.weight), columns).sigmoid_()
    return x.view(len(convolution.weight), 4, -1).sum(1).mul_(0.25)
