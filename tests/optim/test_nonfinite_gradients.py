"""Gradients with Inf or NaN: no error, no silent skip, no effect on other parameters."""

from __future__ import annotations

import math

import pytest
import torch
from optim_checks import (
    FORMATS,
    Follower,
    assert_same_bits,
    parameter,
)

from striped_hf import StripedAdamW


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inf_and_nan_stay_in_their_parameter(
    dtype: torch.dtype, bad: float, momentum_dtype: str
) -> None:
    """Parameters of the same shape step as without it."""
    moved = []
    for poison in (False, True):
        torch.manual_seed(3)
        shapes = [(4, 6), (4, 6), (4, 6), (6,), (6,), (2, 4, 6)]
        ps = [parameter(torch.randn(shape), dtype) for shape in shapes]
        optimizer = StripedAdamW(ps, lr=0.1, momentum_dtype=momentum_dtype)
        for t in range(3):
            for p in ps:
                p.grad = torch.randn_like(p)
            if t == 1 and poison:
                ps[1].grad[2, 3] = bad
                ps[4].grad[1] = bad
                ps[5].grad[0, 1, 2] = bad
            optimizer.step()
        moved.append(ps)
    clean, poisoned = moved
    for i in (0, 2, 3):
        assert_same_bits(poisoned[i], clean[i])
    assert poisoned[1].isnan().all()
    assert poisoned[4].isnan().tolist() == [False, True, False, False, False, False]
    # the other matrix of a stack and the other elements of a vector also step as without it
    assert poisoned[5][0].isnan().all()
    assert_same_bits(poisoned[5][1], clean[5][1])


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("blocks", [(1, 1), (2, 1), (1, 2), (2, 3)], ids=str)
def test_inf_and_nan_stay_in_their_block(blocks: tuple[int, int], bad: float) -> None:
    p = parameter(torch.randn(4, 6))
    optimizer = StripedAdamW([p], lr=0.1, blocks=blocks)
    follower = Follower(optimizer, rtol=4e-6)
    for t in range(3):
        p.grad = torch.randn(4, 6)
        if t == 1:
            p.grad[0, 0] = bad
        if t == 0:
            follower.step()
        else:
            optimizer.step()
    height, width = 4 // blocks[0], 6 // blocks[1]
    inside = torch.zeros(4, 6, dtype=torch.bool)
    inside[:height, :width] = True
    assert torch.equal(p.isnan(), inside)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_inf_and_nan_with_a_learning_rate_of_zero_give_nan_as_in_adamw(bad: float) -> None:
    p, q = parameter(torch.randn(4)), parameter(torch.zeros(4))
    for cls, x in ((StripedAdamW, p), (torch.optim.AdamW, q)):
        optimizer = cls([x], lr=0.0)
        x.grad = torch.tensor([1.0, bad, 1.0, 1.0])
        optimizer.step()
    assert torch.equal(p.isnan(), q.isnan())
