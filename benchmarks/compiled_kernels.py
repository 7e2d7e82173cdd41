"""Compiles the variants of the Triton kernels, for GPUs that need not exist.

A process that imports this module must not have TRITON_INTERPRET in its environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import striped_hf  # noqa: F401  before the next line: otherwise other packages look for the device

_is_available = torch.cuda.is_available
torch.cuda.is_available = lambda: True  # the package refuses to be imported without a GPU

from striped_hf.optim.backends.triton import (  # noqa: E402
    fold_kernels,
    statistics_kernels,
    stripes_kernels,
    tile_sizes,
    update_kernels,
)
from striped_hf.optim.backends.triton.arguments import (  # noqa: E402
    OPTIONS,
    TUNING,
    Buffers,
    FoldVariant,
    Hyperparameters,
    MatrixVariant,
    OnDevice,
    StatisticsVariant,
    StripesVariant,
    Tuning,
    UpdateFlags,
    VectorVariant,
    options_of_update,
)
from striped_hf.optim.backends.triton.workspace import tile_columns  # noqa: E402

torch.cuda.is_available = _is_available

CAPABILITIES = (80, 90)  # A100 and H100

# the types of parameters that are not constants
BUFFERS = Buffers("*i64", "*i64", "*fp32", "*fp32", "*fp32", "*i32", "*fp32")
NUMBERS = Hyperparameters(*["fp32"] * len(Hyperparameters._fields))
TYPES: dict[str, Any] = {
    "tiles": "*i32",
    "reductions": "*i64",
    "segments": "*i64",
    "means": "*i64",
    "buffers": BUFFERS,
    "hyper": NUMBERS,
    "step": "i32",
    "first_step": "i32",
    "count": "i32",
    "one_minus_beta1": "fp32",
    "eps": "fp32",
    "partials": "*fp32",
    **dict.fromkeys(("grad", "exp_avg", "exp_avg_scale", "sketch", "coefficient"), "i64"),
    **dict.fromkeys(("row_sums", "col_sums"), "i64"),
    **dict.fromkeys(("rows", "columns", "block_rows", "block_columns"), "i32"),
    **dict.fromkeys(("whole_start", "whole_stride"), "i32"),
}

# what ``benchmarks/gpu_kernels.py`` compares with ``TUNING``
TUNINGS = (
    TUNING._replace(stages=2),
    TUNING._replace(approximate_reciprocal=True),
    TUNING._replace(stages=2, approximate_reciprocal=True),
)

F32, BF16, F16 = tl.float32, tl.bfloat16, tl.float16
# of each momentum format: the stored type, and the largest code
STORED = {"float32": (F32, 0), "bfloat16": (BF16, 0), "int8": (tl.int8, 127), "int4": (tl.uint8, 7)}


@dataclass(frozen=True)
class Variant:
    """A kernel with its constants.

    Attributes:
        name: Such as "matrices float32 int8 fused".
        kernel: The jit function.
        constants: Parameters of the kernel, single or in named tuples.
        elements: The elements of a matrix, vector or stripe in one iteration of the kernel's loop.
        warps: Of a program.
        types: The types of parameters that differ from ``TYPES``.
        reads: Of one thread and iteration, the loads of tensors by their bytes; empty if the kernel
            does not read them in vectors.
        writes: The same of stores.
        options: Compile options.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    elements: int
    warps: int = 4
    types: dict[str, Any] | None = None
    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=OPTIONS.copy)

    @property
    def elements_per_thread(self) -> float:
        return self.elements / (32 * self.warps)


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


def compile_variant(variant: Variant, capability: int, **options: Any) -> Any:
    """Compiles a variant to a cubin.

    Args:
        variant: The variant.
        capability: Of the GPU, 90 for sm_90.
        **options: Compile options that differ from the backend's, such as ``maxnreg``.

    Returns:
        Triton's compiled kernel; its ``asm`` has "ptx" and "cubin".
    """
    names = variant.kernel.arg_names
    constants = variant.constants
    types = TYPES | (variant.types or {})
    types = {name: types[name] for name in names if name not in constants}
    signature = {
        name: constexprs(constants[name]) if name in constants else types[name] for name in names
    }
    source = ASTSource(
        fn=variant.kernel,
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
    options = {"num_warps": variant.warps, **variant.options, **options}
    return triton.compile(source, target=target, options=options)


def vectors_of(elements: int, *dtypes: Any) -> dict[int, int]:
    """Counts a thread's accesses to tensors by their bytes: four numbers, or bytes of codes, each.

    Args:
        elements: Of each tensor, for all 128 threads.
        *dtypes: Of the tensors.
    """
    counts: dict[int, int] = {}
    for dtype in dtypes:
        width = dtype.primitive_bitwidth // 2
        per_number = 2 if dtype == tl.uint8 else 1  # a byte has two 4-bit codes
        counts[width] = counts.get(width, 0) + elements // 128 // 4 // per_number
    return counts


# ---------------------------------------------------------------------------------------------
# the variants
# ---------------------------------------------------------------------------------------------


def statistics(
    grad: Any, first_step: bool = False, tuning: Tuning = TUNING, **layout: bool
) -> Variant:
    layout = {"aligned": True, "transposed": False, "fused_statistics": False} | layout
    columns = tile_columns(layout["fused_statistics"])
    elements = tile_sizes.STATISTICS_TILE_ROWS * columns
    marks = [key for key in ("transposed", "fused_statistics") if layout[key]]
    in_vectors = layout["aligned"] and tuning.stages == 1
    kernel = (
        statistics_kernels.first_statistics_kernel
        if first_step
        else statistics_kernels.statistics_kernel
    )
    name = "first_statistics" if first_step else "statistics"
    return Variant(
        " ".join([name, str_of(grad), *unaligned(layout), *marks, *marks_of(tuning)]),
        kernel,
        {
            "variant": StatisticsVariant(grad, **layout),
            "tuning": tuning,
            **({"TILES": tile_sizes.TILES_OF_FIRST_STEP} if first_step else {}),
            "TILE_ROWS": tile_sizes.STATISTICS_TILE_ROWS,
            "TILE_COLUMNS": columns,
        },
        elements=elements,
        reads={16: elements // 128 * grad.primitive_bitwidth // 128} if in_vectors else {},
    )


def matrices(
    param: Any,
    momentum_dtype: str,
    tuning: Tuning = TUNING,
    **switches: bool,
) -> Variant:
    layout = {"aligned": True, "transposed": False, "one_block": True, "narrow": False}
    layout |= dict.fromkeys(("large", "fused_statistics", "folded", "low_bits"), False)
    flags = {"maximize": False, "nesterov": False, "stochastic_rounding": param != F32}
    flags |= {"from_start": True}
    flags |= {key: value for key, value in switches.items() if key in flags}
    layout |= {key: value for key, value in switches.items() if key in layout}
    stored, qmax = STORED[momentum_dtype]
    marks = [key if value else f"not {key}" for key, value in switches.items() if key != "aligned"]
    marks += marks_of(tuning)
    tile_rows = tile_sizes.update_tile_rows(layout["transposed"], layout["low_bits"])
    elements = tile_rows * 128
    in_vectors = layout["aligned"] and not layout["narrow"]
    low_bits = (tl.int8,) if layout["low_bits"] else ()
    read = (param, stored, *low_bits, *(() if layout["folded"] else (param,)))
    written = (param, *low_bits, *(() if layout["folded"] else (stored,)))
    variant = MatrixVariant(param, param, stored, qmax, **layout)
    return Variant(
        " ".join(["matrices", str_of(param), momentum_dtype, *unaligned(layout), *marks]),
        update_kernels.matrices_kernel,
        {
            "variant": variant,
            "flags": UpdateFlags(**flags),
            "tuning": tuning,
            "TILE_ROWS": tile_rows,
        },
        elements=elements,
        # cp.async loads without registers
        reads=vectors_of(elements, *read) if in_vectors and tuning.stages == 1 else {},
        writes=vectors_of(elements, *written) if in_vectors else {},
        options=options_of_update(variant),
    )


def fold(grad: Any, momentum_dtype: str, **switches: bool) -> Variant:
    stored, qmax = STORED[momentum_dtype]
    constants = dict.fromkeys(FoldVariant._fields[3:], False)
    constants |= {"aligned": True, "one_block": True, "from_start": True} | switches
    marks = [key if value else f"not {key}" for key, value in switches.items() if key != "aligned"]
    elements = tile_sizes.UPDATE_TILE_ROWS * 128
    in_vectors = constants["aligned"]
    return Variant(
        " ".join(["fold", str_of(grad), momentum_dtype, *unaligned(constants), *marks]),
        fold_kernels.fold_kernel,
        {
            "variant": FoldVariant(grad, stored, qmax, **constants),
            "FOLDED_ROWS": tile_sizes.folded_rows(0),
            "TILE_ROWS": tile_sizes.UPDATE_TILE_ROWS,
        },
        elements=elements,
        reads=vectors_of(elements, grad, stored) if in_vectors else {},
        writes=vectors_of(elements, stored) if in_vectors else {},
    )


def stripes(way: tuple[bool, bool, bool], has_roots: bool, on_device: bool) -> Variant:
    variant = StripesVariant(*way, has_roots=has_roots, nesterov=on_device)
    marks = [key for key, value in variant._asdict().items() if value]
    return Variant(
        " ".join(["stripes", *marks, *(["on_device"] if on_device else [])]),
        stripes_kernels.stripes_kernel,
        {
            "on_device": OnDevice(on_device, on_device),
            "variant": variant,
            "BLOCK": tile_sizes.STRIPE_BLOCK,
        },
        elements=tile_sizes.STRIPE_BLOCK,
        warps=8,
        types={"hyper": NUMBERS._replace(lr="*fp32")} if on_device else {},
    )


def vectors(dtype: Any, on_device: bool = False, low_bits: bool = False) -> Variant:
    marks = ["on_device"] * on_device + ["low_bits"] * low_bits
    low = (tl.int32,) if low_bits else ()
    return Variant(
        " ".join(["vectors", str_of(dtype), *marks]),
        update_kernels.vectors_kernel,
        {
            "on_device": OnDevice(on_device, on_device),
            "variant": VectorVariant(dtype, dtype, aligned=True, low_bits=low_bits),
            "flags": UpdateFlags(
                maximize=on_device,
                nesterov=on_device,
                stochastic_rounding=dtype != F32 and not low_bits,
                from_start=True,
            ),
            "BLOCK": tile_sizes.VECTOR_BLOCK,
        },
        elements=tile_sizes.VECTOR_BLOCK,
        types={"hyper": NUMBERS._replace(lr="*fp32")} if on_device else {},
        reads=vectors_of(tile_sizes.VECTOR_BLOCK, F32, F32, dtype, dtype, *low),
        writes=vectors_of(tile_sizes.VECTOR_BLOCK, F32, F32, dtype, *low),
    )


def sums() -> Iterator[Variant]:
    """Yields the kernels that add up partial sums."""
    sizes = {"PARTIALS": tile_sizes.COMBINED_PARTIALS, "WIDTH": tile_sizes.COMBINED_WIDTH}
    elements = sizes["PARTIALS"] * sizes["WIDTH"]
    yield Variant("combine", statistics_kernels.combine_kernel, sizes, elements)
    first = {"REDUCTIONS": tile_sizes.TILES_OF_FIRST_STEP}
    yield Variant(
        "first_combine", statistics_kernels.first_combine_kernel, {**sizes, **first}, elements
    )
    block = {"BLOCK": tile_sizes.TOTALS_BLOCK}
    yield Variant("means", stripes_kernels.means_kernel, block, tile_sizes.TOTALS_BLOCK, warps=1)
    for has_coefficient in (False, True):
        folded = {"FOLDED_ROWS": tile_sizes.folded_rows(0), "HAS_COEFFICIENT": has_coefficient}
        name = "add_folded" + " has_coefficient" * has_coefficient
        kernel = fold_kernels.add_folded_kernel
        yield Variant(name, kernel, {**sizes, **folded}, elements)


def all_variants() -> Iterator[Variant]:
    """Yields every kernel in the variants that matter, and each constant at least once."""
    for dtype in (F32, BF16):
        yield statistics(dtype)
        yield statistics(dtype, fused_statistics=True)
        for momentum_dtype in STORED:
            yield matrices(dtype, momentum_dtype)
            yield matrices(dtype, momentum_dtype, fused_statistics=True)
            yield matrices(dtype, momentum_dtype, folded=True)
    for momentum_dtype in STORED:
        yield matrices(BF16, momentum_dtype, low_bits=True)
    yield matrices(BF16, "int8", low_bits=True, folded=True)
    yield matrices(BF16, "int8", low_bits=True, fused_statistics=True)
    yield matrices(BF16, "float32", aligned=False, transposed=True, low_bits=True)
    yield statistics(F32, aligned=False, transposed=True)
    yield statistics(F32, fused_statistics=True, first_step=True)
    yield matrices(F32, "int8", one_block=False)
    yield matrices(F32, "int8", one_block=False, fused_statistics=True)
    yield matrices(F32, "int8", nesterov=True)
    yield matrices(F32, "int8", from_start=False)
    yield matrices(F32, "int4", maximize=True)
    yield matrices(F16, "int4")
    yield matrices(F16, "float32", fused_statistics=True)
    yield matrices(F32, "int8", aligned=False, transposed=True)
    yield matrices(F32, "int8", aligned=False, transposed=True, fused_statistics=True)
    yield matrices(BF16, "int4", aligned=False, one_block=False, narrow=True)
    yield matrices(BF16, "int4", aligned=False, one_block=False, narrow=True, large=True)

    for tuning in TUNINGS:
        yield matrices(F32, "float32", tuning)
    yield statistics(F32, tuning=TUNINGS[0])
    yield matrices(F32, "int8", TUNINGS[-1], fused_statistics=True)
    yield matrices(BF16, "int8", TUNINGS[-1])

    first, later = {"is_first": True}, {"has_sketch": True, "has_coefficient": True}
    yield fold(F32, "float32", **first)
    yield fold(BF16, "int8", **first)
    yield fold(BF16, "int8", **later)
    yield fold(BF16, "int4", **first, maximize=True)
    yield fold(F32, "bfloat16", **later, maximize=True)
    yield fold(F32, "int4", **later, one_block=False, large=True)
    yield fold(BF16, "bfloat16", **later, aligned=False)

    yield from sums()
    for way in ((False, False, True), (True, False, True), (True, True, True)):
        yield stripes(way, has_roots=False, on_device=False)
    yield stripes((True, True, False), has_roots=False, on_device=True)
    yield stripes((True, True, True), has_roots=False, on_device=True)
    yield stripes((False, False, True), has_roots=True, on_device=False)
    yield vectors(F32)
    yield vectors(F32, on_device=True)
    yield vectors(BF16)
    yield vectors(BF16, low_bits=True)


def str_of(dtype: Any) -> str:
    return {F32: "float32", BF16: "bfloat16", F16: "float16"}[dtype]


def marks_of(tuning: Tuning) -> list[str]:
    found = [f"stages={tuning.stages}"] if tuning.stages != TUNING.stages else []
    if tuning.approximate_reciprocal != TUNING.approximate_reciprocal:
        found += ["approximate_reciprocal"]
    return found


def unaligned(layout: dict[str, bool]) -> list[str]:
    return [] if layout["aligned"] else ["unaligned"]
