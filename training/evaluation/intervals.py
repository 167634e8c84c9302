"""Means with intervals, and comparisons with tests: Student's t, paired or Welch's."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtrit


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval.

    Attributes:
        mean: the mean of the values.
        half_width: the interval is mean ± half_width; infinite for a single value.
        count: the number of values.
    """

    mean: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + self.half_width

    def excludes(self, value: float) -> bool:
        """Return whether the value lies outside the interval."""
        return not self.low <= value <= self.high

    def __format__(self, spec: str) -> str:
        """Format as `mean ± half width`, both by `spec`."""
        return f"{self.mean:{spec}} ± {self.half_width:{spec.lstrip('+')}}"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of independent values with Student's t-interval.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    count = len(values)
    if count == 1:
        return Interval(values[0], float("inf"), 1)
    quantile = float(stdtrit(count - 1, (1 + confidence) / 2))
    return Interval(fmean(values), quantile * stdev(values) / count**0.5, count)


def paired_difference(
    after: Sequence[float], before: Sequence[float], confidence: float = 0.95
) -> Interval:
    """Return the mean of `after - before` over pairs (such as equal seeds), with its t-interval.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    return mean_interval([a - b for a, b in zip(after, before, strict=True)], confidence)


def welch_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the two-sided p-value of Welch's t-test for two unpaired samples.

    Both samples need at least two values.
    """
    from scipy import stats  # noqa: PLC0415 - takes a second; other commands need not wait

    return float(stats.ttest_ind(first, second, equal_var=False).pvalue)
