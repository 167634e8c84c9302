"""What Prometheus is told, kept in one registry that belongs to the application."""

import asyncio
import os
from bisect import bisect_left
from collections.abc import Sequence
from time import monotonic, time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.samples import Sample

from service.model.artefact import ModelInfo

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own variable
MEMORY = "process_resident_memory_bytes"
MEMORY_SECONDS = 1.0  # between two looks at a worker's memory
BUCKETS = (
    *(n / 1e6 for n in (15, 30, 45, 60, 90, 125, 250, 500, 1e3, 2e3, 4e3, 8e3)),
    *(0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)


class Tally:
    """A histogram's counts in plain integers: a tenth of what `Histogram.observe` costs.

    Attributes:
        counts: events by bucket, the last without a bound.
        seconds: the sum of their durations.
    """

    __slots__ = ("counts", "flushed", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0
        self.flushed = [0] * (len(BUCKETS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        """Count one event."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds

    def flush(self, histogram: "BulkHistogram") -> int:
        """Add what was counted since the last flush to a histogram; return how many events."""
        counts, seconds = self.flushed
        new = [now - before for now, before in zip(self.counts, counts, strict=True)]
        histogram.add(new, self.seconds - seconds)
        self.flushed = self.counts.copy(), self.seconds
        return sum(new)


class Runs(Tally):
    """The model's runs.

    Attributes:
        images: how many images they classified.
        last: when the latest ended, in seconds since 1970.
        queue: counts the requests, and how long they waited for their run to begin.
    """

    __slots__ = ("flushed_images", "images", "last", "queue")

    def __init__(self) -> None:
        super().__init__()
        self.images = self.flushed_images = 0
        self.last = 0.0
        self.queue = Tally()

    def ran(self, images: int, seconds: float) -> None:
        """Count one run."""
        self.observe(seconds)
        self.images += images
        self.last = time()


class BulkHistogram(Histogram):
    """A histogram that takes many observations at once."""

    def add(self, counts: Sequence[int], total: float) -> None:
        """Add events by bucket, the last without a bound, and the sum of their values."""
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(total)


class Metrics:
    """The service's counters and histograms.

    Requests are counted in tallies, which are flushed into `prometheus_client`'s metrics when
    these are read. With several workers, each keeps its metrics in files that all can read (the
    multiprocess mode), so that any worker tells the sums; a tally is then flushed as soon as the
    event loop is free.

    Args:
        model: what is served.

    Attributes:
        decode: seconds from a complete body to pixels.
        inference: seconds of one run of the model, of however many images.
        encode: seconds from probabilities to an answer.
    """

    def __init__(self, model: ModelInfo) -> None:
        self._registry = registry = CollectorRegistry()
        self._directory = os.environ.get(MULTIPROCESS)
        if self._directory is None:
            ProcessCollector(registry=registry)
        else:
            self._process = ProcessCollector(registry=None)  # knows of this process alone
            self._memory = Gauge(
                MEMORY,
                "Resident memory of all workers, each as of its latest request.",
                multiprocess_mode="livesum",
                registry=registry,
            )
            self._memory_read = 0.0

        def histogram(name: str, text: str, labels: Sequence[str] = ()) -> BulkHistogram:
            return BulkHistogram(name, text, labels, buckets=BUCKETS, registry=registry)

        self._requests = Counter(
            "http_requests",
            "Requests answered; status 499: the client left first.",
            ["route", "method", "status"],
            registry=registry,
        )
        self._rejected = Counter(
            "bnlenet_rejected",
            "Requests refused, by the code in the answer.",
            ["reason"],
            registry=registry,
        )
        self._seconds = histogram(
            "http_request_duration_seconds",
            "From a request's arrival to its answer's sending.",
            ["route", "status"],
        )
        self._decode_seconds = histogram(
            "bnlenet_decode_duration_seconds", "From a complete body to pixels."
        )
        self._queue_seconds = histogram(
            "bnlenet_queue_duration_seconds", "From pixels to the start of the model's run."
        )
        self._inference_seconds = histogram(
            "bnlenet_inference_duration_seconds", "One run of the model."
        )
        self._encode_seconds = histogram(
            "bnlenet_encode_duration_seconds", "From probabilities to an answer."
        )
        self._images = Counter("bnlenet_images", "Images classified.", registry=registry)
        self._last = Gauge(
            "bnlenet_last_inference_timestamp_seconds",
            "When the model ran last.",
            multiprocess_mode="max",
            registry=registry,
        )
        self.in_flight = Gauge(
            "http_requests_in_flight",
            "Prediction requests that have arrived and are not yet answered.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        Gauge(
            "bnlenet_model_info",
            "The model that is served, and the execution provider it really has.",
            ["name", "version", "revision", "provider"],
            multiprocess_mode="livemax",
            registry=registry,
        ).labels(model.name, model.version, model.revision, model.provider).set(1)
        self.decode = Tally()
        self.inference = Runs()
        self.encode = Tally()
        self._answers: dict[tuple[str, str, int], Tally] = {}
        self._flush_due = False

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one answered request; `route` and `method` must come from bounded sets."""
        try:
            tally = self._answers[route, method, status]
        except KeyError:
            tally = self._answers[route, method, status] = Tally()
        tally.observe(seconds)
        if self._directory is not None and not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self.flush)

    def rejected(self, reason: str) -> None:
        """Count one refused request by its error code."""
        self._rejected.labels(reason).inc()

    def flush(self) -> None:
        """Bring the metrics up to date; to be called on the event loop."""
        self._flush_due = False
        if self._directory is not None and monotonic() - self._memory_read > MEMORY_SECONDS:
            self._memory_read = monotonic()
            for family in self._process.collect():
                if family.name == MEMORY:
                    self._memory.set(family.samples[0].value)
        self.decode.flush(self._decode_seconds)
        self.encode.flush(self._encode_seconds)
        runs = self.inference
        runs.flush(self._inference_seconds)
        runs.queue.flush(self._queue_seconds)
        self._images.inc(runs.images - runs.flushed_images)
        runs.flushed_images = runs.images
        self._last.set(runs.last)
        for (route, method, status), tally in self._answers.items():
            count = tally.flush(self._seconds.labels(route, str(status)))
            self._requests.labels(route, method, str(status)).inc(count)

    def render(self) -> bytes:
        """Return everything as last flushed, in Prometheus's text format, summed over workers."""
        return generate_latest(self._readable())

    def samples(self) -> list[Sample]:
        """Return everything as last flushed, summed over workers, without the buckets."""
        families = self._readable().collect()
        return [s for f in families for s in f.samples if not s.name.endswith("_bucket")]

    def _readable(self) -> CollectorRegistry:
        if self._directory is None:
            return self._registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry, self._directory)  # type: ignore[no-untyped-call] # untyped there
        return registry
