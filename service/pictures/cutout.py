"""Finds the garment in a small photograph.

A plain background (studio, wall, sheet; uneven light and soft shadows allowed) is followed inwards
from the border up to the steepest edge. Of any other background the colours are learnt.

Lengths are shares of the picture's longest edge, colours are in grey levels from 0 to 255. The
values were chosen by accuracy on made-up photographs (docs/performance.md), unless a reason is
given.
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

MIN_SIDE = 8  # pixels; below, the border is most of the picture
BORDER = 0.02  # thickness of the border whose colours are fitted
PLAIN_SPREAD = 4.0  # median distance of a plain background's border from its smooth model
PLAIN_SHARE = 0.5  # of the border that a plain background's model must fit
FITS = 4  # rounds of fitting the model and leaving out what does not fit
FAINTEST = 3.0  # the least distance from the background that stands out from noise
NOISE = 3.5  # standing out, in medians of the border's distance
LEVELS = 9  # thresholds that are tried
MIN_LEVEL_PIXELS = 8  # fewer give no mean steepness
MAX_HOLES = 0.4  # of the outline's area; with more, the rim is that of a garment of one colour
BINS = 16  # of each of the three colour axes
ROUNDS = 3  # of learning the colours; six or ten were no better
SPECK_RADIUS = 0.008  # thinner parts are noise on a plain background
SCRAP_RADIUS = 0.02  # and on any other
LINE_RADIUS = 0.02  # half the thickness of a joint between boards
NEIGHBOURHOOD = 0.04  # around the main part: parts that begin there belong to it
SECOND = 0.4  # of the main part's area: a part this large elsewhere is kept
SIMILAR = (
    0.5  # of the main part's area: a part this large is a second object, as in a pair of shoes
)
MIN_AREA, MAX_AREA = 0.01, 0.95  # of the picture
MAX_RIM = 0.7  # of the picture's outermost pixels; a garment that takes more was not found
MAX_RAGGEDNESS = 20.0  # perimeter / sqrt(area): a square has 4, none of 499 photographs above 18


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
        The cutout, or None when no garment stands out from the border.
    """
    if min(rgb.shape[:2]) < MIN_SIDE:
        return None
    colours = rgb.astype(np.float32)
    background = _fit_border(colours)
    mask = _beyond_edge(colours, background) if background.is_plain else _unlike_border(colours)
    mask = _without_lines_from_border(mask)
    mask = _main_parts(mask, SPECK_RADIUS if background.is_plain else SCRAP_RADIUS)
    if not MIN_AREA < mask.mean() < MAX_AREA or mask[_rim(mask.shape, 1)].mean() > MAX_RIM:
        return None
    if not background.is_plain and _raggedness(mask) > MAX_RAGGEDNESS:
        return None
    return Cutout(mask, background.is_plain)


def larger_of_two(mask: Mask) -> Mask | None:
    """Return the largest part of a mask where a second one is nearly as large, as in a pair."""
    labels = _label(mask)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    if len(areas) < 3:
        return None
    second, largest = np.argsort(areas)[-2:]
    return np.asarray(labels == largest) if areas[second] > SIMILAR * areas[largest] else None


def eroded(mask: Mask, radius: int) -> Mask:
    """Return where all pixels within a square of this radius are in the mask.

    Beyond the picture's edge the mask goes on as it is there.
    """
    return _eroded_down(_eroded_down(mask, radius).T, radius).T


def _eroded_down(mask: Mask, radius: int) -> Mask:
    """Erode columns: windows of 1, 2, 4, … rows, up to the whole, are joined from two smaller."""
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
        share: of the border that fits.
    """

    coefficients: NDArray[np.float64]
    spread: float
    share: float

    @property
    def is_plain(self) -> bool:
        return self.spread < PLAIN_SPREAD and self.share > PLAIN_SHARE

    def distance(self, colours: Floats) -> Floats:
        """Return each pixel's largest difference in a colour from the model: [height, width]."""
        height, width, _ = colours.shape
        y, x = np.linspace(-1, 1, height)[:, None, None], np.linspace(-1, 1, width)[:, None]
        a = self.coefficients
        rows = (a[0] + y * (a[2] + y * a[4])).astype(np.float32)
        columns = (x * (a[1] + x * a[3])).astype(np.float32)
        both = (y * (x * a[5])).astype(np.float32)
        return _largest(np.moveaxis(np.abs(colours - (rows + columns + both)), 2, 0))


def _fit_border(colours: Floats) -> _Background:
    """Fit the model to the border, leaving out what does not fit (a sleeve, a hem)."""
    height, width, _ = colours.shape
    rim = _rim((height, width), max(2, round(BORDER * max(height, width))))
    row, column = (index[::2] for index in np.nonzero(rim))  # every other pixel is enough
    y, x = np.linspace(-1, 1, height)[row], np.linspace(-1, 1, width)[column]
    samples = np.ascontiguousarray(colours[row, column].T)
    terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y])
    distance = _largest(np.abs(samples - np.median(samples, axis=1, keepdims=True)))
    fits = distance <= max(3 * np.median(distance), 6)
    for _ in range(FITS):
        a = terms[:, fits]
        # The slight ridge keeps the curve flat where part of the border is missing.
        ridge = 1e-3 * a.shape[1] * np.diag([0, 1, 1, 1, 1, 1]) + 1e-9 * np.eye(6)
        coefficients = np.linalg.solve(a @ a.T + ridge, a @ samples[:, fits].T)
        distance = _largest(np.abs(samples - coefficients.T @ terms))
        spread = float(np.median(distance))
        fits = distance <= max(4 * spread, 3)
    return _Background(coefficients, spread, float((distance <= max(4 * spread, 6)).mean()))


def _beyond_edge(colours: Floats, background: _Background) -> Mask:
    """Take what lies beyond the background, up to where edges begin to be steep.

    Shadows and light fall off slowly, garments end at once. So the threshold is the least of nine
    distances from the background at which the picture is half as steep as anywhere.
    """
    distance = background.distance(colours)
    faintest = max(FAINTEST, NOISE * background.spread)
    threshold, strongest = faintest, float(np.percentile(distance, 98)) / 2
    if strongest > 1.2 * faintest:
        levels = np.geomspace(faintest, strongest, LEVELS)
        level = np.searchsorted(levels, distance.ravel())
        steepness = np.hypot(*np.gradient(distance)).ravel()
        counts = np.bincount(level, minlength=LEVELS + 1)[1:LEVELS]
        mean = np.bincount(level, steepness, LEVELS + 1)[1:LEVELS] / np.maximum(counts, 1)
        mean[counts <= MIN_LEVEL_PIXELS] = 0
        threshold = float(levels[np.argmax(mean >= mean.max() / 2)])
    near = distance < threshold
    outside = _connected(_rim(near.shape, 1), near)
    # Enclosed background, as in the handle of a bag; narrow gaps are folds.
    holes = near & ~outside & (distance < max(faintest, 0.7 * threshold))
    holes = _connected(eroded(holes, 1), holes)
    return ~outside if holes.sum() > MAX_HOLES * (~outside).sum() else ~outside & ~holes


def _unlike_border(colours: Floats) -> Mask:
    """Learn the colours of border and garment in turn, as two histograms (a mixture by EM).

    The first guess is that colours rarer at the border than elsewhere are the garment's.
    """
    height, width, _ = colours.shape
    red, green, blue = np.ascontiguousarray(np.moveaxis(colours, 2, 0))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    axes = (luma, red - luma + 128, blue - luma + 128)
    steps = [np.clip(axis * (BINS / 256), 0, BINS - 1).astype(np.uint16) for axis in axes]
    bins = ((steps[0] * BINS + steps[1]) * BINS + steps[2]).ravel().astype(np.intp)
    smooth = np.eye(BINS) / 2 + np.eye(BINS, k=1) / 4 + np.eye(BINS, k=-1) / 4

    def counted(weights: Floats) -> NDArray[np.float64]:
        return np.asarray(
            np.bincount(bins, weights.ravel().astype(np.float64), BINS**3), np.float64
        )

    def histogram(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        along = smooth @ counts.reshape(BINS, -1)
        smoothed = (smooth @ along.reshape(BINS, BINS, BINS) @ smooth).ravel()
        return np.asarray(smoothed / (smoothed.sum() + 1e-9))

    y, x = np.abs(np.linspace(-1, 1, height))[:, None], np.abs(np.linspace(-1, 1, width))[None]
    outward = np.maximum(y, x).astype(np.float32)  # 0 in the middle, 1 on the border
    border = np.clip((outward - 0.88) / 0.15, 0, 1)
    prior = np.clip(0.5 - 0.4 * outward**2, 0.03, 0.97)
    prior_odds = np.log(prior / (1 - prior))
    all_counts = counted(np.ones_like(luma))
    everywhere, edge = histogram(all_counts), histogram(counted(border))
    evidence = np.log((everywhere + 1e-6) / (edge + 1e-6 + 0.02 * everywhere)) - 1
    for _ in range(ROUNDS):
        scaled = (np.clip(evidence, -3, 3) * 42 + 128).astype(np.uint8)[bins].reshape(luma.shape)
        box = ImageFilter.BoxBlur(2)  # neighbours mostly belong together
        smoothed = np.asarray(Image.fromarray(scaled).filter(box).filter(box), np.float32)
        garment = 1 / (1 + np.exp((128 - smoothed) / 7 - prior_odds))
        garment_counts = counted(garment)
        background = histogram(counted(border * (1 - garment))) + histogram(
            all_counts - garment_counts
        )
        evidence = np.log((histogram(garment_counts) + 1e-5) / (background / 2 + 1e-5))
    return np.asarray(garment > 0.5)


def _without_lines_from_border(mask: Mask) -> Mask:
    """Drop thin parts that begin at the border: joints between boards, cables, folds of a sheet."""
    radius = max(1, round(LINE_RADIUS * max(mask.shape)))
    inside = eroded(mask, radius)
    thick = ~eroded(np.pad(~inside, radius, constant_values=True), radius)  # grown back
    thin = mask & ~thick[radius:-radius, radius:-radius]
    return mask & ~_connected(_rim(mask.shape, 1), thin)


def _main_parts(mask: Mask, speck_radius: float) -> Mask:
    """Keep the thickest part and what belongs to it; drop what else lies in the picture.

    Parts thinner than specks all over are dropped, unless most are: a strap that is connected to
    something thicker stays. Of the others that the picture holds whole, those near the main part
    are kept, and large ones: the rest of a garment that was cut up, the second shoe of a pair.
    """
    labels = _label(mask)
    core = eroded(mask, max(1, round(speck_radius * max(mask.shape))))
    if core.sum() > 0.2 * mask.sum():
        labels = np.where(_chosen(labels, labels[core]), labels, 0)
    inside, radius = labels[::2, ::2] > 0, 1  # half the resolution is enough
    while (smaller := eroded(inside, radius)).any() and radius < max(inside.shape) / 2:
        inside, radius = smaller, 2 * radius
    y, x = np.nonzero(inside)
    if not len(y):
        return mask
    height, width = inside.shape
    middle = np.argmin((y / height - 0.5) ** 2 + (x / width - 0.5) ** 2)
    main = labels == labels[2 * y[middle], 2 * x[middle]]
    rest = np.where(main | _chosen(labels, labels[_rim(mask.shape, 1)]), 0, labels)
    y, x = np.nonzero(main)
    margin = round(NEIGHBOURHOOD * max(mask.shape))
    near = np.s_[
        max(0, y.min() - margin) : y.max() + margin + 1,
        max(0, x.min() - margin) : x.max() + margin + 1,
    ]
    beside = _chosen(rest, rest[near])
    elsewhere = (rest > 0) & ~beside
    much = elsewhere.sum() > SECOND * main.sum()
    return np.asarray(main | beside | elsewhere if much else main | beside)


def _raggedness(mask: Mask) -> float:
    """Return perimeter / sqrt(area): high where a pattern was taken for a garment."""
    perimeter = (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum()
    return float(perimeter / np.sqrt(mask.sum()))


def _largest(planes: NDArray[Any]) -> NDArray[Any]:
    """Return the elementwise maximum of three arrays; `max` over an axis of three is slower."""
    return np.asarray(np.maximum(np.maximum(planes[0], planes[1]), planes[2]))


def _rim(shape: tuple[int, ...], thickness: int) -> Mask:
    rim = np.ones(shape, np.bool_)
    rim[thickness:-thickness, thickness:-thickness] = False
    return rim


def _label(mask: Mask) -> Labels:
    """Return the number of the connected part that each pixel is in, from 1; 0 is outside."""
    return cc3d.connected_components(mask, connectivity=4)


def _chosen(labels: Labels, chosen: Labels) -> Mask:
    """Return where the labels are that occur among the chosen ones."""
    is_chosen = np.bincount(chosen.ravel(), minlength=int(labels.max()) + 1) > 0
    is_chosen[0] = False
    return np.asarray(is_chosen[labels])


def _connected(seeds: Mask, allowed: Mask) -> Mask:
    """Return the allowed pixels that are connected to a seed."""
    labels = _label(allowed)
    return _chosen(labels, labels[seeds])
