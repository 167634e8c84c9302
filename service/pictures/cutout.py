"""Tells a garment from the background of a small photograph, with numpy and Pillow alone.

A plain background (studio, wall, sheet: uneven light and soft shadows allowed) is followed
inwards from the border up to the steepest edge; of any other the colours are learnt.
"""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

# Grey levels, 0-255, and shares. Chosen by accuracy on made-up photographs (docs/performance.md).
PLAIN_SPREAD = 4.0  # median distance of a plain background's border from its smooth model
FAINTEST = 3.0  # the least distance from the background that can be told from noise
BINS = 16  # of each of the three colour axes
ROUNDS = 3  # of learning the colours of both anew; six or ten were no better
REACH = 0.04  # of the longest edge: how far from the main part others are still its own
LINE = 0.02  # half the thickness of a joint between boards, as a share of the longest edge


@dataclass(frozen=True)
class Cutout:
    """Where the garment is.

    Attributes:
        mask: bool [height, width], true on the garment.
        plain: whether the background was plain, so that the outline is an edge and not a guess.
    """

    mask: Mask
    plain: bool


def cut_out(rgb: NDArray[np.uint8]) -> Cutout | None:
    """Find the garment in a photograph of some hundred pixels a side.

    Args:
        rgb: uint8 [height, width, 3].

    Returns:
        The cutout, or None when no border can be told from the garment.
    """
    if min(rgb.shape[:2]) < 8:
        return None
    colours = rgb.astype(np.float32)
    background, spread, share = _smooth_background(colours)
    plain = spread < PLAIN_SPREAD and share > 0.5
    mask = _beyond_edge(colours, background, spread) if plain else _unlike_border(colours)
    mask = _without_lines_from_border(mask)
    mask = _main_part(_without_specks(mask, 0.008 if plain else 0.02))
    rim = _rim(mask.shape, 1)
    if not 0.01 < mask.mean() < 0.95 or mask[rim].mean() > 0.7:
        return None
    return Cutout(mask, plain)


def _rim(shape: tuple[int, ...], thickness: int) -> Mask:
    rim = np.ones(shape, np.bool_)
    rim[thickness:-thickness, thickness:-thickness] = False
    return rim


def _smooth_background(colours: Floats) -> tuple[Floats, float, float]:
    """Fit a quadratic to the border's colours, leaving out what does not fit (a sleeve, a hem).

    Returns:
        The model over the whole picture, the median distance of the border from it, and the share
        of the border that fits.
    """
    height, width, _ = colours.shape
    rim = _rim((height, width), max(2, round(0.02 * max(height, width))))
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    terms = np.stack(np.broadcast_arrays(1.0, x, y, x * x, y * y, x * y), axis=-1)
    samples, design = colours[rim], terms[rim]
    distance = np.abs(samples - np.median(samples, axis=0)).max(axis=1)
    fits = distance <= max(3 * np.median(distance), 6)
    for _ in range(4):
        a = design[fits]
        # The slight ridge keeps the curve flat where part of the border is missing.
        ridge = 1e-3 * len(a) * np.diag([0, 1, 1, 1, 1, 1])
        coefficients = np.linalg.solve(a.T @ a + ridge + 1e-9 * np.eye(6), a.T @ samples[fits])
        distance = np.abs(samples - design @ coefficients).max(axis=1)
        spread = float(np.median(distance))
        fits = distance <= max(4 * spread, 3)
    background = (terms @ coefficients).astype(np.float32)
    return background, spread, float((distance <= max(4 * spread, 6)).mean())


def _beyond_edge(colours: Floats, background: Floats, spread: float) -> Mask:
    """Take what the border's background does not reach, up to where edges begin to be steep.

    Shadows and light fall off slowly, garments end at once: so of nine distances from the
    background, the least at which the picture is half as steep as anywhere is the threshold.
    """
    distance = np.abs(colours - background).max(axis=2)
    faintest = max(FAINTEST, 3.5 * spread)
    threshold, most = faintest, float(np.percentile(distance, 98)) / 2
    if most > 1.2 * faintest:
        levels = np.geomspace(faintest, most, 9)
        level = np.searchsorted(levels, distance.ravel())
        steepness = np.hypot(*np.gradient(distance)).ravel()
        counts = np.bincount(level, minlength=10)[1:9]
        mean = np.bincount(level, steepness, 10)[1:9] / np.maximum(counts, 1)
        mean[counts <= 8] = 0
        threshold = float(levels[np.argmax(mean >= mean.max() / 2)])
    near = distance < threshold
    outside = _grow(_rim(near.shape, 1), near)
    # Enclosed background, as in the handle of a bag; narrow gaps are folds.
    holes = near & ~outside & (distance < max(faintest, 0.7 * threshold))
    holes = _grow(eroded(holes, 1), holes)
    # A rim around nothing is that of a garment of the background's colour.
    return ~outside if holes.sum() > 0.4 * (~outside).sum() else ~outside & ~holes


def _unlike_border(colours: Floats) -> Mask:
    """Learn the colours of border and garment in turn, as two histograms (a mixture by EM).

    The first guess takes colours for the garment's that are rarer at the border than elsewhere.
    """
    height, width, _ = colours.shape
    luma = colours @ np.array([0.299, 0.587, 0.114], np.float32)
    axes = (luma, colours[..., 0] - luma + 128, colours[..., 2] - luma + 128)
    steps = [np.clip(axis * (BINS / 256), 0, BINS - 1).astype(np.intp) for axis in axes]
    bins = ((steps[0] * BINS + steps[1]) * BINS + steps[2]).ravel()
    smooth = np.eye(BINS) / 2 + np.eye(BINS, k=1) / 4 + np.eye(BINS, k=-1) / 4

    def histogram(weights: Floats) -> NDArray[np.float64]:
        counts = smooth @ np.bincount(bins, weights.ravel(), BINS**3).reshape(BINS, -1)
        smoothed = (smooth @ counts.reshape(BINS, BINS, BINS) @ smooth).ravel()
        return np.asarray(smoothed / (smoothed.sum() + 1e-9))

    y, x = np.abs(np.linspace(-1, 1, height))[:, None], np.abs(np.linspace(-1, 1, width))[None]
    outward = np.maximum(y, x).astype(np.float32)  # 0 in the middle, 1 on the border
    border = np.clip((outward - 0.88) / 0.15, 0, 1)
    prior = np.clip(0.5 - 0.4 * outward**2, 0.03, 0.97)
    everywhere, edge = histogram(np.ones_like(luma)), histogram(border)
    evidence = np.log((everywhere + 1e-6) / (edge + 1e-6 + 0.02 * everywhere)) - 1
    for _ in range(ROUNDS):
        scaled = (np.clip(evidence, -3, 3) * 42 + 128).astype(np.uint8)[bins].reshape(luma.shape)
        box = ImageFilter.BoxBlur(2)  # neighbours mostly belong together
        smoothed = np.asarray(Image.fromarray(scaled).filter(box).filter(box), np.float32)
        garment = 1 / (1 + np.exp((128 - smoothed) / 7 - np.log(prior / (1 - prior))))
        background = histogram(border * (1 - garment)) + histogram(1 - garment)
        evidence = np.log((histogram(garment) + 1e-5) / (background / 2 + 1e-5))
    return np.asarray(garment > 0.5)


def _grow(seeds: Mask, allowed: Mask) -> Mask:
    """Return the allowed pixels that are connected to a seed, by rows and columns."""
    labels = cc3d.connected_components(allowed, connectivity=4)
    reached = np.bincount(labels[seeds], minlength=int(labels.max()) + 1) > 0
    reached[0] = False  # what is not allowed
    return np.asarray(reached[labels])


def eroded(mask: Mask, radius: int) -> Mask:
    """Return the mask without what is within so many pixels of its edge."""
    blurred = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(radius))
    return np.asarray(np.asarray(blurred) == 255)  # a mean is 255 only where all are


def _without_specks(mask: Mask, radius: float) -> Mask:
    """Drop the parts thinner than twice the radius, a share of the longest edge, all over.

    A strap that is connected to something thicker stays.
    """
    core = eroded(mask, max(1, round(radius * max(mask.shape))))
    return _grow(core, mask) if core.sum() > 0.2 * mask.sum() else mask


def _without_lines_from_border(mask: Mask) -> Mask:
    """Drop thin parts that begin at the border: joints between boards, cables, folds of a sheet."""
    radius = max(1, round(LINE * max(mask.shape)))
    inside = eroded(mask, radius)
    thick = ~eroded(np.pad(~inside, radius, constant_values=True), radius)  # grown back
    thin = mask & ~thick[radius:-radius, radius:-radius]
    return mask & ~_grow(_rim(mask.shape, 1), thin)


def _main_part(mask: Mask) -> Mask:
    """Keep the thickest part and what reaches beside it; drop what else lies in the picture.

    Of what else the picture holds whole, much is kept: the second shoe of a pair, or the rest of a
    garment that was cut up.
    """
    inside, radius = mask, 1
    while (smaller := eroded(mask, radius)).any() and radius < max(mask.shape) / 2:
        inside, radius = smaller, 2 * radius
    y, x = np.nonzero(inside)
    if not len(y):
        return mask
    height, width = mask.shape
    middle = np.argmin((y / height - 0.5) ** 2 + (x / width - 0.5) ** 2)
    seed, box = np.zeros_like(mask), np.zeros_like(mask)
    seed[y[middle], x[middle]] = True
    main = _grow(seed, mask)
    y, x = np.nonzero(main)
    reach = round(REACH * max(mask.shape))
    box[
        max(0, y.min() - reach) : y.max() + reach + 1, max(0, x.min() - reach) : x.max() + reach + 1
    ] = True
    rest = mask & ~main
    cut_off = _grow(_rim(mask.shape, 1), rest)
    beside = _grow(box, rest & ~cut_off)
    elsewhere = rest & ~cut_off & ~beside
    much = elsewhere.sum() > 0.4 * main.sum()
    return main | beside | elsewhere if much else main | beside
