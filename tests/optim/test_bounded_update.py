"""The floor under the root, sqrt(u_t) |m_ij|: it bounds updates, and changes nothing else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from optim_checks import FORMATS, PARAM_DTYPES, parameter, set_grad, to_numpy

from striped_hf import StripedAdamW
from striped_hf.optim import backends

LR = 0.01

# the usual ones; b1^2 = b2 up to rounding and exactly; b1^2 > b2; b1 = 0; b2 = 0
BETAS = [
    (0.9, 0.999),
    (0.9, 0.99),
    (0.9, 0.81),
    (0.5, 0.25),
    (0.99, 0.9),
    (0.0, 0.99),
    (0.0, 0.0),
    (0.9, 0.0),
]


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    try:
        backends.resolve(request.param, "cpu")
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param


def bound(t: int, betas: tuple[float, float], nesterov: bool) -> float:
    """AdamW's largest possible update of an element in step t, in learning rates."""
    least = oracle.u(t, *betas, nesterov)
    return math.inf if least == 0 else 1 / ((1 - betas[0] ** t) * math.sqrt(least))


def updates(grads: list[torch.Tensor], **settings: Any) -> list[np.ndarray]:
    """How many learning rates the parameter moves in each step, each from zero."""
    p = parameter(torch.zeros_like(grads[0]), settings.pop("dtype", torch.float32))
    optimizer = StripedAdamW([p], lr=LR, weight_decay=0.0, **settings)
    found = []
    for g in grads:
        with torch.no_grad():
            p.zero_()
        set_grad(p, g.clone())
        optimizer.step()
        found.append(to_numpy(p) / -LR)
    return found


def block_sparse_gradients(steps: int, columns: int = 140) -> list[torch.Tensor]:
    """Two blocks on the diagonal, the second one small at first and large later; late elements."""
    rows = 8
    mask = torch.zeros(rows, columns)
    mask[: rows // 2, : columns // 2] = 1.0
    mask[rows // 2 :, columns // 2 :] = 1e-4
    grads = []
    for t in range(steps):
        g = torch.randn(rows, columns) * mask
        g[rows // 2 :] *= 1.0 if t < steps // 2 else 100.0
        if t > steps // 2:
            g[0, -1] = 1.0
        grads.append(g)
    return grads


@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_the_bound_is_the_largest_update_of_adamw(
    betas: tuple[float, float], nesterov: bool
) -> None:
    """AdamW attains it with gradients for which Cauchy and Schwarz's inequality is an equality."""
    b1, b2 = betas
    if b2 == 0 and b1 > 0:
        pytest.skip("AdamW has no bound")
    for t in (1, 2, 7, 40):
        weights = [(1 - b1) * b1**k for k in range(t)]
        if nesterov:
            weights = [b1 * w + (1 - b1) * (k == 0) for k, w in enumerate(weights)]
        grads = np.array([w / b2**k if w else 0.0 for k, w in enumerate(weights)])[::-1]
        state = oracle.new_state((1,))
        for step, g in enumerate(grads / np.abs(grads).max(), start=1):
            settings: dict[str, Any] = {"lr": 1.0, "betas": betas, "eps": 0.0, "weight_decay": 0.0}
            p, state = oracle.step(
                np.zeros(1), np.array([g]), state, step, nesterov=nesterov, **settings
            )
        assert -p[0] == pytest.approx(bound(t, betas, nesterov), rel=1e-9)


@pytest.mark.parametrize(
    ("betas", "most"), [((0.9, 0.999), 7.3), ((0.9, 0.99), 2.4), ((0.9, 0.95), 1.2)], ids=str
)
def test_the_bound_of_usual_betas_is_small(betas: tuple[float, float], most: float) -> None:
    assert bound(1, betas, False) == pytest.approx(1.0)
    assert max(bound(t, betas, False) for t in range(1, 2000, 10)) <= most


@pytest.mark.parametrize("settings", [{}, {"nesterov": True}, {"lagged": True}], ids=str)
@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_no_update_exceeds_the_bound(
    betas: tuple[float, float], momentum_dtype: str, settings: dict[str, Any], every_backend: str
) -> None:
    """The gradients are block-sparse and of unequal scales, and some come late."""
    grads = block_sparse_gradients(14)
    nesterov = settings.get("nesterov", False)
    moved = updates(grads, betas=betas, momentum_dtype=momentum_dtype, **settings)
    for t, update in enumerate(moved, start=1):
        assert np.isfinite(update).all()
        assert np.abs(update).max() <= bound(t, betas, nesterov) * (1 + 1e-5), t
    if betas[0] ** 2 < betas[1]:
        # without the floor the same gradients move it much further
        most = max(bound(t, betas, nesterov) for t in range(1, 15))
        assert max(np.abs(update).max() for update in unbounded(grads, betas)) > 3 * most


def unbounded(grads: list[torch.Tensor], betas: tuple[float, float]) -> list[np.ndarray]:
    """The updates with the root a_i c_j, without the floor, in learning rates; eps is 1e-8."""
    b1, b2 = betas
    m, row, col, found = 0.0, 0.0, 0.0, []
    for t, g in enumerate(map(to_numpy, grads), start=1):
        m = b1 * m + (1 - b1) * g
        row = b2 * row + (1 - b2) * (g**2).mean(1, keepdims=True)
        col = b2 * col + (1 - b2) * (g**2).mean(0, keepdims=True)
        root = np.sqrt(row / row.mean() * col / (1 - b2**t))
        found.append(m / (1 - b1**t) / (root + 1e-8))
    return found


@pytest.mark.parametrize("dtype", PARAM_DTYPES, ids=str)
def test_no_update_of_any_backend_exceeds_the_bound(backend: str, dtype: torch.dtype) -> None:
    grads = [g.to(dtype) for g in block_sparse_gradients(6, columns=20)]
    settings: dict[str, Any] = {"backend": backend, "stochastic_rounding": False, "dtype": dtype}
    for more in ({}, {"nesterov": True}, {"lagged": True}):
        for t, update in enumerate(updates(grads, **settings, **more), start=1):
            most = bound(t, (0.9, 0.999), "nesterov" in more)
            rounding = 1 + torch.finfo(dtype).eps + 1e-5
            assert np.abs(update).max() <= most * rounding, (more, t)


@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
@pytest.mark.parametrize("betas", [b for b in BETAS if b[1] > 0 or b[0] == 0], ids=str)
def test_a_first_gradient_behind_lagged_stripes_of_zero_moves_by_the_bound(
    backend: str, betas: tuple[float, float], nesterov: bool
) -> None:
    """LoRA's A has its first gradient in the step after B's first step from zero."""
    first = 5
    grads = [torch.zeros(3, 20)] * (first - 1) + [torch.randn(3, 20)]
    settings: dict[str, Any] = {
        "betas": betas,
        "nesterov": nesterov,
        "backend": backend,
        "eps": 0.0,
    }
    *before, last = updates(grads, lagged=True, **settings)
    assert all((update == 0).all() for update in before)
    expected = bound(first, betas, nesterov) * np.sign(to_numpy(grads[-1]))
    np.testing.assert_allclose(last, expected, rtol=1e-5)


def test_stripes_of_at_least_adamws_root_divide_alone(backend: str) -> None:
    p = parameter(torch.zeros(16, 140))
    optimizer = StripedAdamW([p], lr=LR, weight_decay=0.0, backend=backend)
    v = np.zeros((16, 140))
    consistent = 0
    for t in range(1, 21):
        with torch.no_grad():
            p.zero_()
        p.grad = torch.randn(16, 140) * torch.logspace(-2, 0, 16).unsqueeze(1)
        v = 0.999 * v + 0.001 * to_numpy(p.grad) ** 2
        optimizer.step()
        m, row, col = (
            to_numpy(optimizer.state[p][key])
            for key in ("exp_avg", "exp_avg_sq_row", "exp_avg_sq_col")
        )
        root = np.sqrt(row / row.mean() * col / (1 - 0.999**t))
        at_least = root >= np.sqrt(v / (1 - 0.999**t))
        consistent += at_least.sum()
        expected = (m / (1 - 0.9**t) / (root + 1e-8))[at_least]
        np.testing.assert_allclose((to_numpy(p) / -LR)[at_least], expected, rtol=4e-6)
    assert consistent > 0.4 * 20 * p.numel()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.0)], ids=str)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq_row", "exp_avg_sq_col"])
def test_nan_in_the_state_stays_nan(backend: str, key: str, betas: tuple[float, float]) -> None:
    p = parameter(torch.zeros(4, 20))
    optimizer = StripedAdamW([p], betas=betas, backend=backend)
    for t in range(2):
        p.grad = torch.randn(4, 20)
        if t == 1:
            optimizer.state[p][key][0, 0] = math.nan
        optimizer.step()
    poisoned = torch.zeros(4, 20, dtype=torch.bool)
    if key == "exp_avg":
        poisoned[0, 0] = True
    elif key == "exp_avg_sq_col":
        poisoned[:, 0] = True
    else:
        poisoned[:] = True  # its mean divides every row
    assert torch.equal(p.isnan(), poisoned)
