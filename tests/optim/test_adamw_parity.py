"""0-D and 1-D parameters: their step is AdamW's, bit for bit if PyTorch computes both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_checks import FORMATS, assert_same_bits, parameter

from striped_hf import StripedAdamW

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lr": {"lr": 0.3},
    "betas": {"betas": (0.8, 0.99)},
    "zero betas": {"betas": (0.0, 0.0)},
    "eps": {"eps": 1e-3},
    "no decay": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.5, "lr": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.5, "lr": 0.1},
}

SHAPES = [(), (1,), (7,), (1000,)]


def run_both(
    settings: dict[str, Any], scale: float, steps: int, **only_striped: Any
) -> tuple[list[tuple[torch.Tensor, Any]], list[tuple[torch.Tensor, Any]]]:
    start = [torch.randn(shape) for shape in SHAPES]
    grads = [[scale * torch.randn(shape) for shape in SHAPES] for _ in range(steps)]
    results = []
    striped = {"backend": "reference", **only_striped}
    for cls, more in ((StripedAdamW, striped), (torch.optim.AdamW, {"foreach": False})):
        ps = [parameter(values.clone()) for values in start]
        optimizer = cls(ps, **settings, **more)
        for t, at_step in enumerate(grads):
            for i, (p, g) in enumerate(zip(ps, at_step, strict=True)):
                p.grad = None if (t + i) % 4 == 3 else g.clone()
            optimizer.step()
        results.append([(p.detach(), optimizer.state[p]) for p in ps])
    return results[0], results[1]


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1.0, 1e6], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_state_and_parameter_are_adamws_bit_for_bit(settings: dict[str, Any], scale: float) -> None:
    ours, theirs = run_both(settings, scale, steps=20)
    for (p, state), (q, expected) in zip(ours, theirs, strict=True):
        assert state.keys() == expected.keys()
        for key in expected:
            assert_same_bits(state[key], expected[key], f"{key} of {tuple(p.shape)}")
        assert_same_bits(p, q, f"parameter {tuple(p.shape)}")


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_no_momentum_format_changes_a_vector(momentum_dtype: str) -> None:
    ours, theirs = run_both({"lr": 0.1}, 1.0, steps=5, momentum_dtype=momentum_dtype)
    for (p, state), (q, expected) in zip(ours, theirs, strict=True):
        assert "exp_avg_scale" not in state
        for key in expected:
            assert_same_bits(state[key], expected[key], key)
        assert_same_bits(p, q)


def test_a_denominator_of_zero_is_no_step_where_adamw_has_nan() -> None:
    """A vector's step differs from AdamW's in one case: 0/0 with eps = 0."""
    p, q = parameter([1.0, 2.0]), parameter([1.0, 2.0])
    ours = StripedAdamW([p], eps=0.0, weight_decay=0.0)
    theirs = torch.optim.AdamW([q], eps=0.0, weight_decay=0.0)
    p.grad, q.grad = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])
    ours.step()
    theirs.step()
    assert p[0] == 1.0
    assert q[0].isnan()
    assert_same_bits(p[1], q[1])


@pytest.mark.parametrize("shape", [(1, 9), (9, 1)], ids=str)
def test_one_row_or_one_column_keeps_the_full_second_moment(shape: tuple[int, int]) -> None:
    """For 1 x N the stripes are the second moment, so the step is AdamW's up to rounding."""
    p, q = parameter(torch.randn(9).reshape(shape)), parameter(torch.zeros(9))
    q.data.copy_(p.detach().flatten())
    ours, theirs = StripedAdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1)
    for _ in range(10):
        g = torch.randn(9) * torch.logspace(-6, 2, 9)
        p.grad, q.grad = g.reshape(shape).clone(), g.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p.detach().flatten(), q.detach(), rtol=2e-6, atol=2e-6)
