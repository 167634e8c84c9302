"""Fixtures of the training tests: the first images of the real data set, and short recipes."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from training.dataset import FashionMNIST, Split
from training.fitting.recipes import RECIPES, Recipe


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread, also after a test that chose another number."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def few(fashion_mnist: FashionMNIST) -> FashionMNIST:
    """Return the first 400 training and 200 test images: three batches of 128 and one of 16."""
    train, test = fashion_mnist.train, fashion_mnist.test
    return FashionMNIST(
        Split(train.images[:400], train.labels[:400]),
        Split(test.images[:200], test.labels[:200]),
        fashion_mnist.sha256,
    )


@pytest.fixture
def chapter() -> Recipe:
    return replace(RECIPES["chapter"], epochs=2)


@pytest.fixture
def best() -> Recipe:
    """Return recipe `best`, shortened to a schedule that still has all its phases."""
    return replace(RECIPES["best"], epochs=2, finish=0.5, batch_size=128, averaging=0.4)
