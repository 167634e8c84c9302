"""The metrics: counted here, and rendered for Prometheus and for Triton's statistics extension."""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from service.model.artefact import ModelInfo
from service.telemetry.tallies import (
    BUCKETS,
    LAST_INFERENCE,
    PROCESS_START,
    Gauge,
    Runs,
    Series,
    Stages,
    Tally,
    Totals,
)

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
    PROCESS_START: "When the oldest worker process started, since 1970.",
}

Collect = Callable[[], Awaitable[Totals]]
"""Returns the sum of all workers' totals."""


class Metrics:
    """The metrics of one process.

    Args:
        model: the model that is served.

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

    def count_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one finished request. `route` and `method` must be of a bounded set."""
        try:
            tally = self._answers[route, method, status]
        except KeyError:
            tally = self._answers[route, method, status] = Tally()
        tally.observe(seconds)

    def answered(self, stages: Stages) -> None:
        """Count the stages of one answered prediction; `decode` is observed before this."""
        self.encode.observe(stages.encode)
        batch = self.inference.batches[stages.images]
        batch[2] += 1
        batch[3] += stages.decode
        batch[4] += stages.wait
        batch[5] += stages.run
        batch[6] += stages.encode

    def count_refusal(self, reason: str) -> None:
        """Count one refused request by its error code."""
        self._rejected[reason] = self._rejected.get(reason, 0) + 1

    def totals(self) -> Totals:
        """Return this process's counts. On the event loop, all of them are of one instant."""
        runs = self.inference
        counters: Series = {
            (DECODE,): self.decode.numbers(),
            (QUEUE,): runs.queue.numbers(),
            (INFERENCE,): runs.numbers(),
            (ENCODE,): self.encode.numbers(),
            (LAST_INFERENCE,): [runs.last],
        }
        for (route, method, status), tally in self._answers.items():
            counters[REQUESTS, route, method, str(status)] = tally.numbers()
        for reason, count in self._rejected.items():
            counters[REJECTED, reason] = [count]
        for images, numbers in runs.batches.items():
            counters[BATCHES, str(images)] = numbers.copy()
        gauges: Series = {(IN_FLIGHT,): [self.in_flight.value]}
        for family in self._process.collect():
            series = counters if family.type == "counter" else gauges
            series[(family.name,)] = [family.samples[0].value]
        return Totals(counters, gauges)

    async def collect(self) -> Totals:
        """Return `totals` as a `Collect`, for a service of one process."""
        return self.totals()

    def render(self, totals: Totals, accept: str = "") -> tuple[bytes, str]:
        """Return totals as Prometheus text or OpenMetrics, and the content type.

        Args:
            totals: of this process, or the sum of all workers.
            accept: the request's `Accept` field, which may ask for OpenMetrics.
        """
        registry = CollectorRegistry()
        registry.register(_Families(totals, self._model))
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # it asks for a version that is not a number
            encode, content_type = choose_encoder("")
        return encode(registry), content_type


class _Families(Collector):
    """Gives totals to prometheus_client as metric families."""

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
        durations = Totals()  # by route and status, over all methods
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
        yield GaugeMetricFamily(
            LAST_INFERENCE, "When the model ran last.", counters[(LAST_INFERENCE,)][0]
        )
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
            if (name,) in gauges:  # some systems do not report these of a process
                yield GaugeMetricFamily(name, text, gauges[(name,)][0])


def _histogram(numbers: list[float]) -> tuple[list[tuple[str, float]], float]:
    """Return a histogram's cumulative buckets and its sum."""
    *counts, seconds = numbers
    return list(zip(BOUNDS, accumulate(counts), strict=True)), seconds


def _batches(counters: Series) -> list[tuple[int, list[float]]]:
    """Return the numbers of `Runs.batches` by the number of images in a run, in rising order."""
    return sorted((int(labels[0]), n) for (name, *labels), n in counters.items() if name == BATCHES)


def _images(counters: Series) -> float:
    return sum(images * numbers[0] for images, numbers in _batches(counters))


def statistics(totals: Totals, routes: Iterable[str]) -> dict[str, Any]:
    """Return totals in the form of Triton's statistics extension.

    The time of a run counts once for each request in it. All stages of a request are counted at its
    answer, so that their counts are equal at any moment: clients require it.

    Args:
        totals: of this process, or the sum of all workers.
        routes: the routes that run the model.

    Returns:
        the statistics of a model without its name and version, as in
        docs/protocol/extension_statistics.md of github.com/triton-inference-server/server.
    """
    counters = totals.counters
    success, fail = [0.0, 0.0], [0.0, 0.0]
    for (name, *labels), (*counts, seconds) in counters.items():
        if name == REQUESTS and labels[0] in routes:
            outcome = success if labels[2] == "200" else fail
            outcome[0] += sum(counts)
            outcome[1] += seconds
    batches = _batches(counters)
    answered, *stages = (sum(numbers[i] for _, numbers in batches) for i in range(2, 7))
    inference = {"success": _duration(*success), "fail": _duration(*fail)}
    for name, seconds in zip(
        ("compute_input", "queue", "compute_infer", "compute_output"), stages, strict=True
    ):
        inference[name] = _duration(answered, seconds)
    return {
        "last_inference": int(counters[(LAST_INFERENCE,)][0] * 1e3),
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
