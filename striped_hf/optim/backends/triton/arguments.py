"""The arguments of kernels: named tuples, and rows of integer arrays.

Triton compiles a kernel once for each combination of constants, such as dtypes. A kernel gets its
constants in a named tuple whose fields are ``tl.constexpr`` (see ``constants``). The tuple itself
is no constexpr, because Triton 3.3 reads no attribute of a constexpr. Triton 3.3.1, 3.6.0 and 3.9.0
compile and interpret named tuples as arguments of kernels and of functions.
"""

from functools import cache
from typing import Any, NamedTuple, TypeVar

import triton.language as tl

# Triton 3.9 asks for a choice. The kernels are right either way, and shorter with fused operations.
OPTIONS = {"enable_fp_fusion": True}

# ---------------------------------------------------------------------------------------------
# named tuples
# ---------------------------------------------------------------------------------------------


class Tuning(NamedTuple):
    """Constants of the kernels of matrices whose best values only a GPU can tell."""

    # With 2, the loads of the next tile are in flight while a program works on a tile (cp.async,
    # into shared memory). With 1, the assembler moves each load to its use.
    stages: Any = 1
    # The update multiplies by an approximate reciprocal: 2 instructions instead of 8, with an error
    # of 2 units in the last place, too. A root above 2^126 has the reciprocal 0.
    approximate_reciprocal: Any = False


TUNING = Tuning()  # what the launches use; ``benchmarks/gpu_kernels.py`` tries the others


class Buffers(NamedTuple):
    """Device memory that the kernels share: tensors on the host, pointers in a kernel."""

    pointers: Any  # [entries, 9] int64, rows of ``EntryPointers``
    shapes: Any  # [entries, 14] int64, rows of ``EntryShape``
    sums: Any  # float32: row and column sums; during the update the roots are in their places
    inverse_rms: Any  # [blocks of all matrices] float32: 1 / sqrt(mean(row))
    totals: Any  # float32: the sums of row stripes' segments that have not all rows of a block
    scalars: Any  # [entries, 4] int32, rows of ``EntryScalars``
    partials: Any  # float32: partial sums, one of every row and column of a program


class Hyperparameters(NamedTuple):
    """A param group's hyperparameters, and numbers that the host computes from them in float64."""

    lr: Any  # a float, or a tensor of one element on the device
    log_beta1: Any
    log_beta2: Any
    log_r: Any  # of r = beta1^2 / beta2, see ``launch._log_r``
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    weight_decay: Any
    eps: Any


class OnDevice(NamedTuple):
    """Constants: whether a number is known only on the device."""

    lr: Any  # ``Hyperparameters.lr`` is a tensor
    step: Any  # ``EntryPointers.step`` is the address of the step


class UpdateFlags(NamedTuple):
    """Constants of an update, from the param group's settings."""

    maximize: Any
    nesterov: Any
    stochastic_rounding: Any  # False for a parameter in float32
    from_start: Any  # 1 - beta1 < 0.5, see ``functions.lerp``


class StatisticsVariant(NamedTuple):
    """Constants of ``statistics_kernel``, which depend on the entry."""

    grad_dtype: Any
    aligned: Any  # rows can be read in vectors of 16 bytes
    transposed: Any  # every matrix is the transposed view of a contiguous one
    fused_statistics: Any  # after its first step, the update computes the entry's statistics


class StripesVariant(NamedTuple):
    """Constants of ``stripes_kernel``."""

    lagged: Any  # after the first step, the roots are those of the step before
    fused_statistics: Any  # after the first step, the sums are there after the update only
    before_update: Any  # the update still needs the roots
    has_roots: Any  # the roots are in the places of the sums, divided by sqrt(mean(row))
    nesterov: Any  # in the update


class MatrixVariant(NamedTuple):
    """Constants of ``matrices_kernel``, which depend on the entry."""

    param_dtype: Any
    grad_dtype: Any
    momentum_dtype: Any
    qmax: Any  # the largest momentum code; 0 where the momentum has no codes
    aligned: Any
    transposed: Any
    one_block: Any  # no tile has columns of two blocks
    narrow: Any  # a block of the matrix has fewer columns than a tile
    large: Any  # the parameter has more than 2^32 elements
    fused_statistics: Any  # the update computes the statistics
    folded: Any  # the momentum has the gradient already
    low_bits: Any  # the state has the 8 bits after the parameter's


class VectorVariant(NamedTuple):
    """Constants of ``vectors_kernel``, which depend on the entry."""

    param_dtype: Any
    grad_dtype: Any
    aligned: Any
    low_bits: Any  # the state has the bits that the parameter's dtype lacks


class FoldVariant(NamedTuple):
    """Constants of ``fold_kernel``, which depend on the matrix and the call."""

    grad_dtype: Any
    momentum_dtype: Any
    qmax: Any  # the next three as in ``MatrixVariant``
    aligned: Any
    large: Any
    one_block: Any  # no tile has columns of two blocks
    maximize: Any
    from_start: Any  # as in ``UpdateFlags``
    is_first: Any  # the momentum decays
    has_coefficient: Any
    has_sketch: Any


Variant = TypeVar("Variant", bound=tuple[Any, ...])


def constants(variant: Variant) -> Variant:
    """Makes every field of a named tuple a compile-time constant."""
    return _constants(type(variant), variant)


@cache  # tuples of two classes may be equal
def _constants(cls: type[Variant], variant: Variant) -> Variant:
    return cls(*map(tl.constexpr, variant))


def options_of_update(variant: MatrixVariant) -> dict[str, Any]:
    """Returns the compile options of ``matrices_kernel``."""
    if variant.fused_statistics and variant.low_bits and variant.aligned and variant.one_block:
        # with up to 128 registers 16 warps run at a time, and with the 138 that Triton 3.9 takes
        # (sm_90) only 12; Triton 3.6 takes 128 by itself, and spills two values
        return {"maxnreg": 128, **OPTIONS}
    return OPTIONS


# ---------------------------------------------------------------------------------------------
# rows of integer arrays: the host writes them by name, a kernel reads them by index
# ---------------------------------------------------------------------------------------------


class EntryPointers(NamedTuple):
    """A row of ``Buffers.pointers``: addresses, 0 if the entry has no such tensor."""

    param: int
    grad: int
    exp_avg: int
    exp_avg_scale: int
    exp_avg_sq_row: int
    exp_avg_sq_col: int
    exp_avg_sq: int
    param_low_bits: int
    step: int  # the address of the step, or the difference from the first entry's step


class EntryShape(NamedTuple):
    """A row of ``Buffers.shapes``. The matrices of a parameter lie one below another.

    A vector has its length in ``columns``, its ``whole_start``, and zeros.
    """

    rows: int = 0  # of all matrices together
    matrix_rows: int = 0
    columns: int = 0
    block_rows: int = 0
    block_columns: int = 0
    column_blocks: int = 0  # blocks side by side
    summed_rows: int = 0  # rows whose squares one program adds up
    row_partials: int = 0  # offsets into ``Buffers.partials``
    column_partials: int = 0
    row_sums: int = 0  # offsets into ``Buffers.sums``
    column_sums: int = 0
    first_block: int = 0  # offset into ``Buffers.inverse_rms``
    whole_start: int = 0  # index of the first element in the whole parameter
    whole_stride: int = 0  # distance of two rows in the whole parameter


class EntryScalars(NamedTuple):
    """A row of ``Buffers.scalars``, which ``stripes_kernel`` fills: bits of a float32, or a key."""

    decay: int  # 1 - lr * weight_decay
    step_size: int  # lr / (1 - beta1^t)
    key: int  # of the step's random bits
    floor: int  # the root is at least this times |momentum|


(
    PARAM_POINTER,
    GRAD_POINTER,
    EXP_AVG_POINTER,
    EXP_AVG_SCALE_POINTER,
    ROW_POINTER,
    COLUMN_POINTER,
    EXP_AVG_SQ_POINTER,
    LOW_BITS_POINTER,
    STEP_POINTER,
) = map(tl.constexpr, range(len(EntryPointers._fields)))
POINTERS = tl.constexpr(len(EntryPointers._fields))

(
    ROWS,
    MATRIX_ROWS,
    COLUMNS,
    BLOCK_ROWS,
    BLOCK_COLUMNS,
    COLUMN_BLOCKS,
    SUMMED_ROWS,
    ROW_PARTIALS,
    COLUMN_PARTIALS,
    ROW_SUMS,
    COLUMN_SUMS,
    FIRST_BLOCK,
    WHOLE_START,
    WHOLE_STRIDE,
) = map(tl.constexpr, range(len(EntryShape._fields)))
SHAPES = tl.constexpr(len(EntryShape._fields))

DECAY, STEP_SIZE, KEY, FLOOR = map(tl.constexpr, range(len(EntryScalars._fields)))
SCALARS = tl.constexpr(len(EntryScalars._fields))
