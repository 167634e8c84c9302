"""A split's images and labels as tensors on the computing device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from training.dataset import Split


def on_device(split: Split, device: str) -> tuple[Tensor, Tensor]:
    """Return images uint8 [n, 1, 28, 28] and labels int64 [n] on a device."""
    images = torch.from_numpy(split.images).to(device)[:, None]
    return images, torch.from_numpy(split.labels).to(device, torch.int64)


def batches(images: Tensor) -> Iterator[Tensor]:
    """Yield floats in [0, 1] from uint8 images, in order."""
    size = 10_000 if images.is_cuda else 250  # batches that fit a CPU's cache are twice as fast
    for batch in torch.split(images, size):
        yield batch.float().div_(255)
