"""Compiles the Triton kernels for GPUs that need not exist, and describes their machine code.

Then it takes steps whose launches are compiled but not run, and checks that later steps compile
nothing. ``test_triton_compilation.py`` runs it in a separate process, without TRITON_INTERPRET:

    python compile_kernels.py ROWS.json
    python compile_kernels.py            # only compiles, for sm_90
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

import striped_hf
from benchmarks import sass
from benchmarks.compiled_kernels import CAPABILITIES, Variant, all_variants, compile_variant
from striped_hf.optim.backends.triton import (
    backend,
    fold_kernels,
    statistics_kernels,
    stripes_kernels,
    update_kernels,
)

KERNELS = [
    *((statistics_kernels, f"{name}_kernel") for name in ("statistics", "combine")),
    *((statistics_kernels, f"first_{name}_kernel") for name in ("statistics", "combine")),
    *((stripes_kernels, f"{name}_kernel") for name in ("stripes", "means")),
    *((update_kernels, f"{name}_kernel") for name in ("matrices", "vectors")),
    *((fold_kernels, f"{name}_kernel") for name in ("fold", "add_folded")),
]


def describe(variant: Variant, capability: int, cubin: bytes) -> dict[str, Any]:
    """Describes the machine code of a variant. Loads and stores are of the main loop."""
    row = {"name": variant.name, "capability": capability}
    row |= {"reads": variant.reads, "writes": variant.writes}
    if sass.disassembler() is None:
        return row
    code = sass.read(cubin)
    loop = sass.hot_loop(code.instructions)
    return row | {
        "registers": code.registers,
        "spills": sass.spills(code.instructions),
        "instructions_per_element": len(loop) / variant.elements_per_thread,
        "loads": sass.widths(loop, "LDG"),
        "stores": sass.widths(loop, "STG"),
        "shared_stores": sum(sass.widths(code.instructions, "STS").values()),
    }


def describe_all() -> list[dict[str, Any]]:
    """Describes every variant. The disassembler runs while the next variant is compiled."""
    with ThreadPoolExecutor(1) as pool:
        rows = [
            pool.submit(describe, variant, capability, compiled.asm["cubin"])
            for capability in CAPABILITIES
            for variant in all_variants()
            if (compiled := compile_variant(variant, capability))
        ]
        return [row.result() for row in rows]


class Driver:
    """One GPU, with the parts that compilation needs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Unlaunched:
    """A kernel whose launches end after compilation; its tensors may be on the CPU."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self.kernel.warmup, grid=grid)

    def compiled(self) -> int:
        return sum(len(cache[0]) for cache in self.kernel.device_caches.values())


def check_that_steps_compile_nothing_anew() -> None:
    """Step 1 or 16, a rate of 0 or 1, or a gradient at another address compiles nothing."""
    triton.runtime.driver.set_active(Driver())
    unlaunched = [Unlaunched(getattr(module, name)) for module, name in KERNELS]
    for (module, name), kernel in zip(KERNELS, unlaunched, strict=True):
        setattr(module, name, kernel)
    backend.DEVICE_TYPES = ("cpu",)
    # for each way of stepping, the kernels that earlier ways did not compile
    for capturable, lagged, new in (
        (False, False, 5),
        (False, True, 4),
        (True, False, 2),
        (True, True, 4),
    ):
        before = sum(kernel.compiled() for kernel in unlaunched)
        ps = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((64, 128), (9,))]
        optimizer = striped_hf.StripedAdamW(
            ps, backend="triton", momentum_dtype="int8", lagged=lagged, capturable=capturable
        )
        counts = set()
        for t in range(18):
            optimizer.param_groups[0]["lr"] = (1.0, 0.0, 1, 16, 0.1)[t % 5]
            for p in ps:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            counts.add(sum(kernel.compiled() for kernel in unlaunched) - before)
        assert counts == {new}, (capturable, lagged, counts)
    check_that_folds_compile_nothing_anew(unlaunched)


def check_that_folds_compile_nothing_anew(unlaunched: list[Unlaunched]) -> None:
    """Neither in another step nor for matrices of other sizes, whose rows are whole vectors."""
    before = sum(kernel.compiled() for kernel in unlaunched)
    shapes = ((512, 256), (1000, 128), (257, 512), (2048, 400))
    ps = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in shapes]
    options = {"momentum_dtype": "int8", "max_grad_norm": 1.0, "gradient_accumulation": True}
    optimizer = striped_hf.LayerwiseStripedAdamW(ps, backend="triton", **options)
    for t in range(18):
        for _ in range(2):
            sum(p.sum() for p in ps).backward()
        assert all(p.grad is None for p in ps)
        optimizer.step()
        found = sum(kernel.compiled() for kernel in unlaunched) - before
        # fold: the first gradient and the others, each without a coefficient in the first step and
        # with one later; add_folded: without and with; the update
        assert found == (4 if t == 0 else 7), (t, found)


if __name__ == "__main__":
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(describe_all()), encoding="utf-8")
    else:
        for variant in all_variants():
            compile_variant(variant, 90)
    check_that_steps_compile_nothing_anew()
