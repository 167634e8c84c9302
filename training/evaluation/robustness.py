"""The sixteen fixed changes to the test set that measure robustness.

Real pictures are shifted, turned, blurred, sharpened, darker, flatter or smaller. Each change takes
uint8 images [n, 28, 28] (0 = background) and returns changed images of the same shape and type. It
computes in float64, rounds to the nearest byte, and clips to 0-255.

    shift (dy, dx)   by 2 pixels in each of the 8 directions; background fills the edge
    rotation +-10    degrees about the centre, bilinear, background outside; + is counter-clockwise
    blur 0.7         Gaussian, sigma 0.7 pixels, cut at 3 sigma; the edge pixels are repeated
    unsharp 100 %    2 x - (x blurred with sigma 2)
    gamma 0.7, 1.4   255 (x / 255) ^ gamma
    contrast 0.6     m + 0.6 (x - m), m the mean of the image's 784 pixels
    scale 0.9        about the centre, bilinear, background outside

The recipe `best` was chosen by all sixteen, on held-out images. From then on no choice may look at
the eight in `UNSEEN`, so that a later figure on them says what a change does that nobody tuned for.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]

UNSEEN = (
    "shift (-2, +0)",
    "shift (-2, +2)",
    "shift (+0, -2)",
    "shift (+2, +2)",
    "rotation -10",
    "unsharp 100 %",
    "gamma 1.4",
    "scale 0.9",
)
"""The changes that no choice of a recipe may look at: one of each of eight pairs.

The pairs are opposite shifts, the two rotations, blur and sharpening, the two gammas, and (as two
are left) contrast and scale.
"""


def perturbations() -> dict[str, Callable[[Bytes], Bytes]]:
    """Return the sixteen changes, by name."""
    directions = [(dy, dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2) if dy or dx]
    changes: dict[str, Callable[[Floats], Floats]] = {
        f"shift ({dy:+d}, {dx:+d})": partial(shift, dy=dy, dx=dx) for dy, dx in directions
    }
    changes |= {
        "rotation +10": partial(resample, degrees=10.0),
        "rotation -10": partial(resample, degrees=-10.0),
        "blur 0.7": partial(blur, sigma=0.7),
        "unsharp 100 %": lambda x: 2 * x - blur(x, sigma=2.0),
        "gamma 0.7": lambda x: 255 * (x / 255) ** 0.7,
        "gamma 1.4": lambda x: 255 * (x / 255) ** 1.4,
        "contrast 0.6": contrast,
        "scale 0.9": partial(resample, scale=0.9),
    }
    return {name: partial(_on_bytes, change) for name, change in changes.items()}


def perturbed(images: Bytes) -> Iterator[tuple[str, Bytes]]:
    """Yield the changed versions of `images` one after the other, with their names."""
    for name, change in perturbations().items():
        yield name, change(images)


def _on_bytes(change: Callable[[Floats], Floats], images: Bytes) -> Bytes:
    parts = [
        images[i : i + 1000] for i in range(0, len(images), 1000)
    ]  # in parts, because float64 takes 8 times the memory
    return np.concatenate(
        [np.clip(np.rint(change(part.astype(float))), 0, 255) for part in parts]
    ).astype(np.uint8)


def shift(images: Floats, dy: int, dx: int) -> Floats:
    """Move the content `dy` pixels down and `dx` to the right; zeros fill the edge."""
    height, width = images.shape[1:]
    padded = np.pad(images, ((0, 0), (abs(dy), abs(dy)), (abs(dx), abs(dx))))
    top, left = abs(dy) - dy, abs(dx) - dx
    return padded[:, top : top + height, left : left + width]


def resample(images: Floats, degrees: float = 0.0, scale: float = 1.0) -> Floats:
    """Turn the content counter-clockwise and scale it about the centre; bilinear, zeros outside."""
    height, width = images.shape[1:]
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    y, x = np.mgrid[:height, :width].astype(float)
    y, x = (y - centre_y) / scale, (x - centre_x) / scale
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # The inverse map: where each pixel of the result comes from. Rows count downwards.
    source_x, source_y = cosine * x - sine * y + centre_x, sine * x + cosine * y + centre_y
    left, top = np.floor(source_x).astype(int), np.floor(source_y).astype(int)
    right_share, bottom_share = source_x - left, source_y - top
    margin = 2 + max(height, width)  # at the angles and scales used, no source lies further out
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))
    result = np.zeros_like(images)
    for down, row_share in ((0, 1 - bottom_share), (1, bottom_share)):
        for across, column_share in ((0, 1 - right_share), (1, right_share)):
            corner = padded[:, top + down + margin, left + across + margin]
            result += row_share * column_share * corner
    return result


def blur(images: Floats, sigma: float) -> Floats:
    """Convolve with a normalised Gaussian, cut at three sigma; repeat the edge pixels."""
    radius = math.ceil(3 * sigma)
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    height, width = images.shape[1:]
    padded = np.pad(images, ((0, 0), (radius, radius), (radius, radius)), mode="edge")
    rows = sum(share * padded[:, i : i + height] for i, share in enumerate(kernel))
    return np.asarray(sum(share * rows[:, :, i : i + width] for i, share in enumerate(kernel)))


def contrast(images: Floats, share: float = 0.6) -> Floats:
    """Move every pixel towards its image's mean; `share` of the difference remains."""
    mean = images.mean((1, 2), keepdims=True)
    return np.asarray(mean + share * (images - mean))
