"""The layers that studies use instead of batch norm, compared with formulas in float64."""

import copy
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from training.folding import fold_batch_norm
from training.studies.batch_size import GhostNorm1d, GhostNorm2d
from training.studies.fits import batch_norm, lenet
from training.studies.order import fold_forward
from training.studies.parts import MeanOnly, VarianceOnly, fixed
from training.studies.transforms import ProbabilityIntegral, Whitening


def values(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 3 + 2


def over(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased deviation of each channel, shaped to be used with x."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    return x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True).sqrt()


@pytest.mark.parametrize("shape", [(50, 3), (20, 3, 4, 4)])
def test_each_arm_normalises_as_its_name_says(shape: tuple[int, ...]) -> None:
    x = values(*shape)
    mean, deviation = over(x)
    dims: Literal[2, 4] = 4 if len(shape) == 4 else 2
    assert torch.allclose(MeanOnly(3, dims).double()(x), x - mean)
    assert torch.allclose(VarianceOnly(3, dims).double()(x), x / deviation, rtol=1e-5)


@pytest.mark.parametrize(("layer", "name"), [(MeanOnly, "mean"), (VarianceOnly, "variance")])
def test_a_part_predicts_with_its_moving_statistic(layer: type, name: str) -> None:
    x = values(1000, 3)
    part = layer(3, 2).double()
    part.momentum = 0.0  # the last batch's
    expected = part(x)
    assert torch.allclose(part.eval()(x[:5]), expected[:5])
    assert getattr(part, f"moving_{name}").shape == (3,)


def test_fixed_parameters_get_no_gradient() -> None:
    for gamma, beta in ((True, False), (False, True), (True, True)):
        layer = fixed(gamma=gamma, beta=beta)(3, 2)
        assert [p.requires_grad for p in layer.parameters()] == [not gamma, not beta]


@pytest.mark.parametrize(("layer", "shape"), [(GhostNorm1d, (8, 3)), (GhostNorm2d, (8, 3, 4, 4))])
def test_ghost_batches_are_normalised_separately(layer: type, shape: tuple[int, ...]) -> None:
    x = values(*shape)
    ghost = layer(3).double()
    ghost.group = 4
    found = ghost(x)
    for part in (slice(0, 4), slice(4, 8)):
        mean, deviation = over(x[part])
        assert torch.allclose(found[part], (x[part] - mean) / deviation, atol=1e-4)
    mean, deviation = over(x)
    assert not torch.allclose(found, (x - mean) / deviation, atol=0.1)
    ghost.group = 8
    assert torch.allclose(ghost(x), (x - mean) / deviation, atol=1e-4)


@pytest.mark.parametrize("shape", [(500, 3), (100, 3, 4, 4)])
def test_whitened_channels_have_the_identity_as_covariance(shape: tuple[int, ...]) -> None:
    x = values(*shape)
    x = x + x.roll(1, 1)  # channels that go together
    white = Whitening(3, eps=1e-9).double()(x)
    assert white.shape == x.shape
    rows = white.movedim(1, -1).reshape(-1, 3)
    assert torch.allclose(torch.cov(rows.T, correction=0), torch.eye(3).double(), atol=1e-4)
    assert torch.allclose(rows.mean(0), torch.zeros(3).double(), atol=1e-9)


def test_the_probability_integral_makes_normal_values_uniform() -> None:
    found = ProbabilityIntegral(1, 2).double()(values(20_000, 1)).flatten()
    expected = (torch.arange(1, 20_001) / 20_001 - 0.5) * 12**0.5
    assert (found.sort().values - expected).abs().max() < 0.06
    assert found.var().item() == pytest.approx(1, abs=0.03)


def filled(network: nn.Sequential) -> nn.Sequential:
    """Return a network in prediction mode, whose batch norms have statistics of their own."""
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, -2, 2)
            nn.init.uniform_(layer.bias, -1, 1)
            nn.init.uniform_(layer.running_mean, -1, 1)  # type: ignore[arg-type] # it keeps them
            nn.init.uniform_(layer.running_var, 0.1, 2)  # type: ignore[arg-type] # it keeps them
    return network.double().eval()


@pytest.mark.parametrize("after", [False, True])
def test_both_folds_are_identities(after: bool) -> None:
    """Backward into the layer before; forward through pooling into the layer after."""
    network = filled(lenet([batch_norm] * 4, after_activation=after))
    before = copy.deepcopy(network.state_dict())
    folded = (fold_forward if after else fold_batch_norm)(network)
    assert not any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in folded)
    images = torch.rand(9, 1, 28, 28, dtype=torch.float64)
    assert torch.allclose(folded(images), network(images), rtol=0, atol=1e-9)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_padding_and_activations_stop_the_forward_fold() -> None:
    norm = nn.BatchNorm2d(2)
    for stop in (nn.Conv2d(2, 3, 3, padding=1), nn.AvgPool2d(2, padding=1)):
        with pytest.raises(ValueError, match="padding"):
            fold_forward(nn.Sequential(norm, stop).eval())
    with pytest.raises(ValueError, match="through Sigmoid"):
        fold_forward(nn.Sequential(norm, nn.Sigmoid(), nn.Conv2d(2, 3, 3)).eval())
    with pytest.raises(ValueError, match=r"call eval\(\)"):
        fold_forward(nn.Sequential(norm, nn.Conv2d(2, 3, 3)))


def test_only_a_bias_directly_before_batch_norm_is_left_out() -> None:
    without = lenet([batch_norm, None, batch_norm, None], bias=False)
    biases = [
        layer.bias is not None for layer in without if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    assert biases == [False, True, False, True, True]
    after = lenet([batch_norm] * 4, bias=False, after_activation=True)
    assert all(
        layer.bias is not None for layer in after if isinstance(layer, nn.Conv2d | nn.Linear)
    )
