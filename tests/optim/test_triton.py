"""The Triton backend against the reference and the oracle: on a GPU, else in its interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optim_checks import (
    FORMATS,
    Follower,
    assert_same_bits,
    parameter,
    parameters,
    set_grad,
)
from triton_specs import (
    BF16,
    DEVICE,
    F16,
    F32,
    ON_GPU,
    SPECS,
    Spec,
    assert_agrees,
    gradient_of,
    optimizer_of,
    synchronise,
    tl,
    triton,
    with_smoke_marks,
)

from benchmarks import gpu_kernels
from striped_hf import StripedAdamW
from striped_hf.optim import rounding
from striped_hf.optim.backends.triton import arguments, tile_sizes
from striped_hf.optim.backends.triton.codec import random_bits, step_key

# on a GPU these tests run compiled kernels, and `pytest -m gpu` runs them
pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.mark.parametrize("spec", with_smoke_marks(SPECS), ids=str)
def test_every_step_agrees_with_the_reference(spec: Spec) -> None:
    ours, theirs = optimizer_of(spec, "triton"), optimizer_of(spec, "reference")
    for t in range(3):
        for optimizer in (ours, theirs):
            set_grad(parameters(optimizer)[0], gradient_of(spec, t))
            optimizer.step()
        assert_agrees(ours, theirs)
        synchronise(ours, theirs)


@pytest.mark.parametrize("shape", [(4, 130), (9,)], ids=str)
def test_without_averaging_the_momentum_is_the_gradient(shape: tuple[int, ...]) -> None:
    """The bits are the same, whatever the momentum was before."""
    optimizer = optimizer_of(Spec(shape, flags={"betas": (0.0, 0.9)}), "triton")
    [p] = parameters(optimizer)
    for scale in (1e6, 1.0):
        p.grad = scale * torch.randn(shape).to(DEVICE)
        optimizer.step()
        assert_same_bits(optimizer.state[p]["exp_avg"], p.grad)


@pytest.mark.parametrize("shape", [(4, 130), (60,)], ids=str)
def test_subnormal_float16_is_rounded_as_in_the_reference(shape: tuple[int, ...]) -> None:
    """Updates are a sixth of 2^-24, the spacing of subnormal numbers."""
    spec = Spec(shape, dtype=F16, flags={"lr": 1e-8, "weight_decay": 0.0})
    ours, theirs = optimizer_of(spec, "triton"), optimizer_of(spec, "reference")
    for t in range(2):
        for optimizer in (ours, theirs):
            [p] = parameters(optimizer)
            units = torch.arange(p.numel(), device=DEVICE).view(shape) % 101 - 50
            p.data.copy_(units * 2.0**-24)
            set_grad(p, gradient_of(spec, t))
            optimizer.step()
            assert not torch.equal(p.float(), units * 2.0**-24)
        assert_agrees(ours, theirs)


@pytest.mark.parametrize(
    "spec",
    [
        Spec((150, 2)),
        Spec((2, 150)),
        Spec((300, 6), "int8", (2, 3)),
        Spec((2, 70, 5), blocks=(1, 5), dtype=BF16),
        Spec((150, 3), flags={"lagged": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("totals", [2, 64])
def test_stripes_of_several_segments(
    monkeypatch: pytest.MonkeyPatch, totals: int, spec: Spec
) -> None:
    monkeypatch.setattr(tile_sizes, "STRIPE_BLOCK", 64)
    monkeypatch.setattr(tile_sizes, "TOTALS_BLOCK", totals)
    test_every_step_agrees_with_the_reference(spec)


@pytest.mark.parametrize(
    "spec",
    [
        Spec((140, 20)),
        Spec((6, 450), "int8", (1, 3), flags={"lagged": True}),
        Spec((5, 130), "int4", dtype=BF16),
        Spec((5, 130), flags={"eps": 0.0, "weight_decay": 0.3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("tuning", gpu_kernels.TUNINGS, ids=str)
def test_variants_that_a_gpu_may_prefer(
    monkeypatch: pytest.MonkeyPatch, tuning: dict[str, Any], spec: Spec
) -> None:
    """They agree with the reference within the same tolerances."""
    monkeypatch.setattr(arguments, "TUNING", arguments.TUNING._replace(**tuning))
    test_every_step_agrees_with_the_reference(spec)


# ---------------------------------------------------------------------------------------------
# against the oracle
# ---------------------------------------------------------------------------------------------

FOLLOWED_SHAPES = [(), (5,), (4, 130), (1, 6), (6, 1), (2, 3, 7)]


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_mixed_parameters_follow_the_oracle(dtype: torch.dtype, momentum_dtype: str) -> None:
    """Some gradients are missing, so that step counts differ, and one is all zeros."""
    ps = [parameter(torch.randn(shape), dtype, DEVICE) for shape in FOLLOWED_SHAPES]
    optimizer = StripedAdamW(ps, lr=0.1, momentum_dtype=momentum_dtype, backend="triton")
    follower = Follower(optimizer, rtol=4e-6)
    for t in range(4):
        for i, p in enumerate(ps):
            g = torch.randn(p.shape) * (0.0 if i + t == 4 else 10.0 ** (i - 3))
            set_grad(p, None if (i + t) % 5 == 0 else g.to(DEVICE, dtype))
        follower.step()


@pytest.mark.parametrize("exponent", [-60, -30, 0, 30, 60])
def test_the_step_does_not_depend_on_the_gradients_scale(exponent: int) -> None:
    """2^60 squares to 1e36, 2^-60 to 1e-36."""
    moved = []
    for scale in (1.0, 2.0**exponent):
        p, v = parameter(torch.ones(6, 130), device=DEVICE), parameter(torch.ones(5), device=DEVICE)
        optimizer = StripedAdamW(
            [p, v], eps=0.0, lr=0.1, momentum_dtype="int8", blocks=(2, 1), backend="triton"
        )
        for t in range(3):
            for q in (p, v):
                g = torch.randn(q.shape, generator=torch.Generator().manual_seed(t))
                q.grad = (g * scale).to(DEVICE)
            optimizer.step()
        moved.append((p.detach(), v.detach()))
    for actual, expected in zip(*moved, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_all_zero_gradients_move_nothing(momentum_dtype: str, eps: float) -> None:
    ps = [parameter(torch.randn(shape), device=DEVICE) for shape in FOLLOWED_SHAPES]
    before = [p.detach().clone() for p in ps]
    optimizer = StripedAdamW(
        ps, eps=eps, weight_decay=0.0, momentum_dtype=momentum_dtype, backend="triton"
    )
    for _ in range(2):
        for p in ps:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p, b in zip(ps, before, strict=True):
        assert_same_bits(p, b)
        assert all(value.isfinite().all() for value in optimizer.state[p].values())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy
@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e25], ids=str)
@pytest.mark.parametrize("lagged", [False, True])
def test_inf_and_nan_stay_where_they_stay_in_the_reference(
    lagged: bool, bad: float, momentum_dtype: str
) -> None:
    """This holds in the step of a bad gradient, whose square may overflow, and in the next step."""
    optimizers = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        ps = [parameter(torch.randn(shape), device=DEVICE) for shape in ((4, 300), (7,))]
        optimizer = StripedAdamW(ps, momentum_dtype=momentum_dtype, lagged=lagged, backend=backend)
        for t in range(2 + lagged):
            for p in ps:
                p.grad = torch.randn_like(p)
                if t == lagged:
                    p.grad.view(-1)[5] = bad
            optimizer.step()
        optimizers.append(optimizer)
    ours, theirs = optimizers
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        assert torch.equal(p.isnan(), q.isnan())
        for key, value in theirs.state[q].items():
            assert torch.equal(ours.state[p][key].isfinite(), value.isfinite()), key
    assert parameters(theirs)[0].isnan().any()


# ---------------------------------------------------------------------------------------------
# rounding bits
# ---------------------------------------------------------------------------------------------


@triton.jit
def draw(out, start, step, SIZE: tl.constexpr):
    index = tl.load(start) + tl.arange(0, SIZE)
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    drawn = random_bits(low, high, step_key(tl.load(step)))
    tl.store(out + tl.arange(0, SIZE), drawn.to(tl.int32, bitcast=True))


@pytest.mark.parametrize("step", [1, 2, 100_000])
@pytest.mark.parametrize("start", [0, 77, 2**31 - 5, 2**32 - 9, 2**33 + 3, 2**40 - 30])
def test_random_bits_equal_those_of_the_rounding_module(start: int, step: int) -> None:
    """This holds for parameters of any size."""
    out = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    at = torch.tensor([start], device=DEVICE)
    draw[(1,)](out, at, torch.tensor([step], dtype=torch.int32, device=DEVICE), SIZE=64)
    assert torch.equal(out, rounding.random_bits(start, 64, step, torch.device(DEVICE)))
