"""Folding in the Triton backend against the reference: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from optim_checks import (
    FORMATS,
    PARAM_DTYPES,
    assert_same_bits,
    assert_same_snapshot,
    lay_out,
    parameter,
    parameters,
    snapshot,
    stored_momentum,
)
from torch import Tensor

import striped_hf.optim.layerwise.optimizer as layerwise_optimizer
from striped_hf import LayerwiseStripedAdamW, StripedAdamW
from striped_hf.optim import backends, momentum
from striped_hf.optim.backends import reference
from striped_hf.optim.interface import Entry, Folded, Settings
from striped_hf.optim.options import settings_of
from striped_hf.optim.state import description_of

pytest.importorskip("triton")
triton_backend = pytest.importorskip(
    "striped_hf.optim.backends.triton.backend", exc_type=ImportError
)

from striped_hf.optim.backends.triton import fold, tile_sizes  # noqa: E402

DEVICE = triton_backend.DEVICE_TYPES[0]
TRITON = triton_backend.new()
ON_GPU = DEVICE == "cuda"

# on a GPU every test here runs compiled kernels, so `pytest -m gpu` must select it
pytestmark = [pytest.mark.gpu] if ON_GPU else []

F32, BF16, F16 = PARAM_DTYPES

# float32 roundings of sums in another order, relative to the sums of magnitudes
SUMS = {"rtol": 2e-6, "atol": 0.0}
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


# -------------------------------------------------------------------------------------------------
# one fold
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A matrix, its gradient, and the options of the fold."""

    shape: tuple[int, ...]
    momentum_dtype: str = "float32"
    blocks: tuple[int, int] = (1, 1)
    grad_dtype: torch.dtype = F32
    is_first: bool = True
    sketch: bool = False
    coefficient: float | None = None
    maximize: bool = False
    beta1: float = 0.9
    whole_start: int = 0
    whole_stride: int = 0

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), self.momentum_dtype]
        parts += [f"blocks {self.blocks}"] if self.blocks != (1, 1) else []
        parts += [str(self.grad_dtype).removeprefix("torch."), "first" if self.is_first else "next"]
        parts += [name for name in ("sketch", "maximize") if getattr(self, name)]
        parts += [f"times {self.coefficient}"] if self.coefficient is not None else []
        parts += [f"from {self.whole_start}"] if self.whole_start else []
        return " ".join(parts)


SHAPES: list[tuple[tuple[int, ...], tuple[int, int]]] = [
    ((20, 128), (1, 1)),
    ((7, 129), (1, 1)),  # a tile of one column
    ((70, 48), (1, 1)),  # two programs one below another
    ((5, 7), (1, 1)),
    ((1, 6), (1, 1)),
    ((6, 1), (1, 1)),
    ((6, 384), (1, 3)),  # blocks that are whole tiles
    ((9, 450), (3, 3)),  # and those that are not
    ((6, 90), (2, 9)),  # several blocks in a tile
    ((2, 3, 130), (1, 2)),
    ((2, 6, 7), (3, 1)),
]
CASES = [
    *(
        Case(shape, momentum_dtype, blocks, is_first=i % 2 == 0, sketch=i % 3 > 0)
        for i, (shape, blocks) in enumerate(SHAPES)
        for momentum_dtype in FORMATS
    ),
    *(
        Case((5, 257), momentum_dtype, (1, 1), dtype, is_first, is_sketched, coefficient)
        for momentum_dtype in FORMATS
        for dtype in PARAM_DTYPES
        for is_first in (True, False)
        for is_sketched, coefficient in ((False, None), (True, 0.37))
    ),
    Case((5, 130), sketch=True, coefficient=1.0),
    Case((5, 130), "int8", sketch=True, maximize=True, coefficient=0.5),
    Case((5, 130), "int4", sketch=True, maximize=True, is_first=False),
    Case((5, 130), beta1=0.0),
    Case((5, 130), beta1=0.3),  # a weight above a half, where lerp starts from the other end
    Case((5, 130), beta1=0.3, is_first=False),
    # parts of sharded matrices
    Case((5, 130), "int8", sketch=True, whole_start=3 * 130, whole_stride=130),
    Case((5, 128), "int4", sketch=True, whole_start=7 * 384 + 128, whole_stride=384),
    Case((5, 130), sketch=True, whole_start=(1 << 32) - 400, whole_stride=130),
]


def entry_and_folded(case: Case) -> tuple[Entry, Folded]:
    """Returns the entry and the earlier gradients' sums, with unequal rows and columns."""
    draw = torch.Generator().manual_seed(5)
    *matrices, rows, columns = case.shape
    sizes = torch.logspace(-2, 0, rows).unsqueeze(1) * torch.logspace(0, -1, columns)
    grad = torch.randn(case.shape, generator=draw) * sizes
    before = torch.randn(case.shape, generator=draw) * sizes
    codes, scale = momentum.encode(before, case.momentum_dtype)
    state = {"exp_avg": codes} if scale is None else {"exp_avg": codes, "exp_avg_scale": scale}
    row_blocks, column_blocks = case.blocks
    row_sums = torch.rand(*matrices, rows, column_blocks, generator=draw)
    col_sums = torch.rand(*matrices, row_blocks, columns, generator=draw)
    blocks = momentum.scale_columns(columns)
    sketch = torch.randn(*matrices, rows, blocks, generator=draw) if case.sketch else None
    grad = grad.to(DEVICE, case.grad_dtype)
    entry = Entry(
        param=grad,
        grad=grad,
        state={key: value.to(DEVICE).contiguous() for key, value in state.items()},
        momentum_dtype=case.momentum_dtype,
        blocks=case.blocks,
        step=3,
        whole_start=case.whole_start,
        whole_stride=case.whole_stride,
    )
    sketch = None if sketch is None else sketch.to(DEVICE)
    return entry, Folded(row_sums.to(DEVICE), col_sums.to(DEVICE), sketch)


def settings_for(case: Case) -> Settings:
    optimizer = StripedAdamW(
        [parameter(torch.zeros(2, 2))], betas=(case.beta1, 0.99), maximize=case.maximize
    )
    return settings_of(optimizer.param_groups[0], capturable=False)


def folded_by(backend: Any, case: Case) -> tuple[Entry, Folded]:
    entry, folded = entry_and_folded(case)
    factor = case.coefficient
    coefficient = None if factor is None else torch.tensor(factor, device=DEVICE)
    backend.fold(entry, folded, settings_for(case), case.is_first, coefficient)
    return entry, folded


def assert_same_fold(case: Case) -> None:
    (ours, actual), (theirs, expected) = (folded_by(b, case) for b in (TRITON, reference))
    torch.testing.assert_close(actual.row_sums, expected.row_sums, **SUMS)
    torch.testing.assert_close(actual.col_sums, expected.col_sums, **SUMS)
    if expected.sketch is not None:
        assert actual.sketch is not None
        torch.testing.assert_close(actual.sketch, expected.sketch, rtol=2e-6, atol=4e-6)
    assert_same_momentum(ours.state, theirs.state, case.shape[-1])


def assert_same_momentum(
    actual: dict[str, Tensor], expected: dict[str, Tensor], columns: int
) -> None:
    """Compares up to the last places, and up to codes of values near the border of two codes."""
    values, wanted = (torch.from_numpy(stored_momentum(s, columns)[0]) for s in (actual, expected))
    near = torch.isclose(values, wanted, **CLOSE)
    assert (~near).sum() <= max(1, 1e-3 * near.numel())
    tipped = wanted.abs().max() * {"bfloat16": 2.0**-7, "int8": 0.02, "int4": 0.3}.get(
        stored_momentum(expected, columns)[1], 2e-6
    )
    assert (values - wanted).abs().max() <= tipped


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_fold_agrees_with_the_reference(case: Case) -> None:
    assert fold.can_fold(*entry_and_folded(case))
    assert_same_fold(case)


@pytest.mark.parametrize("shape", [(300, 40), (600, 130)], ids=str)
def test_large_matrices_have_several_programs(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_sizes, "folded_rows", lambda elements: 256)
    fold._geometry.cache_clear()
    assert_same_fold(Case(shape, "int8", (2, 1), sketch=True))
    fold._geometry.cache_clear()


def test_partial_sums_take_little_memory() -> None:
    """They take less than a thirty-second of the memory of a large bfloat16 gradient."""
    for shape, blocks in (
        ((4096, 11008), (1, 1)),
        ((50257, 1600), (1, 1)),
        ((8192, 24576), (1, 3)),
    ):
        geometry = fold._geometry(torch.Size(shape), blocks)
        assert 4 * geometry.partials < 2 * math.prod(shape) / 32


def test_folds_repeat_bit_for_bit() -> None:
    case = Case((150, 300), "int8", (1, 3), BF16, sketch=True, coefficient=0.3)
    (first, one), (second, two) = (folded_by(TRITON, case) for _ in range(2))
    for a, b in zip((*one, *first.state.values()), (*two, *second.state.values()), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy
def test_inf_and_nan_stay_not_finite(momentum_dtype: str, bad: float) -> None:
    case = Case((5, 300), momentum_dtype, sketch=True)
    found = []
    for backend in (TRITON, reference):
        entry, folded = entry_and_folded(case)
        entry.gradient[2, 140] = bad
        backend.fold(entry, folded, settings_for(case), True, None)
        found.append((*folded, *entry.state.values()))
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_the_reference_folds_other_strides_with_one_warning(
    layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    triton_backend._warn_once.cache_clear()
    case = Case((6, 130), "int8", sketch=True)
    results = []
    with caplog.at_level(logging.WARNING):
        for backend in (TRITON, reference, TRITON):
            entry, folded = entry_and_folded(case)
            grad = lay_out(entry.gradient, layout)
            backend.fold(entry._replace(grad=grad), folded, settings_for(case), True, None)
            results.append((*folded, *entry.state.values()))
    for actual, expected in zip(results[0], results[1], strict=True):
        assert_same_bits(actual, expected)
    assert sum("contiguous" in record.message for record in caplog.records) == 1


def test_a_gradient_may_be_at_any_address() -> None:
    """The address is no multiple of 16 bytes."""
    case = Case((6, 128), "int8", sketch=True)
    results = []
    for backend, moved in ((TRITON, False), (TRITON, True), (reference, True)):
        entry, folded = entry_and_folded(case)
        if moved:
            buffer = torch.empty(entry.gradient.numel() + 1, device=DEVICE)
            buffer[1:] = entry.gradient.flatten()
            entry = entry._replace(grad=buffer[1:].view(case.shape))
        backend.fold(entry, folded, settings_for(case), True, None)
        results.append((entry, folded))
    for entry, folded in results[1:]:
        assert_same_momentum(entry.state, results[0][0].state, 128)
        torch.testing.assert_close(folded.row_sums, results[0][1].row_sums, **SUMS)


# -------------------------------------------------------------------------------------------------
# the step
# -------------------------------------------------------------------------------------------------

STEPPED = [((20, 128), (1, 1)), ((9, 450), (3, 3)), ((6, 90), (2, 9)), ((2, 3, 7), (1, 1))]


def next_step_of(optimizer: StripedAdamW) -> tuple[Settings, list[Entry]]:
    """Counts a step of the only group, and returns a backend's arguments."""
    [group] = optimizer.param_groups
    entries = []
    for position, param in enumerate(group["params"]):
        state, description = optimizer.state[param], description_of(group, position)
        state["step"] += 1
        format_and_blocks = (description.momentum_dtype, description.blocks)
        entries.append(Entry(param, param.grad, state, *format_and_blocks, int(state["step"])))
    return settings_of(group, capturable=False), entries


@pytest.mark.parametrize(
    ("dtype", "maximize"), [(F32, False), (F32, True), (BF16, True), (F16, False)], ids=str
)
@pytest.mark.parametrize("in_two_functions", [False, True], ids=["step_folded", "update"])
def test_a_step_of_folded_gradients_is_the_ordinary_one(
    in_two_functions: bool, maximize: bool, dtype: torch.dtype
) -> None:
    """To the bit with float32 momentum, from the ordinary step's sums."""
    ps, qs = (
        [
            parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)), dtype, DEVICE)
            for shape, _ in STEPPED
        ]
        for _ in range(2)
    )
    ordinary, other = (
        StripedAdamW(
            [{"params": params, "blocks": [blocks for _, blocks in STEPPED]}],
            lr=0.1,
            maximize=maximize,
            backend="triton",
        )
        for params in (ps, qs)
    )
    for t in range(3):
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn(p.shape).to(DEVICE, dtype)
            q.grad = p.grad
        if t == 0:  # the first step, which makes the states
            ordinary.step()
            other.step()
            continue
        settings, entries = next_step_of(other)
        sums = [tuple(part.clone() for part in pair) for pair in TRITON.statistics(entries)]
        for entry, (row_sums, col_sums) in zip(entries, sums, strict=True):
            zeros = Folded(torch.zeros_like(row_sums), torch.zeros_like(col_sums), None)
            TRITON.fold(entry, zeros, settings, True, None)
            torch.testing.assert_close(zeros.row_sums, row_sums, **SUMS)
            torch.testing.assert_close(zeros.col_sums, col_sums, **SUMS)
        without = [entry._replace(grad=None) for entry in entries]
        if in_two_functions:
            # the roots are divided in another way than in the step
            TRITON.update(without, reference.stripes(without, sums, settings), settings)
        else:
            TRITON.step_folded(without, sums, settings)
        ordinary.step()
        for p, q in zip(ps, qs, strict=True):
            assert_same_bits(other.state[q]["exp_avg"], ordinary.state[p]["exp_avg"])
            if in_two_functions or ON_GPU:
                within = {} if dtype != F32 else {"rtol": 1e-5, "atol": 1e-6}
                torch.testing.assert_close(q, p, **within)
                q.data.copy_(p)
                for key, value in ordinary.state[p].items():
                    other.state[q][key].copy_(value)
                continue
            assert_same_bits(q, p)
            for key, value in ordinary.state[p].items():
                assert_same_bits(other.state[q][key], value, key)


@torch.no_grad()
@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("with_fallback", [False, True])
def test_the_step_reads_the_stored_momentum(momentum_dtype: str, with_fallback: bool) -> None:
    """The stored momentum does not change, and the gradient's strides no longer count."""
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(7)
        layout = "strided" if with_fallback else "transposed"
        values = [lay_out(torch.randn(6, 130).to(DEVICE), layout), torch.randn(70, 300).to(DEVICE)]
        ps = [torch.nn.Parameter(value) for value in values]
        optimizer = StripedAdamW(ps, lr=0.1, momentum_dtype=momentum_dtype, backend="reference")
        for p in ps:
            p.grad = torch.randn(p.shape).to(DEVICE)
        optimizer.step()
        stored = {p: optimizer.state[p]["exp_avg"].clone() for p in ps}
        settings, entries = next_step_of(optimizer)
        sums = reference.statistics(entries)
        without = [entry._replace(grad=None) for entry in entries]
        backends.new(backend, DEVICE).step_folded(without, sums, settings)
        for p in ps:
            assert_same_bits(optimizer.state[p]["exp_avg"], stored[p])
        results.append(optimizer)
    for p, q in zip(*map(parameters, results), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for key in ("exp_avg_sq_row", "exp_avg_sq_col"):
            actual, expected = (o.state[x][key] for o, x in zip(results, (p, q), strict=True))
            torch.testing.assert_close(actual, expected, **SUMS)


def test_a_step_without_entries_does_nothing() -> None:
    TRITON.step_folded([], [], settings_for(Case((2, 2))))


# -------------------------------------------------------------------------------------------------
# the optimizer
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the optimizer fold matrices of any size."""
    monkeypatch.setattr(layerwise_optimizer, "SMALLEST", 1)


MODEL = [
    ((20, 48), (1, 1)),
    ((4, 390), (2, 3)),
    ((5, 7), (1, 1)),
    ((9,), (1, 1)),
]


def trained(
    backend: str, dtype: torch.dtype, passes: int, steps: int = 2, **options: Any
) -> LayerwiseStripedAdamW:
    draw = torch.Generator().manual_seed(11)
    ps = [parameter(torch.randn(s, generator=draw), dtype, DEVICE) for s, _ in MODEL]
    group = {"params": ps, "blocks": [blocks for _, blocks in MODEL]}
    options = {"lr": 0.01, "gradient_accumulation": passes > 1, **options}
    optimizer = LayerwiseStripedAdamW([group], backend=backend, **options)
    for _ in range(steps):
        for _ in range(passes):
            grads = [torch.randn(p.shape, generator=draw).to(DEVICE, dtype) for p in ps]
            sum((p * g).sum() for p, g in zip(ps, grads, strict=True)).backward()
        assert [p.grad is None for p in ps] == [True, True, True, False]
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.usefixtures("small_matrices")
@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_a_run_agrees_with_the_reference(
    max_grad_norm: float | None, passes: int, momentum_dtype: str
) -> None:
    options = {"momentum_dtype": momentum_dtype, "max_grad_norm": max_grad_norm}
    ours, theirs = (trained(b, F32, passes, **options) for b in ("triton", "reference"))
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        for key in ("exp_avg_sq_row", "exp_avg_sq_col"):
            if key in theirs.state[q]:
                expected = theirs.state[q][key]
                torch.testing.assert_close(ours.state[p][key], expected, rtol=1e-5, atol=0)
        # a code that differs moves its weight by a fraction of lr
        wrong = ~torch.isclose(p, q, rtol=1e-5, atol=1e-6)
        assert wrong.sum() <= max(1, 2e-3 * wrong.numel())
        torch.testing.assert_close(p, q, rtol=0, atol=0.01)


@pytest.mark.usefixtures("small_matrices")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_weights_of_low_precision_are_rounded_as_by_the_reference(dtype: torch.dtype) -> None:
    ours, theirs = (trained(b, dtype, 2, momentum_dtype="int8") for b in ("triton", "reference"))
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        assert (p != q).sum() <= max(1, 5e-3 * p.numel())


@pytest.mark.usefixtures("small_matrices")
def test_runs_repeat_bit_for_bit() -> None:
    options = {"momentum_dtype": "int4", "max_grad_norm": 1.0}
    first, second = (trained("triton", BF16, 2, **options) for _ in range(2))
    assert_same_snapshot(snapshot(first), snapshot(second))
