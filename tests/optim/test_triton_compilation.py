"""Compilation of the Triton kernels, and inside a compiled training step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
    launch,
    optimizer_of,
)

from benchmarks.overlay import make_overlay
from striped_hf import StripedAdamW
from striped_hf.optim import backends
from striped_hf.optim.backends.triton import kernels

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
TESTS = Path(__file__).with_name("test_triton.py")
TESTS_OF_FOLDING = Path(__file__).with_name("test_triton_fold.py")
REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="the other tests compile them for this GPU")
def test_the_kernels_compile_for_real_gpus(tmp_path: Path) -> None:
    """PTX of sm_80 and sm_90, which needs no GPU, has vector loads and no local memory."""
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
    run_python(python, *pytest_options, TESTS, TESTS_OF_FOLDING, TRITON_INTERPRET="1")
