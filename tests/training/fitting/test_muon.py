"""Muon, compared with a plain numpy version of its publication, in float64."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from training.fitting.muon import Muon, orthogonalise

SHAPES = pytest.mark.parametrize("shape", [(6, 25), (16, 150), (120, 256), (84, 120), (40, 7)])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def newton_schulz(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Five steps of X <- a X + (b A + c A A) X, A = X X^T, from X = G / (|G| + 1e-7).

    Coefficients as Jordan et al. published them in 2024; a tall matrix is transposed, as theirs.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: NDArray[np.float64] = matrix / (np.sqrt((matrix**2).sum()) + 1e-7)
    if x.shape[0] > x.shape[1]:
        return newton_schulz(matrix.T).T
    for _ in range(5):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


@SHAPES
@pytest.mark.parametrize("size", [1.0, 1e-8])
def test_orthogonalising_is_the_published_iteration(shape: tuple[int, int], size: float) -> None:
    """Also for a gradient so small that the published 1e-7 matters."""
    matrix = size * random(*shape)
    expected = torch.from_numpy(newton_schulz(matrix.numpy()))
    torch.testing.assert_close(orthogonalise(matrix), expected, rtol=0, atol=1e-12)


def test_a_zero_gradient_stays_zero() -> None:
    assert torch.equal(orthogonalise(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("shape", [(40, 7), (3, 40, 7)])
def test_the_gram_matrix_is_that_of_the_shorter_side(shape: tuple[int, ...]) -> None:
    """Counted in multiplications: a tall matrix costs what a wide one does."""
    counts = []
    for matrix in (random(*shape), random(*shape).mT):
        with FlopCounterMode(display=False) as counter:
            orthogonalise(matrix)
        counts.append(counter.get_total_flops())
    stack = shape[0] if len(shape) == 3 else 1
    assert counts == [stack * 5 * 2 * (7 * 7 * 40 + 7**3 + 7 * 7 * 40)] * 2


@SHAPES
def test_orthogonalising_keeps_singular_vectors_and_brings_values_near_one(
    shape: tuple[int, int],
) -> None:
    matrix = random(*shape)
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


def test_the_defaults_are_no_decay_and_momentum_0_95() -> None:
    weights = [random(4, 6).requires_grad_() for _ in range(2)]
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizers = Muon(weights[:1], rate), Muon(weights[1:], rate, weight_decay=0.0, momentum=0.95)
    for seed in (1, 2):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = random(4, 6, seed=seed)
            optimizer.step()
    assert torch.equal(*weights)


def test_a_weight_without_a_gradient_stays_and_the_others_move() -> None:
    first, second = random(4, 6).requires_grad_(), random(4, 6).requires_grad_()
    second.grad = random(4, 6, seed=1)
    Muon([first, second], lr=torch.tensor(0.1), weight_decay=0.5).step()
    assert torch.equal(first, random(4, 6))
    assert not torch.equal(second, first)


def test_tall_matrices_move_further() -> None:
    weight = torch.zeros(40, 10, requires_grad=True)
    weight.grad = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=torch.tensor(1.0)).step()
    torch.testing.assert_close(-weight.detach(), 2 * orthogonalise(weight.grad))
