"""Fixtures that every test may use."""

import os

import pytest

from training.dataset import DatasetNotFoundError, FashionMNIST, load


@pytest.fixture(scope="session")
def fashion_mnist() -> FashionMNIST:
    """Load the real data set: a wrong FASHION_MNIST_DIR fails, no data anywhere skips."""
    try:
        return load(download=False)
    except DatasetNotFoundError as exc:
        assert not os.environ.get("FASHION_MNIST_DIR")
        pytest.skip(str(exc))
