"""Metrics say what happened, as `prometheus_client` itself would have counted it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.model.classifier import Classifier
from service.telemetry.metrics import BUCKETS, BulkHistogram, Metrics, Tally


def samples(text: bytes, name: str) -> dict[tuple[str, ...], float]:
    """Return the values of a metric's samples by their labels' values."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == name
    }


@given(st.lists(st.lists(st.floats(0, 20) | st.sampled_from(BUCKETS)), min_size=1, max_size=3))
def test_a_tally_counts_as_the_library_does(rounds: list[list[float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    bulk = BulkHistogram("h_seconds", "h", buckets=BUCKETS, registry=ours)
    library = Histogram("h_seconds", "h", buckets=BUCKETS, registry=theirs)
    tally = Tally()
    for values in rounds:
        for value in values:
            tally.observe(value)
            library.observe(value)
        assert tally.flush(bulk) == len(values)
    one, other = generate_latest(ours), generate_latest(theirs)
    assert samples(one, "h_seconds_bucket") == samples(other, "h_seconds_bucket")
    assert samples(one, "h_seconds_sum")[()] == pytest.approx(samples(other, "h_seconds_sum")[()])


def test_requests_are_counted_and_timed(classifier: Classifier) -> None:
    metrics = Metrics(classifier.info)
    for route, method, status, seconds in [
        ("/predict", "POST", 200, 0.001),
        ("/predict", "POST", 200, 0.002),
        ("/predict", "POST", 422, 0.004),
        ("/readyz", "GET", 200, 0.008),
    ]:
        metrics.request(route, method, status, seconds)
    metrics.rejected("overloaded")
    metrics.flush()
    metrics.flush()  # adds nothing
    text = metrics.render()
    assert samples(text, "http_requests_total") == {
        ("POST", "/predict", "200"): 2,
        ("POST", "/predict", "422"): 1,
        ("GET", "/readyz", "200"): 1,
    }
    sums = samples(text, "http_request_duration_seconds_sum")
    assert sums == {
        ("/predict", "200"): pytest.approx(0.003),
        ("/predict", "422"): pytest.approx(0.004),
        ("/readyz", "200"): pytest.approx(0.008),
    }
    assert samples(text, "bnlenet_rejected_total") == {("overloaded",): 1}


def test_the_model_and_its_real_provider_are_told(classifier: Classifier) -> None:
    info = samples(Metrics(classifier.info).render(), "bnlenet_model_info")
    (labels,) = info
    assert set(labels) == {"bn-lenet", "1", classifier.info.revision, "CPUExecutionProvider"}


def test_applications_in_one_process_do_not_share_counts(classifier: Classifier) -> None:
    first, second = Metrics(classifier.info), Metrics(classifier.info)
    first.request("/predict", "POST", 200, 0.001)
    first.flush()
    second.flush()
    assert samples(first.render(), "http_requests_total")
    assert not samples(second.render(), "http_requests_total")


WORKER = """
import asyncio, sys
from service.model.artefact import ModelInfo
from service.telemetry.metrics import Metrics

async def main():
    metrics = Metrics(ModelInfo("bn-lenet", "1", "abc", (), "CPUExecutionProvider", {}))
    for _ in range(int(sys.argv[1])):
        metrics.request("/predict", "POST", 200, 0.001)
    metrics.in_flight.set(2)
    await asyncio.sleep(0)  # one turn of the loop is enough to be seen by others
    print(metrics.render().decode())

asyncio.run(main())
"""


def test_workers_are_summed(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for count, total in [(3, 3), (4, 7)]:
        command = [sys.executable, "-c", WORKER, str(count)]
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        assert set(samples(done.stdout, "http_requests_total").values()) == {total}
    assert set(samples(done.stdout, "bnlenet_model_info").values()) == {1}
