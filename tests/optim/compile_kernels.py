"""Compiles the Triton kernels to PTX for GPUs that need not exist, and checks the PTX.

Then it takes steps whose launches are compiled but not run, and checks that later steps compile
nothing. ``test_triton_compilation.py`` runs it in a separate process, without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import striped_hf  # before the next line: otherwise other packages look for the device

torch.cuda.is_available = lambda: True

from striped_hf.optim.backends.triton import (  # noqa: E402
    fold_kernels,
    kernels,
    launch,
    tile_sizes,
)
from striped_hf.optim.backends.triton.arguments import (  # noqa: E402
    OPTIONS,
    Buffers,
    FoldVariant,
    Hyperparameters,
    MatrixVariant,
    OnDevice,
    StatisticsVariant,
    StripesVariant,
    UpdateFlags,
    VectorVariant,
)
from striped_hf.optim.backends.triton.workspace import tile_columns  # noqa: E402

# Triton 3.3 and 3.6 convert layouts of whole tiles. This costs time, and does not change results.
CONVERTS_LAYOUTS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)

KERNELS = [
    *((kernels, f"{name}_kernel") for name in ("statistics", "combine", "stripes")),
    *((kernels, f"{name}_kernel") for name in ("matrices", "vectors")),
    *((fold_kernels, f"{name}_kernel") for name in ("fold", "add_folded")),
]

# the types of parameters that are not constants
BUFFERS = Buffers("*i64", "*i64", "*fp32", "*fp32", "*i32", "*fp32")
NUMBERS = Hyperparameters(*["fp32"] * len(Hyperparameters._fields))
TYPES: dict[str, Any] = {
    "tiles": "*i32",
    "reductions": "*i64",
    "segments": "*i64",
    "buffers": BUFFERS,
    "hyper": NUMBERS,
    "step": "i32",
    "one_minus_beta1": "fp32",
    "eps": "fp32",
    "partials": "*fp32",
    **dict.fromkeys(("grad", "exp_avg", "exp_avg_scale", "sketch", "coefficient"), "i64"),
    **dict.fromkeys(("row_sums", "col_sums"), "i64"),
    **dict.fromkeys(("rows", "columns", "block_rows", "block_columns"), "i32"),
    **dict.fromkeys(("whole_start", "whole_stride"), "i32"),
}


def leaves(value: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """The fields of nested tuples, with their positions."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    else:
        yield path, value


def constexprs(value: Any) -> Any:
    """The signature of a constant, or of a named tuple of constants."""
    return type(value)(*map(constexprs, value)) if isinstance(value, tuple) else "constexpr"


def ptx_of(
    kernel: Any, capability: int, warps: int, types: dict[str, Any], **constants: Any
) -> str:
    """Compiles a kernel.

    Args:
        kernel: The jit function.
        capability: Of the GPU, 90 for sm_90.
        warps: Of a program.
        types: Of parameters that differ from ``TYPES``.
        **constants: The other parameters, single or in named tuples.
    """
    names = kernel.arg_names
    types = {name: (TYPES | types)[name] for name in names if name not in constants}
    signature = {
        name: constexprs(constants[name]) if name in constants else types[name] for name in names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={
            path: value
            for name in constants
            for path, value in leaves(constants[name], (names.index(name),))
        },
        attrs={
            path: [["tt.divisibility", 16]]
            for name in types
            for path, kind in leaves(types[name], (names.index(name),))
            if kind.startswith("*")
        },
    )
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": warps, **OPTIONS}
    return triton.compile(source, target=target, options=options).asm["ptx"]


def check(what: str, ptx: str, loads: tuple[str, ...] = ()) -> None:
    assert "__local_depot" not in ptx, f"{what}: local memory"
    for load in loads:
        assert re.search(rf"ld\.global\S*\.{load}\b", ptx), f"{what}: no {load} load"


def check_statistics(
    capability: int,
    variant: StatisticsVariant,
    step_on_device: bool = False,
    loads: tuple[str, ...] = ("v4.b32",),
) -> None:
    ptx = ptx_of(
        kernels.statistics_kernel,
        capability,
        4,
        {},
        variant=variant,
        STEP_ON_DEVICE=step_on_device,
        TILE_ROWS=tile_sizes.STATISTICS_TILE_ROWS,
        TILE_COLUMNS=tile_columns(variant.fused_statistics),
    )
    check(f"statistics {variant}", ptx, loads)


def check_matrices(
    capability: int,
    param: Any,
    stored: Any,
    qmax: int,
    loads: tuple[str, ...],
    maximize: bool = False,
    nesterov: bool = False,
    **layout: bool,
) -> None:
    switches = ("transposed", "narrow", "large", "fused_statistics", "folded", "low_bits")
    layout = {**dict.fromkeys(switches, False), "aligned": True, **layout}
    variant = MatrixVariant(param, param, stored, qmax, **layout)
    flags = UpdateFlags(maximize, nesterov, stochastic_rounding=param != tl.float32)
    ptx = ptx_of(
        kernels.matrices_kernel,
        capability,
        4,
        {},
        variant=variant,
        flags=flags,
        TILE_ROWS=tile_sizes.UPDATE_TILE_ROWS,
    )
    check(f"{variant} {flags}", ptx, loads)
    if variant.aligned and not variant.narrow and not CONVERTS_LAYOUTS:
        # conversions between layouts go through shared memory: allow only those of columns and
        # scales
        allowed = 8 if variant.fused_statistics else 4  # and of sums
        count = ptx.count("st.shared")
        assert count <= allowed, f"{variant} {flags}: layouts are converted, {count} stores"


def check_fold(
    capability: int, grad: Any, stored: Any, qmax: int, loads: tuple[str, ...], **more: bool
) -> None:
    switches = dict.fromkeys(FoldVariant._fields[3:], False) | {"aligned": True, "one_block": True}
    variant = FoldVariant(grad, stored, qmax, **switches | more)
    sizes = {"FOLDED_ROWS": tile_sizes.folded_rows(0), "TILE_ROWS": tile_sizes.UPDATE_TILE_ROWS}
    ptx = ptx_of(fold_kernels.fold_kernel, capability, 4, {}, variant=variant, **sizes)
    check(f"{variant}", ptx, loads)
    if variant.aligned and variant.one_block and not CONVERTS_LAYOUTS:
        count = ptx.count("st.shared")
        assert count <= 8, f"{variant}: layouts are converted, {count} stores"


def check_folds(capability: int) -> None:
    f32, bf16 = tl.float32, tl.bfloat16
    first = {"is_first": True}
    next_one = {"has_sketch": True, "has_coefficient": True}
    check_fold(capability, f32, f32, 0, ("v4.b32",), **first)
    check_fold(capability, bf16, tl.int8, 127, ("v2.b32",), **first)
    check_fold(capability, bf16, tl.int8, 127, ("v2.b32",), **next_one)
    check_fold(capability, bf16, tl.uint8, 7, ("v2.b32",), **first, maximize=True)
    check_fold(capability, f32, bf16, 0, ("v4.b32", "v2.b32"), **next_one, maximize=True)
    check_fold(capability, f32, tl.uint8, 7, (), **next_one, one_block=False, large=True)
    check_fold(capability, bf16, bf16, 0, (), **next_one, aligned=False)
    for has_coefficient in (False, True):
        sizes = {"PARTIALS": tile_sizes.COMBINED_PARTIALS, "WIDTH": tile_sizes.COMBINED_WIDTH}
        sizes |= {"FOLDED_ROWS": tile_sizes.folded_rows(0), "HAS_COEFFICIENT": has_coefficient}
        ptx = ptx_of(fold_kernels.add_folded_kernel, capability, 4, {}, **sizes)
        check("add_folded", ptx)


def main() -> None:
    for capability in (80, 90):
        for grad in (tl.float32, tl.bfloat16):
            check_statistics(capability, StatisticsVariant(grad, True, False, False))
            if capability == 90:
                check_statistics(capability, StatisticsVariant(grad, False, True, False), loads=())
        for step_on_device in (False, True):
            variant = StatisticsVariant(tl.float32, True, False, fused_statistics=True)
            check_statistics(capability, variant, step_on_device)
        sizes = {"PARTIALS": tile_sizes.COMBINED_PARTIALS, "WIDTH": tile_sizes.COMBINED_WIDTH}
        check("combine", ptx_of(kernels.combine_kernel, capability, 4, {}, **sizes))
        for on_device in (OnDevice(False, False), OnDevice(True, True)):
            types = {"hyper": NUMBERS._replace(lr="*fp32")} if on_device.lr else {}
            ways = ((False, False, True), (True, False, True), (True, True, True))
            for way in (*ways, (True, True, False)):
                for has_roots in (False, True) if not way[1] else (False,):
                    stripes = StripesVariant(*way, has_roots=has_roots, nesterov=on_device.lr)
                    ptx = ptx_of(
                        kernels.stripes_kernel,
                        capability,
                        8,
                        types,
                        on_device=on_device,
                        variant=stripes,
                        BLOCK=tile_sizes.STRIPE_BLOCK,
                    )
                    check(f"{stripes}", ptx)
            for param, low_bits in ((tl.float32, False), (tl.bfloat16, True)):
                ptx = ptx_of(
                    kernels.vectors_kernel,
                    capability,
                    4,
                    types,
                    on_device=on_device,
                    variant=VectorVariant(param, param, aligned=True, low_bits=low_bits),
                    flags=UpdateFlags(
                        maximize=on_device.lr, nesterov=on_device.lr, stochastic_rounding=False
                    ),
                    BLOCK=tile_sizes.VECTOR_BLOCK,
                )
                check("vectors", ptx, ("v4.b32",))
        f32, bf16 = tl.float32, tl.bfloat16
        check_matrices(capability, f32, f32, 0, ("v4.b32",))
        check_matrices(capability, f32, bf16, 0, ("v4.b32", "v2.b32"))
        check_matrices(capability, f32, tl.int8, 127, ("v4.b32",), nesterov=True)
        check_matrices(capability, f32, tl.uint8, 7, ("v4.b32",), maximize=True)
        check_matrices(capability, bf16, tl.int8, 127, ("v2.b32",))
        check_matrices(capability, f32, f32, 0, ("v4.b32",), fused_statistics=True)
        check_matrices(capability, f32, bf16, 0, ("v4.b32", "v2.b32"), fused_statistics=True)
        check_matrices(capability, bf16, tl.int8, 127, ("v2.b32",), fused_statistics=True)
        check_matrices(capability, f32, tl.uint8, 7, ("v4.b32",), fused_statistics=True)
        for stored, qmax in ((f32, 0), (bf16, 0), (tl.int8, 127), (tl.uint8, 7)):
            check_matrices(capability, bf16, stored, qmax, ("v2.b32",), folded=True)
            check_matrices(capability, bf16, stored, qmax, ("v2.b32", "b32"), low_bits=True)
        check_matrices(capability, bf16, tl.int8, 127, ("v2.b32",), folded=True, low_bits=True)
        fused = {"fused_statistics": True, "low_bits": True}
        check_matrices(capability, bf16, tl.int8, 127, ("v2.b32",), **fused)
        check_folds(capability)
    check_matrices(90, tl.float16, tl.uint8, 7, ("v2.b32",))
    check_matrices(90, f32, f32, 0, ("v4.b32",), folded=True)
    check_matrices(90, f32, tl.int8, 127, (), transposed=True, aligned=False)
    check_matrices(90, bf16, tl.uint8, 7, (), narrow=True, large=True, aligned=False)
    check_matrices(90, bf16, tl.uint8, 7, (), narrow=True, aligned=False)
    check_matrices(90, bf16, f32, 0, (), transposed=True, aligned=False, low_bits=True)
    check_matrices(90, f32, tl.int8, 127, (), transposed=True, aligned=False, fused_statistics=True)


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
    launch.DEVICE_TYPES = ("cpu",)
    # for each way of stepping, the kernels that earlier ways did not compile
    for capturable, lagged, new in (
        (False, False, 5),
        (False, True, 4),
        (True, False, 2),
        (True, True, 3),
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
    main()
    check_that_steps_compile_nothing_anew()
