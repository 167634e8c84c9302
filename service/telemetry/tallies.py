"""Counts in plain numbers: quick to add to, and summed over the worker processes."""

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
LATEST = "bnlenet_last_inference_timestamp_seconds"
EARLIEST = "process_start_time_seconds"

Series = dict[tuple[str, ...], list[float]]
"""Numbers by a metric's name and its labels' values. A histogram has one for each bucket, then
the sum of what it observed; other metrics have one."""


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
    """A histogram of durations in plain numbers: a tenth of what `Histogram.observe` costs.

    Attributes:
        counts: events by bucket, the last without a bound.
        seconds: the sum of their durations.
    """

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Count one event."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds

    def numbers(self) -> list[float]:
        """Return the numbers of its series."""
        return [*self.counts, self.seconds]


class Stages:
    """Where the time of one request went.

    Attributes:
        decode: seconds from its complete body to pixels.
        wait: seconds from pixels to the start of its run.
        run: seconds of the model's run, which it may share with other requests.
        images: how many images were in that run.
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
        last: when the latest ended, in seconds since 1970.
        queue: counts the requests, and how long they waited for their run to begin.
        batches: by the number of images in a run: how many runs, and their seconds; how many
            requests of such runs were answered, and their seconds of decoding, waiting, running
            and encoding. A request counts when its answer is complete, so its four stages always
            have the same count.
    """

    __slots__ = ("batches", "last", "queue")

    def __init__(self) -> None:
        super().__init__()
        self.last = 0.0
        self.queue = Tally()
        self.batches: defaultdict[int, list[float]] = defaultdict(lambda: [0.0] * 7)

    @property
    def images(self) -> int:
        """How many images the runs classified."""
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
    """What one process has counted, or several together.

    Attributes:
        counters: counters and histograms. They outlive their process, so sums never fall.
        gauges: what a process has now; nothing once it has ended.
    """

    counters: Series = field(default_factory=dict)
    gauges: Series = field(default_factory=dict)

    def add(self, other: Self) -> None:
        """Add another process's numbers."""
        _add(self.counters, other.counters)
        _add(self.gauges, other.gauges)

    def add_ended(self, other: Self) -> None:
        """Add the numbers of a process that has ended."""
        _add(self.counters, other.counters)

    def to_json(self) -> bytes:
        """Return it as one line of JSON."""
        return orjson.dumps([[*self.counters.items()], [*self.gauges.items()]])

    @classmethod
    def from_json(cls, line: bytes) -> Self:
        """Read what `to_json` wrote."""
        counters, gauges = orjson.loads(line)
        return cls({tuple(k): v for k, v in counters}, {tuple(k): v for k, v in gauges})


def _add(to: Series, other: Mapping[tuple[str, ...], list[float]]) -> None:
    for key, numbers in other.items():
        have = to.get(key)
        if have is None:
            to[key] = numbers
        elif key[0] == LATEST:
            to[key] = max(have, numbers)
        elif key[0] == EARLIEST:
            to[key] = min(have, numbers)
        else:
            to[key] = [a + b for a, b in zip(have, numbers, strict=True)]
