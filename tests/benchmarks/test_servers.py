"""The times that the servers for comparison report, on a clock that the test moves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import servers
from service.model.classifier import Classifier

IMAGES = np.zeros((50, 1, 28, 28), np.uint8)


class Clock:
    """A clock in nanoseconds that only runs of classifiers move; the next runs may be slow."""

    def __init__(self, slow_runs: int = 0) -> None:
        self.now = 0
        self.slow_runs = slow_runs

    def read(self) -> int:
        return self.now


class Clockwork:
    """A classifier: a run takes 1,000 ns, and 100 ns an image; a hundredfold if it is slow."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def probabilities(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        self._clock.slow_runs -= 1
        factor = 100 if self._clock.slow_runs >= 0 else 1
        self._clock.now += factor * (1000 + 100 * len(pixels))
        return np.zeros((len(pixels), 10), np.float32)


@pytest.mark.parametrize(("batch", "slow_runs"), [(1, servers.WARM_UP), (16, 6)])
def test_a_tight_loop_gives_the_median_for_one_image_without_the_warm_up(
    batch: int, slow_runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of its runs are slow: 100 of 150, and 6 of 9."""
    clock = Clock(slow_runs)
    clockwork: Any = Clockwork(clock)
    monkeypatch.setattr(servers, "perf_counter_ns", clock.read)
    expected = (1000 + 100 * batch) / batch
    assert servers.tight_loop(clockwork, IMAGES, batch) == pytest.approx(expected)


def test_a_timed_service_reports_the_runs_after_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 100 runs: one of 1 image, three of 5."""
    clock = Clock()

    def run(app: Any, *_: object) -> None:
        clock.slow_runs = servers.WARM_UP
        for size in (*[7] * servers.WARM_UP, 1, 5, 5, 5):
            assert app.probabilities(IMAGES[:size]).shape == (size, 10)

    loaded: Any = staticmethod(lambda *_: Clockwork(clock))
    monkeypatch.setattr(Classifier, "load", loaded)
    monkeypatch.setattr(servers, "create_app", lambda _, model: model)
    monkeypatch.setattr(servers, "bind", lambda _: None)
    monkeypatch.setattr(servers, "run", run)
    monkeypatch.setattr(servers, "perf_counter_ns", clock.read)
    report = tmp_path / "report.json"
    many = np.zeros((300, 1, 28, 28), np.uint8)
    servers.timed(many, report)
    assert json.loads(report.read_text()) == pytest.approx(
        {
            "tight_loop": 1100,
            "batched": 2600 / 16,
            "batched_256": 26_600 / 256,
            "alone": 1100,
            "an_image": (1100 + 3 * 1500) / 16,
            "batch": 4,
        }
    )
