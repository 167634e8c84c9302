"""BN-LeNet: the chapter's architecture; the variants with our layer and torch's train alike."""

from typing import Literal

import pytest
import torch
from torch import nn

from training.batch_norm import BatchNorm, affine, set_statistics, statistics
from training.dataset import FashionMNIST
from training.model import BNLeNet, initialise, norm_layers

Kind = Literal["scratch", "torch"]
KINDS: tuple[Kind, ...] = ("scratch", "torch")
BOTH = pytest.mark.parametrize("kind", KINDS)


@BOTH
def test_it_is_the_chapters_network(kind: Kind) -> None:
    """44,878 = (25 + 1) 6 + (150 + 1) 16 + 257 120 + 121 84 + 85 10 and 2 (6 + 16 + 120 + 84)."""
    model = BNLeNet(kind)
    assert sum(parameter.numel() for parameter in model.parameters()) == 44_878
    assert " ".join(name for name, _ in model.named_children()) == (
        "conv1 norm1 sigmoid1 pool1 conv2 norm2 sigmoid2 pool2 flatten "
        "linear1 norm3 sigmoid3 linear2 norm4 sigmoid4 linear3"
    )
    shapes = []
    x = torch.zeros(2, 1, 28, 28)
    for layer in model:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert list(dict.fromkeys(shapes)) == [
        (6, 24, 24),
        (6, 12, 12),
        (16, 8, 8),
        (16, 4, 4),
        (256,),
        (120,),
        (84,),
        (10,),
    ]


def test_both_variants_have_the_same_loss_curve(fashion_mnist: FashionMNIST) -> None:
    """The chapter's steps on real images, in float64, so that rounding does not show."""
    images = torch.from_numpy(fashion_mnist.train.images[:320]).unsqueeze(1).double() / 255
    labels = torch.from_numpy(fashion_mnist.train.labels[:320]).long()
    batches = torch.arange(320).view(10, 32)
    curves = []
    for kind in KINDS:
        model = BNLeNet(kind).double()
        initialise(model, seed=3)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        curve = []
        for batch in batches:
            loss: torch.Tensor = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
            optimiser.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    assert curves[0][-1] < curves[0][0] - 0.2
    torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=1e-11)


def test_both_variants_predict_alike_from_the_same_statistics() -> None:
    ours, torchs = (BNLeNet(kind).double().eval() for kind in KINDS)
    initialise(ours, seed=3)
    initialise(torchs, seed=3)
    generator = torch.Generator().manual_seed(0)
    for mine, other in zip(norm_layers(ours).values(), norm_layers(torchs).values(), strict=True):
        channels = mine.num_features
        mean, variance = torch.rand(2, channels, generator=generator, dtype=torch.float64) + 0.1
        for layer in (mine, other):
            set_statistics(layer, mean, variance)
    x = torch.rand(3, 1, 28, 28, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(ours(x), torchs(x), rtol=0, atol=1e-12)


def test_initial_weights_are_xavier_uniform_and_biases_torchs_default() -> None:
    """Glorot and Bengio's bound is sqrt(6 / (fan in + fan out)); torch's, 1 / sqrt(fan in)."""
    model = BNLeNet()
    initialise(model, seed=0)
    fans = {
        "conv1": (25, 150),
        "conv2": (150, 400),
        "linear1": (256, 120),
        "linear2": (120, 84),
        "linear3": (84, 10),
    }
    for name, (fan_in, fan_out) in fans.items():
        weight = model.get_parameter(f"{name}.weight")
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.95 * bound < weight.abs().max() <= bound
        assert abs(weight.std() - bound / 3**0.5) < 0.1 * bound
        bias = model.get_parameter(f"{name}.bias")
        assert 0.6 * fan_in**-0.5 < bias.abs().max() <= fan_in**-0.5
        assert bias.min() < 0 < bias.max()


def test_layers_deep_inside_and_without_a_bias_are_drawn_too() -> None:
    linear = nn.Linear(4, 3, bias=False)
    before = linear.weight.clone()
    initialise(nn.Sequential(nn.Sequential(linear)), seed=0)
    assert not torch.equal(linear.weight, before)
    assert linear.weight.abs().max() <= (6 / 7) ** 0.5


def test_the_seed_alone_decides_the_initial_weights() -> None:
    states = []
    for seed, kind in zip((5, 5, 6), (*KINDS, "torch"), strict=True):
        model = BNLeNet(kind)
        before = torch.get_rng_state()
        initialise(model, seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(model.state_dict())
    for name in ("conv1.weight", "conv2.bias", "linear3.weight"):
        assert torch.equal(states[0][name], states[1][name])
        assert not torch.equal(states[1][name], states[2][name])


@BOTH
def test_norm_layers_of_both_kinds_are_found(kind: Kind) -> None:
    layers = norm_layers(BNLeNet(kind))
    assert {name: affine(layer)[0].numel() for name, layer in layers.items()} == {
        "norm1": 6,
        "norm2": 16,
        "norm3": 120,
        "norm4": 84,
    }
    assert all(isinstance(layer, BatchNorm) == (kind == "scratch") for layer in layers.values())
    for layer in layers.values():
        set_statistics(layer, torch.full_like(statistics(layer)[0], 3.0), statistics(layer)[1] * 4)
        assert statistics(layer)[0].eq(3).all()
        assert statistics(layer)[1].eq(4).all()


def test_another_kind_of_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="'scratch' or 'torch', not 'jax'"):
        BNLeNet("jax")  # type: ignore[arg-type] # that is the point
