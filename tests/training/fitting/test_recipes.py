from dataclasses import replace

import pytest

from training.fitting.augmentation import Augmentation
from training.fitting.recipes import RECIPES, Recipe


def test_the_chapter_recipe_has_the_chapters_settings() -> None:
    chapter = RECIPES["chapter"]
    assert (chapter.optimizer, chapter.learning_rate, chapter.batch_size, chapter.epochs) == (
        "sgd",
        0.1,
        128,
        10,
    )
    assert [chapter.rate(progress) for progress in (0, 0.5, 0.99)] == [1, 1, 1]
    assert (chapter.weight_decay, chapter.averaging, chapter.temperature) == (0, 0, 1)
    assert {chapter.augmentation_in(epoch) for epoch in (1, 10)} == {Augmentation()}
    assert chapter.statistics == "population"


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    recipe = Recipe("x", "", warm_up=0.2)
    assert [recipe.rate(p) for p in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.5, 1, 0.5, 0])
    assert [recipe.rate(p) for p in (0, 0.001, 0.004)] == pytest.approx([0.01, 0.01, 0.02])


def test_the_finish_is_a_share_of_the_epochs_at_the_end() -> None:
    mild = Augmentation(flip=True)
    recipe = Recipe("x", "", epochs=20, finish=0.1, finish_augmentation=mild)
    kinds = [recipe.augmentation_in(epoch) for epoch in range(1, 21)]
    assert kinds == [Augmentation()] * 18 + [mild] * 2
    assert {replace(recipe, finish=0.0).augmentation_in(e) for e in (1, 20)} == {Augmentation()}


def test_every_recipe_is_found_by_its_own_name() -> None:
    assert all(recipe.name == name and recipe.origin for name, recipe in RECIPES.items())
