"""lagged=True: the stripes of the step before do not contain this step's gradient."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from optim_checks import FORMATS, assert_same_bits, parameter

from striped_hf import StripedAdamW

pytestmark = pytest.mark.usefixtures("every_backend")


def run(grads: list[torch.Tensor], **settings: Any) -> list[torch.Tensor]:
    """The parameter after each step, from zero."""
    p = parameter(torch.zeros_like(grads[0]))
    optimizer = StripedAdamW([p], lr=0.01, weight_decay=0.0, **settings)
    path = []
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        path.append(p.detach().clone())
    return path


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_the_first_step_is_the_same_as_without_lag(momentum_dtype: str) -> None:
    grads = [torch.randn(6, 200) * torch.logspace(-3, 0, 200)]
    lagged, plain = (run(grads, momentum_dtype=momentum_dtype, lagged=on) for on in (True, False))
    assert_same_bits(lagged[0], plain[0])


def test_equal_gradients_make_unit_steps() -> None:
    for p in run([torch.full((3, 5), 1e-6)] * 20, lagged=True, eps=0.0):
        steps = p / -0.01
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("what", ["row", "column", "matrix"])
@pytest.mark.parametrize("first", [2, 10, 100])
def test_a_first_gradient_moves_no_further_than_adamws_may(what: str, first: int) -> None:
    """An embedding's unseen row, a dead unit's column, LoRA's A behind a B of zeros.

    The stripes are zero there: all elements move by the bound on AdamW's updates.
    """
    late = {
        "row": (slice(1, 2), slice(None)),
        "column": (slice(None), slice(2, 3)),
        "matrix": (slice(None), slice(None)),
    }[what]
    grads = [torch.randn(4, 6) for _ in range(first)]
    for g in grads[:-1]:
        g[late] = 0.0
    before, after = run(grads, lagged=True, eps=0.0)[-2:]
    bound = 0.01 / (1 - 0.9**first) / oracle.u(first, 0.9, 0.999, nesterov=False) ** 0.5
    moved = (after - before)[late].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, bound), rtol=1e-4, atol=0)


def test_a_run_goes_on_from_its_state_dict() -> None:
    grads = [torch.randn(5, 130) for _ in range(6)]
    whole = run(grads, lagged=True, momentum_dtype="int8")
    p = parameter(torch.zeros(5, 130))
    optimizer = StripedAdamW([p], lr=0.01, weight_decay=0.0, lagged=True, momentum_dtype="int8")
    for t, g in enumerate(grads):
        if t == 3:
            saved = optimizer.state_dict()
            optimizer = StripedAdamW([p], momentum_dtype="int8")
            optimizer.load_state_dict(saved)
            assert optimizer.param_groups[0]["lagged"] is True
        p.grad = g.clone()
        optimizer.step()
    assert_same_bits(p, whole[-1])
