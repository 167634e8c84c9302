"""What several fitted models say on average, for one model of the same kind to learn from."""

from collections.abc import Sequence

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

    Args:
        models: in prediction mode, on any device; they are folded, not changed.
        device: where the student learns.
    """

    def __init__(self, models: Sequence[BNLeNet], device: torch.device | str = "cpu") -> None:
        self._nets = [fold_batch_norm(model).requires_grad_(False).to(device) for model in models]
        # The convolutions' as in `batch_last`: four rows of the product for each channel.
        self._tiled = [
            [
                (tile_weight(layer.weight), layer.bias.repeat_interleave(4)[:, None])
                for layer in net
                if isinstance(layer, nn.Conv2d) and layer.bias is not None
            ]
            for net in self._nets
        ]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._nets)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the mean probabilities [n, 10] for images, floats [n, 1, 28, 28] in [0, 1]."""
        columns = tiles(images.permute(1, 2, 3, 0).contiguous())
        answers = [self._ask(place, columns, len(images)) for place in range(len(self))]
        return torch.stack(answers).mean(0).t()

    def _ask(self, place: int, columns: Tensor, n: int) -> Tensor:
        """Return one model's probabilities [10, n], from the images' tiles."""
        (weight1, bias1), (weight2, bias2) = self._tiled[place]
        x = torch.addmm(bias1, weight1, columns).sigmoid_()
        x = x.view(len(weight1) // 4, 4, -1).sum(1).mul_(0.25).view(-1, 12, 12, n)
        x = torch.addmm(bias2, weight2, tiles(x)).sigmoid_()
        x = x.view(len(weight2) // 4, 4, -1).sum(1).mul_(0.25).view(-1, n)
        *hidden, last = (layer for layer in self._nets[place] if isinstance(layer, nn.Linear))
        for layer in hidden:
            x = torch.addmm(layer.bias[:, None], layer.weight, x).sigmoid_()
        return torch.addmm(last.bias[:, None], last.weight, x).softmax(0)
