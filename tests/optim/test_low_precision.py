"""bfloat16 and float16 parameters: fp32 arithmetic, and rounding without a loss on average.

Matrices, and vectors in float16, are rounded. Vectors in bfloat16 keep the bits that it lacks.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from optim_checks import (
    FORMATS,
    LAYOUTS,
    assert_same_bits,
    bits,
    lay_out,
    parameter,
    set_grad,
    spacing,
    to_numpy,
)

from striped_hf import StripedAdamW
from striped_hf.optim import adamw_state_dict
from striped_hf.optim.rounding import join, split

pytestmark = pytest.mark.usefixtures("every_backend")

LOW = [torch.bfloat16, torch.float16]
low = pytest.mark.parametrize("dtype", LOW, ids=str)


def move(
    values: torch.Tensor,
    by: float,
    *,
    steps: int = 1,
    stochastic_rounding: bool | None = None,
    shape: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Subtracts ``by`` in each step of the optimizer: equal gradients make unit updates.

    One-dimensional values are a row of a matrix unless another shape is given.
    """
    shape = shape or (tuple(values.shape) if values.dim() > 1 else (1, *values.shape))
    p = parameter(values.reshape(shape).clone(), values.dtype)
    optimizer = StripedAdamW(
        [p], lr=abs(by), eps=0.0, weight_decay=0.0, stochastic_rounding=stochastic_rounding
    )
    for _ in range(steps):
        p.grad = torch.full_like(p, math.copysign(1.0, by))
        optimizer.step()
    return p.detach().reshape(values.shape)


def neighbours(exact: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    step = spacing(exact, dtype)
    below = np.floor(exact / step) * step
    return below, np.where(below == exact, exact, below + step)


# ---------------------------------------------------------------------------------------------
# the rounded parameters
# ---------------------------------------------------------------------------------------------


@low
def test_none_means_stochastic_for_low_precision(dtype: torch.dtype) -> None:
    values = torch.ones(400, dtype=dtype)
    assert_same_bits(move(values, 2e-4), move(values, 2e-4, stochastic_rounding=True))
    assert (move(values, 1e-4, stochastic_rounding=False) == 1).all()
    assert (move(values, 2e-4) != 1).any()


def test_fp32_parameters_are_never_rounded() -> None:
    values = torch.ones(50)
    expected = move(values, 1e-4, stochastic_rounding=False)
    for stochastic_rounding in (None, True):
        assert_same_bits(move(values, 1e-4, stochastic_rounding=stochastic_rounding), expected)


@low
@pytest.mark.parametrize("shape", [(30,), (6, 5), ()], ids=str)
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_the_arithmetic_is_fp32(
    momentum_dtype: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """An fp32 run, rounded to nearest in each step, has the bits of the low precision run.

    For vectors in bfloat16, which keep the lost bits, the fp32 run is not rounded between steps.
    """
    p = parameter(torch.randn(shape), dtype)
    q = parameter(p.detach().float())
    settings = {"lr": 0.01, "weight_decay": 0.1, "momentum_dtype": momentum_dtype}
    ours = StripedAdamW([p], stochastic_rounding=False, **settings)
    exact = StripedAdamW([q], **settings)
    for _ in range(6):
        g = torch.randn(shape).to(dtype)
        set_grad(p, g)
        q.grad = g.float()
        ours.step()
        exact.step()
        rounded = q.detach().to(dtype)
        assert_same_bits(p, rounded)
        if dtype == torch.bfloat16 and len(shape) < 2:
            assert_same_bits(join(p.detach(), ours.state[p]["param_low_bits"]), q.detach())
        else:
            q.data.copy_(rounded)
    for key, value in exact.state[q].items():
        assert_same_bits(ours.state[p][key], value, key)


@low
def test_gradients_keep_their_own_precision(dtype: torch.dtype) -> None:
    """The step does not round the fp32 gradient of a low precision parameter."""
    p, q = parameter(torch.zeros(4, 5), dtype), parameter(torch.zeros(4, 5))
    ours, exact = StripedAdamW([p]), StripedAdamW([q])
    g = torch.randn(4, 5)
    set_grad(p, g)
    q.grad = g
    ours.step()
    exact.step()
    for key, value in exact.state[q].items():
        assert_same_bits(ours.state[p][key], value, key)


def test_fp16_gradients_whose_squares_underflow_fp16() -> None:
    p = parameter(torch.ones(4, 5), torch.float16)
    p.grad = torch.full((4, 5), 1e-5, dtype=torch.float16)
    optimizer = StripedAdamW([p], lr=0.25, weight_decay=0.0)
    optimizer.step()
    torch.testing.assert_close(p.detach().float(), torch.full((4, 5), 0.75), rtol=2e-3, atol=0)


# ---------------------------------------------------------------------------------------------
# the rounding
# ---------------------------------------------------------------------------------------------

# (dtype, value, subtracted number): from 1/1000 to 999/1000 of a spacing, both directions and
# signs, large, small, subnormal
UNBIASED = [
    (torch.bfloat16, 1.0, 1e-4),
    (torch.bfloat16, 1.0, -1e-4),
    (torch.bfloat16, -1.0, 1e-4),
    (torch.bfloat16, 1.0, 3.9e-6),
    (torch.bfloat16, 100.0, 0.37),
    (torch.bfloat16, 1.0, 2e-3),
    (torch.bfloat16, 2.0**-100, 2.0**-110),
    (torch.float16, 1.0, 1e-4),
    (torch.float16, -1.0, 3e-5),
    (torch.float16, 1000.0, 0.1),
    (torch.float16, 2.0**-13, 1e-8),
    (torch.float16, 2.0**-14, 1e-8),  # from the smallest normal into the subnormals
    (torch.float16, 51 * 2.0**-24, 1e-8),  # subnormal
    (torch.float16, 2.0**-24, 1e-8),  # the smallest subnormal
    (torch.float16, 0.0, 1e-8),  # from zero, in both directions
    (torch.float16, 0.0, -1e-8),
]


@pytest.mark.parametrize(("dtype", "value", "by"), UNBIASED, ids=str)
def test_rounding_is_to_a_neighbour_and_unbiased(
    dtype: torch.dtype, value: float, by: float
) -> None:
    n = 2**18
    start = torch.full((n,), value, dtype=dtype)
    exact = np.float64(np.float32(to_numpy(start)[0] - by))
    moved = to_numpy(move(start, by))
    below, above = (float(side) for side in neighbours(np.asarray(exact), dtype))
    assert set(np.unique(moved)) <= {below, above}
    up = (exact - below) / spacing(np.asarray(exact), dtype)
    deviation = math.sqrt(max(up * (1 - up), 1 / n) / n)
    # the bits are a fixed function, so this draw never changes: four deviations
    assert abs((moved == above).mean() - up) < 4 * deviation + 2.0**-16


@low
def test_rounding_bits_look_independent(dtype: torch.dtype) -> None:
    """They do not depend on the neighbour, the row below, the next steps, or the position."""
    side = 512
    start = torch.ones(side, side, dtype=dtype)
    half = float(spacing(np.asarray(0.99), dtype)) / 2
    drawn = []
    p = parameter(start.clone(), dtype)
    optimizer = StripedAdamW([p], lr=half, eps=0.0, weight_decay=0.0)
    for _ in range(6):
        p.data.fill_(1.0)
        p.grad = torch.ones_like(p)
        optimizer.step()
        drawn.append((to_numpy(p) < 1).astype(np.float64) - 0.5)

    def correlation(x: np.ndarray, y: np.ndarray) -> float:
        return float(4 * (x * y).mean())

    limit = 4.5 / side  # standard deviations of a mean of side^2 fair signs
    for x in drawn:
        assert abs(2 * x.mean()) < limit
        for lag in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256):
            assert abs(correlation(x, np.roll(x, lag, 1))) < limit, f"columns {lag} apart"
            assert abs(correlation(x, np.roll(x, lag, 0))) < limit, f"rows {lag} apart"
        assert np.abs(2 * x.mean(axis=0)).max() < 5 / math.sqrt(side)
        assert np.abs(2 * x.mean(axis=1)).max() < 5 / math.sqrt(side)
    for i in range(6):
        for j in range(i):
            assert abs(correlation(drawn[i], drawn[j])) < limit, f"steps {j + 1} and {i + 1}"


@low
def test_the_bits_are_fine_enough_for_small_fractions(dtype: torch.dtype) -> None:
    """An update of 1/4096 of a spacing happens once in 4096 elements, not never."""
    n = 2**20
    by = float(spacing(np.asarray(0.99), dtype)) / 4096
    moved = (move(torch.ones(n, dtype=dtype), by) != 1).sum().item()
    assert abs(moved - n / 4096) < 4 * math.sqrt(n / 4096)


@low
@pytest.mark.parametrize("steps", [1, 4])
def test_exact_values_are_not_rounded(dtype: torch.dtype, steps: int) -> None:
    """Every number of the format, Inf, -0.0 and subnormals included, survives a step of zero."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for lr, g in ((0.0, 1.0), (0.1, 0.0)):
        p = parameter(every.clone(), dtype)
        optimizer = StripedAdamW([p], lr=lr, weight_decay=0.0)
        for _ in range(steps):
            p.grad = torch.full_like(p, g)
            optimizer.step()
        nan = every.isnan()
        assert p.detach()[nan].isnan().all()
        # a sum of -0.0 and 0.0 may be either zero
        rest = ~nan & (every != 0)
        assert_same_bits(p.detach()[rest], every[rest])
        assert (p.detach()[every == 0] == 0).all()


@low
def test_updates_that_are_multiples_of_the_spacing_are_exact(dtype: torch.dtype) -> None:
    start = torch.full((1000,), 3.0, dtype=dtype)
    assert (move(start, 0.25, steps=3) == 2.25).all()


@low
def test_inf_and_nan_gradients_give_nan(dtype: torch.dtype) -> None:
    for bad in (math.inf, -math.inf, math.nan):
        p = parameter(torch.ones(3), dtype)
        optimizer = StripedAdamW([p], lr=0.1)
        p.grad = torch.tensor([1.0, bad, 1.0], dtype=dtype)
        optimizer.step()
        assert p.isnan().tolist() == [False, True, False]


@low
def test_overflow_is_infinite_as_in_every_cast(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    p = parameter(torch.tensor([-0.75, 0.75]) * most, dtype)
    optimizer = StripedAdamW([p], lr=0.75 * most, betas=(0.0, 0.0), weight_decay=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p[0] == -math.inf
    assert p[1].isfinite()


# ---------------------------------------------------------------------------------------------
# vectors in bfloat16
# ---------------------------------------------------------------------------------------------


def norms(dtype: torch.dtype, steps: int = 20, **options: Any) -> tuple[torch.Tensor, StripedAdamW]:
    """Trains weights of about 1 with updates that bfloat16 would lose."""
    torch.manual_seed(0)
    p = parameter(1 + 0.1 * torch.randn(300).bfloat16(), dtype)
    optimizer = StripedAdamW([p], lr=1e-5, **options)
    train_norms(p, optimizer, range(steps))
    return p, optimizer


def train_norms(p: torch.Tensor, optimizer: StripedAdamW, steps: range) -> None:
    for t in steps:
        p.grad = torch.randn(300, generator=torch.Generator().manual_seed(t)).bfloat16().to(p)
        optimizer.step()


@pytest.mark.parametrize("stochastic_rounding", [True, False])
def test_vectors_in_bfloat16_are_updated_as_in_float32(stochastic_rounding: bool) -> None:
    exact, _ = norms(torch.float32)
    p, optimizer = norms(torch.bfloat16, stochastic_rounding=stochastic_rounding)
    low_bits = optimizer.state[p]["param_low_bits"]
    assert low_bits.dtype == torch.int32
    assert_same_bits(join(p.detach(), low_bits), exact.detach())
    assert_same_bits(p.detach(), exact.detach().bfloat16())


def test_the_low_bits_are_saved_and_loaded() -> None:
    whole, _ = norms(torch.bfloat16)
    p, optimizer = norms(torch.bfloat16, steps=10)
    loaded = StripedAdamW([p], lr=1e-5)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_norms(p, loaded, range(10, 20))
    assert_same_bits(p.detach(), whole.detach())


@pytest.mark.parametrize("saved", ["float32", "AdamW"])
def test_a_state_without_low_bits_is_loaded(saved: str) -> None:
    p, optimizer = norms(torch.float32)
    q = parameter(p.detach(), torch.bfloat16)
    loaded = StripedAdamW([q], lr=1e-5)
    state_dict = optimizer.state_dict() if saved == "float32" else adamw_state_dict(optimizer)
    assert "param_low_bits" not in state_dict["state"][0]
    loaded.load_state_dict(state_dict)
    assert (loaded.state[q]["param_low_bits"] == 0).all()
    train_norms(q, loaded, range(20, 22))


def test_a_vector_may_change_its_dtype_between_steps() -> None:
    p, optimizer = norms(torch.float32)
    p.data = p.data.bfloat16()
    train_norms(p, optimizer, range(20, 22))
    assert optimizer.state[p]["param_low_bits"].dtype == torch.int32
    p.data = p.data.float()
    train_norms(p, optimizer, range(22, 24))
    assert optimizer.state[p]["step"] == 24


def test_every_float32_is_the_sum_of_its_halves() -> None:
    values = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32).view(torch.float32)
    values[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    high, low_bits = split(values)
    finite = ~values.isnan()
    assert_same_bits(join(high, low_bits)[finite], values[finite])
    assert high[~finite].isnan().all()
    nearest = values[finite].bfloat16().double() - values[finite].double()
    off = (high[finite].double() - values[finite].double()).abs()
    assert (off.nan_to_num(0) <= nearest.abs().nan_to_num(0)).all()  # Inf - Inf


# ---------------------------------------------------------------------------------------------
# the purpose of stochastic rounding
# ---------------------------------------------------------------------------------------------


def test_small_updates_move_a_bf16_weight_like_an_fp32_weight() -> None:
    """The weight 1.0 gets a hundred updates of 1e-4, a fortieth of the spacing."""
    expected = 1 - 100 * 1e-4
    stochastic = move(torch.ones(64, 64, dtype=torch.bfloat16), 1e-4, steps=100)
    nearest = move(
        torch.ones(64, 64, dtype=torch.bfloat16), 1e-4, steps=100, stochastic_rounding=False
    )
    exact = move(torch.ones(64, 64), 1e-4, steps=100)
    torch.testing.assert_close(exact, torch.full((64, 64), expected), rtol=1e-5, atol=0)
    assert abs(stochastic.double().mean().item() - expected) < 4 * 0.0063 / 64
    assert (nearest == 1).all()


@pytest.mark.parametrize("shape", [(40, 30), (1200,)], ids=str)
def test_a_bf16_run_follows_the_oracle_on_average(shape: tuple[int, ...]) -> None:
    p = parameter(torch.ones(shape), torch.bfloat16)
    optimizer = StripedAdamW([p], lr=1e-4, weight_decay=0.0)
    mine, state = to_numpy(p), oracle.new_state(shape)
    for t in range(1, 201):
        g = (torch.randn(shape) + 0.5).bfloat16()
        p.grad = g
        optimizer.step()
        mine, state = oracle.step(
            mine, to_numpy(g), state, t, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        )
    travelled = 1 - mine.mean()
    assert travelled > 5e-3
    assert abs(1 - to_numpy(p).mean() - travelled) < 0.1 * travelled


# ---------------------------------------------------------------------------------------------
# the random bits depend on seed, step and index
# ---------------------------------------------------------------------------------------------


def run(
    ps: list[torch.nn.Parameter], steps: range, momentum_dtype: str = "float32"
) -> list[torch.Tensor]:
    """Runs steps whose gradients depend only on the step, not on the parameters' order."""
    optimizer = StripedAdamW(ps, lr=1e-3, momentum_dtype=momentum_dtype)
    for t in steps:
        for p in ps:
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            p.grad = g.to(p.device, p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in ps]


@low
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_replicas_stay_identical(momentum_dtype: str, dtype: torch.dtype) -> None:
    """The states of the global generators have no effect, and do not change."""
    start = torch.randn(20, 150).to(dtype)
    torch.manual_seed(0)
    [one] = run([parameter(start.clone(), dtype)], range(5), momentum_dtype)
    torch.manual_seed(1234)
    untouched = torch.get_rng_state()
    [other] = run([parameter(start.clone(), dtype)], range(5), momentum_dtype)
    assert torch.equal(torch.get_rng_state(), untouched)
    assert_same_bits(one, other)


@low
@pytest.mark.parametrize("shape", [(6, 50), (300,), (2, 3, 50)], ids=str)
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_other_parameters_do_not_change_the_bits(
    momentum_dtype: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The parameter is alone, first, last or between others, of the same shape and other shapes."""
    start = torch.randn(shape)
    [alone] = run([parameter(start.clone(), dtype)], range(3), momentum_dtype)
    for before, after in ((0, 5), (5, 0), (3, 4)):
        others = [parameter(torch.randn(shape), dtype) for _ in range(before)]
        others += [parameter(torch.randn(7, 3), dtype), parameter(torch.randn(shape))]
        rest = [parameter(torch.randn(shape), dtype) for _ in range(after)]
        mine = parameter(start.clone(), dtype)
        together = run([*others, mine, *rest], range(3), momentum_dtype)
        assert_same_bits(together[len(others)], alone)


def test_random_bits_depend_on_the_parameters_step_count() -> None:
    """A parameter that starts late has the same bits in its first step as alone."""
    start = torch.ones(4, 100)
    [alone] = run([parameter(start.clone(), torch.bfloat16)], range(1))
    late, early = (parameter(start.clone(), torch.bfloat16) for _ in range(2))
    optimizer = StripedAdamW([early, late], lr=1e-3)
    for t in range(3):
        early.grad = torch.randn_like(early)
        if t == 2:
            g = torch.randn(late.shape, generator=torch.Generator().manual_seed(0))
            late.grad = g.bfloat16()
        optimizer.step()
    assert_same_bits(late.detach(), alone)


def test_steps_draw_different_bits() -> None:
    p = parameter(torch.ones(100, 100), torch.bfloat16)
    optimizer = StripedAdamW([p], lr=2e-3, eps=0.0, weight_decay=0.0)
    results = []
    for _ in range(3):
        p.data.fill_(1.0)
        p.grad = torch.ones_like(p)
        optimizer.step()
        results.append(p.detach().clone())
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float16, (1200,)),
        *((dtype, s) for dtype in LOW for s in ((30, 40), (40, 30), (1, 1200), (2, 20, 30))),
    ],
    ids=str,
)
def test_random_bits_depend_on_the_index_in_the_whole_parameter(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """With equal updates, shapes with the same sequence of elements get the same bits."""
    by = 0.3 * float(spacing(np.asarray(0.99), dtype))
    expected = move(torch.ones(1200, dtype=dtype), by, steps=3, shape=(60, 20))
    moved = move(torch.ones(1200, dtype=dtype), by, steps=3, shape=shape)
    # the update's fp32 rounding may differ between shapes, and change one draw in 65,536
    assert (bits(moved) != bits(expected)).sum() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(9001, 1000), (999, 9001), (5, 1301, 1000), (1, 9_000_001)], ids=str
)
def test_chunks_do_not_change_the_bits(shape: tuple[int, ...]) -> None:
    """Nine million elements begin with the bits of small tensors, for any chunks."""
    n = 6000
    large = move(torch.ones(shape, dtype=torch.bfloat16), 2e-3, steps=2).flatten()
    small = move(torch.ones(n, dtype=torch.bfloat16), 2e-3, steps=2)
    assert (bits(large[:n]) != bits(small)).sum() <= 1
    # they continue with the bits of tensors with other chunks; the update's fp32 rounding depends
    # on the shape and may change a few
    n = 2_000_000
    other = move(torch.ones(2857, 701, dtype=torch.bfloat16), 2e-3, steps=2).flatten()[:n]
    assert (bits(large[:n]) != bits(other)).sum() <= 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_change_the_bits(layout: str) -> None:
    """The index is the logical index, not the position in memory."""
    values, g = torch.ones(3, 50, 40), torch.ones(3, 50, 40)
    expected = parameter(values.clone(), torch.bfloat16)
    p = torch.nn.Parameter(lay_out(values.bfloat16(), layout))
    for q in (expected, p):
        optimizer = StripedAdamW([q], lr=2e-3, eps=0.0, weight_decay=0.0)
        for _ in range(2):
            set_grad(q, lay_out(g, layout))
            optimizer.step()
    assert (bits(p) != bits(expected)).sum() <= 1


@pytest.mark.parametrize("off", [0, np.False_], ids=repr)
def test_every_false_value_rounds_to_the_nearest(off: Any) -> None:
    stepped = []
    for value in (False, off):
        weights = torch.linspace(0.5, 1.5, 256).bfloat16().view(16, 16)
        param = torch.nn.Parameter(weights)
        optimizer = StripedAdamW([param], lr=1e-4, stochastic_rounding=value)
        param.grad = torch.ones_like(param)
        optimizer.step()
        stepped.append(param.detach())
    assert torch.equal(*stepped)
