"""The C backend against the reference on denormals, Inf and NaN, and with eps and beta2 of 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_checks import FORMATS, parameter

from striped_hf import StripedAdamW
from striped_hf.optim import backends
from striped_hf.optim.interface import Entry, Settings
from striped_hf.optim.state import init_state

try:
    cpu = backends.resolve("cpu", "cpu")
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

SHAPES = [(4, 130), (6, 256), (3, 5), (9,)]


def nan_with_a_payload(g: torch.Tensor, t: int) -> torch.Tensor:
    """Puts Inf, and a NaN whose lowest bits are not zero, into a gradient."""
    if t == 1:
        g.view(torch.int32).view(-1)[:2] = torch.tensor([0x7FC01235, 0x7F800000])
    return g


GRADIENTS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "denormal": lambda g, t: 1e-41 * g,
    "hardly normal": lambda g, t: 1e-38 * g,
    "small": lambda g, t: 1e-30 * g,
    "large": lambda g, t: 1e20 * g,
    "NaN and Inf": nan_with_a_payload,
    "zero after the first": lambda g, t: g * (t == 0),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "eps = 0": {"eps": 0},
    "eps = beta2 = 0": {"eps": 0, "betas": (0.9, 0)},
    "lagged, eps = beta2 = 0": {"eps": 0, "betas": (0.9, 0), "lagged": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_extreme_numbers_give_the_references_results(
    momentum_dtype: str,
    gradient: Callable[[torch.Tensor, int], torch.Tensor],
    settings: dict[str, Any],
) -> None:
    found = []
    for backend in ("cpu", "reference"):
        generator = torch.Generator().manual_seed(3)
        ps = [parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        optimizer = StripedAdamW(ps, momentum_dtype=momentum_dtype, backend=backend, **settings)
        for t in range(3):
            for p in ps:
                p.grad = gradient(torch.randn(p.shape, generator=generator), t)
            optimizer.step()
        found.append([(p.detach(), optimizer.state[p]) for p in ps])
    for (p, state), (q, expected) in zip(*found, strict=True):
        close = torch.isclose(p, q, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert close.all(), (p[~close], q[~close])
        for key, value in expected.items():
            if value.is_floating_point():
                rtol = 2**-7 if value.dtype == torch.bfloat16 else 1e-4
                close = torch.isclose(state[key].float(), value.float(), rtol, 0, equal_nan=True)
            else:
                close = state[key] == value
            assert (~close).float().mean() < 0.01, key


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
def test_an_empty_entry_changes_nothing(shape: tuple[int, ...]) -> None:
    """A process may pass an empty entry when its place in a mesh has changed."""
    p = torch.zeros(shape)
    state = init_state(p, "float32", (1, 1))
    entries = [Entry(p, p.clone(), state, "float32", (1, 1), 1)]
    other = torch.ones(3, 4)
    entries.append(
        Entry(other, torch.ones(3, 4), init_state(other, "int8", (1, 1)), "int8", (1, 1), 1)
    )
    settings = Settings(1e-3, 0.9, 0.999, 1e-8, 0.0, False, False, True, False)
    cpu.step(entries, settings)
    assert (other < 1).all()


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_without_beta1_the_momentum_is_the_gradient(momentum_dtype: str) -> None:
    """Also after a far larger gradient, whose rounding must not swallow it."""
    ps = [parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = StripedAdamW(ps, betas=(0, 0.9), momentum_dtype=momentum_dtype, backend="cpu")
    for scale in (1e8, 1.0):
        for p in ps:
            p.grad = torch.full_like(p, scale / 3)
        optimizer.step()
    for p in ps:
        state = optimizer.state[p]
        m = state["exp_avg_scale"] if "exp_avg_scale" in state else state["exp_avg"]
        torch.testing.assert_close(m.float(), torch.full_like(m.float(), 1 / 3), rtol=2e-3, atol=0)


def test_a_learning_rate_of_zero_moves_nothing() -> None:
    """If momentum / root overflowed, zero times the result would be NaN."""
    p = parameter(torch.ones(9))
    optimizer = StripedAdamW([p], lr=0.0, betas=(0.9, 0), eps=1e-30, backend="cpu")
    for scale in (1e14, 0.0):
        p.grad = torch.full_like(p, scale)
        optimizer.step()
    assert (p == 1).all()
