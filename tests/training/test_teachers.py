"""The teachers' fast path against the models themselves, in float64."""

import copy

import pytest
import torch
from torch import Tensor

from training.dataset import FashionMNIST
from training.model import BNLeNet
from training.teachers import Teachers


def believed(model: BNLeNet, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = copy.deepcopy(model).double()(images.double())
    return logits.softmax(1)


@pytest.fixture
def images(few: FashionMNIST) -> Tensor:
    return torch.from_numpy(few.test.images[:70, None]).float() / 255


def test_their_mean_prediction_is_that_of_the_unfolded_models(
    models: list[BNLeNet], images: Tensor
) -> None:
    each = [believed(model, images) for model in models]
    assert (each[0] - each[1]).abs().max() > 0.01  # they differ, so that a mean is one
    answer = Teachers(models, [0.0, 0.0])(images)
    torch.testing.assert_close(answer.double(), (each[0] + each[1]) / 2, rtol=1e-4, atol=1e-6)


def test_label_smoothing_is_undone(models: list[BNLeNet], images: Tensor) -> None:
    """A model that believes q, and was fitted to labels smoothed by 0.8, predicts 0.2 q + 0.08."""
    smoothed = believed(models[0], images)
    sharp = ((smoothed - 0.08) / 0.2).clamp_min(0)
    assert (smoothed < 0.08).any()  # not every model learns its labels so exactly
    answer = Teachers(models[:1], [0.8])(images)
    expected = sharp / sharp.sum(1, keepdim=True)
    torch.testing.assert_close(answer.double(), expected, rtol=1e-4, atol=1e-6)


def test_asking_changes_nothing(models: list[BNLeNet], teachers: Teachers, images: Tensor) -> None:
    before = [copy.deepcopy(model.state_dict()) for model in models]
    kept = images.clone()
    assert torch.equal(teachers(images), teachers(images))
    assert torch.equal(images, kept)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
