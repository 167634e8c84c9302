"""Finds the garment in a small photograph.

A plain background is a studio, a wall or a sheet; light may be uneven and shadows soft. It is
followed from the border inwards, up to the first steep edge. For any other background, the colours
of background and garment are learnt.

Lengths are fractions of the picture's longest edge. Colours are grey levels from 0 to 255. Where a
constant gives no reason, its value gave the best accuracy on composed photographs
(docs/performance.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Labels = NDArray[np.integer]

MIN_SIDE = 8  # pixels; a smaller picture is mostly border
BORDER = 0.02  # thickness of the border, to which the background model is fitted
PLAIN_SPREAD = 4.0  # largest median distance of a plain background's border from its model
PLAIN_SHARE = 0.5  # smallest share of the border that fits a plain background's model
FIT_ROUNDS = 4  # of fitting the model and removing outliers
MIN_DISTANCE = 3.0  # smallest distance from the background that is not noise
NOISE_FACTOR = 3.5  # a distance is also noise below this many times the border's median
LEVELS = 9  # thresholds to try
# Holes' share of the outline's area. With more, the "holes" are the garment, in the background's
# colour, and only its edge stands out.
MAX_HOLES = 0.4
BINS = 16  # of the colour histogram, on each of three axes
COLOUR_ROUNDS = 3  # of learning the colours; six and ten rounds gave no better accuracy
# A pixel's weight as border grows from this distance from the middle on. The border's is 1.
BORDER_FROM = 0.88
# The garment's prior probability, in the middle and how much less at the border.
PRIOR, PRIOR_DROP = 0.5, 0.4
FIRST_EVIDENCE = 1  # log-likelihood ratio that a colour of the garment exceeds in the first round
MAX_EVIDENCE = 3  # log-likelihood ratio; larger ones are clipped
# Pillow blurs 8-bit images, so evidence is scaled to grey levels: zero, and levels for one unit.
ZERO_LEVEL, UNIT_LEVELS = 128, 42
LEVELS_PER_LOG_ODDS = 7  # of blurred evidence
SPECK_RADIUS = 0.008  # on a plain background, thinner parts are noise
BUSY_SPECK_RADIUS = 0.02  # the same on any other background
LINE_RADIUS = 0.02  # half the thickness of lines such as joints between boards
NEIGHBOURHOOD = 0.04  # parts that are this near to the main part belong to it
KEPT_AREA = 0.4  # times the main part's area; distant parts are kept if together larger
SIMILAR_AREA = 0.5  # times the largest part's area; a second part, if larger, is a second object
MIN_AREA, MAX_AREA = 0.01, 0.95  # the garment's share of the picture
MAX_RIM = 0.7  # share of the outermost pixels; a mask with more of them is the background
MAX_RAGGEDNESS = 20.0  # perimeter / sqrt(area); a square has 4, and 499 photographs at most 18


@dataclass(frozen=True)
class Cutout:
    """Where the garment is.

    Attributes:
        mask: bool [height, width], true on the garment.
        plain: whether the background is plain. If so, the outline follows an edge; if not, it is
            guessed from the colours.
    """

    mask: Mask
    plain: bool


def cut_out(rgb: NDArray[np.uint8]) -> Cutout | None:
    """Find the garment in a small photograph, a few hundred pixels wide.

    Args:
        rgb: uint8 [height, width, 3].

    Returns:
        the cutout, or None if no garment stands out from the background.
    """
    if min(rgb.shape[:2]) < MIN_SIDE:
        return None
    colours = rgb.astype(np.float32)
    background = _fit_border(colours)
    mask = (
        _inside_edges(colours, background) if background.is_plain else _unlike_background(colours)
    )
    mask = _without_border_lines(mask)
    mask = _main_parts(mask, SPECK_RADIUS if background.is_plain else BUSY_SPECK_RADIUS)
    if not MIN_AREA < mask.mean() < MAX_AREA or mask[_rim(mask.shape, 1)].mean() > MAX_RIM:
        return None
    if not background.is_plain and _raggedness(mask) > MAX_RAGGEDNESS:
        return None
    return Cutout(mask, background.is_plain)


def larger_of_two(mask: Mask) -> Mask | None:
    """Return the largest part of a mask if a second part has a similar area, else None."""
    labels = _label(mask)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    if len(areas) < 3:
        return None
    second, largest = np.argsort(areas)[-2:]
    return np.asarray(labels == largest) if areas[second] > SIMILAR_AREA * areas[largest] else None


def eroded(mask: Mask, radius: int) -> Mask:
    """Return the pixels whose whole square neighbourhood of this radius is in the mask.

    Outside the picture, the mask continues as it is at the picture's edge.
    """
    return _eroded_down(_eroded_down(mask, radius).T, radius).T


def _eroded_down(mask: Mask, radius: int) -> Mask:
    """Erode along columns, by joining windows of 1, 2, 4, … rows until they have the full size."""
    window, whole = 1, 2 * radius + 1
    ends = np.repeat(mask[:1], radius, axis=0), np.repeat(mask[-1:], radius, axis=0)
    result = np.concatenate([ends[0], mask, ends[1]])
    while window < whole:
        step = min(window, whole - window)
        result = result[:-step] & result[step:]
        window += step
    return np.asarray(result)


@dataclass(frozen=True)
class _Background:
    """A quadratic model of the border's colours.

    Attributes:
        coefficients: float64 [6, 3], of 1, x, y, x², y², xy, with x and y from -1 to 1.
        spread: median distance of the border from the model.
        share: share of the border that fits the model.
    """

    coefficients: NDArray[np.float64]
    spread: float
    share: float

    @property
    def is_plain(self) -> bool:
        return self.spread < PLAIN_SPREAD and self.share > PLAIN_SHARE

    def distance(self, colours: Floats) -> Floats:
        """Return each pixel's distance, the largest of its colours': float32 [height, width]."""
        height, width, _ = colours.shape
        y, x = np.linspace(-1, 1, height)[:, None, None], np.linspace(-1, 1, width)[:, None]
        a = self.coefficients
        rows = (a[0] + y * (a[2] + y * a[4])).astype(np.float32)
        columns = (x * (a[1] + x * a[3])).astype(np.float32)
        both = (y * (x * a[5])).astype(np.float32)
        return _largest(np.moveaxis(np.abs(colours - (rows + columns + both)), 2, 0))


def _fit_border(colours: Floats) -> _Background:
    """Fit the model to the border without outliers, such as a sleeve or a hem at the border."""
    height, width, _ = colours.shape
    rim = _rim((height, width), max(2, round(BORDER * max(height, width))))
    row, column = (index[::2] for index in np.nonzero(rim))  # half the pixels are enough
    y, x = np.linspace(-1, 1, height)[row], np.linspace(-1, 1, width)[column]
    samples = np.ascontiguousarray(colours[row, column].T)
    terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y])
    distance = _largest(np.abs(samples - np.median(samples, axis=1, keepdims=True)))
    fits = distance <= max(3 * np.median(distance), 6)
    for _ in range(FIT_ROUNDS):
        a = terms[:, fits]
        # A small ridge keeps the model flat where part of the border is left out.
        ridge = 1e-3 * a.shape[1] * np.diag([0, 1, 1, 1, 1, 1]) + 1e-9 * np.eye(6)
        coefficients = np.linalg.solve(a @ a.T + ridge, a @ samples[:, fits].T)
        distance = _largest(np.abs(samples - coefficients.T @ terms))
        spread = float(np.median(distance))
        fits = distance <= max(4 * spread, 3)
    return _Background(coefficients, spread, float((distance <= max(4 * spread, 6)).mean()))


def _inside_edges(colours: Floats, background: _Background) -> Mask:
    """Return the pixels that a plain background, followed from the border, does not reach.

    Light and shadows change slowly; a garment's edge is steep. The threshold is the lowest of nine
    distances from the background at which the mean steepness is half of its maximum.
    """
    distance = background.distance(colours)
    lowest = max(MIN_DISTANCE, NOISE_FACTOR * background.spread)
    threshold, highest = lowest, float(np.percentile(distance, 98)) / 2
    if highest > 1.2 * lowest:
        levels = np.geomspace(lowest, highest, LEVELS)
        level = np.searchsorted(levels, distance.ravel())
        steepness = np.hypot(*np.gradient(distance)).ravel()
        counts = np.bincount(level, minlength=LEVELS + 1)[1:LEVELS]
        mean = np.bincount(level, steepness, LEVELS + 1)[1:LEVELS] / np.maximum(counts, 1)
        threshold = float(levels[np.argmax(mean >= mean.max() / 2)])
    near = distance < threshold
    outside = _connected(_rim(near.shape, 1), near)
    # Holes are enclosed background, as inside a bag's handle. Narrow gaps are folds: not holes.
    holes = near & ~outside & (distance < max(lowest, 0.7 * threshold))
    holes = _connected(eroded(holes, 1), holes)
    return ~outside if holes.sum() > MAX_HOLES * (~outside).sum() else ~outside & ~holes


def _unlike_background(colours: Floats) -> Mask:
    """Learn the colours of background and garment in turn, as two histograms (a mixture by EM).

    At first, the garment's colours are those that are rarer at the border than elsewhere.
    """
    height, width, _ = colours.shape
    red, green, blue = np.ascontiguousarray(np.moveaxis(colours, 2, 0))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    axes = (luma, red - luma + 128, blue - luma + 128)
    steps = [np.clip(axis * (BINS / 256), 0, BINS - 1).astype(np.uint16) for axis in axes]
    bins = ((steps[0] * BINS + steps[1]) * BINS + steps[2]).ravel().astype(np.intp)
    smooth = np.eye(BINS) / 2 + np.eye(BINS, k=1) / 4 + np.eye(BINS, k=-1) / 4

    def histogram(counts: NDArray[Any]) -> NDArray[np.float64]:
        along = smooth @ counts.reshape(BINS, -1)
        smoothed = (smooth @ along.reshape(BINS, BINS, BINS) @ smooth).ravel()
        return np.asarray(smoothed / (smoothed.sum() + 1e-9))

    y, x = np.abs(np.linspace(-1, 1, height))[:, None], np.abs(np.linspace(-1, 1, width))[None]
    outward = np.maximum(y, x).astype(np.float32)  # 0 in the middle, 1 on the border
    band = outward > BORDER_FROM
    # The weights as border, of these pixels alone. Histograms do not depend on their scale.
    border, border_bins = outward[band] - BORDER_FROM, bins[band.ravel()]
    prior = PRIOR - PRIOR_DROP * outward**2
    prior_odds = np.log(prior / (1 - prior))

    def probability(evidence: NDArray[np.float64]) -> Floats:
        """Return the probability of each pixel to be garment, from the evidence by colour."""
        clipped = np.clip(evidence, -MAX_EVIDENCE, MAX_EVIDENCE)
        scaled = (clipped * UNIT_LEVELS + ZERO_LEVEL).astype(np.uint8)[bins].reshape(luma.shape)
        box = ImageFilter.BoxBlur(2)  # neighbouring pixels usually belong together
        smoothed = np.asarray(Image.fromarray(scaled).filter(box).filter(box), np.float32)
        log_odds = prior_odds - (ZERO_LEVEL - smoothed) / LEVELS_PER_LOG_ODDS
        return np.asarray(1 / (1 + np.exp(-log_odds)))

    all_counts = np.bincount(bins, minlength=BINS**3)
    everywhere = histogram(all_counts)
    edge = histogram(np.bincount(border_bins, border, BINS**3))
    evidence = np.log((everywhere + 1e-6) / (edge + 1e-6 + 0.02 * everywhere)) - FIRST_EVIDENCE
    garment = probability(evidence)
    for _ in range(COLOUR_ROUNDS - 1):
        garment_counts = np.bincount(bins, garment.ravel(), BINS**3)
        near_border = np.bincount(border_bins, border * (1 - garment[band]), BINS**3)
        background = histogram(near_border) + histogram(all_counts - garment_counts)
        evidence = np.log((histogram(garment_counts) + 1e-5) / (background / 2 + 1e-5))
        garment = probability(evidence)
    return garment > 0.5


def _without_border_lines(mask: Mask) -> Mask:
    """Remove thin parts that touch the border: joints between boards, cables, folds of a sheet."""
    radius = max(1, round(LINE_RADIUS * max(mask.shape)))
    inside = eroded(mask, radius)
    thick = ~eroded(np.pad(~inside, radius, constant_values=True), radius)  # grown back
    thin = mask & ~thick[radius:-radius, radius:-radius]
    return mask & ~_connected(_rim(mask.shape, 1), thin)


def _main_parts(mask: Mask, speck_radius: float) -> Mask:
    """Keep the main part and the parts that belong to it; remove all others.

    The main part is the thickest. Of the other parts:
    - Parts that are thin everywhere are specks and are removed, unless they are most of the mask.
      A strap stays: it is connected to something thicker.
    - Parts that touch the border are removed.
    - Parts near the main part are kept: they are pieces of the garment.
    - All others are kept if they are large together, such as a second shoe.
    """
    labels = _label(mask)
    core = eroded(mask, max(1, round(speck_radius * max(mask.shape))))
    if core.sum() > 0.2 * mask.sum():
        labels = np.where(_with_labels(labels, labels[core]), labels, 0)
    inside, radius = labels[::2, ::2] > 0, 1  # at half the resolution, for speed
    while (smaller := eroded(inside, radius)).any() and radius < max(inside.shape) / 2:
        inside, radius = smaller, 2 * radius
    y, x = np.nonzero(inside)
    if not len(y):
        return mask
    height, width = inside.shape
    middle = np.argmin((y / height - 0.5) ** 2 + (x / width - 0.5) ** 2)
    main = labels == labels[2 * y[middle], 2 * x[middle]]
    rest = np.where(main | _with_labels(labels, labels[_rim(mask.shape, 1)]), 0, labels)
    y, x = np.nonzero(main)
    margin = round(NEIGHBOURHOOD * max(mask.shape))
    near = np.s_[
        max(0, y.min() - margin) : y.max() + margin + 1,
        max(0, x.min() - margin) : x.max() + margin + 1,
    ]
    nearby = _with_labels(rest, rest[near])
    elsewhere = (rest > 0) & ~nearby
    large = elsewhere.sum() > KEPT_AREA * main.sum()
    return np.asarray(main | nearby | elsewhere if large else main | nearby)


def _raggedness(mask: Mask) -> float:
    """Return perimeter / sqrt(area), which is high if the mask follows a pattern, not a garment."""
    perimeter = (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum()
    return float(perimeter / np.sqrt(mask.sum()))


def _largest(planes: NDArray[Any]) -> NDArray[Any]:
    """Return the elementwise maximum of three arrays, faster than `max` over an axis."""
    return np.asarray(np.maximum(np.maximum(planes[0], planes[1]), planes[2]))


def _rim(shape: tuple[int, ...], thickness: int) -> Mask:
    rim = np.ones(shape, np.bool_)
    rim[thickness:-thickness, thickness:-thickness] = False
    return rim


def _label(mask: Mask) -> Labels:
    """Return each pixel's part number: connected parts count from 1; 0 is outside the mask."""
    return cc3d.connected_components(mask, connectivity=4)


def _with_labels(labels: Labels, chosen: Labels) -> Mask:
    """Return the pixels whose label is among the chosen ones."""
    is_chosen = np.bincount(chosen.ravel(), minlength=int(labels.max()) + 1) > 0
    is_chosen[0] = False
    return np.asarray(is_chosen[labels])


def _connected(seeds: Mask, allowed: Mask) -> Mask:
    """Return the allowed pixels that are connected to a seed."""
    labels = _label(allowed)
    return _with_labels(labels, labels[seeds])
