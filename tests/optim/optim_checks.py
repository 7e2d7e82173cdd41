"""Code that several of the optimizer's tests share: documented layouts, bounds, the follower."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import oracle
import torch
from torch.optim import Optimizer

FORMATS = ("float32", "bfloat16", "int8", "int4")
CODED = ("int8", "int4")
QMAX = {"int8": 127, "int4": 7}
BLOCK = 128
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---------------------------------------------------------------------------------------------
# the allowed differences between the CPU backend and the reference
# ---------------------------------------------------------------------------------------------


class Tolerance(NamedTuple):
    value: float
    reason: str


# for second moments, relative
STRIPES = Tolerance(2e-6, "the squares of up to a thousand rows, summed in another order")
# for float32 parameters, relative to their largest update so far
UPDATES = Tolerance(4e-6, "the stripes' error, and a few roundings of 6e-8 each")
# for the share of momentum codes that differ in a step, each by one, and of the moved parameters
CODES = Tolerance(2e-4, "a value within 1e-6 of the border between two codes falls on either side")


# ---------------------------------------------------------------------------------------------
# tensors
# ---------------------------------------------------------------------------------------------


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Returns the values in float64 (exact for every floating dtype used here)."""
    return tensor.detach().to("cpu", torch.float64).numpy().copy()


def parameter(
    values: Any,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    requires_grad: bool | None = None,
) -> torch.nn.Parameter:
    values = torch.as_tensor(values).to(device, dtype)
    if requires_grad is None:
        requires_grad = dtype.is_floating_point or dtype.is_complex
    return torch.nn.Parameter(values, requires_grad)


def set_grad(param: torch.Tensor, grad: torch.Tensor | None) -> None:
    """Gives ``param`` a gradient of any dtype and layout (assignment needs the same dtype)."""
    param.grad = None
    if grad is None:
        return
    if grad.dtype != param.dtype:
        param.grad = torch.zeros_like(param)
        param.grad.data = grad
    else:
        param.grad = grad


def lay_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """Returns the same values under other strides."""
    if layout == "transposed" and values.ndim >= 2:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "permuted" and values.ndim >= 2:
        order = list(range(values.ndim))[::-1]
        return values.permute(order).contiguous().permute(order)
    if layout == "strided" and values.ndim >= 1:
        buffer = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), 77.0)
        view = buffer[..., ::2]
        view.copy_(values)
        return view
    return values.contiguous().clone()


LAYOUTS = ("contiguous", "transposed", "permuted", "strided")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the raw bits, so that NaN equals itself and -0.0 differs from 0.0."""
    tensor = tensor.detach().cpu().contiguous()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(whole[tensor.element_size()])


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return (
        actual.dtype == expected.dtype
        and actual.shape == expected.shape
        and torch.equal(bits(actual), bits(expected))
    )


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    wrong = bits(actual) != bits(expected)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} elements differ, the first "
        f"{actual[wrong].flatten()[0].item()!r} against {expected[wrong].flatten()[0].item()!r}"
    )


def spacing(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Returns the distance of neighbours in ``dtype`` around each value (also subnormals)."""
    info = torch.finfo(dtype)
    magnitude = np.maximum(np.abs(np.nan_to_num(values)), info.tiny)
    return 2.0 ** np.floor(np.log2(magnitude)) * info.eps


# ---------------------------------------------------------------------------------------------
# optimizers
# ---------------------------------------------------------------------------------------------


def parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def snapshot(optimizer: Optimizer) -> list[Any]:
    """Copies everything that a step may change: parameters, their states, the groups' settings."""
    copied: list[Any] = []
    for p in parameters(optimizer):
        state = optimizer.state.get(p, {})
        copied.append(p.detach().clone())
        copied.append({k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()})
    copied += [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]
    return copied


def assert_same_snapshot(actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        if torch.is_tensor(a):
            assert_same_bits(a, b, "parameter")
            continue
        assert a.keys() == b.keys()
        for key, value in a.items():
            if torch.is_tensor(value):
                assert_same_bits(value, b[key], key)
            else:
                assert value == b[key], key


def state_bytes(optimizer: Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )


# ---------------------------------------------------------------------------------------------
# how a parameter is read, by its documentation
# ---------------------------------------------------------------------------------------------


def documented_matrix(shape: Iterable[int], blocks: Any = (1, 1)) -> tuple[int, ...]:
    """Returns the shape in which a parameter is stepped (docs/algorithm.md)."""
    shape = tuple(shape)
    size = math.prod(shape)
    if len(shape) < 3 or size == 0 or blocks not in ((1, 1), "kernel", "stack"):
        return shape
    first, *_, rows, columns = shape
    in_stack = size // (rows * columns) * (rows + columns)
    in_kernel = first + size // first
    if blocks == (1, 1):
        is_stack = in_stack <= in_kernel or (len(shape) == 3 and rows >= 16 and columns >= 16)
    else:
        is_stack = blocks == "stack"
    if (in_stack if is_stack else in_kernel) >= size:
        return (size,)
    return shape if is_stack else (first, size // first)


# ---------------------------------------------------------------------------------------------
# momentum, by its documentation
# ---------------------------------------------------------------------------------------------


def decode_documented(
    codes: np.ndarray, scale: np.ndarray | None, momentum_dtype: str, C: int
) -> np.ndarray:
    """Decodes a stored momentum as documented: absmax * sign(code) * (code / qmax)^2, float64."""
    if scale is None:
        return codes.astype(np.float64)
    qmax = QMAX[momentum_dtype]
    values = np.zeros((*codes.shape[:-1], C))
    for b, start in enumerate(range(0, C, BLOCK)):
        n = min(BLOCK, C - start)
        if momentum_dtype == "int8":
            code = codes[..., start : start + n].astype(np.float64)
        else:
            half = (n + 1) // 2
            packed = codes[..., start // 2 : start // 2 + half].astype(np.int64)
            both = np.concatenate([packed & 15, packed >> 4], axis=-1)[..., :n]
            code = both.astype(np.float64) - 8
        decoded = np.sign(code) * (code / qmax) ** 2
        values[..., start : start + n] = scale[..., b : b + 1].astype(np.float64) * decoded
    return values


def code_bound(values: np.ndarray, momentum_dtype: str) -> np.ndarray:
    """Returns the largest distance of a coded value from the original, element by element.

    With s = sqrt(|x| / absmax) and k = round(s qmax), |s - k / qmax| <= 1 / (2 qmax), so
    |k^2 / qmax^2 - s^2| <= (1 / (2 qmax)) (2 s + 1 / (2 qmax)). A hundredth on top is for fp32,
    where s qmax can fall on the other side of a half.
    """
    C = values.shape[-1]
    qmax = QMAX[momentum_dtype]
    bound = np.zeros(values.shape)
    for start in range(0, C, BLOCK):
        block = np.abs(values[..., start : start + BLOCK])
        absmax = block.max(axis=-1, keepdims=True, initial=0.0)
        s = np.sqrt(block / np.where(absmax == 0, 1.0, absmax))
        bound[..., start : start + BLOCK] = absmax * (2 * s + 1 / (2 * qmax)) / (2 * qmax)
    return 1.01 * bound


def stored_momentum(state: dict[str, Any], C: int) -> tuple[np.ndarray, str]:
    """Returns the momentum of a state, in float64, and the name of its format."""
    stored = state["exp_avg"]
    name = {torch.int8: "int8", torch.uint8: "int4", torch.bfloat16: "bfloat16"}.get(
        stored.dtype, "float32"
    )
    if name in CODED:
        scale = state["exp_avg_scale"].cpu().numpy()
        return decode_documented(stored.cpu().numpy(), scale, name, C), name
    return to_numpy(stored), name


def whole_values(p: torch.Tensor, state: dict[str, Any]) -> np.ndarray:
    """Returns a parameter in float64, with the 16 or 8 bits after its own if its state has them."""
    low = state.get("param_low_bits")
    if low is None:
        return to_numpy(p)
    high = p.detach().cpu().contiguous().view(torch.int16).numpy().astype(np.uint16)
    unit = 2**8 if low.dtype == torch.int8 else 1
    added = low.cpu().numpy().astype(np.int64).reshape(high.shape) * unit
    return (high.astype(np.int64) * 2**16 + added).astype(np.uint32).view(np.float32).astype(float)


# ---------------------------------------------------------------------------------------------
# the oracle beside an optimizer
# ---------------------------------------------------------------------------------------------


@dataclass
class Followed:
    state: oracle.State
    magnitude: oracle.State  # the same averages over |g|: errors are relative to them
    t: int = 0


class Follower:
    """Steps the oracle beside an optimizer and compares every number after every step.

    The second moments and the step counter are the oracle's own over the whole run. The parameter
    (rounded to its dtype) and a momentum in fewer bits are read from the optimizer before each
    step, so that the comparison is of one step's rounding.

    Args:
        optimizer: The StripedAdamW to follow.
        rtol: The allowed error, relative to the terms of each sum (the sum itself may cancel).
        tiny: The allowed absolute error of the second moments.
    """

    def __init__(self, optimizer: Optimizer, rtol: float, tiny: float = 0.0) -> None:
        self.optimizer = optimizer
        self.rtol = rtol
        self.tiny = tiny
        self.followed: dict[torch.Tensor, Followed] = {}

    def step(self) -> None:
        states = self.optimizer.state
        before = {p: whole_values(p, states.get(p, {})) for p in parameters(self.optimizer)}
        momentum = {}
        for p in parameters(self.optimizer):
            if self.optimizer.state.get(p) and p.ndim >= 1:
                momentum[p] = self._stored_momentum(p)
        settings = [dict(group) for group in self.optimizer.param_groups]
        with np.errstate(all="ignore"):
            self.optimizer.step()
            for group in settings:
                for p in group["params"]:
                    self._compare(p, before[p], momentum.get(p), group)

    def _stored_momentum(self, p: torch.Tensor) -> tuple[np.ndarray, str]:
        mine = self.followed[p]
        values, name = stored_momentum(self.optimizer.state[p], (mine.state["m"].shape or (1,))[-1])
        return values.reshape(mine.state["m"].shape), name

    def _compare(
        self,
        p: torch.Tensor,
        before: np.ndarray,
        momentum: tuple[np.ndarray, str] | None,
        group: dict[str, Any],
    ) -> None:
        what = f"{p.dtype} {tuple(p.shape)} blocks={group['blocks']} {group['momentum_dtype']}"
        if p.grad is None:
            after = whole_values(p, self.optimizer.state.get(p, {}))
            assert np.array_equal(after, before), f"{what}: moved without a gradient"
            return
        shape = documented_matrix(p.shape, group["blocks"])
        is_blocked = len(shape) >= 2 and not isinstance(group["blocks"], str)
        blocks = tuple(group["blocks"]) if is_blocked else (1, 1)
        mine = self.followed.get(p)
        if mine is None:
            mine = Followed(oracle.new_state(shape, blocks), oracle.new_state(shape, blocks))
            self.followed[p] = mine
        mine.t += 1
        before, g = before.reshape(shape), to_numpy(p.grad).reshape(shape)
        hyper: dict[str, Any] = {
            key: group[key] for key in ("betas", "eps", "nesterov", "lagged", "maximize")
        }
        hyper["blocks"] = blocks
        if momentum is not None and momentum[1] != "float32":
            mine.state["m"] = momentum[0]
        lr = float(group["lr"])
        numerator, denominator, mine.state = oracle.fraction(g, mine.state, mine.t, **hyper)
        expected = before * (1 - lr * group["weight_decay"]) - lr * numerator / denominator
        mine.magnitude["m"] = np.maximum(
            mine.magnitude["m"], 0 if momentum is None else np.abs(momentum[0])
        )
        hyper["maximize"] = False
        numerator, _, mine.magnitude = oracle.fraction(np.abs(g), mine.magnitude, mine.t, **hyper)
        size = lr * numerator / denominator
        self._compare_state(p, mine, group, what)
        actual = whole_values(p, self.optimizer.state[p]).reshape(shape)
        allowed = self.rtol * np.abs(size) + 2.0**-22 * (np.abs(before) + np.abs(size))
        low = self.optimizer.state[p].get("param_low_bits")
        is_kept = len(shape) < 2 or group["master_bits"] == 24
        assert (low is not None) == (p.dtype == torch.bfloat16 and is_kept), what
        if low is not None:
            assert low.dtype == (torch.int32 if len(shape) < 2 else torch.int8), what
            half = 0.5 * spacing(actual, p.dtype)
            self._close(to_numpy(p).reshape(shape), actual, half, f"{what}: not the nearest")
        if p.dtype != torch.float32 and (low is None or low.dtype == torch.int8):
            stochastic = group["stochastic_rounding"] in (None, True)
            ulps = (1.0 if stochastic else 0.5) * (1.0 if low is None else 2.0**-8)
            allowed = 1.01 * allowed + ulps * spacing(
                np.maximum(np.abs(expected), np.abs(actual)), p.dtype
            )
        self._close(actual, expected, allowed, f"{what}: parameter at step {mine.t}")

    def _compare_state(
        self, p: torch.Tensor, mine: Followed, group: dict[str, Any], what: str
    ) -> None:
        state = self.optimizer.state[p]
        assert float(state["step"]) == mine.t
        names = {"v": "exp_avg_sq", "row": "exp_avg_sq_row", "col": "exp_avg_sq_col"}
        for key, name in names.items():
            if key not in mine.state:
                assert name not in state, f"{what}: {name}"
                continue
            assert state[name].dtype == torch.float32, f"{what}: {name}"
            value = mine.state[key]
            allowed = 2 * self.rtol * value + self.tiny
            if p.numel():
                stored = to_numpy(state[name])
                if name == "exp_avg_sq":  # it has the parameter's shape
                    stored = stored.reshape(value.shape)
                self._close(stored, value, allowed, f"{what}: {name}")
        m = mine.state["m"]
        actual, name = self._stored_momentum(p)
        assert name == expected_format(m.shape, group["momentum_dtype"]), what
        allowed = self.rtol * mine.magnitude["m"] + self.tiny
        if name == "bfloat16":
            allowed = allowed + 1.01 * 2.0**-8 * np.abs(m)
        elif name in CODED:
            allowed = allowed + code_bound(m, name)
        self._close(actual, m, allowed, f"{what}: exp_avg")

    @staticmethod
    def _close(actual: np.ndarray, expected: np.ndarray, allowed: np.ndarray, what: str) -> None:
        assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
        wrong = ~((np.abs(actual - expected) <= allowed) | (np.isnan(actual) & np.isnan(expected)))
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"{what}: {int(wrong.sum())} of {wrong.size} elements are off, the first at {at}: "
                f"{actual[at]!r} against {expected[at]!r}, allowed {allowed[at]:.3e}, "
                f"off by {abs(actual[at] - expected[at]):.3e}"
            )


def expected_format(shape: Iterable[int], momentum_dtype: str) -> str:
    """Returns the format of a parameter's momentum if the group asks for ``momentum_dtype``."""
    shape = tuple(shape)
    if len(shape) < 2 or math.prod(shape) == 0:
        return "float32"
    if momentum_dtype in CODED and shape[-1] == 1:
        return "float32"  # a code and its scale take more than the four bytes they replace
    return momentum_dtype


def gpt2_124m_shapes() -> list[tuple[int, ...]]:
    """Returns the shapes of GPT-2 124M's parameters, in the model's order (tied embedding once)."""
    width, layers, vocabulary, positions = 768, 12, 50257, 1024
    block: list[tuple[int, ...]] = [
        (width,),
        (width,),
        (width, 3 * width),
        (3 * width,),
        (width, width),
        (width,),
        (width,),
        (width,),
        (width, 4 * width),
        (4 * width,),
        (4 * width, width),
        (width,),
    ]
    shapes = [(vocabulary, width), (positions, width), *(layers * block), (width,), (width,)]
    assert sum(math.prod(shape) for shape in shapes) == 124_439_808
    return shapes
