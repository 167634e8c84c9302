"""The teachers' fast path against the models themselves, in float64."""

import copy

import torch

from training.model import BNLeNet
from training.teachers import Teachers


def test_their_mean_prediction_is_that_of_the_unfolded_models(teachers: list[BNLeNet]) -> None:
    images = torch.rand((70, 1, 28, 28), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        each = [copy.deepcopy(model).double()(images.double()).softmax(1) for model in teachers]
    assert (each[0] - each[1]).abs().max() > 0.01  # they differ, so that a mean is one
    answer = Teachers(teachers)(images)
    torch.testing.assert_close(answer.double(), (each[0] + each[1]) / 2, rtol=1e-4, atol=1e-6)


def test_asking_changes_nothing(teachers: list[BNLeNet]) -> None:
    before = [copy.deepcopy(model.state_dict()) for model in teachers]
    images = torch.rand(8, 1, 28, 28)
    kept, ask = images.clone(), Teachers(teachers)
    assert torch.equal(ask(images), ask(images))
    assert torch.equal(images, kept)
    for model, state in zip(teachers, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
