"""Rows of probabilities for the tests of the measures."""

import numpy as np

from training.evaluation.confidence import Probabilities


def rows(*confidences: tuple[int, float]) -> Probabilities:
    """Make probability rows: the class named gets the confidence, the others share the rest."""
    made = np.empty((len(confidences), 10), np.float32)
    for row, (answer, confidence) in zip(made, confidences, strict=True):
        row[:] = (1 - confidence) / 9
        row[answer] = confidence
    return made
