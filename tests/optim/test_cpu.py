"""The CPU backend against the reference: the parts where it alone could be wrong."""

from __future__ import annotations

import ctypes
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_checks import (
    CODES,
    FORMATS,
    PARAM_DTYPES,
    STRIPES,
    UPDATES,
    assert_same_bits,
    lay_out,
    parameter,
)

import striped_hf
from striped_hf import StripedAdamW
from striped_hf.optim import backends, rounding
from striped_hf.optim.backends import reference
from striped_hf.optim.interface import Entry, Settings
from striped_hf.optim.state import init_state

try:
    cpu = backends.resolve("cpu", "cpu")
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

SOURCE = Path(striped_hf.__file__).parent / "optim" / "backends" / "csrc" / "cpu.c"


# shapes and blocks: slices of one matrix, many matrices in one task, short last blocks, packed
# projections whose parts end inside a block of 128, one row, one column, vectors
SHAPES: list[tuple[tuple[int, ...], tuple[int, int]]] = [
    ((800, 768), (1, 1)),
    ((900, 600), (2, 1)),
    ((70, 9000), (1, 3)),
    ((64, 300), (1, 3)),
    ((60, 129), (3, 1)),
    ((6, 255), (2, 5)),
    ((100, 3, 3, 3), (1, 1)),
    ((3, 40, 130), (4, 2)),
    ((1, 7_000), (1, 1)),
    ((7_000, 1), (1, 1)),
    ((7_000, 2), (1, 1)),
    ((300_000,), (1, 1)),
    ((1,), (1, 1)),
    ((), (1, 1)),
]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "other settings": {"nesterov": True, "maximize": True, "betas": (0.5, 0.9)},
    "lagged": {"lagged": True},
}


def run(
    backend: str,
    momentum_dtype: str,
    dtype: torch.dtype = torch.float32,
    steps: int = 3,
    layout: str = "contiguous",
    **settings: Any,
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    ps = []
    for shape, _ in SHAPES:
        values = torch.randn(shape, generator=generator).to(dtype)
        ps.append(torch.nn.Parameter(lay_out(values, layout)))
    optimizer = StripedAdamW(
        [{"params": ps, "blocks": [blocks for _, blocks in SHAPES]}],
        lr=1e-2,
        momentum_dtype=momentum_dtype,
        backend=backend,
        **settings,
    )
    for _ in range(steps):
        for p in ps:
            p.grad = 1e-3 * torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    return [p.detach() for p in ps], [optimizer.state[p] for p in ps]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_it_agrees_with_the_reference(momentum_dtype: str, settings: dict[str, Any]) -> None:
    """The momentum's scales agree after the first step, before any code differs."""
    for steps in (1, 3):
        ours, states = run("cpu", momentum_dtype, steps=steps, **settings)
        theirs, expected = run("reference", momentum_dtype, steps=steps, **settings)
        for p, q, state, other in zip(ours, theirs, states, expected, strict=True):
            what = f"{tuple(p.shape)} after {steps}"
            for key in ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_scale"):
                if key in other and (steps == 1 or key != "exp_avg_scale"):
                    torch.testing.assert_close(
                        state[key], other[key], rtol=STRIPES.value, atol=0, msg=f"{key} of {what}"
                    )
            differing = 1 + steps * CODES.value * p.numel()  # another code visibly moves its weight
            if other["exp_avg"].dtype in (torch.int8, torch.uint8):
                assert (state["exp_avg"] != other["exp_avg"]).sum() <= differing, what
            tolerance = steps * (2**-23 * q.abs() + 1e-2 * UPDATES.value)
            assert ((p - q).abs() > tolerance).sum() <= differing, what


@pytest.mark.parametrize("dtype", PARAM_DTYPES, ids=str)
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_bits_do_not_depend_on_the_threads_nor_on_the_run(
    momentum_dtype: str, dtype: torch.dtype, threads: Iterator[None]
) -> None:
    results = []
    for count in (1, 2, 2, 3, 50):  # 50: more than there are tasks
        torch.set_num_threads(count)
        results.append(run("cpu", momentum_dtype, dtype))
    for ps, states in results[1:]:
        for p, q, state, other in zip(ps, results[0][0], states, results[0][1], strict=True):
            assert_same_bits(p, q, f"parameter {tuple(p.shape)}")
            for key, value in other.items():
                assert_same_bits(state[key], value, f"{key} of {tuple(p.shape)}")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_uses_torchs_threads(threads: Iterator[None], monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(cpu, "_library", Spy(cpu._library, used))
    for count in (1, 2):
        torch.set_num_threads(count)
        run("cpu", "int8", steps=1)
    assert used == [1, 2]  # each step has one parallel region for all entries


class Spy:
    """Records the threads of each call to the library, and makes the call."""

    def __init__(self, library: ctypes.CDLL, used: list[int]) -> None:
        self.library, self.used = library, used

    def __getattr__(self, name: str) -> Any:
        def call(address: int, count: int, settings: Any, threads: int) -> int:
            self.used.append(threads)
            return getattr(self.library, name)(address, count, settings, threads)

        return call


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_statistics_and_update_do_what_step_does(
    momentum_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded parameters need statistics and update as separate calls."""
    settings = [{}, {"lagged": True}]
    whole = [run("cpu", momentum_dtype, **each)[0] for each in settings]

    def step(entries: list[Entry], settings: Settings, known: object = None) -> None:
        roots = reference.stripes(entries, cpu.statistics(entries), settings)
        for entry in entries:  # a part of a sharded matrix has no stripes
            for key in ("exp_avg_sq_row", "exp_avg_sq_col"):
                kept[entry.param, key] = entry.state.pop(key, None)
        cpu.update(entries, roots, settings)
        for entry in entries:
            for key in ("exp_avg_sq_row", "exp_avg_sq_col"):
                if kept[entry.param, key] is not None:
                    entry.state[key] = kept[entry.param, key]

    kept: dict[Any, Any] = {}
    monkeypatch.setattr(cpu, "step", step)
    apart = [run("cpu", momentum_dtype, **each)[0] for each in settings]
    for ps, qs in zip(apart, whole, strict=True):
        for p, q in zip(ps, qs, strict=True):  # the sums and roundings of the stripes differ
            assert (~torch.isclose(p, q, rtol=1e-6, atol=1e-6)).float().mean() < CODES.value


def test_statistics_have_the_references_shapes() -> None:
    entries = []
    for shape, blocks in SHAPES:
        p = torch.nn.Parameter(torch.randn(shape))
        state = init_state(p, "float32", blocks)
        entries.append(Entry(p, torch.randn(shape), state, "float32", blocks, 1))
    for ours, theirs in zip(cpu.statistics(entries), reference.statistics(entries), strict=True):
        assert (ours is None) == (theirs is None)
        for a, b in zip(ours or (), theirs or (), strict=True):
            torch.testing.assert_close(a, b, rtol=STRIPES.value, atol=0)


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_the_reference_steps_layouts_that_it_does_not_support(momentum_dtype: str) -> None:
    for layout in ("transposed", "strided"):
        ours, _ = run("cpu", momentum_dtype, layout=layout)
        theirs, _ = run("reference", momentum_dtype, layout=layout)
        for p, q in zip(ours, theirs, strict=True):
            if not p.is_contiguous() and p.dim() != 4:  # a kernel is stepped in a contiguous copy
                assert_same_bits(p, q)


def test_a_lack_of_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    p = parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    optimizer = StripedAdamW([p], backend="cpu")
    monkeypatch.setattr(cpu, "_library", type("Full", (), {"striped_step": lambda *_: 1}))
    with pytest.raises(MemoryError, match="partial sums"):
        optimizer.step()
    assert (p == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_the_build_for_any_processor_agrees(
    momentum_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build without variants for newer processors is the code that an old processor runs."""
    library = compile_library(SOURCE, tmp_path, "-DSTRIPED_BASELINE")
    newest, _ = run("cpu", momentum_dtype, steps=1)
    monkeypatch.setattr(cpu, "_library", cpu._load(library))
    baseline, _ = run("cpu", momentum_dtype, steps=1)
    for p, q in zip(baseline, newest, strict=True):
        torch.testing.assert_close(p, q, rtol=2**-23, atol=1e-2 * UPDATES.value)


def compile_library(source: Path, folder: Path, *flags: str) -> str:
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    library = folder / "library.so"
    flags = ("-O2", "-fopenmp", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", *flags)
    subprocess.run([compiler, *flags, source, "-o", library, "-lm"], check=True)
    return str(library)


DRAW = """
#include "cpu.c"

void draw(const float *values, uint16_t *rounded, int64_t start, int64_t n, int64_t step)
{
    Entry e = {.param = rounded, .param_dtype = BFLOAT16, .step = step};
    Settings settings = {.stochastic_rounding = 1};
    for (int64_t i = 0; i < n; i += CODE_BLOCK)
        store_parameter(values + i, &e, i, start + i, minimum(n - i, CODE_BLOCK), &settings);
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 77, 2**32 - 200, 5 * 2**32 - 1], ids=str)
def test_the_rounding_bits_are_the_references(start: int, tmp_path: Path) -> None:
    """An index above 2^32 would need a parameter that is too large for a test."""
    source = tmp_path / "draw.c"
    source.write_text(DRAW.replace("cpu.c", str(SOURCE)))
    library = ctypes.CDLL(compile_library(source, tmp_path))
    values = torch.randn(500)
    rounded = torch.empty(500, dtype=torch.bfloat16)
    arguments = (values.data_ptr(), rounded.data_ptr(), start, 500, 7)
    library.draw(*map(ctypes.c_void_p, arguments[:2]), *map(ctypes.c_int64, arguments[2:]))
    bits = rounding.random_bits(start, 500, 7, torch.device("cpu"))
    assert_same_bits(rounded, rounding.stochastic_round(values, torch.bfloat16, bits))
