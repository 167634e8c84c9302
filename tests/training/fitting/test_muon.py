import pytest
import torch

from training.fitting.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(6, 25), (16, 150), (120, 256), (84, 120), (40, 7)])
def test_orthogonalising_keeps_singular_vectors_and_brings_values_near_one(
    shape: tuple[int, int],
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    core = u.t() @ orthogonalise(matrix) @ v.t()
    values = core.diagonal()
    torch.testing.assert_close(core, torch.diag(values), rtol=0, atol=1e-9)
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_a_step_is_nesterov_momentum_orthogonalised_with_decay() -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(6, 1, 5, 5, generator=generator, dtype=torch.float64)
    weight, rate = start.clone().requires_grad_(), torch.tensor(0.1, dtype=torch.float64)
    optimizer = Muon([weight], lr=rate, weight_decay=0.5, momentum=0.9)
    expected, momentum = start.clone(), torch.zeros_like(start)
    for _ in range(3):
        weight.grad = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        momentum = 0.9 * momentum + 0.1 * weight.grad
        direction = (0.1 * weight.grad + 0.9 * momentum).view(6, 25)
        expected = 0.95 * expected - 0.1 * orthogonalise(direction).view_as(expected)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


def test_tall_matrices_move_further() -> None:
    weight = torch.zeros(40, 10, requires_grad=True)
    weight.grad = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=torch.tensor(1.0)).step()
    torch.testing.assert_close(-weight.detach(), 2 * orthogonalise(weight.grad))


@pytest.mark.parametrize("shape", [(40, 7), (6, 1, 5, 5)])
def test_a_stack_of_weights_moves_as_each_would_alone(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    stack, rate = torch.zeros(3, *shape, requires_grad=True), torch.tensor(0.1)
    stack.grad = torch.randn(3, *shape, generator=generator) * torch.tensor([1.0, 9.0, 0.1]).view(
        -1, *[1] * len(shape)
    )
    Muon([stack], lr=rate).step()
    for gradient, moved in zip(stack.grad, stack.detach(), strict=True):
        weight = torch.zeros(shape, requires_grad=True)
        weight.grad = gradient
        Muon([weight], lr=rate).step()
        torch.testing.assert_close(moved, weight.detach())
