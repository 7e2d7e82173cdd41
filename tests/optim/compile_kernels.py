"""Compiles the Triton kernels to PTX for GPUs that need not be there, and looks at what came out.

Then takes steps whose launches are compiled and not run, to see that none is compiled anew. In a
process of its own, without TRITON_INTERPRET; ``test_triton.py`` runs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import striped_hf  # before the next line, or other packages look for the device

torch.cuda.is_available = lambda: True

from striped_hf.optim.backends.triton import kernels as jit  # noqa: E402
from striped_hf.optim.backends.triton import launch as triton_kernels  # noqa: E402

KERNELS = ("statistics", "combine", "stripes", "matrices", "vectors")

POINTERS = {
    **dict.fromkeys(("tiles", "scalars"), "*i32"),
    **dict.fromkeys(("pointers", "shapes", "jobs", "segments"), "*i64"),
    **dict.fromkeys(("partials", "sums", "roots", "cells"), "*fp32"),
}
NUMBERS = ["lr", "log_beta1", "log_beta2", "beta2", "one_minus_beta1", "one_minus_beta2"]
NUMBERS += ["weight_decay", "eps"]
TYPES = {**POINTERS, **dict.fromkeys(NUMBERS, "fp32"), "step": "i32"}


def ptx_of(
    kernel: Any, capability: int, warps: int, types: dict[str, str], **constants: Any
) -> str:
    types = {**TYPES, **types}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*")
        },
    )
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": warps, **triton_kernels._OPTIONS}
    return triton.compile(source, target=target, options=options).asm["ptx"]


def check(what: str, ptx: str, loads: tuple[str, ...] = ()) -> None:
    assert "__local_depot" not in ptx, f"{what}: local memory"
    for load in loads:
        assert re.search(rf"ld\.global\S*\.{load}\b", ptx), f"{what}: no {load} load"


def check_matrices(
    capability: int, param: Any, stored: Any, qmax: int, loads: tuple[str, ...], **flags: Any
) -> None:
    switches = ("TRANSPOSED", "NARROW", "LARGE", "LAGGED", "SUMS", "MAXIMIZE", "NESTEROV")
    flags = {
        **dict.fromkeys(switches, False),
        "ALIGNED": True,
        **flags,
    }
    ptx = ptx_of(
        jit.matrices_kernel,
        capability,
        4,
        {},
        PARAM=param,
        GRAD=param,
        MOMENTUM=stored,
        QMAX=qmax,
        STOCHASTIC=param != tl.float32,
        TILE_ROWS=jit.UPDATE_ROWS.value,
        **flags,
    )
    check(f"matrices {param} {stored} {flags}", ptx, loads)
    if flags["ALIGNED"] and not flags["NARROW"]:
        # a conversion between layouts goes through shared memory: none but of columns and scales
        allowed = 8 if flags["SUMS"] else 4  # and of sums
        count = ptx.count("st.shared")
        assert count <= allowed, f"{param} {stored} {flags}: layouts are converted, {count} stores"


def main() -> None:
    for capability in (80, 90):
        for grad in (tl.float32, tl.bfloat16):
            for transposed in (False, True) if capability == 90 else (False,):
                ptx = ptx_of(
                    jit.statistics_kernel,
                    capability,
                    4,
                    {},
                    GRAD=grad,
                    ALIGNED=not transposed,
                    TRANSPOSED=transposed,
                    ONE_PASS=False,
                    CAPTURABLE=False,
                    TILE_ROWS=jit.STATISTICS_ROWS,
                    TILE_COLUMNS=jit.STATISTICS_COLUMNS,
                )
                check(f"statistics {grad}", ptx, () if transposed else ("v4.b32",))
        for capturable in (False, True):
            ptx = ptx_of(
                jit.statistics_kernel,
                capability,
                4,
                {},
                GRAD=tl.float32,
                ALIGNED=True,
                TRANSPOSED=False,
                ONE_PASS=True,
                CAPTURABLE=capturable,
                TILE_ROWS=jit.STATISTICS_ROWS,
                TILE_COLUMNS=triton_kernels._tile_columns(one_pass=True),
            )
            check("statistics of a first step", ptx, ("v4.b32",))
        sizes = {"PARTIALS": jit.COMBINE_PARTIALS, "WIDTH": jit.COMBINE_WIDTH}
        check("combine", ptx_of(jit.combine_kernel, capability, 4, {}, **sizes))
        for capturable in (False, True):
            constants = {"LR_IN_MEMORY": capturable, "CAPTURABLE": capturable}
            types = {"lr": "*fp32"} if capturable else {}
            stripes = {**constants, "BLOCK": jit.STRIPE_BLOCK}
            ways = ((False, False, True), (True, False, True), (True, True, True))
            for way in (*ways, (True, True, False)):
                flags = dict(zip(("LAGGED", "ONE_PASS", "ROOTS"), way, strict=True))
                for has_roots in (False, True) if not flags["ONE_PASS"] else (False,):
                    flags["HAS_ROOTS"] = has_roots
                    ptx = ptx_of(jit.stripes_kernel, capability, 8, types, **stripes, **flags)
                    check(f"stripes {flags}", ptx)
            ptx = ptx_of(
                jit.vectors_kernel,
                capability,
                4,
                types,
                PARAM=tl.float32,
                GRAD=tl.float32,
                ALIGNED=True,
                MAXIMIZE=capturable,
                NESTEROV=capturable,
                STOCHASTIC=False,
                BLOCK=jit.VECTOR_BLOCK.value,
                **constants,
            )
            check("vectors", ptx, ("v4.b32",))
        f32, bf16 = tl.float32, tl.bfloat16
        check_matrices(capability, f32, f32, 0, ("v4.b32",))
        check_matrices(capability, f32, bf16, 0, ("v4.b32", "v2.b32"))
        check_matrices(capability, f32, tl.int8, 127, ("v4.b32",), NESTEROV=True)
        check_matrices(capability, f32, tl.uint8, 7, ("v4.b32",), MAXIMIZE=True)
        check_matrices(capability, bf16, tl.int8, 127, ("v2.b32",))
        lagged = {"LAGGED": True, "SUMS": True}
        check_matrices(capability, f32, f32, 0, ("v4.b32",), **lagged)
        check_matrices(capability, f32, bf16, 0, ("v4.b32", "v2.b32"), **lagged)
        check_matrices(capability, bf16, tl.int8, 127, ("v2.b32",), **lagged)
        check_matrices(capability, f32, tl.uint8, 7, ("v4.b32",), **lagged)
    check_matrices(90, tl.float16, tl.uint8, 7, ("v2.b32",))
    check_matrices(90, f32, tl.int8, 127, (), TRANSPOSED=True, ALIGNED=False)
    check_matrices(90, bf16, tl.uint8, 7, (), NARROW=True, LARGE=True, ALIGNED=False)
    check_matrices(90, bf16, tl.uint8, 7, (), NARROW=True, LAGGED=True, ALIGNED=False)
    check_matrices(90, f32, tl.int8, 127, (), TRANSPOSED=True, ALIGNED=False, **lagged)


class Driver:
    """One GPU, as far as compiling needs it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Unlaunched:
    """A kernel whose launches end when it is compiled; the tensors may lie on the CPU."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self.kernel.warmup, grid=grid)

    def compiled(self) -> int:
        return sum(len(cache[0]) for cache in self.kernel.device_caches.values())


def check_that_steps_compile_nothing_anew() -> None:
    """Not step 1 or 16, nor a rate of 0 or 1, nor a gradient that lies elsewhere."""
    triton.runtime.driver.set_active(Driver())
    kernels = [Unlaunched(getattr(jit, f"{name}_kernel")) for name in KERNELS]
    for name, kernel in zip(KERNELS, kernels, strict=True):
        setattr(jit, f"{name}_kernel", kernel)
    triton_kernels.DEVICE_TYPES = ("cpu",)
    # for each way what the ones before it did not compile
    for capturable, lagged, new in (
        (False, False, 5),
        (False, True, 4),
        (True, False, 2),
        (True, True, 3),
    ):
        before = sum(kernel.compiled() for kernel in kernels)
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
            counts.add(sum(kernel.compiled() for kernel in kernels) - before)
        assert counts == {new}, (capturable, lagged, counts)


if __name__ == "__main__":
    main()
    check_that_steps_compile_nothing_anew()
