"""The batch-last forward pass, compared with the plain model in float64."""

import pytest
import torch
from torch import Tensor

from training.batch_norm import affine, statistics
from training.fitting import batch_last
from training.model import BNLeNet, initialise, norm_layers

BEFORE_NORM = {"conv1.bias", "conv2.bias", "linear1.bias", "linear2.bias"}


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.rand(n, 1, 28, 28, generator=generator, dtype=torch.float64),
            torch.randint(10, (n,), generator=generator),
        )
        for n in (32, 7)
    ]


def trained() -> BNLeNet:
    """Make a model whose gammas, betas and moving statistics are not the initial ones."""
    model = BNLeNet("torch").double()
    initialise(model, 3)
    generator = torch.Generator().manual_seed(5)
    for layer in norm_layers(model).values():
        for tensor in (*affine(layer), *statistics(layer)):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
    return model


def test_logits_gradients_and_statistics_are_those_of_the_model(
    batches: list[tuple[Tensor, Tensor]],
) -> None:
    plain, fast = trained(), trained()
    for images, labels in batches:
        logits, fast_logits = plain(images), batch_last.forward(fast, images)
        torch.testing.assert_close(fast_logits, logits, rtol=0, atol=1e-12)
        for some in (logits, fast_logits):
            torch.autograd.backward(torch.nn.functional.cross_entropy(some, labels))
    for (name, one), other in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert one.grad is not None
        if name in BEFORE_NORM:  # batch norm takes them away: nothing to learn
            assert one.grad.abs().max() < 1e-12
            assert other.grad is None
        else:
            assert other.grad is not None
            torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=1e-12, msg=name)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(fast.get_buffer(name), value, rtol=0, atol=1e-12, msg=name)


def test_the_images_get_a_gradient_if_they_need_one() -> None:
    images = torch.rand(4, 1, 28, 28, dtype=torch.float64, requires_grad=True)
    same = images.detach().clone().requires_grad_()
    weights = torch.linspace(-1, 1, 10, dtype=torch.float64)
    torch.autograd.backward((trained()(images) * weights).sum())
    torch.autograd.backward((batch_last.forward(trained(), same) * weights).sum())
    torch.testing.assert_close(same.grad, images.grad, rtol=0, atol=1e-12)


def test_our_own_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="torch's batch norm"):
        batch_last.forward(BNLeNet("scratch"), torch.rand(4, 1, 28, 28))
