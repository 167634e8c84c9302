"""Random changes to a batch of training images, on their own device, from one generator.

Real pictures of garments are mirrored, shifted, turned, larger, darker, flatter, blurred or
sharpened. A model that was trained on such images still recognises them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """The limit of each change; every image draws its own amounts, uniformly up to the limit.

    Attributes:
        flip: mirror half of the images, left to right.
        shift: pixels, in each direction; a whole number unless the image is also turned or scaled.
        rotation: degrees, in both directions.
        scale: natural logarithm of the change in size, up and down.
        sharpness: weight of a Gaussian blur (sigma 1) against the image; negative draws sharpen.
        sharpness_share: the share of a batch whose sharpness changes.
        contrast: relative change of the differences from the image's mean, up and down.
        brightness: relative change of every pixel, up and down.
        gamma: natural logarithm of the exponent, up and down.
    """

    flip: bool = False
    shift: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0
    sharpness: float = 0.0
    sharpness_share: float = 0.25
    contrast: float = 0.0
    brightness: float = 0.0
    gamma: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return changed copies of `images`, floats [n, 1, 28, 28] in [0, 1]; same shape, range.

        All draws come from `generator`, on its device, in a fixed order: the same state gives the
        same images with any number of threads.
        """
        if self == Augmentation():
            return images

        def draw(limit: float, count: int = len(images)) -> Tensor:
            uniform = torch.rand((count, 1, 1, 1), generator=generator, device=images.device)
            return (2 * uniform - 1) * limit

        if self.rotation or self.scale:
            images = self._turn(images, draw)
        elif self.flip or self.shift:
            images = self._move(images, draw)
        if self.sharpness:
            # The first images of the batch will do: the batch is in random order.
            count = int(len(images) * self.sharpness_share)
            some = images[:count]
            some = some + draw(self.sharpness, count) * (gaussian_blur(some, 1.0) - some)
            images = torch.cat([some.clamp(0, 1), images[count:]])
        if self.contrast:
            mean = images.mean((1, 2, 3), keepdim=True)
            images = torch.lerp(mean, images, 1 + draw(self.contrast))
        if self.brightness:
            images = images * (1 + draw(self.brightness))
        if self.contrast or self.brightness:
            images = images.clamp(0, 1)
        if self.gamma:
            images = images.clamp_min(1e-6) ** draw(self.gamma).exp()
        return images

    def _turn(self, images: Tensor, draw: Callable[[float], Tensor]) -> Tensor:
        """Mirror, turn, scale and shift in one bilinear resampling; zeros fill the edges."""
        mirror = torch.sign(draw(1.0)) if self.flip else torch.ones_like(draw(0.0))
        angle, size = draw(math.radians(self.rotation)), draw(self.scale).exp()
        right, down = (draw(2 * self.shift / images.shape[-1]) for _ in range(2))
        cosine, sine = angle.cos() * size, angle.sin() * size
        rows = [cosine * mirror, -sine, right, sine * mirror, cosine, down]
        matrix = torch.cat(rows, 1).view(-1, 2, 3)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

    def _move(self, images: Tensor, draw: Callable[[float], Tensor]) -> Tensor:
        """Mirror and shift by whole pixels: values do not change, and zeros fill the edges."""
        size, limit = images.shape[-1], round(self.shift)
        positions = torch.arange(size, device=images.device)
        columns = positions.expand(len(images), size)
        if self.flip:
            columns = torch.where(draw(1.0).view(-1, 1) < 0, size - 1 - columns, columns)
        # Uniform over (-limit - 0.5, limit + 0.5), so that every whole shift is equally likely.
        down, right = (draw(limit + 0.5).round().clamp(-limit, limit) for _ in range(2))
        columns = columns + right.view(-1, 1).long() + limit
        rows = positions + down.view(-1, 1).long() + limit
        padded = F.pad(images, (limit,) * 4)[:, 0]
        image = torch.arange(len(images), device=images.device)[:, None, None]
        return padded[image, rows[:, :, None], columns[:, None, :]][:, None]


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur images [n, 1, h, w] by a Gaussian, cut at three sigma (pixels); repeat the edges."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel), kernel.transpose(2, 3))
