"""What Prometheus is told, kept in one registry that belongs to the application."""

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.process_collector import ProcessCollector

from service.classifier import ModelInfo

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own variable
MICROSECOND = 1e-6
BUCKETS = (
    *(n * MICROSECOND for n in (15, 30, 45, 60, 90, 125, 250, 500, 1e3, 2e3, 4e3, 8e3)),
    *(0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)


class Metrics:
    """The service's counters and histograms.

    With several workers, each keeps its values in files that all can read
    (`prometheus_client`'s multiprocess mode), and any worker tells the sums.

    Attributes:
        decode: seconds from a complete body to pixels.
        inference: seconds of one run of the model, of however many images.
    """

    def __init__(self, model: ModelInfo) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._directory = os.environ.get(MULTIPROCESS)
        if self._directory is None:
            ProcessCollector(registry=registry)
        self._requests = Counter(
            "http_requests",
            "Requests answered; status 499: the client left first.",
            ["route", "method", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "From a request's arrival to its answer's sending.",
            ["route"],
            buckets=BUCKETS,
            registry=registry,
        )
        self.decode = Histogram(
            "bnlenet_decode_duration_seconds",
            "From a complete body to pixels.",
            buckets=BUCKETS,
            registry=registry,
        )
        self.inference = Histogram(
            "bnlenet_inference_duration_seconds",
            "One run of the model.",
            buckets=BUCKETS,
            registry=registry,
        )
        self._rejected = Counter(
            "bnlenet_rejected",
            "Requests refused, by the code in the answer.",
            ["reason"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "http_requests_in_flight",
            "Requests that have arrived and are not yet answered.",
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
        # Looking a labelled child up costs more than counting: keep those in use at hand.
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one answered request; `route` and `method` must come from bounded sets."""
        try:
            counter, histogram = self._children[route, method, status]
        except KeyError:
            counter = self._requests.labels(route, method, str(status))
            histogram = self._seconds.labels(route)
            self._children[route, method, status] = counter, histogram
        counter.inc()
        histogram.observe(seconds)

    def rejected(self, reason: str) -> None:
        """Count one refused request by its error code."""
        self._rejected.labels(reason).inc()

    def render(self) -> bytes:
        """Return everything in Prometheus's text format, summed over the workers."""
        if self._directory is None:
            return generate_latest(self._registry)
        Path(self._directory).mkdir(exist_ok=True)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, self._directory)  # type: ignore[no-untyped-call] # untyped there
        return generate_latest(registry)
