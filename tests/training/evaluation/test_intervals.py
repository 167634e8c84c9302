import math

import numpy as np
import pytest

from training.evaluation.intervals import mean_interval, paired_difference, welch_p

# Student's t, two-sided 95 %, from printed tables: degrees of freedom and quantile.
PRINTED = {1: 12.706, 4: 2.776, 9: 2.262}


@pytest.mark.parametrize(("freedom", "quantile"), PRINTED.items())
def test_the_half_width_is_the_printed_quantile_times_the_standard_error(
    freedom: int, quantile: float
) -> None:
    values = [0.92 + 0.001 * (i % 3) for i in range(freedom + 1)]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / freedom)
    interval = mean_interval(values)
    assert interval.mean == pytest.approx(mean)
    assert interval.half_width == pytest.approx(
        quantile * deviation / math.sqrt(freedom + 1), rel=1e-3
    )
    assert (interval.low, interval.high) == (
        interval.mean - interval.half_width,
        interval.mean + interval.half_width,
    )


def test_one_value_has_no_finite_interval() -> None:
    assert mean_interval([0.5]).half_width == math.inf
    assert not mean_interval([0.5]).excludes(100)


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_pairing_removes_what_the_pairs_share() -> None:
    """Seeds differ far more than the arms; the paired difference still shows the arms' effect."""
    before = [0.1, 0.5, 0.9]
    difference = paired_difference([v + 0.010 + 0.001 * i for i, v in enumerate(before)], before)
    assert difference.mean == pytest.approx(0.011)
    assert difference.half_width == pytest.approx(4.303 * 0.001 / math.sqrt(3), rel=1e-3)
    assert difference.excludes(0)
    assert f"{difference:+.3f}" == "+0.011 ± 0.002"


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="longer"):
        paired_difference([1.0], [1.0, 2.0])


def test_welchs_p_value_is_its_formula() -> None:
    """Welch (1947): t and its degrees of freedom by hand, the tail by integrating the density."""
    first, second = [0.921, 0.924, 0.926, 0.925], [0.927, 0.929, 0.928, 0.9285, 0.9275]
    errors = [np.var(values, ddof=1) / len(values) for values in (first, second)]
    t = abs(np.mean(first) - np.mean(second)) / math.sqrt(sum(errors))
    freedom = sum(errors) ** 2 / (errors[0] ** 2 / 3 + errors[1] ** 2 / 4)
    x = np.linspace(0, t, 100_001)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    density *= math.gamma((freedom + 1) / 2)
    density /= math.sqrt(freedom * math.pi) * math.gamma(freedom / 2)
    assert welch_p(first, second) == pytest.approx(1 - 2 * np.trapezoid(density, x), rel=1e-6)
