"""StripedAdamW against the float64 oracle, over shapes, dtypes, blocks, settings and scales."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optim_checks import (
    FORMATS,
    LAYOUTS,
    PARAM_DTYPES,
    Follower,
    assert_same_bits,
    lay_out,
    parameter,
    parameters,
    set_grad,
    to_numpy,
)

from striped_hf import StripedAdamW

pytestmark = pytest.mark.usefixtures("every_backend")


class Tolerance(NamedTuple):
    """The allowed error if gradients are at least ``scale``, relative to the summed terms."""

    scale: float
    rtol: float
    tiny: float  # absolute, for second moments
    reason: str


TOLERANCES = (
    Tolerance(
        1e-13,
        4e-6,
        0.0,
        "about a dozen fp32 roundings of 6e-8 each, and the means of up to thousands of squares",
    ),
    Tolerance(
        1e-16,
        2e-5,
        1e-42,
        "(1 - b2) g^2 may be 1e-38, where fp32 turns denormal and its spacing is 1.4e-45",
    ),
    Tolerance(
        1e-18,
        1e-3,
        4e-44,
        "(1 - b2) g^2 down to 1e-41 is denormal: its spacing of 1.4e-45 is 1e-4 of it, per step",
    ),
)


def tolerance_at(scale: float) -> Tolerance:
    return next(t for t in TOLERANCES if scale >= 0.999 * t.scale)


# ---------------------------------------------------------------------------------------------
# random problems
# ---------------------------------------------------------------------------------------------

SIDES = (1, 2, 3, 5, 7, 8, 12, 31, 64, 127, 128, 129, 200, 256, 257, 385)
MOST_ELEMENTS = 12_000
MOST_MATRICES = 16


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    shape = draw(
        st.one_of(
            st.just(()),
            st.lists(st.sampled_from(SIDES), min_size=1, max_size=4).map(tuple),
            st.sampled_from(SIDES).map(lambda n: (1, n)),
            st.sampled_from(SIDES).map(lambda n: (n, 1)),
            st.sampled_from([(0,), (0, 5), (5, 0), (2, 0, 3), (0, 3, 4), (1, 2, 3, 0)]),
        )
    )
    while math.prod(shape[:-2]) > MOST_MATRICES:  # the oracle loops over them
        largest = max(shape[:-2])
        shape = (*(n // 2 if n == largest else n for n in shape[:-2]), *shape[-2:])
    while math.prod(shape) > MOST_ELEMENTS:
        largest = max(shape)
        shape = tuple(n // 2 if n == largest else n for n in shape)
    return shape


def divisors(n: int) -> list[int]:
    return [d for d in range(1, min(n, 12) + 1) if n % d == 0] or [1]


class Problem(NamedTuple):
    shape: tuple[int, ...]
    copies: int
    dtype: torch.dtype
    grad_dtype: torch.dtype
    layout: str
    grad_layout: str
    present: tuple[bool, ...]  # in which step there is a gradient


@st.composite
def groups(draw: st.DrawFn, steps: int, scale: float) -> dict[str, Any]:
    """One param group's settings, and the problems of its parameters under ``problems``."""
    shape = draw(shapes())
    blocks = (1, 1)
    if len(shape) >= 2 and draw(st.booleans()):
        blocks = tuple(draw(st.sampled_from(divisors(n))) for n in shape[-2:])
    # with blocks every matrix of the group must divide alike: one shape, else any
    count = 1 if blocks != (1, 1) else draw(st.integers(1, 3))
    master_bits = draw(st.sampled_from([None, 24]))
    dtypes = PARAM_DTYPES if master_bits is None else PARAM_DTYPES[:2]  # not float16
    problems = []
    for i in range(count):
        problems.append(
            Problem(
                shape if i == 0 else draw(shapes()),
                draw(st.sampled_from([1, 1, 3])),
                draw(st.sampled_from(dtypes)),
                # fp16 ends at 6e-8 below and 65504 above
                draw(st.sampled_from(PARAM_DTYPES if 1e-4 <= scale <= 1e2 else PARAM_DTYPES[:2])),
                draw(st.sampled_from(LAYOUTS)),
                draw(st.sampled_from(LAYOUTS)),
                tuple(draw(st.sampled_from([True, True, False])) for _ in range(steps)),
            )
        )
    return {
        "problems": problems,
        "lr": draw(st.sampled_from([0.0, 1e-5, 1e-3, 3e-2, 0.3])),
        "betas": (
            draw(st.sampled_from([0.0, 0.5, 0.9, 0.99])),
            # b1^2 may be less than b2, as usual, equal (0.9, 0.81) or more
            draw(st.sampled_from([0.0, 0.81, 0.95, 0.99, 0.999, 0.999])),
        ),
        "eps": draw(st.sampled_from([0.0, 1e-8, 1e-3, 1e-3 * scale, scale])),
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.5])),
        "maximize": draw(st.booleans()),
        "nesterov": draw(st.booleans()),
        "lagged": draw(st.booleans()),
        "momentum_dtype": draw(st.sampled_from(FORMATS)),
        "stochastic_rounding": draw(st.sampled_from([None, True, False])),
        "master_bits": master_bits,
        "blocks": blocks,
    }


def gradient(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> torch.Tensor:
    """Either sign, magnitudes within 16 of ``scale``, with rows and columns of unequal size."""
    values = rng.choice([-1.0, 1.0], shape) * 2.0 ** rng.uniform(0, 2, shape)
    if len(shape) >= 2:
        values = values * 2.0 ** rng.uniform(0, 1, (*shape[:-1], 1))
        values = values * 2.0 ** rng.uniform(0, 1, (*shape[:-2], 1, shape[-1]))
    return torch.as_tensor(scale * values)


@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_every_number_agrees_with_the_oracle(device: str, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, 4), "steps")
    scale = 10.0 ** data.draw(st.integers(-18, 6), "gradient scale, a power of ten")
    drawn = [data.draw(groups(steps, scale)) for _ in range(data.draw(st.integers(1, 2)))]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))

    problems = []
    for group in drawn:
        group["params"] = []
        for problem in group.pop("problems"):
            for _ in range(problem.copies):
                values = torch.as_tensor(rng.standard_normal(problem.shape))
                laid = lay_out(values.to(device, problem.dtype), problem.layout)
                group["params"].append(torch.nn.Parameter(laid))
                problems.append((group["params"][-1], problem))

    optimizer = StripedAdamW(drawn)
    tolerance = tolerance_at(scale)
    follower = Follower(optimizer, tolerance.rtol, tolerance.tiny)
    for t in range(steps):
        for p, problem in problems:
            if not problem.present[t]:
                set_grad(p, None)
                continue
            g = gradient(rng, problem.shape, scale).to(device, problem.grad_dtype)
            set_grad(p, lay_out(g, problem.grad_layout))
        for group in optimizer.param_groups:
            group["lr"] *= 0.7  # as a scheduler does
        follower.step()


# ---------------------------------------------------------------------------------------------
# zeros
# ---------------------------------------------------------------------------------------------

ZERO_SHAPES = [(), (5,), (4, 6), (1, 6), (6, 1), (2, 3, 130)]


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("lr", [0.0, 0.1])
@pytest.mark.parametrize("zeros", [(0,), (1, 2), (0, 1, 2, 3), (3,)], ids=str)
@pytest.mark.parametrize("dtype", PARAM_DTYPES, ids=str)
def test_all_zero_gradients(
    dtype: torch.dtype, zeros: tuple[int, ...], lr: float, eps: float, momentum_dtype: str
) -> None:
    """Zeros come first (as after a sharded checkpoint), later, or always, and never give NaN."""
    ps = [parameter(torch.randn(shape), dtype) for shape in ZERO_SHAPES]
    start = [p.detach().clone() for p in ps]
    optimizer = StripedAdamW(
        ps, lr=lr, eps=eps, weight_decay=0.0, momentum_dtype=momentum_dtype, betas=(0.9, 0.99)
    )
    follower = Follower(optimizer, rtol=4e-6)
    only_zeros = True
    for t in range(4):
        only_zeros = only_zeros and t in zeros
        for p in ps:
            p.grad = torch.zeros_like(p) if t in zeros else torch.randn_like(p)
        follower.step()
        for p, before in zip(ps, start, strict=True):
            assert p.isfinite().all()
            if only_zeros:
                assert_same_bits(p, before)
        for state in optimizer.state.values():
            assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("blocks", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_zero_rows_columns_and_blocks_do_not_move(eps: float, blocks: tuple[int, int]) -> None:
    """An example are embedding rows of tokens that do not occur."""
    mask = torch.ones(8, 10)
    mask[2], mask[:, 3], mask[4:, 5:] = 0, 0, 0
    p = parameter(torch.randn(8, 10))
    start = p.detach().clone()
    optimizer = StripedAdamW([p], lr=0.1, eps=eps, weight_decay=0.0, blocks=blocks)
    follower = Follower(optimizer, rtol=4e-6)
    for _ in range(3):
        p.grad = torch.randn(8, 10) * mask
        follower.step()
    assert torch.equal(p[mask == 0], start[mask == 0])
    assert (p[mask == 1] != start[mask == 1]).all()


def test_a_row_that_wakes_up_late() -> None:
    """The row has no gradient for many steps, then one, then none."""
    p = parameter(torch.zeros(3, 5))
    optimizer = StripedAdamW([p], lr=0.1)
    follower = Follower(optimizer, rtol=4e-6)
    for t in range(30):
        p.grad = torch.randn(3, 5)
        p.grad[1] *= float(t == 15)
        follower.step()


# ---------------------------------------------------------------------------------------------
# long, many, large
# ---------------------------------------------------------------------------------------------

# b2 = 0.999 is 0.99900001287 in fp32 (in torch's AdamW too), and 1 / (1 - b2) of it is the level
# of the average: 1.3e-5 more after thousands of steps. The update uses its root. The errors of
# single roundings are a random walk and stay below this: 6e-8 sqrt(1000) = 2e-6.
THOUSAND_STEPS_MOMENT = 1.5e-5
THOUSAND_STEPS_UPDATE = 0.75e-5


def test_a_thousand_steps() -> None:
    """The oracle reads nothing from the optimizer, so errors must not accumulate."""
    rng = np.random.default_rng(7)
    settings: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
    kinds = [((6, 10), (1, 1)), ((6, 10), (2, 5)), ((2, 3, 4), (1, 1)), ((7,), (1, 1))]
    ps = [parameter(rng.standard_normal(shape)) for shape, _ in kinds]
    optimizer = StripedAdamW(
        [{"params": [p], "blocks": blocks} for p, (_, blocks) in zip(ps, kinds, strict=True)],
        weight_decay=0.1,
        **settings,
    )
    mine = [to_numpy(p) for p in ps]
    states = [oracle.new_state(shape, blocks) for shape, blocks in kinds]
    travelled = [np.zeros(shape) for shape, _ in kinds]
    for t in range(1, 1001):
        lr = 1e-2 * 0.5 * (1 + math.cos(math.pi * t / 1000))
        scale = 10 ** math.sin(t / 50)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for i, (shape, blocks) in enumerate(kinds):
            g = scale * rng.standard_normal(shape).astype(np.float32)
            ps[i].grad = torch.as_tensor(g, dtype=torch.float32)
            g = to_numpy(ps[i].grad)
            before = mine[i]
            mine[i], states[i] = oracle.step(
                mine[i], g, states[i], t, lr=lr, weight_decay=0.1, blocks=blocks, **settings
            )
            travelled[i] += np.abs(mine[i] - before)
        optimizer.step()
    for p, expected, path, state in zip(ps, mine, travelled, states, strict=True):
        allowed = THOUSAND_STEPS_UPDATE * path + math.sqrt(1000) * 2.0**-23 * np.abs(expected).max()
        assert (np.abs(to_numpy(p) - expected) <= allowed).all()
        stored = optimizer.state[p]
        assert float(stored["step"]) == 1000
        for key in ("row", "col") if p.ndim >= 2 else ("v",):
            name = {"v": "exp_avg_sq"}.get(key, f"exp_avg_sq_{key}")
            np.testing.assert_allclose(
                to_numpy(stored[name]), state[key], rtol=THOUSAND_STEPS_MOMENT
            )


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_small_tensors_of_the_same_shape(
    device: str, dtype: torch.dtype, momentum_dtype: str
) -> None:
    """A backend might stack them. Gradients have unequal sizes, and some are missing."""
    rng = np.random.default_rng(11)
    ps = [parameter(torch.randn(16, 24), dtype, device=device) for _ in range(60)]
    ps += [parameter(torch.randn(24), dtype, device=device) for _ in range(30)]
    ps += [parameter(torch.randn(24, 16), dtype, device=device) for _ in range(30)]
    optimizer = StripedAdamW(ps, lr=0.1, momentum_dtype=momentum_dtype)
    follower = Follower(optimizer, rtol=4e-6)
    for t in range(3):
        for i, p in enumerate(ps):
            g = gradient(rng, tuple(p.shape), 10.0 ** (i % 9 - 6)).to(device, torch.float32)
            if i % 5 == 2:
                g = torch.zeros_like(g)
            set_grad(p, None if (i + t) % 4 == 0 else g.to(dtype))
        follower.step()


LARGE = [
    # (shape, blocks): prime row counts divide no chunk; block borders at 2,002 and 858 rows do not
    # fall on a power of two either
    ((4099, 1030), (1, 2)),
    ((6006, 700), (3, 1)),
    ((6006, 702), (7, 3)),
    ((3, 1409, 997), (1, 1)),
    ((2, 1, 2_100_000), (1, 1)),
    ((600_001, 2), (1, 1)),
]


@pytest.mark.slow
@pytest.mark.parametrize("momentum_dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize(("shape", "blocks"), LARGE, ids=str)
def test_matrices_too_large_to_be_held_at_once(
    device: str, shape: tuple[int, ...], blocks: tuple[int, int], momentum_dtype: str
) -> None:
    dtype = torch.bfloat16 if momentum_dtype == "int8" else torch.float32
    p = parameter(torch.randn(shape), dtype, device=device)
    optimizer = StripedAdamW([p], lr=0.1, blocks=blocks, momentum_dtype=momentum_dtype)
    follower = Follower(optimizer, rtol=4e-6)
    rows = torch.logspace(-3, 1, shape[-2]).unsqueeze(1).to(device)
    for _ in range(2):
        set_grad(p, (torch.randn(shape, device=device) * rows).to(dtype))
        follower.step()


@pytest.mark.slow
def test_a_large_transposed_parameter_with_a_transposed_gradient() -> None:
    p = torch.nn.Parameter(torch.randn(1031, 4098).T)
    optimizer = StripedAdamW([p], lr=0.1, blocks=(3, 1), momentum_dtype="int8")
    follower = Follower(optimizer, rtol=4e-6)
    for _ in range(2):
        p.grad = torch.randn(1031, 4098).T
        follower.step()


def test_two_groups_keep_their_own_settings() -> None:
    settings: list[dict[str, Any]] = [
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3, "nesterov": True},
        {"lr": 0.01, "maximize": True, "blocks": (2, 1), "momentum_dtype": "int8"},
    ]
    groups = [
        {"params": [parameter(torch.randn(4, 6)), parameter(torch.randn(4))], **setting}
        for setting in settings
    ]
    optimizer = StripedAdamW(groups, lr=7.0)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        assert {key: group[key] for key in setting} == setting
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)
    follower = Follower(optimizer, rtol=4e-6)
    for _ in range(4):
        for p in parameters(optimizer):
            p.grad = torch.randn_like(p)
        follower.step()
