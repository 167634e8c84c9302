"""Statistics of the whole training set, compared with those of all images at once in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from training.batch_norm import statistics
from training.dataset import FashionMNIST
from training.fitting.augmentation import Augmentation
from training.fitting.fit import fit
from training.fitting.images import on_device
from training.fitting.population import population_statistics, with_statistics
from training.fitting.recipes import RECIPES
from training.model import BNLeNet, initialise, norm_layers


@pytest.fixture(scope="module")
def model(few: FashionMNIST) -> BNLeNet:
    return fit(few, replace(RECIPES["chapter"], epochs=1)).model


@torch.no_grad()
def one_shot(model: BNLeNet, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each norm's input's mean and variance, all images at once, in float64."""
    x, found = images.double() / 255, {}
    for name, layer in copy.deepcopy(model).double().named_children():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            axes = [axis for axis in range(x.ndim) if axis != 1]
            mean, variance = x.mean(axes), x.var(axes, correction=0)
            found[name] = (mean, variance)
            shape = (1, -1) + (1,) * (x.ndim - 2)
            x = (x - mean.view(shape)) / torch.sqrt(variance.view(shape) + layer.eps)
            x = x * layer.weight.view(shape) + layer.bias.view(shape)
        else:
            x = layer(x)
    return found


def test_population_statistics_are_those_of_all_images_at_once(
    few: FashionMNIST, model: BNLeNet
) -> None:
    """400 images are not a multiple of the batch, so an unweighted mean over batches would fail."""
    before = copy.deepcopy(model.state_dict())
    images, _ = on_device(few.train, "cpu")
    found = population_statistics(model, images)
    expected = one_shot(model, images)
    assert found.keys() == expected.keys() == norm_layers(model).keys()
    for name in found:
        torch.testing.assert_close(found[name][0], expected[name][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[name][1], expected[name][1], rtol=1e-5, atol=1e-7)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_population_statistics_can_be_those_of_augmented_images(
    few: FashionMNIST, model: BNLeNet
) -> None:
    images, _ = on_device(few.train, "cpu")
    mirrored = Augmentation(flip=True)
    generator = torch.Generator().manual_seed(9)
    views = [mirrored(part.float() / 255, generator) for part in torch.split(images, 250)]
    expected = one_shot(model, torch.cat(views) * 255)
    found = population_statistics(model, images, mirrored, seed=9)
    for name in found:
        torch.testing.assert_close(found[name][0], expected[name][0], rtol=1e-4, atol=1e-5)


def test_a_channel_that_is_constant_has_no_negative_variance(model: BNLeNet) -> None:
    """The variance is a difference of two sums, here only rounding error of either sign."""
    found = population_statistics(model, torch.zeros(400, 1, 28, 28, dtype=torch.uint8))
    assert any((variance < 1e-12).any() for _, variance in found.values())
    assert all((variance >= 0).all() for _, variance in found.values())


@pytest.mark.parametrize("batch_norm", ["scratch", "torch"])
def test_statistics_are_replaced_in_a_copy(batch_norm: str) -> None:
    model = BNLeNet(batch_norm).eval()  # type: ignore[arg-type] # parametrised with its literals
    initialise(model, 0)
    moments = {
        name: (torch.full_like(mean, 2.0), torch.full_like(variance, 3.0))
        for name, (mean, variance) in (
            (name, statistics(layer)) for name, layer in norm_layers(model).items()
        )
    }
    before = copy.deepcopy(model.state_dict())
    changed = with_statistics(model, moments)
    for layer in norm_layers(changed).values():
        mean, variance = statistics(layer)
        assert (mean == 2).all()
        assert (variance == 3).all()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
