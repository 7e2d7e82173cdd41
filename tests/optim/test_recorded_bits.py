"""The recorded bits of every backend, which a change of layout or words must not change.

The record is ``recorded_bits.json``. For each backend, momentum format, parameter dtype and set of
options it has one hash, over parameters of several shapes and every entry of their state: after
three steps, and after a fourth by an optimizer that loaded the state dict of the third. It also has
the state dicts' keys and dtypes, and hashes of state dicts of ``torch.optim.AdamW`` that were
loaded. If a change is meant to change the arithmetic, record again, and say why in the commit:

    python tests/optim/test_recorded_bits.py

The bits must not depend on the processor, so that one record is valid on every x86-64 machine:

- Gradients and parameters come from integers, not from a random generator, which is vectorized.
- The steps run in a separate process. There torch's kernels are the builds for any processor
  (``ATEN_CPU_CAPABILITY=default``; other builds fuse multiplications with additions). MKL's square
  roots are the same everywhere (``MKL_CBWR=COMPATIBLE``; otherwise their last bits differ between
  AVX2 and AVX-512). numpy, which interprets the Triton kernels, uses no optional feature of
  processors (``NPY_DISABLE_CPU_FEATURES``; otherwise exponentials differ).
- The test compiles the C sources for any x86-64 processor and without fused operations
  (``-ffp-contract=off``): then every compiler rounds each operation as written. ``test_cpu.py``
  tests the installed library against the reference, within tolerances.

The rest is checked, and the tests are skipped if it differs from the record: the versions of torch,
numpy and Triton, and the bits of the elementary functions that the steps use (glibc's exponential
differs on processors without fused operations).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import striped_hf.optim
from striped_hf.optim import StripedAdamW, backends

RECORD = Path(__file__).with_name("recorded_bits.json")
PACKAGE = Path(striped_hf.optim.__file__).parent

BACKENDS = ("reference", "cpu", "triton")
FORMATS = ("float32", "bfloat16", "int8", "int4")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nesterov, maximize": {"nesterov": True, "maximize": True, "betas": (0.5, 0.95)},
    "lagged, to nearest": {"lagged": True, "stochastic_rounding": False, "weight_decay": 0.1},
    "master bits": {"master_bits": 24},
    "master bits, to nearest": {"master_bits": 24, "stochastic_rounding": False},
}

# shape, blocks, and whether rows or columns are contiguous in memory
SHAPES: list[tuple[tuple[int, ...], tuple[int, int], str]] = [
    ((33, 257), (1, 1), "rows"),
    ((12, 384), (1, 3), "rows"),
    ((48, 130), (3, 1), "rows"),
    ((6, 255), (2, 5), "rows"),
    ((20, 140), (1, 1), "columns"),
    ((3, 7, 129), (1, 1), "rows"),
    ((2, 2, 6, 10), (2, 1), "rows"),
    ((1, 300), (1, 1), "rows"),
    ((300, 1), (1, 1), "rows"),
    ((4, 2), (1, 1), "rows"),
    ((0, 5), (1, 1), "rows"),
    ((1100,), (1, 1), "rows"),
    ((1,), (1, 1), "rows"),
    ((), (1, 1), "rows"),
]
# one matrix that the reference cuts into chunks and the C code into tasks
SHAPES_OF: dict[str, list[Any]] = {
    "reference": [*SHAPES, ((90, 1500), (1, 1), "rows")],
    "cpu": [*SHAPES, ((90, 1500), (1, 1), "rows")],
    "triton": [*SHAPES[3:6], SHAPES[1], *SHAPES[-3:]],  # its interpreter is slow
}


# ---------------------------------------------------------------------------------------------
# the tests
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bits_equal_the_record(backend: str, record: dict[str, Any]) -> None:
    if reason := cannot_run(backend):
        pytest.skip(reason)
    measured = run_in_process(backend)
    for what in ("versions", "elementary functions"):
        if measured[what] != record[what]:
            pytest.skip(f"{what}: {measured[what]}, recorded with {record[what]}")
    bits, expected = measured["bits"], record["bits"][backend]
    assert bits.keys() == expected.keys()
    changed = [case for case in bits if bits[case] != expected[case]]
    assert not changed, f"{len(changed)} of {len(bits)} cases have other bits: {changed}"


def test_state_dicts_have_the_recorded_entries(record: dict[str, Any]) -> None:
    assert state_dict_entries() == record["state dicts"]


# ---------------------------------------------------------------------------------------------
# the recorded steps
# ---------------------------------------------------------------------------------------------


def bits_of_backend(backend: str) -> dict[str, str]:
    """Returns a hash for each case."""
    shapes = SHAPES_OF[backend]
    found = {}
    for dtype, momentum_dtype, options in product(DTYPES, FORMATS, OPTIONS):
        if dtype == "float16" and options != "plain":
            continue  # only the rounding of float16 differs
        if dtype != "bfloat16" and "master bits" in options:
            continue
        case = f"{dtype}, momentum {momentum_dtype}, {options}"
        found[case] = three_steps(backend, DTYPES[dtype], momentum_dtype, options, shapes)
    for momentum_dtype in FORMATS:
        found[f"AdamW loaded into {momentum_dtype}"] = from_adamw(backend, momentum_dtype, shapes)
    return found


def three_steps(
    backend: str, dtype: torch.dtype, momentum_dtype: str, options: str, shapes: list[Any]
) -> str:
    optimizer = new_optimizer(backend, dtype, momentum_dtype, options, shapes)
    for step in range(3):
        set_gradients(optimizer, step)
        optimizer.step()
    loaded = new_optimizer(backend, dtype, momentum_dtype, options, shapes)
    loaded.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for p, q in zip(parameters(loaded), parameters(optimizer), strict=True):
            p.copy_(q)
    set_gradients(loaded, 3)
    loaded.step()
    return hash_of(optimizer, loaded)


def from_adamw(backend: str, momentum_dtype: str, shapes: list[Any]) -> str:
    optimizer = new_optimizer(backend, torch.float32, momentum_dtype, "plain", shapes)
    adamw = torch.optim.AdamW(parameters(optimizer), lr=3e-3)
    state_dict = adamw.state_dict()
    for i, p in enumerate(parameters(optimizer)):
        state_dict["state"][i] = {
            "step": torch.tensor(7.0),
            "exp_avg": numbers(p.shape, seed=100 + i) / 512,
            "exp_avg_sq": (numbers(p.shape, seed=200 + i) / 256).square(),
        }
    optimizer.load_state_dict(state_dict)
    set_gradients(optimizer, 0)
    optimizer.step()
    return hash_of(optimizer)


def new_optimizer(
    backend: str, dtype: torch.dtype, momentum_dtype: str, options: str, shapes: list[Any]
) -> StripedAdamW:
    ps = []
    for i, (shape, _, contiguous) in enumerate(shapes):
        values = lay_out(numbers(shape, seed=i).to(dtype), contiguous)
        ps.append(torch.nn.Parameter(values))
    return StripedAdamW(
        [{"params": ps, "blocks": [blocks for _, blocks, _ in shapes]}],
        lr=1e-2,
        momentum_dtype=momentum_dtype,
        backend=backend,
        **OPTIONS[options],
    )


def parameters(optimizer: StripedAdamW) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(optimizer: StripedAdamW, step: int) -> None:
    for i, p in enumerate(parameters(optimizer)):
        grad = numbers(p.shape, seed=1000 * (step + 1) + i) / 1024
        grad[grad.abs() < 2.0**-18] = 0.0
        p.grad = lay_out(grad.to(p.dtype), "rows" if p.is_contiguous() else "columns")


def lay_out(values: torch.Tensor, contiguous: str) -> torch.Tensor:
    return values if contiguous == "rows" else values.mT.contiguous().mT


def numbers(shape: tuple[int, ...] | torch.Size, seed: int) -> torch.Tensor:
    """Exact float32 numbers in (-1, 1) of very different magnitudes, the same on every machine."""
    i = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(1_000_003 * (seed + 1))
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):  # MurmurHash3's 64-bit finalizer
        i = (i ^ i >> np.uint64(33)) * np.uint64(factor)
    mantissas = (i >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0
    exponents = ((i & np.uint64(7)) * (i >> np.uint64(3) & np.uint64(1))).astype(np.float64)
    values = np.ldexp(mantissas, -exponents.astype(np.int64)).astype(np.float32)
    return torch.from_numpy(values).view(tuple(shape))


def hash_of(*optimizers: StripedAdamW) -> str:
    found = hashlib.sha256()
    for optimizer in optimizers:
        for p in parameters(optimizer):
            for name, tensor in (("param", p.detach()), *sorted(optimizer.state[p].items())):
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def state_dict_entries() -> dict[str, Any]:
    """Returns the keys of a state dict's groups, and the keys and dtypes of its states."""
    found = {}
    for momentum_dtype in FORMATS:
        optimizer = new_optimizer("reference", torch.bfloat16, momentum_dtype, "plain", SHAPES)
        set_gradients(optimizer, 0)
        optimizer.step()
        state_dict = optimizer.state_dict()
        (group,) = state_dict["param_groups"]
        states = {
            f"{shape}, blocks {blocks}": {
                key: f"{value.dtype} {tuple(value.shape)}"
                for key, value in state_dict["state"][i].items()
            }
            for i, (shape, blocks, _) in enumerate(SHAPES)
        }
        found[momentum_dtype] = {"param group": sorted(group), "states": states}
    return found


# ---------------------------------------------------------------------------------------------
# the process in which the bits depend on no processor
# ---------------------------------------------------------------------------------------------


def cannot_run(backend: str) -> str | None:
    """Returns why the bits of a backend cannot be compared here; None if they can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the bits are recorded for Linux on x86-64"
    if backend == "cpu" and shutil.which(compiler()) is None:
        return "no C compiler"
    if backend == "triton":
        pytest.importorskip("triton")
    return None


def run_in_process(backend: str) -> dict[str, Any]:
    """Returns what ``print_bits`` prints."""
    simd = np.show_config(mode="dicts")["SIMD Extensions"]
    environment = {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "NPY_DISABLE_CPU_FEATURES": " ".join(simd.get("found", [])),
        "OMP_NUM_THREADS": "2",
        "TRITON_INTERPRET": "1",
    }
    run = subprocess.run(
        [sys.executable, __file__, backend],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout)


def print_bits(backend: str) -> None:
    """Prints the bits of a backend, and what they depend on, as JSON."""
    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    if backend == "cpu":
        use_portable_library()
    print(
        json.dumps(
            {
                "versions": {name: version(name) for name in ("torch", "numpy", "triton")},
                "elementary functions": elementary_functions(),
                "bits": bits_of_backend(backend),
            }
        )
    )


def elementary_functions() -> str:
    """A hash of the elementary functions whose bits depend on a library."""
    x = numbers((5000,), seed=0).abs()
    found = hashlib.sha256()
    for values in (x.sqrt(), x.double().sqrt(), x.view(50, 100).sum(0), x.view(50, 100).sum(1)):
        found.update(values.numpy().tobytes())
    for dtype in (np.float32, np.float64):
        found.update(np.exp(-x.numpy().astype(dtype)).tobytes())
    powers = [beta**step for beta in (0.5, 0.9, 0.95, 0.999) for step in range(1, 10)]
    found.update(np.array(powers).tobytes())
    return found.hexdigest()


def use_portable_library() -> None:
    """Lets the CPU backend call C code compiled for any x86-64, without fused operations."""
    cpu: Any = backends.resolve("cpu", "cpu")
    (source,) = PACKAGE.rglob("cpu.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "portable.so"
        flags = "-O2 -march=x86-64 -ffp-contract=off -DSTRIPED_BASELINE -fopenmp -fPIC -shared"
        command = [compiler(), *flags.split(), str(source), "-o", str(library), "-lm"]
        subprocess.run(command, check=True)
        cpu._library = cpu._load(str(library))


@cache
def compiler() -> str:
    return (sysconfig.get_config_var("CC") or "cc").split()[0]


def main() -> None:
    if len(sys.argv) == 2:
        print_bits(sys.argv[1])
        return
    measured = {backend: run_in_process(backend) for backend in BACKENDS}
    commit = ["git", "-C", PACKAGE, "describe", "--always", "--dirty", "--abbrev=40"]
    record = {
        "commit": subprocess.check_output(commit, text=True).strip(),
        **{key: measured["cpu"][key] for key in ("versions", "elementary functions")},
        "state dicts": state_dict_entries(),
        "bits": {backend: measured[backend]["bits"] for backend in BACKENDS},
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
