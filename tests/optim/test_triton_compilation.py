"""Compilation of the Triton kernels, and inside a compiled training step."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from machine_code_bounds import bound_of
from optim_checks import (
    parameters,
    set_grad,
    snapshot,
)
from triton_specs import (
    BF16,
    DEVICE,
    ON_GPU,
    Spec,
    gradient_of,
    optimizer_of,
    triton,
    triton_backend,
)

from benchmarks.overlay import make_overlay
from striped_hf import StripedAdamW
from striped_hf.optim import backends
from striped_hf.optim.backends.triton import statistics_kernels, stripes_kernels, update_kernels

# on a GPU these tests run compiled kernels, and `pytest -m gpu` runs them
pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_inside_a_compiled_training_step(backend: str) -> None:
    """Tracing stops at the optimizer and continues after it; the steps are the same."""
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
def test_later_steps_and_rates_compile_nothing() -> None:
    """Step 1 or 16, a rate of 0 or 1, or a gradient at a new address compiles nothing."""
    optimizer = optimizer_of(Spec((64, 128), "int8", dtype=BF16), "triton")
    [p] = parameters(optimizer)

    def compiled() -> int:
        functions = (statistics_kernels.statistics_kernel, statistics_kernels.combine_kernel)
        functions += (stripes_kernels.stripes_kernel,)
        functions += (update_kernels.matrices_kernel, update_kernels.vectors_kernel)
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
    assert backends.resolve("auto", "cuda") is triton_backend


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
TESTS = Path(__file__).with_name("test_triton.py")
TESTS_OF_FOLDING = Path(__file__).with_name("test_triton_fold.py")
REPOSITORY = Path(__file__).parents[2]


PINNED, OLDER, OLDEST = triton.__version__, "3.6.0", "3.3.1"


class Compiled(NamedTuple):
    """What ``compile_kernels.py`` found with one version of Triton."""

    version: str
    rows: list[dict[str, Any]]

    def described(self) -> list[dict[str, Any]]:
        """The rows, if this Triton could read machine code."""
        if not all("registers" in row for row in self.rows):
            pytest.skip(f"triton {self.version} has no disassembler")
        return self.rows


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str | Path]:
    """Returns a function from a version of Triton to the Python of an environment with it."""

    @cache
    def python_of(version: str) -> str | Path:
        if version == PINNED:
            return sys.executable
        # their interpreters need an older NumPy
        packages = (f"triton=={version}", "numpy<2.4")
        folder = tmp_path_factory.mktemp("environment")
        python = make_overlay(folder, packages, [str(REPOSITORY)])
        found = f"import triton; assert triton.__version__ == {version!r}, triton.__version__"
        run_python(python, "-c", found)
        return python

    return python_of


@pytest.fixture(scope="module", params=[PINNED, pytest.param(OLDER, marks=pytest.mark.compat)])
def compiled(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    environments: Callable[[str], str | Path],
) -> Compiled:
    """Every variant of every kernel, compiled for sm_80 and sm_90."""
    folder = tmp_path_factory.mktemp("compiled")
    rows = folder / "rows.json"
    run_python(
        environments(request.param),
        COMPILE_KERNELS,
        rows,
        TRITON_CACHE_DIR=str(folder / "cache"),
        PYTHONPATH=str(REPOSITORY),
    )
    return Compiled(request.param, json.loads(rows.read_text()))


on_a_cpu = pytest.mark.skipif(ON_GPU, reason="the other tests compile the kernels for this GPU")


@pytest.mark.slow
@on_a_cpu
def test_no_register_is_spilled(compiled: Compiled) -> None:
    assert not {name_of(row): row["spills"] for row in compiled.described() if row["spills"]}


@pytest.mark.slow
@on_a_cpu
def test_tensors_are_read_and_written_in_vectors(compiled: Compiled) -> None:
    """Addresses, roots, scales and sums are in memory, too, 4 or 8 bytes each."""
    rows = [row for row in compiled.described() if row["reads"] or row["writes"]]
    assert len(rows) > 50
    for row in rows:
        for expected, found in (("reads", "loads"), ("writes", "stores")):
            assert not {"1", "2"} & row[found].keys(), (name_of(row), found, row[found])
            for width, count in row[expected].items():
                what = (name_of(row), found, row[found], row[expected])
                assert row[found].get(width, 0) >= count, what


@pytest.mark.slow
@on_a_cpu
def test_instructions_and_registers_are_within_bounds(compiled: Compiled) -> None:
    beyond = {}
    for row in compiled.described():
        bound = bound_of(row["name"])
        if (
            row["instructions_per_element"] > bound.instructions_per_element
            or row["registers"] > bound.registers
        ):
            found = (round(row["instructions_per_element"], 1), row["registers"])
            beyond[name_of(row)] = f"{found} beyond {bound}"
    assert not beyond


@pytest.mark.slow
@on_a_cpu
def test_layouts_are_not_converted(compiled: Compiled) -> None:
    """A conversion goes through shared memory. Some are allowed: of columns, scales and sums."""
    if compiled.version == OLDER:
        pytest.skip("Triton before 3.9 converts layouts of whole tiles, which costs time only")
    for row in compiled.described():
        if row["name"].startswith(("matrices", "fold")) and row["reads"]:
            is_plain = not re.search("fold |fused|not one_block", row["name"])
            assert row["shared_stores"] <= (4 if is_plain else 9), name_of(row)


def name_of(row: dict[str, Any]) -> str:
    return f"{row['name']}, sm_{row['capability']}"


@pytest.mark.compat
@pytest.mark.slow
@pytest.mark.parametrize("version", [OLDER, OLDEST])
def test_other_versions_of_triton_compile_and_interpret_the_kernels(
    version: str, environments: Callable[[str], str | Path], tmp_path: Path
) -> None:
    python = environments(version)
    if version == OLDEST:  # ``compiled`` has the other version
        cache_folder = str(tmp_path)
        run_python(
            python, COMPILE_KERNELS, TRITON_CACHE_DIR=cache_folder, PYTHONPATH=str(REPOSITORY)
        )
    pytest_options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "5x130 or random_bits")
    run_python(python, *pytest_options, TESTS, TESTS_OF_FOLDING, TRITON_INTERPRET="1")
