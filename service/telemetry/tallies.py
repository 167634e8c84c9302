"""Counters and histograms in plain numbers: cheap to update, and summed over all workers."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import time
from typing import Self

import orjson

BUCKETS = (
    *(n / 1e6 for n in (15, 30, 45, 60, 90, 125, 250, 500, 1e3, 2e3, 4e3, 8e3)),
    *(0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
LAST_INFERENCE = "bnlenet_last_inference_timestamp_seconds"
PROCESS_START = "process_start_time_seconds"

Series = dict[tuple[str, ...], list[float]]
"""Numbers by metric name and label values. A histogram has a number for each bucket, then the sum
of its observations; other metrics have one number."""


class Gauge:
    """A number that goes up and down.

    Attributes:
        value: the number.
    """

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        """Set the number."""
        self.value = value


class Tally:
    """A histogram of durations. `observe` takes a tenth of the time of prometheus_client's.

    Attributes:
        counts: events in each bucket; the last bucket has no upper bound.
        seconds: the sum of all durations.
    """

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Count one event of this duration."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds

    def numbers(self) -> list[float]:
        """Return the counts, then the sum, as in `Series`."""
        return [*self.counts, self.seconds]


class Stages:
    """The time that one request spent in each stage.

    Attributes:
        decode: seconds from the complete body to pixels.
        wait: seconds from pixels to the start of the model's run.
        run: seconds of the model's run, which may be shared with other requests.
        images: the number of images in that run.
        encode: seconds from probabilities to the answer.
    """

    __slots__ = ("decode", "encode", "images", "run", "wait")

    decode: float
    wait: float
    run: float
    images: int
    encode: float


class Runs(Tally):
    """The model's runs.

    Attributes:
        last: when the latest run ended, in seconds since 1970.
        queue: the time that requests waited for their run.
        batches: seven numbers by the number of images in a run. Of the runs: their count and
            seconds. Of the requests in them that were answered: their count, and their seconds of
            decoding, waiting, running and encoding. All four stages of a request are added at its
            answer, so that one count holds for all.
    """

    __slots__ = ("batches", "last", "queue")

    def __init__(self) -> None:
        super().__init__()
        self.last = 0.0
        self.queue = Tally()
        self.batches: defaultdict[int, list[float]] = defaultdict(lambda: [0.0] * 7)

    @property
    def images(self) -> int:
        """The number of images in all runs."""
        return int(sum(images * numbers[0] for images, numbers in self.batches.items()))

    def ran(self, images: int, seconds: float) -> None:
        """Count one run."""
        self.observe(seconds)
        self.last = time()
        batch = self.batches[images]
        batch[0] += 1
        batch[1] += seconds


@dataclass
class Totals:
    """The counts of one process, or the sum of several.

    Attributes:
        counters: counters and histograms. They stay in the sum when their process ends, so that it
            never falls.
        gauges: present values. They leave the sum when their process ends.
    """

    counters: Series = field(default_factory=dict)
    gauges: Series = field(default_factory=dict)

    def add(self, other: Self) -> None:
        """Add another process's numbers."""
        _add(self.counters, other.counters)
        _add(self.gauges, other.gauges)

    def add_ended(self, other: Self) -> None:
        """Add the counters of a process that has ended."""
        _add(self.counters, other.counters)

    def to_json(self) -> bytes:
        """Return the totals as one line of JSON."""
        return orjson.dumps([[*self.counters.items()], [*self.gauges.items()]])

    @classmethod
    def from_json(cls, line: bytes) -> Self:
        """Parse what `to_json` returns."""
        counters, gauges = orjson.loads(line)
        return cls({tuple(k): v for k, v in counters}, {tuple(k): v for k, v in gauges})


def _add(series: Series, other: Mapping[tuple[str, ...], list[float]]) -> None:
    for key, numbers in other.items():
        present = series.get(key)
        if present is None:
            series[key] = numbers
        elif key[0] == LAST_INFERENCE:
            series[key] = max(present, numbers)
        elif key[0] == PROCESS_START:
            series[key] = min(present, numbers)
        else:
            series[key] = [a + b for a, b in zip(present, numbers, strict=True)]
