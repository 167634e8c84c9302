"""Folding, compared with torch.nn.utils.fusion, with plain numpy, and with the model itself."""

import copy
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from training.batch_norm import affine, set_statistics, statistics
from training.folding import fold_batch_norm
from training.model import BNLeNet, initialise, norm_layers

PAIRS = {"conv1": "norm1", "conv2": "norm2", "linear1": "norm3", "linear2": "norm4"}
EPS = {"norm1": 1e-2, "norm2": 1e-3, "norm3": 1e-5, "norm4": 0.1}
BOTH = pytest.mark.parametrize("kind", ["scratch", "torch"])


def fitted(kind: Literal["scratch", "torch"] = "torch", seed: int = 0) -> BNLeNet:
    """Make a float64 model in which every number matters: no gamma is one, no beta or bias zero.

    Every batch norm has a different epsilon, large compared with the smallest variances.
    """
    model = BNLeNet(kind).double().eval()
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in norm_layers(model).items():
        layer.eps = EPS[name]
        gamma, beta, mean, variance = torch.rand(
            4, layer.num_features, generator=generator, dtype=torch.float64
        )
        with torch.no_grad():
            affine(layer)[0].copy_(gamma + 0.5)
            affine(layer)[1].copy_(beta - 0.5)
        set_statistics(layer, mean - 0.5, variance * 2 + 1e-3)
    return model


@BOTH
def test_the_folded_model_predicts_what_the_model_predicts(
    kind: Literal["scratch", "torch"],
) -> None:
    model = fitted(kind)
    x = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(fold_batch_norm(model)(x), model(x), rtol=0, atol=1e-12)


@BOTH
def test_weights_are_those_of_plain_numpy(kind: Literal["scratch", "torch"]) -> None:
    """Output by output, in plain numpy: w (g / root) and (b - m) (g / root) + beta."""
    model = fitted(kind)
    folded = fold_batch_norm(model)
    for name, norm in PAIRS.items():
        layer = norm_layers(model)[norm]
        gamma, beta = (value.detach().numpy() for value in affine(layer))
        mean, variance = (value.numpy() for value in statistics(layer))
        weight = model.get_parameter(f"{name}.weight").detach().numpy()
        bias = model.get_parameter(f"{name}.bias").detach().numpy()
        for c in range(len(bias)):
            scale = gamma[c] / np.sqrt(variance[c] + EPS[norm])
            np.testing.assert_allclose(
                folded.get_parameter(f"{name}.weight")[c].detach().numpy(),
                weight[c] * scale,
                rtol=1e-14,
            )
            np.testing.assert_allclose(
                folded.get_parameter(f"{name}.bias")[c].item(),
                (bias[c] - mean[c]) * scale + beta[c],
                rtol=1e-12,
                atol=1e-15,
            )


def test_weights_are_those_of_torchs_fusion() -> None:
    model = fitted()
    folded = fold_batch_norm(model)
    for name, norm in PAIRS.items():
        fuse: Callable[..., nn.Module] = (
            fuse_conv_bn_eval if name.startswith("conv") else fuse_linear_bn_eval
        )
        expected = fuse(model.get_submodule(name), model.get_submodule(norm))
        for parameter, value in expected.named_parameters():
            torch.testing.assert_close(
                folded.get_parameter(f"{name}.{parameter}"), value, rtol=1e-13, atol=1e-15
            )


def test_float32_weights_are_the_float64_fold_rounded_once() -> None:
    model = fitted().float()
    expected = fold_batch_norm(copy.deepcopy(model).double()).float().state_dict()
    actual = fold_batch_norm(model).state_dict()
    assert {value.dtype for value in actual.values()} == {torch.float32}
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_only_the_batch_norms_are_removed() -> None:
    model = fitted()
    folded = fold_batch_norm(model)
    assert not norm_layers(folded)
    assert not folded.training
    assert [(name, type(layer)) for name, layer in folded.named_children()] == [
        (name, type(layer)) for name, layer in model.named_children() if "norm" not in name
    ]
    assert torch.equal(folded.get_parameter("linear3.bias"), model.get_parameter("linear3.bias"))


@BOTH
def test_the_argument_does_not_change(kind: Literal["scratch", "torch"]) -> None:
    """Neither folding nor a change to its result changes the model."""
    model = fitted(kind)
    layers, state = list(model.modules()), copy.deepcopy(model.state_dict())
    folded = fold_batch_norm(model)
    assert all(parameter.is_leaf for parameter in folded.parameters())
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    assert all(now is before for now, before in zip(model.modules(), layers, strict=True))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_layer_without_a_bias_gets_one() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)).double().eval()
    set_statistics(model[1], torch.ones(3), torch.full((3,), 2.0))  # type: ignore[arg-type] # an index into Sequential is untyped
    x = torch.rand(5, 4, dtype=torch.float64)
    torch.testing.assert_close(fold_batch_norm(model)(x), model(x), rtol=0, atol=1e-12)


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training mode: call eval\(\)"):
        fold_batch_norm(fitted().train())


def test_one_layer_left_in_training_mode_is_refused() -> None:
    model = fitted()
    norm_layers(model)["norm3"].train()
    with pytest.raises(ValueError, match="training mode"):
        fold_batch_norm(model)


def test_training_mode_deep_inside_is_refused() -> None:
    dropout = nn.Dropout()
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3), dropout)).eval()
    dropout.train()
    with pytest.raises(ValueError, match="training mode"):
        fold_batch_norm(model)


@pytest.mark.parametrize(
    "layers", [[nn.BatchNorm2d(1)], [nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.BatchNorm2d(2)]]
)
def test_batch_norm_after_anything_but_an_affine_layer_is_refused(layers: list[nn.Module]) -> None:
    with pytest.raises(ValueError, match=f"cannot fold {len(layers) - 1}:"):
        fold_batch_norm(nn.Sequential(*layers).eval())


def test_a_layer_used_twice_stays_twice() -> None:
    sigmoid = nn.Sigmoid()
    layers = [nn.Linear(4, 3), nn.BatchNorm1d(3), sigmoid, nn.Linear(3, 3), nn.BatchNorm1d(3)]
    model = nn.Sequential(*layers, sigmoid).double().eval()
    x = torch.rand(5, 4, dtype=torch.float64)
    torch.testing.assert_close(fold_batch_norm(model)(x), model(x), rtol=0, atol=1e-12)


def test_a_block_without_batch_norm_is_copied_whole() -> None:
    block = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid())
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), block).double().eval()
    folded = fold_batch_norm(model)
    assert [name for name, _ in folded.named_children()] == ["0", "2"]
    x = torch.rand(5, 4, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-12)


def test_batch_norm_inside_another_module_is_refused() -> None:
    inner = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="cannot fold a batch norm inside 0"):
        fold_batch_norm(nn.Sequential(inner).eval())


def test_channels_without_scale_or_variance_stay_finite() -> None:
    """A gamma of zero leaves beta alone; epsilon bounds what a constant channel is divided by."""
    model = fitted()
    for layer in norm_layers(model).values():
        with torch.no_grad():
            affine(layer)[0][0] = 0
        statistics(layer)[1][:2] = 0
    folded = fold_batch_norm(model)
    assert not folded.get_parameter("conv1.weight")[0].any()
    assert torch.equal(folded.get_parameter("conv1.bias")[0], affine(model.norm1)[1][0])
    x = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-10)
