"""Fixtures of the training tests: the first images of the real data set, and short recipes."""

from dataclasses import replace

import pytest
import torch

from training.dataset import FashionMNIST, Split
from training.fitting.recipes import RECIPES, Recipe


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Compute as the command line does by default."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def few(fashion_mnist: FashionMNIST) -> FashionMNIST:
    """Return the first 1,100 training and 500 test images: eight batches of 128 and one of 76."""
    train, test = fashion_mnist.train, fashion_mnist.test
    return FashionMNIST(
        Split(train.images[:1100], train.labels[:1100]),
        Split(test.images[:500], test.labels[:500]),
        fashion_mnist.sha256,
    )


@pytest.fixture
def chapter() -> Recipe:
    return replace(RECIPES["chapter"], epochs=3)


@pytest.fixture
def best() -> Recipe:
    """Return the best recipe, so short that its schedule still has all its phases."""
    return replace(RECIPES["best"], epochs=4, finish=0.5, batch_size=128, averaging=0.2)
