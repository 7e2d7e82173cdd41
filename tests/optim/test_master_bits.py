"""master_bits=24: bfloat16 matrices keep 8 more bits in their state, and train in 24 bits.

The oracle, the state dicts, the layerwise and the sharded optimizer have more tests with it.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from optim_checks import (
    FORMATS,
    LAYOUTS,
    assert_same_bits,
    lay_out,
    parameter,
    set_grad,
    snapshot,
    spacing,
    state_bytes,
    to_numpy,
    whole_values,
)

from striped_hf import StripedAdamW
from striped_hf.optim import adamw_state_dict
from striped_hf.optim.rounding import join, round_to_24_bits, split

pytestmark = pytest.mark.usefixtures("every_backend")

BF16 = torch.bfloat16
UNIT = 2.0**-16  # the spacing of 24-bit numbers from 1/2 to 1


def matrix(
    steps: int = 20, dtype: torch.dtype = BF16, shape: tuple[int, ...] = (20, 150), **options: Any
) -> tuple[torch.nn.Parameter, StripedAdamW]:
    """Trains weights of about 1 with updates that bfloat16 would lose."""
    torch.manual_seed(0)
    p = parameter((1 + 0.1 * torch.randn(shape)).to(BF16), dtype)
    optimizer = StripedAdamW([p], **{"lr": 1e-5, "master_bits": 24, **options})
    train(p, optimizer, range(steps))
    return p, optimizer


def train(p: torch.Tensor, optimizer: StripedAdamW, steps: range) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        p.grad = (torch.randn(p.shape, generator=generator) + 0.3).to(BF16).to(p)
        optimizer.step()


def move(values: torch.Tensor, by: float, **options: Any) -> np.ndarray:
    """Subtracts ``by`` from the row of a matrix: equal gradients make unit updates."""
    p = parameter(values.reshape(1, -1).clone(), BF16)
    settings = {"lr": abs(by), "eps": 0.0, "weight_decay": 0.0, "master_bits": 24, **options}
    optimizer = StripedAdamW([p], **settings)
    p.grad = torch.full_like(p, math.copysign(1.0, by))
    optimizer.step()
    return whole_values(p, optimizer.state[p]).reshape(values.shape)


# ---------------------------------------------------------------------------------------------
# the arithmetic
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_random", [False, True])
def test_every_24_bit_number_is_the_sum_of_its_parts(is_random: bool) -> None:
    values = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    values[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    # adding to the mantissa of this NaN would overflow
    values[4:5] = torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)
    bits = torch.randint(-(2**31), 2**31, values.shape).to(torch.int32) if is_random else None
    rounded = round_to_24_bits(values, bits)
    high, low = split(rounded, torch.int8)
    assert (high.dtype, low.dtype) == (BF16, torch.int8)
    assert torch.equal(rounded.isnan(), values.isnan())
    assert torch.equal(rounded.isinf() & values.isinf(), values.isinf())
    numbers = ~values.isnan()
    assert_same_bits(join(high, low)[numbers], rounded[numbers])
    assert high[~numbers].isnan().all()
    assert (rounded[numbers].view(torch.int32) & 0xFF == 0).all()
    middle = values.abs() < 2.0**120  # their neighbors are finite
    x, y, z = (t[middle].double().numpy() for t in (values, rounded, high))
    unit = 2.0**-8 * spacing(x, BF16)
    assert (np.abs(x - y) <= (unit if is_random else unit / 2)).all()
    assert (np.abs(y - z) <= 128 * unit).all()


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_bits_after_the_kept_ones_are_rounded_without_bias(sign: int, share: float) -> None:
    n = 2**18
    moved = move(torch.full((n,), 0.75), sign * share * UNIT)
    steps = (0.75 - moved) / UNIT * sign
    assert set(np.unique(steps)) <= {0.0, 1.0}
    deviation = math.sqrt(share * (1 - share) / n)
    # the bits are a fixed function: four deviations; float32 has 256 numbers in a unit
    assert abs(steps.mean() - share) < 4 * deviation + 2.0**-8


def test_to_nearest() -> None:
    values = torch.full((200,), 0.75)
    assert (move(values, 0.49 * UNIT, stochastic_rounding=False) == 0.75).all()
    assert (move(values, 0.51 * UNIT, stochastic_rounding=False) == 0.75 - UNIT).all()


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_small_updates_are_kept(momentum_dtype: str) -> None:
    """Updates of a four-hundredth of bfloat16's spacing: 24 bits follow float32, 16 bits do not."""
    exact, _ = matrix(100, torch.float32, momentum_dtype=momentum_dtype)
    p, optimizer = matrix(100, momentum_dtype=momentum_dtype)
    q, _ = matrix(100, momentum_dtype=momentum_dtype, master_bits=None)
    start = to_numpy(matrix(0)[0])
    moved = to_numpy(exact) - start
    size = np.linalg.norm(moved)
    off = np.linalg.norm(whole_values(p, optimizer.state[p]) - to_numpy(exact)) / size
    off_without = np.linalg.norm(to_numpy(q) - to_numpy(exact)) / size
    assert off < 0.3 < 1 < off_without


def test_the_parameter_is_the_nearest_bfloat16() -> None:
    p, optimizer = matrix(lr=1e-3)
    whole = torch.from_numpy(whole_values(p, optimizer.state[p]))
    assert (p != matrix(0)[0]).any()
    nearest = (whole.bfloat16().double() - whole).abs()
    assert torch.equal((p.detach().double() - whole).abs(), nearest)


@pytest.mark.parametrize("shape", [(300,), (30, 10)], ids=str)
def test_weights_that_other_code_sets_to_zero_stay_numbers(shape: tuple[int, ...]) -> None:
    """As a mask does; a negative low part of a zero would be a NaN."""
    p, optimizer = matrix(shape=shape, lr=1e-3)
    assert (optimizer.state[p]["param_low_bits"] < 0).any()
    for zero in (0.0, -0.0):
        p.data.fill_(zero)
        train(p, optimizer, range(20, 21))
        assert p.isfinite().all()
        assert p.abs().max() < 0.01


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_inf_and_nan_gradients_give_nan(bad: float) -> None:
    p = parameter(torch.ones(3, 4), BF16)
    optimizer = StripedAdamW([p], lr=0.1, master_bits=24)
    p.grad = torch.ones_like(p)
    p.grad[1, 2] = bad
    optimizer.step()
    assert p[1, 2].isnan()
    assert (optimizer.state[p]["param_low_bits"][p.isnan()] == 0).all()


# ---------------------------------------------------------------------------------------------
# the random bits depend on seed, step and index
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (1, 1200), (2, 20, 30)], ids=str)
def test_random_bits_depend_on_the_index_in_the_whole_parameter(shape: tuple[int, ...]) -> None:
    results = []
    for each in ((60, 20), shape):
        p = parameter(torch.full(each, 0.75), BF16)
        optimizer = StripedAdamW([p], lr=0.3 * UNIT, eps=0.0, weight_decay=0.0, master_bits=24)
        for _ in range(3):
            p.grad = torch.ones_like(p)
            optimizer.step()
        results.append(whole_values(p, optimizer.state[p]).flatten())
    assert len(np.unique(results[0])) == 4  # none to three steps of one unit
    # an update's last place differs between shapes, and tips one draw in 256 of them
    assert (results[0] != results[1]).mean() < 0.02


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_other_parameters_do_not_change_the_bits(momentum_dtype: str) -> None:
    alone, optimizer = matrix(3, momentum_dtype=momentum_dtype)
    ps = [parameter(alone.detach(), BF16) for _ in range(5)] + [parameter(torch.randn(7, 3), BF16)]
    for p in ps[:5]:
        p.data.copy_(matrix(0)[0])
    together = StripedAdamW(ps, lr=1e-5, master_bits=24, momentum_dtype=momentum_dtype)
    for t in range(3):
        for p in ps:
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)) + 0.3
            p.grad = g.bfloat16()
        together.step()
    for p in ps[:5]:
        assert_same_bits(p.detach(), alone.detach())
        low = together.state[p]["param_low_bits"]
        assert_same_bits(low, optimizer.state[alone]["param_low_bits"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_change_the_bits(layout: str) -> None:
    values, g = torch.full((3, 50, 40), 0.75), torch.ones(3, 50, 40)
    results = []
    for each in ("contiguous", layout):
        p = torch.nn.Parameter(lay_out(values.bfloat16(), each))
        optimizer = StripedAdamW([p], lr=0.3 * UNIT, eps=0.0, weight_decay=0.0, master_bits=24)
        for _ in range(3):
            set_grad(p, lay_out(g, each))
            optimizer.step()
        results.append(whole_values(p, optimizer.state[p]))
    assert (results[0] != results[1]).mean() < 0.02


# ---------------------------------------------------------------------------------------------
# dtypes and memory
# ---------------------------------------------------------------------------------------------


def test_it_takes_one_byte_an_element() -> None:
    _, optimizer = matrix(1)
    _, without = matrix(1, master_bits=None)
    assert state_bytes(optimizer) - state_bytes(without) == 20 * 150


def test_float32_parameters_do_not_change() -> None:
    results = [matrix(3, torch.float32, master_bits=bits) for bits in (None, 24)]
    (p, without), (q, optimizer) = results
    assert_same_bits(q.detach(), p.detach())
    assert optimizer.state[q].keys() == without.state[p].keys()


@pytest.mark.parametrize("shape", [(4, 6), (6,)], ids=str)
def test_float16_parameters_are_refused(shape: tuple[int, ...]) -> None:
    p, q = parameter(torch.randn(shape), torch.float16), parameter(torch.randn(shape), BF16)
    with pytest.raises(ValueError, match=r"float16.*master_bits=24.*bfloat16"):
        StripedAdamW([("w", p)], master_bits=24)
    optimizer = StripedAdamW([q])
    with pytest.raises(ValueError, match="master_bits"):
        optimizer.add_param_group({"params": [p], "master_bits": 24})
    assert len(optimizer.param_groups) == 1
    StripedAdamW([p])
    StripedAdamW([{"params": [p]}, {"params": [q], "master_bits": 24}])


def test_a_model_that_becomes_float16_is_refused_at_its_next_step() -> None:
    p, optimizer = matrix(2)
    p.data = p.data.half()
    p.grad = torch.ones_like(p)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"float16.*master_bits=24.*bfloat16"):
        optimizer.step()
    assert_same_bits(p.detach(), before[0])


@pytest.mark.parametrize(
    "low", [torch.zeros(20, 150, dtype=torch.int16), torch.zeros(20, 149, dtype=torch.int8)]
)
def test_bits_that_do_not_fit_are_refused(low: torch.Tensor) -> None:
    p, optimizer = matrix(2)
    optimizer.state[p]["param_low_bits"] = low
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"'param_low_bits' is torch\.int"):
        train(p, optimizer, range(2, 3))
    assert_same_bits(p.detach(), before)


def test_a_parameter_may_change_its_dtype_and_its_group_the_option() -> None:
    p, optimizer = matrix(5, torch.float32)
    assert "param_low_bits" not in optimizer.state[p]
    p.data = p.data.bfloat16()
    train(p, optimizer, range(5, 10))
    assert optimizer.state[p]["param_low_bits"].dtype == torch.int8
    optimizer.param_groups[0]["master_bits"] = None
    train(p, optimizer, range(10, 15))
    optimizer.param_groups[0]["master_bits"] = 24
    train(p, optimizer, range(15, 20))
    assert optimizer.state[p]["step"] == 20
    assert p.isfinite().all()


# ---------------------------------------------------------------------------------------------
# state dicts
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_a_resumed_run_has_the_bits_of_a_run_without_a_stop(momentum_dtype: str) -> None:
    whole, optimizer = matrix(momentum_dtype=momentum_dtype)
    p, through = matrix(10, momentum_dtype=momentum_dtype)
    loaded = StripedAdamW([p], lr=1e-5, master_bits=24, momentum_dtype=momentum_dtype)
    loaded.load_state_dict(copy.deepcopy(through.state_dict()))
    train(p, loaded, range(10, 20))
    assert_same_bits(p.detach(), whole.detach())
    for key, value in optimizer.state[whole].items():
        assert_same_bits(loaded.state[p][key], value, key)


@pytest.mark.parametrize("saved", ["without", "before the option existed", "AdamW"])
def test_a_state_without_the_bits_gets_zeros(saved: str) -> None:
    p, optimizer = matrix(5, master_bits=None)
    state_dict = copy.deepcopy(optimizer.state_dict())
    if saved == "AdamW":
        state_dict = adamw_state_dict(optimizer)
    elif saved != "without":
        del state_dict["param_groups"][0]["master_bits"]
    loaded = StripedAdamW([p], lr=1e-5, master_bits=24)
    loaded.load_state_dict(state_dict)
    assert loaded.param_groups[0]["master_bits"] == 24
    assert (loaded.state[p]["param_low_bits"] == 0).all()
    train(p, loaded, range(5, 7))
    assert (loaded.state[p]["param_low_bits"] != 0).any()


def test_bits_that_an_optimizer_would_lose_are_an_error() -> None:
    p, optimizer = matrix(5)
    state_dict = copy.deepcopy(optimizer.state_dict())
    other = StripedAdamW([p], lr=1e-5)
    with pytest.raises(ValueError, match=r"master_bits=24.*master_bits=None.*'param_low_bits'"):
        other.load_state_dict(state_dict)
    assert not other.state
    del state_dict["state"][0]["param_low_bits"]  # the fix that the message names
    other.load_state_dict(state_dict)
    train(p, other, range(5, 7))
    assert "param_low_bits" not in other.state[p]


def test_a_float32_model_loads_a_state_with_the_bits() -> None:
    p, optimizer = matrix(5)
    q = parameter(p.detach().float())
    for bits in (None, 24):
        loaded = StripedAdamW([q], lr=1e-5, master_bits=bits)
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert "param_low_bits" not in loaded.state[q]
        train(q, loaded, range(5, 7))


def test_an_exported_state_leaves_the_bits_out() -> None:
    _, optimizer = matrix(5)
    assert set(adamw_state_dict(optimizer)["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
