"""Fixtures of the training tests: the first images of the real data set, and short recipes."""

from dataclasses import replace

import pytest
import torch

from training.dataset import FashionMNIST, Split
from training.fit import fit
from training.model import BNLeNet
from training.recipes import RECIPES, Recipe
from training.teachers import Teachers


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
def teacher() -> Recipe:
    """Return the teachers' recipe, so short that its schedule still has all its phases."""
    return replace(RECIPES["teacher"], epochs=4, batch_size=128, averaging=0.2)


@pytest.fixture
def best(teacher: Recipe) -> Recipe:
    """Return the best recipe, as short, with two teachers."""
    recipe = RECIPES["best"]
    names = ("epochs", "batch_size", "averaging")
    return replace(recipe, teachers=2, **{name: getattr(teacher, name) for name in names})


@pytest.fixture(scope="session")
def models(few: FashionMNIST) -> list[BNLeNet]:
    """Return two models that have learnt a little."""
    recipe = replace(RECIPES["chapter"], epochs=2)
    return [fit(few, recipe, seed=seed).model for seed in (8, 9)]


@pytest.fixture
def teachers(models: list[BNLeNet]) -> Teachers:
    return Teachers(models, [0.0, 0.05])
