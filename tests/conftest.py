"""Fixtures for all tests."""

import gc
import os
import signal
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from training.dataset import DatasetNotFoundError, FashionMNIST, load

# No time limits, which a busy machine misses. Every run tries the same examples;
# `pytest --hypothesis-profile search` tries others.
SLOW = [HealthCheck.too_slow]
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=SLOW)
settings.register_profile("search", deadline=None, suppress_health_check=SLOW, print_blob=True)
settings.load_profile("same")


def pytest_configure() -> None:
    """Let signals reach the processes that tests start, under nohup and in the background too.

    A child process inherits ignored signals. It does not inherit handlers.

    And let httpx load no certificates: each of its clients takes 25 ms to read all of them, and
    the tests' servers have no TLS.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    if not os.environ.get("BASE_URL", "").startswith("https:"):
        os.environ.pop("SSL_CERT_FILE", None)
        os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)  # has none


def pytest_collection_finish() -> None:
    """Let the garbage collector skip what stays to the end, and look less often for the rest.

    It would look through torch and thousands of tests again and again, a tenth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def assert_same_picture(drawn: Path, committed: Path, share: float) -> None:
    """Compare PNGs by matplotlib: at most this share of the pixels may differ clearly.

    Another version of matplotlib draws another picture; then the test is skipped.
    """
    pins = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    if f"matplotlib=={version('matplotlib')}" not in pins:
        pytest.skip(f"{committed.name} was drawn by the matplotlib of constraints.txt")
    with Image.open(drawn) as one, Image.open(committed) as other:
        first, second = (np.asarray(image.convert("L"), float) for image in (one, other))
    assert first.shape == second.shape
    assert (np.abs(first - second) > 64).mean() < share, committed.name


@pytest.fixture(scope="session")
def fashion_mnist() -> FashionMNIST:
    """Load the real data set: a wrong FASHION_MNIST_DIR fails; without data the test is skipped."""
    try:
        return load(download=False)
    except DatasetNotFoundError as exc:
        assert not os.environ.get("FASHION_MNIST_DIR")
        pytest.skip(str(exc))
