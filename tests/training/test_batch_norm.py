"""Our batch norm, compared with torch's in float64 and with values computed by hand."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from training.batch_norm import (
    BatchNorm,
    NormLayer,
    affine,
    batch_norm,
    set_statistics,
    statistics,
)

SHAPES: dict[Literal[2, 4], tuple[int, ...]] = {2: (32, 5), 4: (8, 5, 6, 7)}
BOTH = pytest.mark.parametrize("dims", [2, 4])
TorchNorm = nn.BatchNorm1d | nn.BatchNorm2d


def pair(
    dims: Literal[2, 4], momentum: float = 0.9, eps: float = 1e-5
) -> tuple[BatchNorm, TorchNorm]:
    """Our layer and torch's, in float64, with the same random parameters and statistics.

    torch's momentum multiplies the new value, ours the old one: hence 1 - momentum.
    """
    generator = torch.Generator().manual_seed(dims)
    gamma, beta, mean = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    variance = torch.rand(5, generator=generator, dtype=torch.float64) + 0.5
    ours = BatchNorm(5, dims, momentum=momentum, eps=eps).double()
    torchs: TorchNorm = (nn.BatchNorm1d if dims == 2 else nn.BatchNorm2d)(
        5, momentum=1 - momentum, eps=eps
    ).double()
    for layer in (ours, torchs):
        with torch.no_grad():
            for parameter, value in zip(affine(layer), (gamma, beta), strict=True):
                parameter.copy_(value)
        set_statistics(layer, mean, variance)
    return ours, torchs


def batches(dims: Literal[2, 4], count: int) -> list[Tensor]:
    """Batches whose channels have means about 3 and deviations about 2."""
    generator = torch.Generator().manual_seed(7)
    return [
        3 + 2 * torch.randn(SHAPES[dims], generator=generator, dtype=torch.float64)
        for _ in range(count)
    ]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@BOTH
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_outputs_and_gradients_are_torchs(dims: Literal[2, 4], training: bool, eps: float) -> None:
    ours, torchs = (layer.train(training) for layer in pair(dims, eps=eps))
    (x,) = batches(dims, 1)
    weights = torch.randn(SHAPES[dims], dtype=torch.float64, generator=torch.manual_seed(1))
    results = []
    for layer in (ours, torchs):
        mine = x.clone().requires_grad_()
        output = layer(mine)
        (output * weights).sum().backward()
        gradients = (mine.grad, *(parameter.grad for parameter in affine(layer)))
        assert all(gradient is not None for gradient in gradients)
        results.append((output, *(gradient for gradient in gradients if gradient is not None)))
    for actual, expected in zip(*results, strict=True):
        assert_equal(actual, expected)


@BOTH
@pytest.mark.parametrize("momentum", [0.9, 0.75])
def test_moving_statistics_are_torchs_but_for_the_biased_variance(
    dims: Literal[2, 4], momentum: float
) -> None:
    """We average the biased variance, torch the unbiased one, n / (n - 1) times as large."""
    ours, torchs = pair(dims, momentum)
    start = statistics(torchs)[1].clone()
    steps = 5
    for x in batches(dims, steps):
        ours(x)
        torchs(x)
    n = x.numel() // x.shape[1]
    mean, unbiased = statistics(torchs)
    kept = momentum**steps * start  # the start is not a batch variance: it has no n - 1 in it
    assert_equal(ours.moving_mean, mean)
    assert_equal(ours.moving_variance, kept + (unbiased - kept) * (n - 1) / n)


def test_the_defaults_are_torchs() -> None:
    """The function's too: it gets eps and momentum only from its arguments."""
    ours, torchs = BatchNorm(5, 2).double(), nn.BatchNorm1d(5).double()
    (x,) = batches(2, 1)
    x = x * 1e-2  # so small a variance that eps shows
    function = batch_norm(x, *affine(ours), *statistics(ours), training=True)
    assert_equal(function.output, torchs(x))
    assert_equal(ours(x), function.output)
    assert_equal(function.moving_mean, statistics(torchs)[0])
    n = len(x)
    assert_equal(function.moving_variance, 0.9 + (statistics(torchs)[1] - 0.9) * (n - 1) / n)
    assert all(map(torch.equal, statistics(ours), function[1:]))


def test_a_new_layer_does_not_change_standardised_input() -> None:
    """Scale and variance begin with one, shift and mean with zero."""
    layer = BatchNorm(5, 2, eps=0.0).eval()
    x = batches(2, 1)[0].float()
    assert torch.equal(layer(x), x)
    assert all(parameter.requires_grad for parameter in affine(layer))


def test_momentum_multiplies_the_old_value() -> None:
    """By hand: the batch (1, 3) has mean 2 and biased variance 1; the old values are 10 and 20."""
    _, mean, variance = batch_norm(
        torch.tensor([[1.0], [3.0]]),
        torch.ones(1),
        torch.zeros(1),
        torch.tensor([10.0]),
        torch.tensor([20.0]),
        training=True,
        momentum=0.75,
    )
    assert mean.item() == 0.75 * 10 + 0.25 * 2
    assert variance.item() == 0.75 * 20 + 0.25 * 1


def test_moving_statistics_have_no_autograd_graph() -> None:
    x = torch.tensor([[1.0], [3.0]], requires_grad=True)
    one, zero = torch.ones(1), torch.zeros(1)
    output, *moved = batch_norm(x, one, zero, zero, one, training=True)
    assert output.requires_grad
    assert [tensor.requires_grad for tensor in moved] == [False, False]


def test_epsilon_is_inside_the_root() -> None:
    """By hand: variance 3 and epsilon 1 make the root 2, so (5 - 1) / 2 * 10 + 7 = 27."""
    output, *_ = batch_norm(
        torch.tensor([[5.0]]),
        torch.tensor([10.0]),
        torch.tensor([7.0]),
        torch.tensor([1.0]),
        torch.tensor([3.0]),
        training=False,
        eps=1.0,
    )
    assert output.item() == 27


@BOTH
def test_the_function_changes_none_of_its_arguments(dims: Literal[2, 4]) -> None:
    (x,) = batches(dims, 1)
    arguments = (x, *torch.rand(4, 5, dtype=torch.float64))
    before = [argument.clone() for argument in arguments]
    batch_norm(*arguments, training=True)
    assert all(map(torch.equal, arguments, before))


@BOTH
def test_prediction_does_not_change_the_moving_statistics(dims: Literal[2, 4]) -> None:
    ours, _ = pair(dims)
    before = [value.clone() for value in statistics(ours)]
    ours.eval()(batches(dims, 1)[0])
    assert all(map(torch.equal, statistics(ours), before))


def test_the_mode_is_the_layers_own_and_not_that_of_autograd() -> None:
    ours, _ = pair(2)
    (x,) = batches(2, 1)
    ours.eval()
    with_gradients = ours(x)
    with torch.no_grad():
        assert torch.equal(ours(x), with_gradients)
        assert not torch.equal(ours.train()(x), with_gradients)


def test_a_training_pass_without_gradients_still_moves_the_statistics() -> None:
    ours, _ = pair(2)
    before = ours.moving_mean.clone()
    with torch.no_grad():
        ours(batches(2, 1)[0])
    assert not torch.equal(ours.moving_mean, before)


def test_statistics_survive_saving_and_casting() -> None:
    ours, _ = pair(4)
    ours(batches(4, 1)[0])
    restored = BatchNorm(5, 4).double()
    restored.load_state_dict(ours.state_dict())
    assert set(ours.state_dict()) == {"gamma", "beta", "moving_mean", "moving_variance"}
    assert all(map(torch.equal, statistics(restored), statistics(ours)))
    assert {value.dtype for value in statistics(ours.float())} == {torch.float32}


def test_the_layer_keeps_its_buffers_in_place() -> None:
    """A captured CUDA graph reads and writes fixed addresses."""
    ours, _ = pair(4)
    addresses = [value.data_ptr() for value in statistics(ours)]
    ours(batches(4, 1)[0])
    assert [value.data_ptr() for value in statistics(ours)] == addresses


def test_the_layer_reads_no_value_back_to_the_host() -> None:
    """Tensors on the meta device have no values: reading one raises."""
    layer = BatchNorm(5, 4).to("meta")
    assert layer(torch.empty(SHAPES[4], device="meta")).shape == SHAPES[4]


@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 1, 1), (0, 5), (0, 5, 3, 3), (2, 5, 0, 3)])
def test_training_on_fewer_than_two_values_per_channel_is_refused(shape: tuple[int, ...]) -> None:
    """The variance of one value is always zero, and the mean of no values is NaN."""
    dims: Literal[2, 4] = 2 if len(shape) == 2 else 4
    layer = BatchNorm(5, dims)
    before = [value.clone() for value in statistics(layer)]
    with pytest.raises(ValueError, match="at least two values per channel"):
        layer(torch.ones(shape))
    assert all(map(torch.equal, statistics(layer), before))
    assert layer.eval()(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("shape", [(1, 5, 6, 7), (1, 5, 1, 2), (2, 5, 1, 1), (2, 5)])
def test_training_takes_any_batch_of_two_values_per_channel(shape: tuple[int, ...]) -> None:
    """A single image has as many values per channel as pixels."""
    dims: Literal[2, 4] = 2 if len(shape) == 2 else 4
    ours, torchs = pair(dims)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_equal(ours(x), torchs(x))
    assert_equal(ours.moving_mean, statistics(torchs)[0])


@pytest.mark.parametrize("shape", [(8, 4), (8, 5, 6), (8, 5, 6, 7)])
def test_input_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2-D input of 5 channels"):
        BatchNorm(5, 2)(torch.ones(shape))


def test_the_function_takes_two_or_four_dimensions_only() -> None:
    with pytest.raises(ValueError, match="not 3-D"):
        batch_norm(torch.ones(8, 5, 6), *torch.ones(4, 5), training=True)


def test_a_torch_layer_without_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="has no statistics"):
        statistics(nn.BatchNorm1d(5, track_running_stats=False))


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_a_torch_layer_without_one_of_the_statistics_is_refused(missing: str) -> None:
    layer = nn.BatchNorm1d(5)
    setattr(layer, missing, None)
    with pytest.raises(ValueError, match="has no statistics"):
        statistics(layer)


@BOTH
def test_statistics_are_overwritten_in_place(dims: Literal[2, 4]) -> None:
    mean, variance = torch.rand(2, 5, dtype=torch.float64)
    for layer in pair(dims):
        assert isinstance(layer, NormLayer)
        tensors = statistics(layer)
        set_statistics(layer, mean, variance)
        assert torch.equal(tensors[0], mean)
        assert torch.equal(tensors[1], variance)
        assert all(now is before for now, before in zip(statistics(layer), tensors, strict=True))


def test_the_layer_prints_its_arguments() -> None:
    printed = str(BatchNorm(5, 4, eps=0.01, momentum=0.8))
    assert printed == "BatchNorm(5, 4, eps=0.01, momentum=0.8)"


def test_a_torch_layer_without_scale_and_shift_is_refused() -> None:
    with pytest.raises(ValueError, match="no gamma and beta"):
        affine(nn.BatchNorm1d(5, affine=False))
