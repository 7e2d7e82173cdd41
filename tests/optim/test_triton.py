"""The Triton backend against the reference and the oracle: on a GPU, else in its interpreter."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optim_checks import (
    FORMATS,
    Follower,
    assert_same_bits,
    assert_same_snapshot,
    bits,
    lay_out,
    parameter,
    parameters,
    set_grad,
    snapshot,
    spacing,
    to_numpy,
)

from benchmarks.overlay import make_overlay
from striped_hf import StripedAdamW
from striped_hf.optim import backends, rounding
from striped_hf.optim.backends import reference
from striped_hf.optim.interface import Entry
from striped_hf.optim.options import settings_of

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
launch = pytest.importorskip("striped_hf.optim.backends.triton.launch", exc_type=ImportError)

from striped_hf.optim.backends.triton import kernels, tile_sizes  # noqa: E402
from striped_hf.optim.backends.triton.codec import random_bits, step_key  # noqa: E402

DEVICE = launch.DEVICE_TYPES[0]
ON_GPU = DEVICE == "cuda"

# on a GPU every test here is one of compiled kernels, which `pytest -m gpu` is to run
pytestmark = [pytest.mark.gpu] if ON_GPU else []

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


# ---------------------------------------------------------------------------------------------
# against the reference, one step at a time
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """One parameter and the settings it is stepped with."""

    shape: tuple[int, ...]
    momentum_dtype: str = "float32"
    blocks: tuple[int, int] = (1, 1)
    dtype: torch.dtype = F32
    grad_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    flags: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)) or "scalar", self.momentum_dtype]
        parts += [str(self.dtype).removeprefix("torch.")]
        parts += [f"blocks {self.blocks}"] if self.blocks != (1, 1) else []
        parts += [f"grad {self.grad_dtype}"] if self.grad_dtype else []
        parts += [self.layout] if self.layout != "contiguous" else []
        return " ".join([*parts, *self.flags])


FLAGS: list[dict[str, Any]] = [
    {"nesterov": True},
    {"maximize": True, "nesterov": True},
    {"eps": 0.0, "weight_decay": 0.3},
    {"betas": (0.0, 0.5)},
    {"betas": (0.4, 0.999)},  # a weight above a half, where lerp starts from the other end
    {"betas": (0.9, 0.0)},
    {"betas": (0.9, 0.81), "nesterov": True},  # b1^2 = b2
    {"betas": (0.99, 0.9)},
    {"betas": (0.0, 0.0), "nesterov": True},
    {"stochastic_rounding": False},
]
LAGGED = {"lagged": True}

SPECS = [
    # a whole block of codes, one column more, rows that are not whole tiles
    *(Spec((20, 128), f) for f in FORMATS),
    *(Spec((7, 129), f) for f in FORMATS),
    *(Spec((3, 300), f) for f in FORMATS),
    *(Spec((70, 48), f) for f in ("float32", "int8", "int4")),
    *(Spec((140, 20), f) for f in ("float32", "int4")),  # statistics: several programs of rows
    *(Spec((2, 600), f) for f in ("bfloat16", "int4")),  # and several of columns
    # the shapes that break things
    *(Spec(shape, f) for shape in ((1, 6), (7, 5), (1, 1), (6, 1), (5, 2)) for f in FORMATS),
    *(Spec(shape, f) for shape in ((2, 3, 7), (2, 1, 3, 130)) for f in ("float32", "int8", "int4")),
    *(Spec(shape) for shape in ((), (1,), (5,), (1030,))),
    # blocks: as wide as tiles, narrower, across blocks of codes, by rows
    *(Spec((6, 384), f, (1, 3)) for f in FORMATS),
    *(Spec((6, 192), f, (3, 2)) for f in ("float32", "int8")),
    *(Spec((6, 450), f, (1, 3)) for f in ("bfloat16", "int8", "int4")),
    *(Spec((6, 9), f, (2, 3)) for f in ("float32", "int8", "int4")),
    *(Spec((2, 9, 7), f, (3, 1)) for f in ("float32", "int4")),
    *(Spec((201, 10), f, (3, 1)) for f in ("float32", "int8")),
    # precision of parameter and gradient
    *(Spec((5, 130), f, dtype=d) for f in FORMATS for d in (BF16, F16)),
    *(Spec((9,), dtype=d) for d in (BF16, F16)),
    *(Spec((), dtype=d) for d in (BF16, F16)),
    Spec((5, 130), "int8", dtype=BF16, grad_dtype=F32),
    Spec((5, 130), "int4", dtype=F32, grad_dtype=BF16),
    Spec((9,), dtype=BF16, grad_dtype=F32),
    # where the elements lie
    *(
        Spec((6, 132), f, (1, 2), d, layout="transposed")
        for f in ("float32", "int8", "int4")
        for d in (F32, BF16)
    ),
    Spec((2, 5, 7), "int8", layout="transposed"),
    # settings
    *(Spec((5, 130), f, flags=flags) for f in ("float32", "int8") for flags in FLAGS[:-1]),
    *(Spec((9,), flags=flags) for flags in FLAGS[:-1]),
    *(
        Spec((5, 130), f, dtype=d, flags=FLAGS[-1])
        for f in ("float32", "int4")
        for d in (BF16, F16)
    ),
    # lagged: several tiles and programs, blocks that are whole tiles, and those that are not
    *(Spec((7, 300), f, flags=LAGGED) for f in FORMATS),
    *(Spec((140, 20), f, flags=LAGGED) for f in ("float32", "int4")),
    *(Spec((6, 384), f, (2, 3), BF16, flags=LAGGED) for f in ("bfloat16", "int4")),
    *(Spec((6, 450), f, (1, 3), flags=LAGGED) for f in ("int8", "int4")),
    Spec((6, 9), "int8", (2, 3), flags=LAGGED),
    Spec((201, 10), blocks=(3, 1), flags=LAGGED),
    Spec((2, 3, 7), "int8", flags={**LAGGED, "maximize": True, "nesterov": True}),
    Spec((5, 130), "int8", flags={**LAGGED, "betas": (0.0, 0.0), "eps": 0.0}),
    *(Spec((6, 132), f, (1, 2), BF16, layout="transposed", flags=LAGGED) for f in ("int8", "int4")),
    Spec((2, 5, 7), layout="transposed", flags=LAGGED),
    *(Spec(shape, flags=LAGGED) for shape in ((1, 6), (6, 1), (9,))),
]

# Relative to the values' own size. Sums of n squares in another order: n^(1/2) roundings of 6e-8.
# A momentum is a difference that may cancel: relative to the gradients, which are of order 1.
# What a fast division and root add is 2 units in the last place.
STRIPES = {"rtol": 2e-6, "atol": 0.0}
MOMENTUM = {"rtol": 1e-6, "atol": 2e-7}
SCALE = {"rtol": 1e-6, "atol": 2e-7}
UPDATE = 2e-6  # of lr, plus the last place of the parameter
# A value within 1e-5 of a half may fall on either side: one code, or one draw, in some thousands.
TIPPED = 1e-3


def gradient_of(spec: Spec, t: int) -> torch.Tensor:
    """Rows and columns of unequal size."""
    g = torch.randn(spec.shape, generator=torch.Generator().manual_seed(t))
    if g.ndim >= 2:
        g = g * torch.logspace(-2, 0, spec.shape[-2]).unsqueeze(1)
        g = g * torch.logspace(0, -1, spec.shape[-1])
    return lay_out(g.to(DEVICE, spec.grad_dtype or spec.dtype), spec.layout)


def optimizer_of(spec: Spec, backend: str, **more: Any) -> StripedAdamW:
    values = torch.randn(spec.shape, generator=torch.Generator().manual_seed(99))
    p = torch.nn.Parameter(lay_out(values.to(DEVICE, spec.dtype), spec.layout))
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, **spec.flags, **more}
    return StripedAdamW(
        [p],
        momentum_dtype=spec.momentum_dtype,
        blocks=spec.blocks,
        backend=backend,
        **settings,
    )


def assert_agrees(ours: StripedAdamW, theirs: StripedAdamW) -> None:
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        state, expected = ours.state[p], theirs.state[q]
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            actual = state[key].cpu()
            value = value.cpu()
            if key.startswith("exp_avg_sq"):
                torch.testing.assert_close(actual, value, **STRIPES, msg=lambda m, k=key: k + m)
            elif key == "exp_avg_scale":
                torch.testing.assert_close(actual, value, **SCALE)
            elif key == "exp_avg" and value.dtype == F32:
                torch.testing.assert_close(actual, value, **MOMENTUM)
            elif key == "exp_avg" and value.dtype == BF16:
                assert_nearly_the_same(actual, value, key)
            elif key == "exp_avg":
                low, high = (actual & 15) - (value & 15), (actual >> 4) - (value >> 4)
                whole = actual.int() - value.int()
                apart = torch.stack((low, high)) if value.dtype == torch.uint8 else whole
                wrong = (apart.to(torch.int8) != 0).float()
                assert apart.to(torch.int8).abs().max() <= 1, key
                assert wrong.sum() <= max(1, TIPPED * wrong.numel()), key
            else:
                assert_same_bits(actual, value, key)
        if p.dtype == F32:
            lr = float(ours.param_groups[0]["lr"])
            torch.testing.assert_close(p, q, rtol=2.0**-22, atol=UPDATE * lr * 20)
        else:
            assert_nearly_the_same(p.detach().cpu(), q.detach().cpu(), "parameter")


def assert_nearly_the_same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """The same bits, but for a few that rounding tips to a neighbour."""
    a, b = to_numpy(actual), to_numpy(expected)
    unit = spacing(np.maximum(np.abs(a), np.abs(b)), expected.dtype)
    assert (np.abs(a - b) <= 1.01 * unit).all(), what
    wrong = (bits(actual) != bits(expected)).sum()
    assert wrong <= max(1, TIPPED * actual.numel()), f"{what}: {wrong} of {actual.numel()} differ"


def synchronise(target: StripedAdamW, source: StripedAdamW) -> None:
    """So that the next step starts from the same numbers."""
    with torch.no_grad():
        for p, q in zip(parameters(target), parameters(source), strict=True):
            p.copy_(q)
            for key, value in source.state[q].items():
                target.state[p][key].copy_(value)


def with_smoke_marks(specs: list[Spec]) -> list[Any]:
    """Marks the first spec of each kernel variant, for a first look on a GPU."""
    seen, marked = set(), []
    for spec in specs:
        variant = (spec.momentum_dtype, spec.dtype, spec.grad_dtype, spec.layout)
        variant += (len(spec.shape) > 1, spec.flags == LAGGED, spec.blocks != (1, 1))
        marks = () if variant in seen or spec.flags not in ({}, LAGGED) else pytest.mark.smoke
        seen |= {variant} if marks else set()
        marked.append(pytest.param(spec, marks=marks))
    return marked


@pytest.mark.parametrize("spec", with_smoke_marks(SPECS), ids=str)
def test_every_step_is_the_references(spec: Spec) -> None:
    ours, theirs = optimizer_of(spec, "triton"), optimizer_of(spec, "reference")
    for t in range(3):
        for optimizer in (ours, theirs):
            set_grad(parameters(optimizer)[0], gradient_of(spec, t))
            optimizer.step()
        assert_agrees(ours, theirs)
        synchronise(ours, theirs)


@pytest.mark.parametrize("shape", [(4, 130), (9,)], ids=str)
def test_without_averaging_the_momentum_is_the_gradient(shape: tuple[int, ...]) -> None:
    """To the bit, whatever it was before."""
    optimizer = optimizer_of(Spec(shape, flags={"betas": (0.0, 0.9)}), "triton")
    [p] = parameters(optimizer)
    for scale in (1e6, 1.0):
        p.grad = scale * torch.randn(shape).to(DEVICE)
        optimizer.step()
        assert_same_bits(optimizer.state[p]["exp_avg"], p.grad)


@pytest.mark.parametrize("shape", [(4, 130), (60,)], ids=str)
def test_subnormal_float16_is_rounded_as_the_references(shape: tuple[int, ...]) -> None:
    """Updates of a sixth of 2^-24, the unit there."""
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


@pytest.mark.parametrize("shape", [(150, 2), (2, 150)], ids=str)
def test_stripes_longer_than_one_block(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(tile_sizes, "STRIPE_BLOCK", 64)
    test_every_step_is_the_references(Spec(shape))


# ---------------------------------------------------------------------------------------------
# against the oracle
# ---------------------------------------------------------------------------------------------

FOLLOWED_SHAPES = [(), (5,), (4, 130), (1, 6), (6, 1), (2, 3, 7)]


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_mixed_parameters_follow_the_oracle(dtype: torch.dtype, momentum_dtype: str) -> None:
    """With a gradient missing now and then, so that steps differ, and one of zeros."""
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
def test_what_is_not_finite_stays_so_where_the_references_does(
    lagged: bool, bad: float, momentum_dtype: str
) -> None:
    """In the step of a bad gradient, whose square may be what overflows, and in the next."""
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
def test_random_bits_are_those_of_rounding(start: int, step: int) -> None:
    """In parameters of any size."""
    out = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    at = torch.tensor([start], device=DEVICE)
    draw[(1,)](out, at, torch.tensor([step], dtype=torch.int32, device=DEVICE), SIZE=64)
    assert torch.equal(out, rounding.random_bits(start, 64, step, torch.device(DEVICE)))


# ---------------------------------------------------------------------------------------------
# several parameters
# ---------------------------------------------------------------------------------------------


def mixed_specs() -> list[Spec]:
    coded = [spec for spec in SPECS if not spec.flags and spec.momentum_dtype == "int8"]
    return [*coded[::4], Spec((5,)), Spec((), dtype=BF16), Spec((4, 130), dtype=F16)]


def test_other_parameters_change_no_bit() -> None:
    specs = mixed_specs()
    alone = [optimizer_of(spec, "triton") for spec in specs]
    groups = []
    for spec in specs:
        [p] = parameters(optimizer_of(spec, "triton"))
        groups.append({"params": [p], "blocks": spec.blocks, "momentum_dtype": spec.momentum_dtype})
    one_group = {"params": [group["params"][0] for group in groups], "momentum_dtype": "int8"}
    one_group["blocks"] = [group["blocks"] for group in groups]
    together = StripedAdamW([one_group], lr=0.01, weight_decay=0.1, backend="triton")
    for t in range(2):
        for spec, p, optimizer in zip(specs, parameters(together), alone, strict=True):
            optimizer.param_groups[0]["momentum_dtype"] = "int8"
            set_grad(p, gradient_of(spec, t))
            set_grad(parameters(optimizer)[0], gradient_of(spec, t))
            optimizer.step()
        together.step()
    for p, optimizer in zip(parameters(together), alone, strict=True):
        [q] = parameters(optimizer)
        assert_same_bits(p, q)
        for key, value in optimizer.state[q].items():
            assert_same_bits(together.state[p][key], value, key)


def test_runs_repeat_bit_for_bit() -> None:
    results = []
    for _ in range(2):
        optimizer = optimizer_of(Spec((40, 300), "int8", dtype=BF16), "triton")
        for t in range(2):
            set_grad(parameters(optimizer)[0], torch.randn(40, 300).to(DEVICE, BF16))
            torch.manual_seed(t)
            optimizer.step()
        results.append(snapshot(optimizer))
        torch.manual_seed(20240607)
    assert_same_snapshot(*results)


def test_gradients_that_come_elsewhere_in_memory() -> None:
    """New addresses, of other alignment and other layout than the step before."""
    spec = Spec((20, 128), "int8")
    ours, theirs = optimizer_of(spec, "triton"), optimizer_of(spec, "reference")
    for t in range(6):
        g = gradient_of(spec, t)
        set_grad(parameters(theirs)[0], g)
        if t % 3 == 1:
            buffer = torch.empty(g.numel() + 1, device=DEVICE)
            buffer[1:] = g.flatten()
            g = buffer[1:].view(g.shape)
        if t % 3 == 2:
            g = lay_out(g, "transposed")
        set_grad(parameters(ours)[0], g)
        ours.step()
        theirs.step()
        assert_agrees(ours, theirs)
        synchronise(ours, theirs)


def lagged_pair() -> tuple[list[Spec], list[StripedAdamW]]:
    """One lagged group: blocks of whole tiles, other blocks, a transposed matrix and a vector."""
    specs = [
        Spec((140, 256), "int8", (1, 2)),
        Spec((6, 9), "int8", (1, 3)),
        Spec((5, 7), "int8", layout="transposed"),
        Spec((3, 130), "int8"),
        Spec((9,)),
    ]
    pair = []
    for backend in ("triton", "reference"):
        group = {"params": [parameters(optimizer_of(spec, backend))[0] for spec in specs]}
        group["blocks"] = [spec.blocks for spec in specs]
        pair.append(
            StripedAdamW([group], 0.01, momentum_dtype="int8", lagged=True, backend=backend)
        )
    return specs, pair


@pytest.mark.parametrize("late", [0, 1, 3])
def test_a_first_step_among_later_ones(late: int) -> None:
    """Of a parameter whose gradients begin at the others' second step."""
    specs, (ours, theirs) = lagged_pair()
    for t in range(3):
        for optimizer in (ours, theirs):
            for i, (spec, p) in enumerate(zip(specs, parameters(optimizer), strict=True)):
                if (i, t) != (late, 0):
                    set_grad(p, gradient_of(spec, t))
            optimizer.step()
        assert_agrees(ours, theirs)
        synchronise(ours, theirs)


def test_a_lagged_step_is_that_of_its_two_functions() -> None:
    """Sharded parameters use the two."""
    specs, (ours, theirs) = lagged_pair()
    for t in range(3):
        for optimizer in (ours, theirs):
            for spec, p in zip(specs, parameters(optimizer), strict=True):
                set_grad(p, gradient_of(spec, t))
        [(_, settings, table)], *_ = ours._collect()
        roots = reference.stripes(table, launch.statistics(table), settings)
        launch.update(table, roots, settings)
        theirs.step()
        assert_agrees(ours, theirs)
        synchronise(ours, theirs)


def entry_of(p: torch.nn.Parameter, optimizer: StripedAdamW) -> Entry:
    return Entry(p, p.grad, optimizer.state[p], "float32", (1, 1), 2)


def test_roots_may_come_from_elsewhere() -> None:
    """Sharding changes the sums between the two functions; here they are four times as large."""
    spec = Spec((5, 40))
    optimizers = [optimizer_of(spec, "triton") for _ in range(2)]
    for optimizer in optimizers:
        set_grad(parameters(optimizer)[0], gradient_of(spec, 0))
        optimizer.step()
    settings = settings_of(optimizers[0].param_groups[0], capturable=False)
    entries = [[entry_of(parameters(o)[0], o)] for o in optimizers]
    sums_of_each = [launch.statistics(of_one) for of_one in entries]
    expected = reference.statistics(entries[0])
    for sums in sums_of_each:  # of other parameters of the same shapes
        assert sums[0] is not None
        for actual, wanted in zip(sums[0], expected[0], strict=True):
            torch.testing.assert_close(actual, wanted, **STRIPES)
    for of_one, sums in zip(entries, sums_of_each, strict=True):
        roots = reference.stripes(of_one, [tuple(4 * part for part in sums[0])], settings)
        launch.update(of_one, roots, settings)
    assert_same_snapshot(*(snapshot(o) for o in optimizers))


def test_other_strides_are_the_references_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    launch._warn_once.cache_clear()
    specs = [
        Spec((6, 10), "int8", layout="strided"),
        Spec((5,), layout="strided"),
        Spec((2, 3, 7), layout="permuted"),
        Spec((4, 6), "int8"),
    ]
    ours, theirs = (
        StripedAdamW(
            [
                {"params": parameters(optimizer_of(s, backend)), "momentum_dtype": s.momentum_dtype}
                for s in specs
            ],
            lr=0.01,
            backend=backend,
        )
        for backend in ("triton", "reference")
    )
    with caplog.at_level(logging.WARNING):
        for t in range(3):
            for optimizer in (ours, theirs):
                for spec, p in zip(specs, parameters(optimizer), strict=True):
                    set_grad(p, gradient_of(spec, t))
                optimizer.step()
    assert sum("contiguous" in record.message for record in caplog.records) == 1
    for p, q in list(zip(parameters(ours), parameters(theirs), strict=True))[:3]:
        assert_same_bits(p, q)
    torch.testing.assert_close(parameters(ours)[3], parameters(theirs)[3], rtol=1e-5, atol=1e-6)


def test_a_transposed_parameters_adamw_state_is_laid_out_anew() -> None:
    """AdamW's moments have the parameter's strides; ours are contiguous, as the kernels need."""
    p = torch.nn.Parameter(torch.randn(6, 4).to(DEVICE).T)
    p.grad = torch.randn(6, 4).to(DEVICE).T
    adamw = torch.optim.AdamW([p])
    adamw.step()
    optimizer = StripedAdamW([p], momentum_dtype="bfloat16", backend="triton")
    optimizer.load_state_dict(adamw.state_dict())
    assert all(value.is_contiguous() for value in optimizer.state[p].values())


def test_no_entries_and_empty_tensors() -> None:
    empty, other = (parameter(torch.ones(shape), device=DEVICE) for shape in ((0, 5), (3, 5)))
    optimizer = StripedAdamW([empty, other], backend="triton")
    optimizer.step()
    empty.grad, other.grad = torch.ones_like(empty), torch.ones_like(other)
    optimizer.step()
    assert (other != 1).all()
    assert launch.statistics([]) == []


# ---------------------------------------------------------------------------------------------
# capturable
# ---------------------------------------------------------------------------------------------


def capturable_pair(momentum_dtype: str, lr: Any, **more: Any) -> tuple[StripedAdamW, StripedAdamW]:
    pair = []
    for capturable in (False, True):
        torch.manual_seed(1)
        ps = [parameter(torch.randn(s), BF16, DEVICE) for s in ((4, 130), (5,), (2, 3, 7))]
        rate = copy.copy(lr) if capturable else float(lr)
        options = {"momentum_dtype": momentum_dtype, "capturable": capturable, **more}
        pair.append(StripedAdamW(ps, lr=rate, backend="triton", **options))
    return pair[0], pair[1]


@pytest.mark.parametrize("lagged", [False, True])
@pytest.mark.parametrize("momentum_dtype", ["float32", "int8"])
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05), torch.tensor([0.05])], ids=repr)
def test_capturable_steps_are_the_others(lr: Any, momentum_dtype: str, lagged: bool) -> None:
    if isinstance(lr, torch.Tensor):
        lr = lr.to(DEVICE)
    plain, capturable = capturable_pair(momentum_dtype, lr, lagged=lagged)
    for t in range(3):
        for p, q in zip(parameters(plain), parameters(capturable), strict=True):
            p.grad = torch.randn(p.shape).to(DEVICE, BF16) if (p.ndim, t) != (1, 2) else None
            q.grad = p.grad
        plain.step()
        capturable.step()
        if t == 1:
            saved = copy.deepcopy(capturable.state_dict())
            capturable.load_state_dict(saved)
    assert all(state["step"].device.type == DEVICE for state in capturable.state.values())
    for p, q in zip(parameters(plain), parameters(capturable), strict=True):
        assert_same_bits(p, q)
        for key, value in plain.state[p].items():
            assert_same_bits(capturable.state[q][key].cpu(), value.cpu(), key)
    assert copy.deepcopy(capturable).capturable
    plain.load_state_dict(capturable.state_dict())
    assert all(state["step"].device.type == "cpu" for state in plain.state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_learning_rate_in_memory(dtype: torch.dtype) -> None:
    """As the optimizer hands it over where it lies on a GPU."""
    optimizers = [optimizer_of(Spec(shape), "triton") for shape in ((4, 130), (4, 130), (9,), (9,))]
    for i, optimizer in enumerate(optimizers):
        [p] = parameters(optimizer)
        p.grad = gradient_of(Spec(tuple(p.shape)), 0)
        optimizer.step()
        p.grad = gradient_of(Spec(tuple(p.shape)), 1)
        settings = settings_of(optimizer.param_groups[0], capturable=True)
        if i % 2:
            lr = torch.tensor(settings.lr, dtype=dtype, device=DEVICE)
            settings = dataclasses.replace(settings, lr=lr)
        launch.step([entry_of(p, optimizer)], settings)
    for plain, in_memory in (optimizers[:2], optimizers[2:]):
        torch.testing.assert_close(parameters(plain), parameters(in_memory), rtol=2e-7, atol=0)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_capturable_elsewhere_says_what_it_needs(backend: str) -> None:
    p = parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    optimizer = StripedAdamW([p], backend=backend, capturable=True)
    with pytest.raises(RuntimeError, match=r"capturable.*triton"):
        optimizer.step()
    assert (p == 1).all()
    assert not optimizer.state


def test_capturable_takes_no_other_strides() -> None:
    p = torch.nn.Parameter(torch.ones(4, 8).to(DEVICE)[:, ::2])
    set_grad(p, torch.ones(4, 4).to(DEVICE))
    optimizer = StripedAdamW([p], backend="triton", capturable=True)
    with pytest.raises(RuntimeError, match="contiguous"):
        optimizer.step()


def warmed_up(optimizer: StripedAdamW, steps: int = 1) -> None:
    """Takes steps on a side stream, as torch's notes on CUDA graphs have it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(steps):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("lagged", [False, True])
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_a_cuda_graph_of_a_step(momentum_dtype: str, lagged: bool) -> None:
    """Replayed, it goes on with the steps and rates that an optimizer without a graph has."""
    lr = torch.tensor(0.05, device="cuda")
    plain, capturable = capturable_pair(momentum_dtype, lr, lagged=lagged)
    for p, q in zip(parameters(plain), parameters(capturable), strict=True):
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)

    def draw_gradients(t: int) -> None:
        torch.manual_seed(t)
        for p, q in zip(parameters(plain), parameters(capturable), strict=True):
            p.grad.copy_(torch.randn_like(p))
            q.grad.copy_(p.grad)

    draw_gradients(0)
    plain.step()
    warmed_up(capturable)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capturable.step()
    for t in range(1, 5):
        draw_gradients(t)
        for group in plain.param_groups:
            group["lr"] = 0.05 / t
        capturable.param_groups[0]["lr"].fill_(0.05 / t)
        plain.step()
        if t == 3:  # a step outside of the graph, with gradients elsewhere, does not disturb it
            held = [q.grad for q in parameters(capturable)]
            for q in parameters(capturable):
                q.grad = q.grad.clone()
            capturable.step()
            for q, g in zip(parameters(capturable), held, strict=True):
                q.grad = g
        else:
            graph.replay()
    torch.cuda.synchronize()
    for p, q in zip(parameters(plain), parameters(capturable), strict=True):
        assert_same_bits(p, q)
        assert float(capturable.state[q]["step"]) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
def test_a_capture_without_capturable_raises() -> None:
    p = parameter(torch.ones(3, 4), device="cuda")
    p.grad = torch.ones_like(p)
    optimizer = StripedAdamW([p])
    warmed_up(optimizer)
    with (
        pytest.raises(RuntimeError, match="capturable=True"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


# ---------------------------------------------------------------------------------------------
# compilation
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_inside_a_compiled_training_step(backend: str) -> None:
    """Tracing stops at the optimizer and goes on behind it; the steps are the same."""
    try:
        backends.resolve(backend, DEVICE)
    except RuntimeError as error:
        pytest.skip(str(error))
    torch._dynamo.reset()
    x = torch.randn(3, 8, 6, device=DEVICE)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 4).to(DEVICE)
        optimizer = StripedAdamW(model.parameters(), lr=0.1, backend=backend)

        def train(
            batch: torch.Tensor, model: torch.nn.Module = model, o: StripedAdamW = optimizer
        ) -> torch.Tensor:
            o.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            o.step()
            return loss

        step = torch.compile(train, backend="eager") if compiled else train
        results.append((*(step(batch).item() for batch in x), *snapshot(optimizer)[0:3:2]))
    assert results[0][:3] == pytest.approx(results[1][:3])
    for expected, actual in zip(results[0][3:], results[1][3:], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
def test_steps_and_rates_compile_nothing_anew() -> None:
    """Not step 1 or 16, not a rate of 0 or 1, nor a gradient at a new address."""
    optimizer = optimizer_of(Spec((64, 128), "int8", dtype=BF16), "triton")
    [p] = parameters(optimizer)

    def compiled() -> int:
        functions = (kernels.statistics_kernel, kernels.combine_kernel, kernels.stripes_kernel)
        functions += (kernels.matrices_kernel, kernels.vectors_kernel)
        return sum(len(cache[0]) for f in functions for cache in f.device_caches.values())

    counts = set()
    for t in range(34):
        optimizer.param_groups[0]["lr"] = [1.0, 0.0, 1, 16, 0.1][t % 5]
        set_grad(p, gradient_of(Spec((64, 128), dtype=BF16), t))
        optimizer.step()
        counts.add(compiled())
    assert len(counts) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
def test_auto_is_triton_on_a_gpu() -> None:
    assert backends.resolve("auto", "cuda") is launch


def run_python(*command: str | Path, **environment: str) -> None:
    """Runs Python in a separate process, without TRITON_INTERPRET unless it is given."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    finished = subprocess.run(
        command,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


COMPILE_KERNELS = Path(__file__).with_name("compile_kernels.py")
REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="the other tests compile them for this GPU")
def test_the_kernels_compile_for_real_gpus(tmp_path: Path) -> None:
    """To PTX of sm_80 and sm_90, which needs no GPU, with vector loads and no local memory."""
    run_python(sys.executable, COMPILE_KERNELS, TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.compat
@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.3.1", "3.6.0"])
def test_other_versions_of_triton_compile_and_interpret_the_kernels(
    version: str, tmp_path: Path
) -> None:
    # their interpreters need an older NumPy
    packages = (f"triton=={version}", "numpy<2.4")
    python = make_overlay(tmp_path / "environment", packages, [str(REPOSITORY)])
    found = f"import triton; assert triton.__version__ == {version!r}, triton.__version__"
    run_python(python, "-c", found)
    run_python(python, COMPILE_KERNELS, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    pytest_options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "5x130 or random_bits")
    run_python(python, *pytest_options, __file__, TRITON_INTERPRET="1")
