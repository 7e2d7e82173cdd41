"""Equivalent problems take the same step: layouts, transposes, scales, blocks, stacks."""

from __future__ import annotations

import pytest
import torch
from optim_checks import (
    FORMATS,
    assert_same_bits,
    parameter,
)

from striped_hf import StripedAdamW

pytestmark = pytest.mark.usefixtures("every_backend")


# ---------------------------------------------------------------------------------------------
# layouts and aliasing
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_memory_between_a_strided_parameters_elements_is_unchanged(momentum_dtype: str) -> None:
    buffer = torch.full((2, 7, 2 * 130), 77.0)
    p = torch.nn.Parameter(buffer[..., ::2])
    optimizer = StripedAdamW([p], lr=0.1, momentum_dtype=momentum_dtype)
    p.grad = torch.randn(2, 7, 130)
    optimizer.step()
    assert (buffer[..., 1::2] == 77).all()
    assert (buffer[..., ::2] != 77).all()


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (4,)], ids=str)
def test_gradients_are_only_read(shape: tuple[int, ...]) -> None:
    p = parameter(torch.randn(shape))
    grad = torch.randn(shape)
    p.grad = grad.clone()
    optimizer = StripedAdamW([p], maximize=True, nesterov=True)
    for _ in range(3):
        optimizer.step()
    assert_same_bits(p.grad, grad)


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_an_expanded_gradient_equals_its_copy(momentum_dtype: str) -> None:
    """``loss = p.sum()`` gives a gradient whose strides are zero."""
    moved = []
    for copy in (False, True):
        p = parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
        optimizer = StripedAdamW([p], lr=0.1, momentum_dtype=momentum_dtype)
        for value in (0.3, -2.0):
            g = torch.tensor(value).expand(3, 4)
            p.grad = g.clone() if copy else g
            optimizer.step()
        moved.append(p)
    assert_same_bits(*moved)


# ---------------------------------------------------------------------------------------------
# invariances
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
@pytest.mark.parametrize("blocks", [(1, 1), (1, 3), (3, 1), (2, 3), (6, 9)], ids=str)
def test_the_transposed_matrix_takes_the_transposed_step(
    blocks: tuple[int, int], nesterov: bool
) -> None:
    """The steps are equal up to rounding: the sums have another order."""
    w, grads = torch.randn(6, 9), torch.randn(5, 6, 9) * torch.logspace(-2, 0, 9)
    p, q = parameter(w), parameter(w.T.contiguous())
    one = StripedAdamW([p], lr=0.1, blocks=blocks, nesterov=nesterov)
    other = StripedAdamW([q], lr=0.1, blocks=blocks[::-1], nesterov=nesterov)
    for g in grads:
        p.grad, q.grad = g.clone(), g.T.contiguous()
        one.step()
        other.step()
        torch.testing.assert_close(q.T, p, rtol=2e-6, atol=2e-6)
    row, col = one.state[p]["exp_avg_sq_row"], one.state[p]["exp_avg_sq_col"]
    torch.testing.assert_close(other.state[q]["exp_avg_sq_col"], row.T)
    torch.testing.assert_close(other.state[q]["exp_avg_sq_row"], col.T)


# 2^+-20 is far from the ends of fp32 for every intermediate number: all scale exactly
@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-2])
@pytest.mark.parametrize("power", [-20, -7, 1, 20])
def test_scaling_gradients_and_eps_by_a_power_of_two_changes_no_bit(
    power: int, eps: float, momentum_dtype: str
) -> None:
    shapes = [(5, 140), (2, 3, 4), (6,), ()]
    values = [torch.randn(shape) for shape in shapes]
    grads = [[torch.randn(shape) for shape in shapes] for _ in range(4)]
    moved = []
    for factor in (1.0, 2.0**power):
        ps = [parameter(v.clone()) for v in values]
        optimizer = StripedAdamW(ps, lr=0.01, eps=eps * factor, momentum_dtype=momentum_dtype)
        for at_step in grads:
            for p, g in zip(ps, at_step, strict=True):
                p.grad = g * factor
            optimizer.step()
        moved.append(ps)
    for p, q in zip(*moved, strict=True):
        assert_same_bits(q, p)


# fp32 squares of 2^-60 = 8.7e-19 are near its denormals; 2^40 squared is 1e24
@pytest.mark.parametrize(("power", "rtol"), [(-60, 1e-3), (-50, 1e-4), (-40, 0.0), (40, 0.0)])
def test_scaling_gradients_far_does_not_change_the_trajectory(power: int, rtol: float) -> None:
    w, moved = torch.zeros(7, 11), []
    signs = torch.randn(6, 7, 11).sign()
    grads = signs * torch.rand(6, 7, 11).add(0.5)
    for factor in (1.0, 2.0**power):
        p = parameter(w.clone())
        optimizer = StripedAdamW([p], lr=0.01, eps=0.0)
        for g in grads:
            p.grad = g * factor
            optimizer.step()
        moved.append(p)
    torch.testing.assert_close(moved[1], moved[0], rtol=rtol, atol=rtol * 0.06)


def test_a_small_eps_does_not_slow_gradients_of_real_size() -> None:
    """Second moments of real models are 1e-12 to 1e-6, and eps = 1e-8 must not affect them."""
    g, moved = torch.randn(32, 48), []
    for factor in (1.0, 1e-6):
        p = parameter(torch.zeros(32, 48))
        optimizer = StripedAdamW([p], lr=1e-3, eps=1e-8, weight_decay=0.0)
        for _ in range(3):
            p.grad = g * factor
            optimizer.step()
        moved.append(p.detach().norm())
    assert moved[1] > 0.97 * moved[0]


def test_a_rank_one_gradient_takes_adamws_step() -> None:
    """If g^2 is an outer product, the stripes lose nothing."""
    outer = torch.outer(torch.logspace(-3, 0, 9), torch.logspace(0, 2, 14))
    p, q = parameter(torch.ones(9, 14)), parameter(torch.ones(9, 14))
    striped = StripedAdamW([p], lr=0.01)
    adamw = torch.optim.AdamW([q], lr=0.01)
    for t in range(5):
        g = outer * torch.randn(9, 14).sign() * (t + 1)
        p.grad, q.grad = g.clone(), g.clone()
        striped.step()
        adamw.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("blocks", [(1, 3), (3, 1), (3, 3)], ids=str)
def test_blocks_step_like_separate_matrices(blocks: tuple[int, int]) -> None:
    """The packed matrix steps like its parts as separate parameters."""
    w, grads = torch.randn(12, 18), torch.randn(4, 12, 18)
    grads *= torch.logspace(-3, 3, 12).unsqueeze(1) * torch.logspace(3, -1, 18)

    def parts(matrix: torch.Tensor) -> list[torch.Tensor]:
        return [
            part.clone() for band in matrix.chunk(blocks[0], 0) for part in band.chunk(blocks[1], 1)
        ]

    packed, split = parameter(w.clone()), [parameter(part) for part in parts(w)]
    whole = StripedAdamW([packed], lr=0.1, blocks=blocks)
    apart = StripedAdamW(split, lr=0.1)
    for g in grads:
        packed.grad = g.clone()
        for p, part in zip(split, parts(g), strict=True):
            p.grad = part
        whole.step()
        apart.step()
    for moved, p in zip(parts(packed.detach()), split, strict=True):
        torch.testing.assert_close(moved, p.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_leading_dimensions_step_like_separate_matrices(momentum_dtype: str) -> None:
    w, grads = torch.randn(2, 3, 5, 140), torch.randn(3, 2, 3, 5, 140)
    grads *= torch.logspace(-4, 2, 6).reshape(2, 3, 1, 1)
    stack, each = parameter(w.clone()), [parameter(m.clone()) for m in w.flatten(0, 1)]
    one = StripedAdamW([stack], lr=0.1, momentum_dtype=momentum_dtype)
    many = StripedAdamW(each, lr=0.1, momentum_dtype=momentum_dtype)
    for g in grads:
        stack.grad = g.clone()
        for p, part in zip(each, g.flatten(0, 1), strict=True):
            p.grad = part.clone()
        one.step()
        many.step()
    expected = torch.stack([p.detach() for p in each]).reshape(w.shape)
    torch.testing.assert_close(stack.detach(), expected, rtol=1e-6, atol=1e-6)
