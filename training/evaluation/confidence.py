"""What a model's confidence is worth: its calibration, and the accuracy of its confident answers.

An answer's confidence is the largest of its probabilities [n, 10].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Probabilities = NDArray[np.float32]
Labels = NDArray[np.uint8]
Floats = NDArray[np.float64]

BINS = 15
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
DRAWS, DRAWS_AT_ONCE = 2000, 100


@dataclass(frozen=True)
class CalibrationFloor:
    """The calibration error that chance alone gives a perfectly calibrated model.

    Attributes:
        mean: the expected error.
        low: its 5th percentile.
        high: its 95th percentile.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Answered:
    """The answers whose confidence is at least a threshold.

    Attributes:
        threshold: the lowest confidence that counts.
        share: the share of images with such an answer.
        accuracy: the share of right ones among these answers; None if there are none.
    """

    threshold: float
    share: float
    accuracy: float | None


def calibration_error(probabilities: Probabilities, labels: Labels, bins: int = BINS) -> float:
    """Return the expected calibration error.

    The answers are sorted by confidence into equal bins ((i - 1)/bins, i/bins]. The error is
    |accuracy - mean confidence| of a bin, averaged over all images (Guo et al., "On Calibration of
    Modern Neural Networks", 2017, equation 3).
    """
    confidence, right = judged(probabilities, labels)
    return float(_errors(confidence, right[None], bins)[0])


def calibration_floor(
    probabilities: Probabilities, bins: int = BINS, draws: int = DRAWS, seed: int = 0
) -> CalibrationFloor:
    """Return the calibration error of a perfectly calibrated model with these confidences.

    A perfectly calibrated model's answers are right as often as their confidence says. So a draw
    makes each answer right with this probability. The error of a draw is not zero, because a
    bin has few images. (Bröcker and Smith, "Increasing the Reliability of Reliability Diagrams",
    2007: consistency resampling.)

    Args:
        probabilities: float32 [n, 10].
        bins: as in `calibration_error`.
        draws: the number of draws.
        seed: decides the draws.
    """
    confidence = probabilities.max(1).astype(np.float64)
    rng = np.random.default_rng(seed)
    errors = np.concatenate(
        [
            _errors(confidence, rng.random((size, len(confidence))) < confidence, bins)
            for size in np.diff([*range(0, draws, DRAWS_AT_ONCE), draws])
        ]
    )
    low, high = np.quantile(errors, (0.05, 0.95))
    return CalibrationFloor(float(errors.mean()), float(low), float(high))


def answered(
    probabilities: Probabilities, labels: Labels, thresholds: Sequence[float] = THRESHOLDS
) -> list[Answered]:
    """Return share and accuracy of the answers with at least each threshold's confidence."""
    confidence, right = judged(probabilities, labels)
    found = []
    for threshold in thresholds:
        among = right[confidence >= threshold]
        accuracy = float(among.mean()) if len(among) else None
        found.append(Answered(threshold, len(among) / len(right), accuracy))
    return found


def answered_curve(probabilities: Probabilities, labels: Labels) -> tuple[Floats, Floats]:
    """Return the shares answered and the accuracies, by falling threshold of confidence.

    There is one point for each different confidence: equal ones are answered together.
    """
    confidence, right = judged(probabilities, labels)
    order = np.argsort(-confidence, kind="stable")
    count = np.arange(1, len(order) + 1)
    last = np.append(np.diff(confidence[order]) != 0, True)  # the last answer of a confidence
    shares, accuracies = count / len(order), right[order].cumsum() / count
    return shares[last], accuracies[last]


def judged(probabilities: Probabilities, labels: Labels) -> tuple[Floats, NDArray[np.bool_]]:
    """Return each answer's confidence, float64 [n], and whether it is right, bool [n]."""
    return probabilities.max(1).astype(np.float64), probabilities.argmax(1) == labels


def _errors(confidence: Floats, right: NDArray[np.bool_], bins: int) -> Floats:
    """Return the calibration error of each row of right [m, n], for confidences [n]: [m]."""
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    members = np.eye(bins)[which]
    return np.asarray(np.abs((right - confidence) @ members).sum(1) / len(confidence))
