"""Metrics count as `prometheus_client` itself does, and are summed over workers."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from service.model.artefact import ModelInfo
from service.telemetry.metrics import Metrics, statistics
from service.telemetry.tallies import BUCKETS, Stages, Totals

MODEL = ModelInfo("bn-lenet", "1", "abc", (), "CPU", {})
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
IN_FLIGHT = ("http_requests_in_flight",)


def samples(text: bytes, name: str) -> dict[tuple[str, ...], float]:
    """Return a metric's values by its label values; labels are in alphabetical order."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == name
    }


def text_of(*metrics: Metrics) -> bytes:
    """Return the text of several workers' metrics, summed."""
    total = Totals()
    for one in metrics:
        total.add(Totals.from_json(one.totals().to_json()))
    return metrics[0].render(total)[0]


def answer(metrics: Metrics, *images: int, run: float = 0.5) -> None:
    """Count one run of the model, and the answers to its requests of so many images."""
    metrics.inference.ran(sum(images), run)
    for i, _ in enumerate(images, 1):
        stages = Stages()
        stages.decode, stages.wait, stages.run, stages.encode = 0.001 * i, 0.01 * i, run, 0.1 * i
        stages.images = sum(images)
        metrics.answered(stages)


@given(st.lists(st.floats(0, 20) | st.sampled_from(BUCKETS)), st.lists(st.floats(0, 20)))
def test_durations_are_counted_as_prometheus_client_counts(
    one: list[float], other: list[float]
) -> None:
    """In one process, and summed over two."""
    registry = CollectorRegistry()
    library = Histogram("h_seconds", "h", ["route"], buckets=BUCKETS, registry=registry)
    workers = [Metrics(MODEL), Metrics(MODEL)]
    for worker, values in zip(workers, (one, other), strict=True):
        for value in values:
            worker.decode.observe(value)
            worker.count_request("/predict", "POST", 200, value)
            library.labels("/predict").observe(value)
    ours, theirs = text_of(*workers), generate_latest(registry)

    def by_bound(text: bytes, name: str) -> dict[str | None, float]:
        families = text_string_to_metric_families(text.decode())
        found = [sample for family in families for sample in family.samples if sample.name == name]
        return {sample.labels.get("le"): sample.value for sample in found}

    for part in ("bucket", "count", "sum"):
        expected = pytest.approx(by_bound(theirs, f"h_seconds_{part}"))
        assert by_bound(ours, f"http_request_duration_seconds_{part}") == expected
        decoding = by_bound(ours, f"bnlenet_decode_duration_seconds_{part}")
        assert decoding == expected or not any(decoding.values())


def test_requests_are_counted_and_timed() -> None:
    metrics = Metrics(MODEL)
    for route, method, status, seconds in [
        ("/predict", "POST", 200, 0.001),
        ("/predict", "POST", 200, 0.002),
        ("/predict", "POST", 422, 0.004),
        ("/readyz", "GET", 200, 0.008),
        ("/readyz", "HEAD", 200, 0.016),
    ]:
        metrics.count_request(route, method, status, seconds)
    metrics.count_refusal("overloaded")
    metrics.count_refusal("overloaded")
    text = text_of(metrics)
    assert samples(text, "http_requests_total") == {
        ("POST", "/predict", "200"): 2,
        ("POST", "/predict", "422"): 1,
        ("GET", "/readyz", "200"): 1,
        ("HEAD", "/readyz", "200"): 1,
    }
    assert samples(text, "http_request_duration_seconds_sum") == {
        ("/predict", "200"): pytest.approx(0.003),
        ("/predict", "422"): pytest.approx(0.004),
        ("/readyz", "200"): pytest.approx(0.024),
    }
    assert samples(text, "bnlenet_rejected_total") == {("overloaded",): 2}


def test_images_and_stages_are_counted() -> None:
    metrics = Metrics(MODEL)
    metrics.inference.queue.observe(0.25)
    answer(metrics, 1, 3)
    answer(metrics, 256)
    text = text_of(metrics)
    assert samples(text, "bnlenet_images_total") == {(): 260}
    assert samples(text, "bnlenet_inference_duration_seconds_count") == {(): 2}
    assert samples(text, "bnlenet_inference_duration_seconds_sum") == {(): 1}
    assert samples(text, "bnlenet_queue_duration_seconds_sum") == {(): 0.25}
    assert samples(text, "bnlenet_encode_duration_seconds_sum") == {(): pytest.approx(0.4)}


def test_the_model_and_its_provider_are_shown() -> None:
    text = text_of(Metrics(MODEL), Metrics(MODEL))
    assert samples(text, "bnlenet_model_info") == {("bn-lenet", "CPU", "abc", "1"): 1}


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="prometheus_client reads it from /proc"
)
def test_each_process_is_measured() -> None:
    one, two = text_of(Metrics(MODEL)), text_of(Metrics(MODEL), Metrics(MODEL))
    names = ["resident_memory_bytes", "virtual_memory_bytes", "open_fds", "max_fds"]
    for name in (*(f"process_{name}" for name in names), "process_cpu_seconds_total"):
        assert samples(two, name)[()] == pytest.approx(2 * samples(one, name)[()], rel=0.1)
    (started,) = samples(one, "process_start_time_seconds").values()
    assert samples(two, "process_start_time_seconds") == {(): started}


def test_the_counters_of_an_ended_worker_stay_and_its_gauges_go() -> None:
    """A counter that falls looks like a restart; an old gauge is wrong."""
    metrics = Metrics(MODEL)
    metrics.count_request("/predict", "POST", 200, 0.001)
    metrics.count_refusal("overloaded")
    answer(metrics, 2)
    metrics.in_flight.set(3)
    total = Totals()
    total.add_ended(metrics.totals())
    assert total.counters == metrics.totals().counters | {
        key: total.counters[key] for key in total.counters if key[0].startswith("process_")
    }
    assert total.gauges == {}
    total.add(metrics.totals())
    text, _ = metrics.render(total)
    assert samples(text, "http_requests_total") == {("POST", "/predict", "200"): 2}
    assert samples(text, "bnlenet_images_total") == {(): 4}
    assert samples(text, "http_requests_in_flight") == {(): 3}


def test_the_latest_run_of_any_worker_is_the_last() -> None:
    early, late = Metrics(MODEL), Metrics(MODEL)
    early.inference.last, late.inference.last = 100.0, 200.0
    for order in ((early, late), (late, early)):
        assert samples(text_of(*order), "bnlenet_last_inference_timestamp_seconds") == {(): 200}


def test_sums_are_independent_of_the_order() -> None:
    one = Totals({("n",): [1, 2]}, {("process_start_time_seconds",): [5]})
    two = Totals({("n",): [10, 20], ("m",): [3]}, {("process_start_time_seconds",): [4]})
    for first, second in ((one, two), (two, one)):
        total = Totals()
        total.add(first)
        total.add(second)
        assert total == Totals(
            {("n",): [11, 22], ("m",): [3]}, {("process_start_time_seconds",): [4]}
        )
    assert one.counters == {("n",): [1, 2]}


def test_totals_are_of_one_instant() -> None:
    metrics = Metrics(MODEL)
    answer(metrics, 1)
    metrics.count_request("/predict", "POST", 200, 0.5)
    before = metrics.totals()
    kept = before.to_json()
    answer(metrics, 1)
    metrics.count_request("/predict", "POST", 200, 0.5)
    assert before.to_json() == kept


def test_there_are_no_created_series() -> None:
    metrics = Metrics(MODEL)
    metrics.count_request("/predict", "POST", 200, 0.001)
    for accept in ("", OPENMETRICS):
        text, _ = metrics.render(metrics.totals(), accept)
        assert b"_created" not in text


def test_openmetrics_is_written_if_accepted() -> None:
    metrics = Metrics(MODEL)
    metrics.count_request("/predict", "POST", 200, 0.001)
    text, content_type = metrics.render(metrics.totals(), OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    parsed = openmetrics.text_string_to_metric_families(text.decode())  # type: ignore[no-untyped-call] # untyped there
    families = {family.name: family for family in parsed}
    assert families["http_requests"].samples[0].value == 1
    text, content_type = metrics.render(metrics.totals(), "*/*")
    assert content_type.startswith("text/plain; version=0.0.4")
    assert samples(text, "http_requests_total")


def test_statistics_count_the_time_of_a_run_for_each_request_in_it() -> None:
    """Triton defines them so; `perf_analyzer` refuses stages with different counts."""
    metrics = Metrics(MODEL)
    answer(metrics, 1, 1, 1, run=0.5)
    answer(metrics, 3, run=0.25)
    answer(metrics, 64, run=2.0)
    metrics.inference.last = 1_700_000_000.5
    metrics.count_request("/predict", "POST", 200, 0.5)
    metrics.count_request("/predict", "POST", 422, 0.125)
    metrics.count_request("/infer", "POST", 200, 0.25)
    metrics.count_request("/other", "POST", 200, 8.0)
    stats = statistics(metrics.totals(), ["/predict", "/infer"])
    assert (stats["inference_count"], stats["execution_count"]) == (70, 3)
    assert stats["last_inference"] == 1_700_000_000_500
    assert stats["inference_stats"] == {
        "success": {"count": 2, "ns": 750_000_000},
        "fail": {"count": 1, "ns": 125_000_000},
        "compute_input": {"count": 5, "ns": 8_000_000},
        "queue": {"count": 5, "ns": 80_000_000},
        "compute_infer": {"count": 5, "ns": 3_750_000_000},
        "compute_output": {"count": 5, "ns": 800_000_000},
    }
    assert stats["batch_stats"] == [
        {
            "batch_size": 3,
            "compute_input": {"count": 2, "ns": 7_000_000},
            "compute_infer": {"count": 2, "ns": 750_000_000},
            "compute_output": {"count": 2, "ns": 700_000_000},
        },
        {
            "batch_size": 64,
            "compute_input": {"count": 1, "ns": 1_000_000},
            "compute_infer": {"count": 1, "ns": 2_000_000_000},
            "compute_output": {"count": 1, "ns": 100_000_000},
        },
    ]


def test_a_request_counts_in_all_stages_or_in_none() -> None:
    metrics = Metrics(MODEL)
    metrics.inference.queue.observe(0.1)
    metrics.inference.ran(1, 0.5)  # its answer is not complete yet
    stages = statistics(metrics.totals(), [])["inference_stats"]
    assert {stage["count"] for stage in stages.values()} == {0}


def test_telemetry_loads_neither_the_model_nor_the_framework() -> None:
    program = """
import sys, service.telemetry.metrics, service.http.workers
print({"onnxruntime", "numpy", "fastapi", "uvicorn"} & set(sys.modules))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
