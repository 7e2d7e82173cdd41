"""Parameters and settings for the tests of the Triton backend, and their comparison.

A test that imports this module is skipped where Triton cannot run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from optim_checks import (
    FORMATS,
    assert_same_bits,
    bits,
    lay_out,
    parameters,
    spacing,
    to_numpy,
    whole_values,
)

from striped_hf import StripedAdamW
from striped_hf.optim.interface import Entry

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
triton_backend = pytest.importorskip(
    "striped_hf.optim.backends.triton.backend", exc_type=ImportError
)

DEVICE = triton_backend.DEVICE_TYPES[0]
ON_GPU = DEVICE == "cuda"

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


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
MASTER = {"master_bits": 24}

SPECS = [
    # a whole block of codes, one column more, rows that are not whole tiles
    *(Spec((20, 128), f) for f in FORMATS),
    *(Spec((7, 129), f) for f in FORMATS),
    *(Spec((3, 300), f) for f in FORMATS),
    *(Spec((70, 48), f) for f in ("float32", "int8", "int4")),
    *(Spec((140, 20), f) for f in ("float32", "int4")),  # statistics: several programs of rows
    *(Spec((2, 600), f) for f in ("bfloat16", "int4")),  # and several of columns
    # shapes at the limits
    *(Spec(shape, f) for shape in ((1, 6), (7, 5), (1, 1), (6, 1), (5, 2)) for f in FORMATS),
    *(Spec(shape, f) for shape in ((2, 3, 7), (2, 1, 3, 130)) for f in ("float32", "int8", "int4")),
    *(Spec(shape) for shape in ((), (1,), (5,), (1030,))),
    # blocks: as wide as tiles, narrower, across blocks of codes, by rows
    *(Spec((6, 384), f, (1, 3)) for f in FORMATS),
    *(Spec((6, 192), f, (3, 2)) for f in ("float32", "int8")),
    *(Spec((6, 450), f, (1, 3)) for f in ("bfloat16", "int8", "int4")),
    Spec((6, 640), "int8", (1, 4)),
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
    # layouts in memory
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
    *(Spec((6, 450), f, (1, 3), flags=LAGGED) for f in FORMATS),
    *(Spec((140, 640), f, (2, 4), flags=LAGGED) for f in ("int8", "int4")),
    Spec((6, 9), "int8", (2, 3), flags=LAGGED),
    Spec((201, 10), blocks=(3, 1), flags=LAGGED),
    Spec((2, 3, 7), "int8", flags={**LAGGED, "maximize": True, "nesterov": True}),
    Spec((5, 130), "int8", flags={**LAGGED, "betas": (0.0, 0.0), "eps": 0.0}),
    *(Spec((6, 132), f, (1, 2), BF16, layout="transposed", flags=LAGGED) for f in ("int8", "int4")),
    Spec((2, 5, 7), layout="transposed", flags=LAGGED),
    *(Spec(shape, flags=LAGGED) for shape in ((1, 6), (6, 1), (9,))),
    # the 8 bits after those of bfloat16
    *(Spec((7, 300), f, dtype=BF16, flags=MASTER) for f in FORMATS),
    *(Spec((6, 450), f, (1, 3), BF16, flags=MASTER) for f in ("float32", "int4")),
    *(Spec((6, 384), f, (2, 3), BF16, flags=LAGGED | MASTER) for f in ("bfloat16", "int4")),
    *(Spec((6, 132), f, (1, 2), BF16, layout="transposed", flags=MASTER) for f in ("int8", "int4")),
    Spec((2, 5, 7), dtype=BF16, layout="transposed", flags=MASTER),
    Spec((5, 130), "int8", dtype=BF16, flags=MASTER | {"stochastic_rounding": False}),
    Spec((9,), dtype=BF16, flags=MASTER),
    Spec((20, 128), "int8", flags=MASTER),
]

# Relative to the values. Sums of n squares in another order have n^(1/2) roundings of 6e-8. A
# momentum may cancel: its error is relative to the gradients, which are of order 1. A fast division
# and root add 2 units in the last place.
STRIPES = {"rtol": 2e-6, "atol": 0.0}
MOMENTUM = {"rtol": 1e-6, "atol": 2e-7}
SCALE = {"rtol": 1e-6, "atol": 2e-7}
UPDATE = 2e-6  # of lr, plus the last place of the parameter
# A value within 1e-5 of a half may round to either side: one code, or one draw, in some thousands.
TIPPED = 1e-3


def gradient_of(spec: Spec, t: int) -> torch.Tensor:
    """A gradient whose rows and columns have unequal size."""
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
            elif value.dtype != torch.int8:  # with the parameter
                assert_same_bits(actual, value, key)
        low, lr = state.get("param_low_bits"), float(ours.param_groups[0]["lr"])
        if low is not None and low.dtype == torch.int8:
            a, b = whole_values(p, state), whole_values(q, expected)
            unit = 2.0**-8 * spacing(np.maximum(np.abs(a), np.abs(b)), BF16)
            assert (np.abs(a - b) <= 1.01 * unit + UPDATE * lr).all()
            # an error of a float32's last place is 1/256 of the unit
            assert (a != b).sum() <= max(2, 0.02 * a.size)
        elif p.dtype == F32:
            torch.testing.assert_close(p, q, rtol=2.0**-22, atol=UPDATE * lr * 20)
        else:
            assert_nearly_the_same(p.detach().cpu(), q.detach().cpu(), "parameter")


def assert_nearly_the_same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Asserts equal bits, except for a few values that round to a neighbour."""
    a, b = to_numpy(actual), to_numpy(expected)
    unit = spacing(np.maximum(np.abs(a), np.abs(b)), expected.dtype)
    assert (np.abs(a - b) <= 1.01 * unit).all(), what
    wrong = (bits(actual) != bits(expected)).sum()
    assert wrong <= max(1, TIPPED * actual.numel()), f"{what}: {wrong} of {actual.numel()} differ"


def synchronise(target: StripedAdamW, source: StripedAdamW) -> None:
    """Copies parameters and state, so that the next step starts from the same numbers."""
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


def entry_of(p: torch.nn.Parameter, optimizer: StripedAdamW) -> Entry:
    return Entry(p, p.grad, optimizer.state[p], "float32", (1, 1), 2)
