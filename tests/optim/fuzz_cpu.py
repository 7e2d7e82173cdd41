"""Fuzzes the CPU backend against the reference, with a library that has sanitizers.

``test_cpu_sanitized.py`` builds the library and runs this program. Any Python can repeat a case::

    python tests/optim/fuzz_cpu.py LIBRARY --seed 7 --first 123 --cases 1

A case draws a few tensors in one or two param groups and steps them: shapes, strides, dtypes,
momentum formats, blocks, settings, gradients and threads are random. Before each step the reference
gets the numbers of the CPU backend, so that the comparison is of one step's error. Between steps
the program replaces a tensor of the optimizer by one that does not fit. The step must refuse it
before it changes any tensor. Other cases call ``statistics`` and ``update`` on parts of sharded
matrices.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from optim_checks import (
    CODED,
    FORMATS,
    LAYOUTS,
    PARAM_DTYPES,
    STRIPES,
    UPDATES,
    assert_same_bits,
    lay_out,
    set_grad,
    spacing,
    to_numpy,
    whole_values,
)

from striped_hf import StripedAdamW
from striped_hf.optim import momentum
from striped_hf.optim.backends import cpu, reference
from striped_hf.optim.interface import Blocks, Entry, Settings, State
from striped_hf.optim.options import settings_of
from striped_hf.optim.state import Description, description_of, zero_state

BUNDLE = 1 << 19  # elements: csrc/plan.h begins another bundle after as many
EDGES = (1, 2, 3, 7, 31, 64, 65, 127, 128, 129, 255, 256, 257, 385)
FEW_ELEMENTS, MANY_ELEMENTS = 20_000, 300_000  # many: several slices of a matrix, and threads
# The scales of gradients. Their squares are normal numbers, zero, or infinite, and not denormal: a
# sum of denormal numbers in another order has no relative precision.
SCALES = (1e-36, 1e-30, 1e-12, 1e-6, 1e-3, 1.0, 1e4, 1e15, 1e25)
DENORMAL = 1e-43  # denormal numbers have no relative precision
GUARD = 77.0


class Draw(random.Random):
    """The random choices of one case."""

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def size(self) -> int:
        return self.choice(EDGES) if self.chance(0.6) else self.randint(1, 400)

    def shape(self) -> tuple[int, ...]:
        most = MANY_ELEMENTS if self.chance(0.03) else FEW_ELEMENTS
        kind = self.random()
        if kind < 0.05:
            return ()
        if kind < 0.2:
            return (self.choice((0, self.size(), self.randint(1, most))),)
        if kind < 0.35:  # a few long rows, or many short ones
            long, short = self.randint(1, most // 8), self.randint(1, 8)
            return (short, long) if self.chance(0.5) else (long, short)
        shape = [self.size() for _ in range(self.choice((2, 2, 2, 3, 4)))]
        if self.chance(0.05):
            shape[self.randrange(len(shape))] = 0
        while math.prod(shape) > most:
            largest = shape.index(max(shape))
            shape[largest] = shape[largest] // 3 + 1
        return tuple(shape)

    def blocks(self, shape: tuple[int, ...]) -> Blocks:
        if len(shape) < 2 or self.chance(0.5):
            return (1, 1)
        counts = [self.choice([n for n in range(1, 13) if size % n == 0]) for size in shape[-2:]]
        return (counts[0], counts[1])

    def settings(self) -> dict[str, Any]:
        betas = ((0.9, 0.999), (0.0, 0.0), (0.5, 0.9), (0.9, 0.0), (0.0, 0.99), (0.95, 1 - 1e-7))
        return {
            "lr": self.choice((1e-3, 1e-3, 0.0, 1e-30, 0.1, 10.0, 1e6)),
            "betas": self.choice(betas),
            "eps": self.choice((1e-8, 1e-8, 0.0, 1e-30, 1e-3, 1.0)),
            "weight_decay": self.choice((0.0, 0.01, 0.9, 300.0)),
            "momentum_dtype": self.choice(FORMATS),
            "stochastic_rounding": self.choice((None, False)),
            "master_bits": self.choice((None, 24)),
            **{key: self.chance(0.3) for key in ("nesterov", "lagged", "maximize")},
        }

    def dtype(self, settings: dict[str, Any]) -> torch.dtype:
        """Returns a dtype of parameters; master_bits refuses float16."""
        return self.choice(PARAM_DTYPES if settings["master_bits"] is None else PARAM_DTYPES[:2])

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(63))
        return torch.randn(shape, generator=generator)

    def gradient(self, shape: tuple[int, ...], scale: float) -> torch.Tensor:
        """Returns a gradient [*shape] float32, dense, with zeros, or of equal numbers."""
        values, kind = scale * self.normal(shape), self.random()
        if kind < 0.1:
            values.zero_()
        elif kind < 0.3 and values.numel():
            values *= torch.rand(shape) < self.choice((0.01, 0.5))
        elif kind < 0.4 and values.dim():  # expanded: a repeated row, column or number
            dims = [i for i in range(values.dim()) if self.chance(0.7)]
            values = values[
                tuple(slice(0, 1) if i in dims else slice(None) for i in range(values.dim()))
            ]
            return values.expand(shape) if 0 not in values.shape else scale * self.normal(shape)
        elif kind < 0.5 and values.numel():
            values.view(-1)[self.randrange(values.numel())] = self.choice((math.inf, math.nan))
        return values

    def laid_out(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the same values under other strides, or elsewhere in memory."""
        kind = self.choice((*LAYOUTS, "contiguous", "guarded", "guarded", "unaligned"))
        if kind == "guarded":
            return guarded(values, self.randint(1, 9))
        if kind == "unaligned" and values.numel():
            memory = bytearray(values.numel() * values.element_size() + 1)
            copy = torch.frombuffer(memory, dtype=values.dtype, offset=1).view(values.shape)
            return copy.copy_(values)
        return lay_out(values, kind)


def guarded(values: torch.Tensor, before: int) -> torch.Tensor:
    """Returns a view of a larger array; see ``check_guards``."""
    memory = torch.full((before + values.numel() + 5,), GUARD, dtype=torch.float64)
    memory = memory.to(values.dtype)
    return memory[before : before + values.numel()].view(values.shape).copy_(values)


def check_guards(tensor: torch.Tensor, what: str) -> None:
    """Checks that nothing was written around a tensor, if ``guarded`` made it."""
    if not tensor.is_contiguous() or not tensor.storage_offset():
        return
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    start, end = tensor.storage_offset(), tensor.storage_offset() + tensor.numel()
    outside = torch.cat((memory[:start], memory[end:]))
    assert (outside == torch.tensor(GUARD).to(tensor.dtype)).all(), f"{what}: written outside"


# -------------------------------------------------------------------------------------------------
# comparison
# -------------------------------------------------------------------------------------------------


def assert_close(ours: np.ndarray, theirs: np.ndarray, allowed: np.ndarray, what: str) -> None:
    # Inf and NaN count as equal, because the order of a sum decides which of them it gives
    both = np.isfinite(ours) & np.isfinite(theirs)
    wrong = np.where(
        both, ~(np.abs(ours - theirs) <= allowed), np.isfinite(ours) | np.isfinite(theirs)
    )
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.size} elements differ, the first at {at}: "
            f"{ours[at]!r}, by the reference {theirs[at]!r}, allowed {allowed[at]:.2e}"
        )


class Sizes(NamedTuple):
    """The sizes of the terms that a step adds, element by element: their sums may cancel."""

    param: np.ndarray
    update: np.ndarray
    momentum: np.ndarray
    step_size: float  # the update is this times the momentum, over its root


def sizes_of(entry: Entry, settings: Settings, roots: Any = None) -> Sizes:
    """Returns the sizes of the terms of the next step."""
    scale = entry.state.get("exp_avg_scale")
    m = momentum.decode(entry.state["exp_avg"], scale, entry.momentum_dtype, columns_of(entry))
    others = entry.state.keys() - {"exp_avg_scale", "param_low_bits"}
    state = {key: entry.state[key].clone() for key in others}
    state["exp_avg"] = m.abs()
    p, g = torch.zeros(entry.param.shape), entry.grad.float().abs()
    absolute = entry._replace(param=p, grad=g, state=state, momentum_dtype="float32")
    sizes = to_numpy(m.abs()), to_numpy(g)
    without = replace(settings, weight_decay=0.0, maximize=False)
    if roots is None:
        reference.step([absolute], without)
    else:
        reference.update([absolute], [roots], without)
    weights = settings.beta1, 1 - settings.beta1
    return Sizes(
        np.abs(to_numpy(entry.param)) * abs(1 - settings.lr * settings.weight_decay),
        np.abs(to_numpy(p)),
        sum((w + min(weights)) * size for w, size in zip(weights, sizes, strict=True)),
        settings.lr / (1 - settings.beta1**entry.step),
    )


def columns_of(entry: Entry) -> int:
    return entry.param.shape[-1] if entry.param.dim() else 1


def compare(ours: Entry, theirs: Entry, sizes: Sizes, what: str) -> None:
    """Compares a step of the CPU backend with the reference's step from the same numbers."""
    # if all squares are equal, roundings add up: csrc/sums.h adds SUM_ROWS rows at a time
    rows = ours.param.shape[-2] // ours.blocks[0] if ours.param.dim() >= 2 else 0
    worst = 2.0**-24 * min(rows, 1024) / 4
    p, q = whole_values(ours.param, ours.state), whole_values(theirs.param, theirs.state)
    allowed = (2 * UPDATES.value + worst) * sizes.update + 2.0**-22 * (sizes.param + sizes.update)
    # a momentum may be off by DENORMAL, and so may its denormal product with the step size
    numerator = sizes.step_size * sizes.momentum
    off = (1 + sizes.step_size) * DENORMAL
    allowed += np.divide(
        off * sizes.update, numerator, out=np.zeros_like(allowed), where=numerator > 0
    )
    low = ours.state.get("param_low_bits")
    if ours.param.dtype != torch.float32 and (low is None or low.dtype == torch.int8):
        # some values are near the border of two numbers; other random bits would change a third
        differ = np.isfinite(q) & (np.abs(p - q) > allowed)
        assert differ.sum() <= 10 + 0.2 * q.size, f"parameter of {what}: {differ.sum()} differ"
        unit = 1.0 if low is None else 2.0**-8
        allowed += unit * spacing(np.maximum(np.abs(p), np.abs(q)), ours.param.dtype)
    assert_close(p, q, allowed, f"parameter of {what}")
    for key in ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"):
        if key in theirs.state:
            value = to_numpy(theirs.state[key])
            allowed = (2 * STRIPES.value + worst) * np.abs(value) + DENORMAL
            assert_close(to_numpy(ours.state[key]), value, allowed, f"{key} of {what}")
    compare_momentum(ours, theirs, sizes.momentum, what)


def compare_momentum(ours: Entry, theirs: Entry, size: np.ndarray, what: str) -> None:
    if ours.momentum_dtype not in CODED:
        a, b = (to_numpy(each.state["exp_avg"]) for each in (ours, theirs))
        allowed = 2.0**-22 * size + DENORMAL
        if ours.momentum_dtype == "bfloat16":
            allowed += spacing(np.maximum(np.abs(a), np.abs(b)), torch.bfloat16)
        assert_close(a, b, allowed, f"exp_avg of {what}")
        return
    scales = [to_numpy(each.state["exp_avg_scale"]) for each in (ours, theirs)]
    largest = np.maximum.reduceat(size, range(0, size.shape[-1], momentum.BLOCK_SIZE), axis=-1)
    assert_close(*scales, 2.0**-22 * largest + DENORMAL, f"exp_avg_scale of {what}")
    a, b = (each.state["exp_avg"] for each in (ours, theirs))
    if ours.momentum_dtype == "int4":
        a, b = (momentum._unpack(each, size.shape[-1]) for each in (a, b))
    # if the terms cancel, the whole block consists of their roundings
    is_rounding = ~(scales[1] > 2.0**-10 * largest)
    is_rounding = np.repeat(is_rounding, momentum.BLOCK_SIZE, -1)[..., : size.shape[-1]]
    allowed = np.where(is_rounding, np.inf, 1.0)
    assert_close(to_numpy(a), to_numpy(b), allowed, f"codes of {what}")


# -------------------------------------------------------------------------------------------------
# whole steps
# -------------------------------------------------------------------------------------------------


def fuzz_steps(draw: Draw) -> None:
    """Steps an optimizer of each backend; the reference starts from the CPU backend's numbers."""
    groups, mirrored = [], []
    for _ in range(draw.choice((1, 1, 2))):
        shapes = [draw.shape() for _ in range(draw.randint(1, 5))]
        if draw.chance(0.3):  # tensors of one shape, which the reference stacks
            shapes += shapes[:1] * 2
        if draw.chance(0.1):
            shapes.insert(draw.randint(0, len(shapes)), (BUNDLE,))
        settings = {**draw.settings(), "blocks": [draw.blocks(shape) for shape in shapes]}
        dtype = draw.dtype(settings)
        params = [
            torch.nn.Parameter(draw.laid_out(draw.normal(shape).to(dtype))) for shape in shapes
        ]
        copies = [torch.nn.Parameter(p.detach().clone().contiguous()) for p in params]
        groups.append({**settings, "params": params})
        mirrored.append({**settings, "params": copies})
    ours = StripedAdamW(groups, backend="cpu")
    theirs = StripedAdamW(mirrored, backend="reference")
    pairs = [
        (p, q, group, description_of(group, i))
        for group, mirror in zip(ours.param_groups, theirs.param_groups, strict=True)
        for i, (p, q) in enumerate(zip(group["params"], mirror["params"], strict=True))
    ]
    scales = [draw.choice(SCALES) for _ in pairs]
    for _ in range(draw.randint(1, 4)):
        for (p, q, *_), scale in zip(pairs, scales, strict=True):
            if draw.chance(0.1):
                p.grad = q.grad = None
                continue
            dtype = draw.choice((torch.float32, p.dtype, *PARAM_DTYPES))
            grad = draw.gradient(tuple(p.shape), scale).to(dtype)
            is_expanded = 0 in grad.stride()
            set_grad(p, grad if is_expanded else draw.laid_out(grad))
            set_grad(q, grad.clone(memory_format=torch.contiguous_format))
            for key, value in ours.state[p].items() if draw.chance(0.2) else ():
                if key != "step":
                    ours.state[p][key] = draw.laid_out(value)
        if draw.chance(0.3):
            fuzz_misfit(draw, ours)
        compare_step(ours, theirs, pairs, draw.randint(1, 4))


def entry_of(param: torch.Tensor, state: State, description: Description) -> Entry:
    """Returns the entry of a parameter, only for reading."""
    shape = description.stepped
    if len(shape) < 2:  # the state of a vector has its parameter's shape
        state = {key: v if key == "step" else v.reshape(shape) for key, v in state.items()}
    return Entry(
        param.detach().reshape(shape),
        param.grad.reshape(shape),
        state,
        description.momentum_dtype,
        description.blocks,
        int(state["step"]),
    )


def compare_step(ours: StripedAdamW, theirs: StripedAdamW, pairs: list[Any], threads: int) -> None:
    """Gives the reference the CPU backend's numbers, steps both, and compares them."""
    stepped = []
    for p, q, group, description in pairs:
        state, mirror = ours.state[p], theirs.state[q]
        q.detach().copy_(p.detach())
        for key, value in state.items():
            mirror[key] = value.clone(memory_format=torch.contiguous_format)
        if p.grad is None or not p.numel():
            continue
        entry = entry_of(q, dict(mirror) or zero_state(description, q.device), description)
        sizes = sizes_of(entry._replace(step=entry.step + 1), settings_of(group, False))
        stepped.append((p, q, description, sizes))
    torch.set_num_threads(threads)
    ours.step()
    torch.set_num_threads(1)
    theirs.step()
    for p, q, description, sizes in stepped:
        mine = entry_of(p, ours.state[p], description)
        other = entry_of(q, theirs.state[q], description)
        what = f"{p.dtype} {tuple(p.shape)} {mine.momentum_dtype} {mine.blocks} step {mine.step}"
        compare(mine, other, sizes, what)
        check_guards(p.detach(), what)
        for key, value in ours.state[p].items():
            check_guards(value, f"{key} of {what}")


# -------------------------------------------------------------------------------------------------
# misfits
# -------------------------------------------------------------------------------------------------


def shrunk(value: torch.Tensor) -> torch.Tensor:
    """Frees the memory of a tensor's last element, without the tensor's knowledge."""
    value.untyped_storage().resize_(value.untyped_storage().nbytes() - value.element_size())
    return value


def freed(value: torch.Tensor) -> torch.Tensor:
    value.untyped_storage().resize_(0)
    return value


# each function gets a copy of a nonempty tensor of a state, and returns a tensor that does not fit
STATE_MISFITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "longer": lambda x: x.new_zeros((*x.shape[:-1], x.shape[-1] + 1) if x.dim() else (2,)),
    "shorter": lambda x: x[..., :-1].clone() if x.dim() else x.new_zeros(0),
    "one more dimension": lambda x: x.unsqueeze(0),
    "resized in place": lambda x: x.resize_(x.numel() // 2),
    "another dtype": lambda x: x.to(torch.float16),
    "float64": lambda x: x.double(),
    "on meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "a zero tensor": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "a number": lambda x: 1.0,
    "missing": lambda x: None,
    "freed": freed,
    "shrunk": shrunk,
    "overlapping": lambda x: x.as_strided(x.shape, (0,) * x.dim()) if x.numel() > 1 else None,
}
PARAMETER_MISFITS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "more rows": lambda x: x.new_zeros((x.shape[0] + 1, *x.shape[1:]) if x.dim() else (2,)),
    "fewer columns": lambda x: x[..., :-1].clone() if x.dim() else x.new_zeros(2),
    "a zero tensor": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "freed": freed,
    "shrunk": shrunk,
    "overlapping": lambda x: x.as_strided(x.shape, (0,) * x.dim()) if x.numel() > 1 else freed(x),
}


def fuzz_misfit(draw: Draw, optimizer: StripedAdamW) -> None:
    """Replaces one tensor by one that does not fit: the step must refuse it and change nothing."""
    params = [
        p
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None and p.numel() and optimizer.state[p]
    ]
    if not params:
        return
    p = draw.choice(params)
    state, data, grad = optimizer.state[p], p.data, p.grad
    saved = dict(state)
    kept = [x.clone() for x in (data, *saved.values())]
    others = [x for q in params if q is not p for x in (q.detach(), *optimizer.state[q].values())]
    kept_others = [x.clone() for x in others]
    which = draw.choice(("state", "state", "parameter", "gradient"))
    if which == "state":
        key = draw.choice([key for key in saved if key != "step"])
        name = f"{key} {(misfit := draw.choice(list(STATE_MISFITS)))}"
        value = STATE_MISFITS[misfit](saved[key].clone(memory_format=torch.contiguous_format))
        if value is not None:
            state[key] = value
        elif key == "param_low_bits":  # a state without them is one from float32, and fits
            return
        else:
            del state[key]
    elif which == "parameter":
        name = f"parameter {(misfit := draw.choice(list(PARAMETER_MISFITS)))}"
        p.grad = None
        p.data = PARAMETER_MISFITS[misfit](data.clone(memory_format=torch.contiguous_format))
        p.grad = torch.zeros_like(p)
    else:
        name = f"gradient {(misfit := draw.choice(('freed', 'shrunk')))}"
        p.grad = None
        p.grad = PARAMETER_MISFITS[misfit](torch.ones(p.shape, dtype=p.dtype))
    try:
        optimizer.step()
    except RuntimeError:
        pass
    else:
        raise AssertionError(f"{tuple(data.shape)}: {name} was not refused")
    p.grad = None
    p.data = data
    set_grad(p, grad)
    state.clear()
    state.update(saved)
    for x, before in zip((data, *saved.values()), kept, strict=True):
        assert_same_bits(x, before, f"{name} was refused too late")
    for x, before in zip(others, kept_others, strict=True):
        assert_same_bits(x, before, f"{name} was refused too late")


# -------------------------------------------------------------------------------------------------
# parts of sharded matrices
# -------------------------------------------------------------------------------------------------


def fuzz_parts(draw: Draw) -> None:
    """Calls ``statistics`` and ``update`` on parts of matrices, which have no stripes."""
    options = draw.settings()
    settings = settings_of(options | {"blocks": (1, 1)}, False)
    ours, theirs, expected = [], [], []
    for _ in range(draw.randint(1, 4)):
        shape, dtype = draw.shape(), draw.dtype(options)
        if not math.prod(shape):
            continue
        blocks, p = draw.blocks(shape), draw.laid_out(draw.normal(shape).to(dtype))
        stored = momentum.storage_format(p.shape, options["momentum_dtype"])
        has_low_bits = p.dim() >= 2 and dtype == torch.bfloat16 and options["master_bits"]
        low_bits = torch.int8 if has_low_bits else None
        state = zero_state(Description(p.shape, p.shape, stored, blocks, None, low_bits), p.device)
        codes, scale = momentum.encode(1e-3 * draw.normal(shape), stored)
        state["exp_avg"] = codes
        if scale is not None:
            state["exp_avg_scale"] = scale
        roots = None
        if p.dim() >= 2:
            roots = tuple(
                draw.normal(tuple(state.pop(key).shape)).abs()
                for key in ("exp_avg_sq_row", "exp_avg_sq_col")
            )
        columns = shape[-1] if shape else 1
        grad = 1e-3 * draw.normal(shape)
        place = {
            "whole_start": draw.choice((0, 77, 2**32 - 50, 5 * 2**32 - 1)),
            "whole_stride": draw.choice((0, columns, columns + 3)) if len(shape) >= 2 else 0,
        }
        step = draw.choice((1, 2, 1000, 2**24))
        mine = Entry(p, draw.laid_out(grad), state, stored, blocks, step, **place)
        ours.append(mine)
        theirs.append(
            mine._replace(
                param=p.clone(memory_format=torch.contiguous_format),
                grad=grad,
                state={key: value.clone() for key, value in state.items()},
            )
        )
        expected.append((roots, sizes_of(theirs[-1], settings, roots)))
    for a, b in zip(cpu.statistics(ours), reference.statistics(theirs), strict=True):
        assert (a is None) == (b is None)
        for x, y in zip(a or (), b or (), strict=True):
            y = to_numpy(y)
            assert_close(to_numpy(x), y, 2 * STRIPES.value * np.abs(y) + DENORMAL, "sums")
    roots_of_all = [roots for roots, _ in expected]
    torch.set_num_threads(draw.randint(1, 4))
    cpu.update(ours, roots_of_all, settings)
    torch.set_num_threads(1)
    reference.update(theirs, roots_of_all, settings)
    for mine, other, (_, sizes) in zip(ours, theirs, expected, strict=True):
        what = f"part {mine.param.dtype} {tuple(mine.param.shape)} {mine[3:]}"
        compare(mine, other, sizes, what)
        check_guards(mine.param, what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", help="the library that setup.py built with sanitizers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=10**9, help="how many at most")
    parser.add_argument("--seconds", type=float, default=math.inf)
    arguments = parser.parse_args()
    cpu._library = cpu._load(arguments.library)
    torch.set_num_threads(1)
    end = time.monotonic() + arguments.seconds
    for case in range(arguments.first, arguments.first + arguments.cases):
        if time.monotonic() > end:
            break
        # after a crash only this line is left
        print(f"case --seed {arguments.seed} --first {case} --cases 1", flush=True)
        draw = Draw(f"{arguments.seed} {case}")
        torch.manual_seed(draw.getrandbits(63))
        with np.errstate(all="ignore"):
            (fuzz_parts if draw.chance(0.25) else fuzz_steps)(draw)
    print(f"{case - arguments.first} cases passed")


if __name__ == "__main__":
    main()
