"""TF32 is off while scores are computed, and has its old setting afterwards."""

import pytest
import torch
from torch import Tensor

from training.dataset import FashionMNIST
from training.fitting import batch_last
from training.fitting.fit import fit
from training.fitting.images import on_device
from training.fitting.population import population_statistics
from training.fitting.precision import full_precision
from training.fitting.recipes import Recipe
from training.fitting.scoring import predict
from training.model import BNLeNet


def precisions() -> tuple[str, str]:
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined] # torch forgot
    return convolutions.fp32_precision, torch.backends.cuda.matmul.fp32_precision


FULL = ("ieee", "ieee")


def test_the_settings_come_back_after_an_error() -> None:
    before = precisions()
    assert before != FULL
    within = []

    @full_precision()
    def fail() -> None:
        within.append(precisions())
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert within == [FULL]
    assert precisions() == before


def test_scores_statistics_and_training_compute_without_tf32(
    few: FashionMNIST, chapter: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []

    def note(*_: object) -> None:
        seen.append(precisions())

    before = precisions()
    images, _ = on_device(few.test, "cpu")
    model = BNLeNet()
    model.conv1.register_forward_hook(note)
    predict(model, images)
    assert len(seen) == 1
    population_statistics(model, images)
    assert len(seen) == 5  # once for every batch norm

    forward = batch_last.forward

    def spy(network: BNLeNet, batch: Tensor) -> Tensor:
        seen.append(precisions())
        return forward(network, batch)

    count = len(seen)
    monkeypatch.setattr(batch_last, "forward", spy)
    fit(few, chapter)
    assert len(seen) == count + 8
    assert set(seen) == {FULL}
    assert precisions() == before
