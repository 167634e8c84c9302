"""What the service counts, and how Prometheus and Triton's clients are told."""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from service.model.artefact import ModelInfo
from service.telemetry.tallies import BUCKETS, LATEST, Gauge, Runs, Series, Stages, Tally, Totals

BOUNDS = [*map(str, BUCKETS), "+Inf"]
REQUESTS, REJECTED, BATCHES = "http_requests", "bnlenet_rejected", "batches"
REQUEST_SECONDS = "http_request_duration_seconds"
STAGES = {
    "bnlenet_decode_duration_seconds": "From a complete body to pixels.",
    "bnlenet_queue_duration_seconds": "From pixels to the start of the model's run.",
    "bnlenet_inference_duration_seconds": "One run of the model.",
    "bnlenet_encode_duration_seconds": "From probabilities to an answer.",
}
DECODE, QUEUE, INFERENCE, ENCODE = STAGES
CPU_SECONDS = "process_cpu_seconds"
IN_FLIGHT = "http_requests_in_flight"
GAUGES = {
    IN_FLIGHT: "Prediction requests that have arrived and are not yet answered.",
    "process_resident_memory_bytes": "Resident memory of all worker processes.",
    "process_virtual_memory_bytes": "Virtual memory of all worker processes.",
    "process_open_fds": "Open file descriptors of all worker processes.",
    "process_max_fds": "The most file descriptors that all worker processes may open.",
    "process_start_time_seconds": "When the oldest worker process started, since 1970.",
}


Collect = Callable[[], Awaitable[Totals]]
"""Returns the totals of all workers."""


class Metrics:
    """What one process counts, and how it is told.

    Args:
        model: what is served.

    Attributes:
        decode: seconds from a complete body to pixels.
        inference: the model's runs.
        encode: seconds from probabilities to an answer.
        in_flight: prediction requests that have arrived and are not yet answered.
    """

    def __init__(self, model: ModelInfo) -> None:
        self._model = model
        self._process = ProcessCollector(registry=None)
        self._answers: dict[tuple[str, str, int], Tally] = {}
        self._rejected: dict[str, int] = {}
        self.decode = Tally()
        self.inference = Runs()
        self.encode = Tally()
        self.in_flight = Gauge()

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one answered request; `route` and `method` must come from bounded sets."""
        try:
            tally = self._answers[route, method, status]
        except KeyError:
            tally = self._answers[route, method, status] = Tally()
        tally.observe(seconds)

    def answered(self, stages: Stages) -> None:
        """Count the stages of one answered prediction request; its decoding is observed before."""
        self.encode.observe(stages.encode)
        batch = self.inference.batches[stages.images]
        batch[2] += 1
        batch[3] += stages.decode
        batch[4] += stages.wait
        batch[5] += stages.run
        batch[6] += stages.encode

    def rejected(self, reason: str) -> None:
        """Count one refused request by its error code."""
        self._rejected[reason] = self._rejected.get(reason, 0) + 1

    def totals(self) -> Totals:
        """Return this process's numbers, all as of one instant; to be called on the event loop."""
        runs = self.inference
        counters: Series = {
            (DECODE,): self.decode.numbers(),
            (QUEUE,): runs.queue.numbers(),
            (INFERENCE,): runs.numbers(),
            (ENCODE,): self.encode.numbers(),
            (LATEST,): [runs.last],
        }
        for (route, method, status), tally in self._answers.items():
            counters[REQUESTS, route, method, str(status)] = tally.numbers()
        for reason, count in self._rejected.items():
            counters[REJECTED, reason] = [count]
        for images, numbers in runs.batches.items():
            counters[BATCHES, str(images)] = numbers.copy()
        gauges: Series = {(IN_FLIGHT,): [self.in_flight.value]}
        for family in self._process.collect():
            of = counters if family.type == "counter" else gauges
            of[(family.name,)] = [family.samples[0].value]
        return Totals(counters, gauges)

    async def collect(self) -> Totals:
        """Return the same; this process has no others beside it."""
        return self.totals()

    def render(self, totals: Totals, accept: str = "") -> tuple[bytes, str]:
        """Write totals as text, and return it with its content type.

        Args:
            totals: of this process, or of all workers together.
            accept: the request's header field; OpenMetrics is written for those that name it.
        """
        registry = CollectorRegistry()
        registry.register(_Families(totals, self._model))
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type


class _Families(Collector):
    """Totals in `prometheus_client`'s form."""

    def __init__(self, totals: Totals, model: ModelInfo) -> None:
        self._totals = totals
        self._model = model

    def collect(self) -> Iterator[Metric]:
        counters, gauges = self._totals.counters, self._totals.gauges
        requests = CounterMetricFamily(
            REQUESTS,
            "Requests answered; status 499: the client left first.",
            labels=["route", "method", "status"],
        )
        seconds = HistogramMetricFamily(
            REQUEST_SECONDS,
            "From a request's arrival to its answer's sending.",
            labels=["route", "status"],
        )
        rejected = CounterMetricFamily(
            REJECTED, "Requests refused, by the code in the answer.", labels=["reason"]
        )
        durations = Totals()  # of any method
        for (name, *labels), numbers in counters.items():
            if name == REQUESTS:
                route, _, status = labels
                requests.add_metric(labels, sum(numbers[:-1]))
                durations.add(Totals({(route, status): numbers}))
            elif name == REJECTED:
                rejected.add_metric(labels, numbers[0])
        for labels_of, numbers in durations.counters.items():
            seconds.add_metric(labels_of, *_histogram(numbers))
        yield from (requests, seconds, rejected)
        for name, text in STAGES.items():
            buckets, total = _histogram(counters[(name,)])
            yield HistogramMetricFamily(name, text, buckets, total)
        yield CounterMetricFamily("bnlenet_images", "Images classified.", _images(counters))
        yield GaugeMetricFamily(LATEST, "When the model ran last.", counters[(LATEST,)][0])
        model = GaugeMetricFamily(
            "bnlenet_model_info",
            "The model that is served, and the execution provider that it really has.",
            labels=["name", "version", "revision", "provider"],
        )
        served = self._model
        model.add_metric([served.name, served.version, served.revision, served.provider], 1)
        yield model
        if (CPU_SECONDS,) in counters:
            text = "User and system CPU time of all worker processes."
            yield CounterMetricFamily(CPU_SECONDS, text, counters[(CPU_SECONDS,)][0])
        for name, text in GAUGES.items():
            if (name,) in gauges:  # some systems tell nothing of a process
                yield GaugeMetricFamily(name, text, gauges[(name,)][0])


def _histogram(numbers: list[float]) -> tuple[list[tuple[str, float]], float]:
    """Return a histogram's cumulative buckets and its sum."""
    *counts, seconds = numbers
    return list(zip(BOUNDS, accumulate(counts), strict=True)), seconds


def _batches(counters: Series) -> Iterator[tuple[int, list[float]]]:
    """Return what was counted by the number of images in a run, in its order."""
    found = ((int(labels[0]), n) for (name, *labels), n in counters.items() if name == BATCHES)
    return iter(sorted(found))


def _images(counters: Series) -> float:
    return sum(images * numbers[0] for images, numbers in _batches(counters))


def statistics(totals: Totals, routes: Iterable[str]) -> dict[str, Any]:
    """Tell totals in the words of Triton's statistics extension.

    A run's time counts once for each request in it. All stages of a request count when its answer
    is complete, so their counts are equal at any moment; clients insist on that.

    Args:
        totals: of this process, or of all workers together.
        routes: the ways to the model.

    Returns:
        the members of a model's statistics, but for its name and version:
        docs/protocol/extension_statistics.md in github.com/triton-inference-server/server.
    """
    counters = totals.counters
    success, fail = [0.0, 0.0], [0.0, 0.0]
    for (name, *labels), (*counts, seconds) in counters.items():
        if name == REQUESTS and labels[0] in routes:
            outcome = success if labels[2] == "200" else fail
            outcome[0] += sum(counts)
            outcome[1] += seconds
    batches = [*_batches(counters)]
    answered, *stages = (sum(numbers[i] for _, numbers in batches) for i in range(2, 7))
    inference = {"success": _duration(*success), "fail": _duration(*fail)}
    for name, seconds in zip(
        ("compute_input", "queue", "compute_infer", "compute_output"), stages, strict=True
    ):
        inference[name] = _duration(answered, seconds)
    return {
        "last_inference": int(counters[(LATEST,)][0] * 1e3),
        "inference_count": int(_images(counters)),
        "execution_count": int(sum(numbers[0] for _, numbers in batches)),
        "inference_stats": inference,
        "batch_stats": [
            {
                "batch_size": images,
                "compute_input": _duration(runs, decode),
                "compute_infer": _duration(runs, seconds),
                "compute_output": _duration(runs, encode),
            }
            for images, (runs, seconds, _, decode, _, _, encode) in batches
        ],
    }


def _duration(count: float, seconds: float) -> dict[str, int]:
    return {"count": int(count), "ns": round(seconds * 1e9)}
