"""Calibration, its floor and the answers above a threshold, against plain loops."""

import math

import numpy as np
import pytest

from tests.training.evaluation.conftest import rows
from training.evaluation.confidence import (
    THRESHOLDS,
    Answered,
    Labels,
    Probabilities,
    answered,
    answered_curve,
    calibration_error,
    calibration_floor,
)


def sample(count: int, seed: int = 0) -> tuple[Probabilities, Labels]:
    """Draw probabilities like a classifier's, and labels from them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (count, 10))
    powers = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = powers / powers.sum(1, keepdims=True)
    labels = [rng.choice(10, p=row) for row in probabilities]
    return probabilities.astype(np.float32), np.array(labels, np.uint8)


def error_by_loop(confidences: list[float], right: list[bool], bins: int = 15) -> float:
    """Guo et al., equation 3, as it is written."""
    total = 0.0
    for i in range(1, bins + 1):
        members = [
            (hit, confidence)
            for hit, confidence in zip(right, confidences, strict=True)
            if (i - 1) / bins < confidence <= i / bins
        ]
        if members:
            accuracy = sum(hit for hit, _ in members) / len(members)
            confidence = sum(confidence for _, confidence in members) / len(members)
            total += len(members) / len(right) * abs(accuracy - confidence)
    return total


def test_calibration_error_of_a_case_worked_out_by_hand() -> None:
    """Bin (9/15, 10/15]: confidences 0.61 right, 0.65 wrong; bin (14/15, 1]: 0.95 and 1.0, right.

    |1/2 - 0.63| * 2/4 + |1 - 0.975| * 2/4 = 0.065 + 0.0125.
    """
    probabilities = rows((0, 0.61), (1, 0.65), (2, 0.95), (3, 1.0))
    labels = np.array([0, 9, 2, 3], np.uint8)
    assert calibration_error(probabilities, labels) == pytest.approx(0.0775, abs=1e-6)


def test_calibration_error_is_its_equation() -> None:
    probabilities, labels = sample(500)
    confidences = probabilities.max(1).astype(float).tolist()
    expected = error_by_loop(confidences, (probabilities.argmax(1) == labels).tolist())
    assert calibration_error(probabilities, labels) == pytest.approx(expected, rel=1e-9)


def test_confidence_on_the_edge_of_a_bin_belongs_to_the_lower_one() -> None:
    """0.5 closes bin (0, 1/2]; there its gap and that of 0.45 cancel, apart they would add up."""
    labels = np.array([0, 9], np.uint8)
    found = calibration_error(rows((0, 0.5), (1, 0.45)), labels, bins=2)
    assert found == pytest.approx((0.5 - 0.45) / 2, abs=1e-6)


def test_the_floor_of_one_bin_is_the_mean_distance_of_a_binomial_from_its_mean() -> None:
    """Exact: the error of n answers of confidence p is |B(n, p)/n - p|."""
    n, p = 40, 0.75
    chance = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    distance = [abs(k / n - p) for k in range(n + 1)]
    expected = sum(c * d for c, d in zip(chance, distance, strict=True))
    floor = calibration_floor(rows(*[(0, p)] * n), draws=20_000)
    assert floor.mean == pytest.approx(expected, rel=0.03)
    # B(40, 0.75) is 30 with probability 0.144, and |B - 30| <= 4 with 0.900, <= 5 with 0.955.
    assert floor.low == pytest.approx(0, abs=1e-6)
    assert floor.high == pytest.approx(5 / n, abs=1e-6)


def test_the_floor_is_what_a_loop_over_drawn_answers_gives() -> None:
    probabilities, _ = sample(300)
    confidences = probabilities.max(1).astype(float).tolist()
    chance = np.random.default_rng(1)
    drawn = sorted(
        error_by_loop(confidences, [chance.random() < c for c in confidences]) for _ in range(400)
    )
    floor = calibration_floor(probabilities)
    assert floor.mean == pytest.approx(sum(drawn) / 400, rel=0.05)
    assert floor.low == pytest.approx(drawn[20], rel=0.1)
    assert floor.high == pytest.approx(drawn[380], rel=0.1)


def test_a_perfectly_calibrated_model_lies_within_its_floor_nine_times_of_ten() -> None:
    """The labels are drawn from all ten probabilities, not from the confidence alone."""
    within = 0
    for seed in range(40):
        probabilities, labels = sample(200, seed)
        floor = calibration_floor(probabilities, draws=200)
        within += floor.low <= calibration_error(probabilities, labels) <= floor.high
    assert 31 <= within <= 40


def test_the_floor_depends_on_its_seed_only() -> None:
    probabilities, _ = sample(50)
    first = calibration_floor(probabilities, draws=150)
    assert first == calibration_floor(probabilities, draws=150)
    assert first != calibration_floor(probabilities, draws=150, seed=1)
    assert first != calibration_floor(probabilities, draws=100)
    assert calibration_floor(probabilities) == calibration_floor(probabilities, draws=2000)


def test_an_answer_counts_from_its_threshold_on() -> None:
    probabilities = rows((0, 0.5), (1, 0.75), (2, 0.75), (3, 0.9))
    labels = np.array([0, 1, 9, 3], np.uint8)
    assert answered(probabilities, labels, [0.5, 0.75, 0.9, 0.95]) == [
        Answered(0.5, 1.0, 0.75),
        Answered(0.75, 0.75, 2 / 3),
        Answered(0.9, 0.0, None),  # 0.9 in float32 is less than 0.9
        Answered(0.95, 0.0, None),
    ]


def test_answers_by_threshold_are_those_of_a_loop() -> None:
    probabilities, labels = sample(400)
    found = answered(probabilities, labels)
    assert [one.threshold for one in found] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]
    for one in found:
        hits = [
            row.argmax() == label
            for row, label in zip(probabilities, labels, strict=True)
            if max(row) >= one.threshold
        ]
        assert one.share == len(hits) / 400
        assert one.accuracy == pytest.approx(sum(hits) / len(hits))


def test_the_curve_passes_through_the_answers_at_every_threshold() -> None:
    probabilities, labels = sample(400)
    shares, accuracies = answered_curve(probabilities, labels)
    points = dict(zip(shares.tolist(), accuracies.tolist(), strict=True))
    for one in answered(probabilities, labels, THRESHOLDS):
        assert points[one.share] == pytest.approx(one.accuracy)
    assert shares[-1] == 1
    assert accuracies[-1] == (probabilities.argmax(1) == labels).mean()
    assert (np.diff(shares) > 0).all()


def test_equal_confidences_are_one_point_of_the_curve() -> None:
    shares, accuracies = answered_curve(
        rows((0, 0.8), (1, 0.9), (2, 0.8), (3, 0.8)), np.array([0, 1, 2, 9], np.uint8)
    )
    assert shares.tolist() == [0.25, 1]
    assert accuracies.tolist() == [1, 0.75]
