"""Fixtures that every test may use."""

import os
import signal

import pytest

from training.dataset import DatasetNotFoundError, FashionMNIST, load


def pytest_configure() -> None:
    """Let the processes that tests start be interrupted, under nohup and in the background too.

    A process inherits that SIGINT is ignored, and Python then leaves it so.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def fashion_mnist() -> FashionMNIST:
    """Load the real data set: a wrong FASHION_MNIST_DIR fails, no data anywhere skips."""
    try:
        return load(download=False)
    except DatasetNotFoundError as exc:
        assert not os.environ.get("FASHION_MNIST_DIR")
        pytest.skip(str(exc))
