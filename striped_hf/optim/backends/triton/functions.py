"""Functions that the kernels call, and the named tuples that the kernels pass to them."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from striped_hf.optim.backends.triton import INTERPRETED
from striped_hf.optim.backends.triton.arguments import (
    COLUMN_PARTIALS,
    DECAY,
    FLOOR,
    KEY,
    POINTERS,
    ROW_PARTIALS,
    STEP_POINTER,
    STEP_SIZE,
)
from striped_hf.optim.backends.triton.codec import (
    join,
    random_bits,
    round_to_24_bits,
    round_to_nearest,
    split,
    stochastic_round,
)

_INTERPRETED = tl.constexpr(INTERPRETED)  # the interpreter runs no PTX

# ---------------------------------------------------------------------------------------------
# named tuples
# ---------------------------------------------------------------------------------------------


class Region(NamedTuple):
    """The place of a program's tiles in the parameter. A program's rows are rows of one block."""

    first_row: Any  # of all matrices together
    first_column: Any
    rows: Any  # the others are fields of ``EntryShape``
    matrix_rows: Any
    columns: Any
    block_rows: Any
    block_columns: Any
    summed_rows: Any


class Matrix(NamedTuple):
    """The facts about the matrix that all tiles of a program share."""

    param: Any  # pointer
    low_bits: Any  # pointer, if the variant has low bits
    grad: Any  # pointer
    region: Region
    row_roots: Any  # pointer to sqrt(row), [rows, column_blocks]
    column_blocks: Any
    block: Any  # number, from the left, of the block that has the first column
    next_inverse_rms: Any  # 1 / sqrt(mean(row)) of the block to the right of it
    whole_start: Any
    whole_stride: Any


class Columns(NamedTuple):
    """The columns of a tile."""

    index: Any  # [c] int32
    inside: Any  # [c] bool
    roots: Any  # [c] float32: c_j
    inverse_rms: Any  # 1 / sqrt(mean(row)): [c] if the variant is narrow, else of ``Matrix.block``


class StepScalars(NamedTuple):
    """Numbers that all elements of a matrix share in a step."""

    decay: Any  # the first four as in ``EntryScalars``
    step_size: Any
    key: Any
    floor: Any
    one_minus_beta1: Any
    eps: Any


# ---------------------------------------------------------------------------------------------
# functions of several kernels
# ---------------------------------------------------------------------------------------------


@triton.jit
def load_pointer(pointers, INDEX: tl.constexpr, DTYPE: tl.constexpr):
    """Returns the pointer in field INDEX of an ``EntryPointers``."""
    return tl.load(pointers + INDEX).to(tl.pointer_type(DTYPE))


@triton.jit
def load_aligned_pointer(pointers, INDEX: tl.constexpr, DTYPE: tl.constexpr, aligned):
    """Returns a pointer as ``load_pointer``; Triton reads aligned tensors in vectors.

    The vectors have four elements in every tensor: if some had more, Triton would convert layouts.
    """
    return aligned_pointer(tl.load(pointers + INDEX), DTYPE, aligned)


@triton.jit
def aligned_pointer(address, DTYPE: tl.constexpr, aligned):
    """Returns the pointer to an address."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if aligned:
        # not DTYPE.primitive_bitwidth // 2: Triton 3.3 reads no attribute of a constexpr
        if DTYPE == tl.float32 or DTYPE == tl.int32:
            pointer = tl.multiple_of(pointer, 16)
        elif DTYPE == tl.bfloat16 or DTYPE == tl.float16:
            pointer = tl.multiple_of(pointer, 8)
        else:
            pointer = tl.multiple_of(pointer, 4)
    return pointer


@triton.jit
def load_step(pointers, step, on_device):  # int32
    """Returns the entry's step, from 1. ``step`` is the first entry's step."""
    if on_device:
        current = tl.load(load_pointer(pointers, STEP_POINTER, tl.float32)).to(tl.int32)
    else:
        current = (tl.load(pointers + STEP_POINTER) + step).to(tl.int32)
    return current


@triton.jit
def load_steps(buffers, entries):  # integers -> float32
    """Returns the steps of entries, from 1, which only the device knows."""
    addresses = tl.load(buffers.pointers + entries.to(tl.int64) * POINTERS + STEP_POINTER)
    return tl.load(addresses.to(tl.pointer_type(tl.float32)))


@triton.jit
def bias_correction(step, log_beta):  # float64
    """Returns 1 - beta^step, with a relative error of 1e-7: the logarithm is float32."""
    return 1.0 - tl.exp(step.to(tl.float64) * tl.cast(log_beta, tl.float64))


@triton.jit
def decay_and_step_size(step, hyper, on_device):  # float32, float32
    """Returns 1 - lr * weight_decay and lr / (1 - beta1^t)."""
    if on_device.lr:
        lr = tl.load(hyper.lr).to(tl.float64)
    else:
        lr = tl.cast(hyper.lr, tl.float64)
    decay = (1.0 - lr * tl.cast(hyper.weight_decay, tl.float64)).to(tl.float32)
    step_size = (lr / bias_correction(step, hyper.log_beta1)).to(tl.float32)
    return decay, step_size


@triton.jit
def momentum_floor(step, hyper, nesterov):  # float32
    """Returns ``reference.momentum_floor``, by the logarithm of r = beta1^2 / beta2."""
    t = step.to(tl.float64)
    log_r = tl.cast(hyper.log_r, tl.float64)
    x = tl.abs(log_r)
    inverse_sum = (1.0 - tl.exp(-x)) / (1.0 - tl.exp(-t * x))
    inverse_sum *= tl.exp((1.0 - t) * tl.maximum(log_r, 0.0))
    one_minus_beta1 = tl.cast(hyper.one_minus_beta1, tl.float64)
    if nesterov:
        beta1 = 1.0 - one_minus_beta1
        inverse_sum /= (1 + beta1) * (1 + beta1) * inverse_sum + beta1 * beta1 * (1 - inverse_sum)
    u = tl.cast(hyper.one_minus_beta2, tl.float64) / bias_correction(step, hyper.log_beta2)
    u *= inverse_sum / (one_minus_beta1 * one_minus_beta1)
    return tl.sqrt_rn(u.to(tl.float32))


@triton.jit
def inverse_rms_of(total, rows):  # float32, integer -> float32
    """Returns 1 / sqrt(total / rows), from the sum of a block's row stripe."""
    mean = tl.div_rn(total, rows.to(tl.float32))
    inverse_rms = tl.div_rn(1.0, tl.sqrt_rn(mean))
    # 0/0 is an all-zero gradient, which must change nothing; an Inf must give NaN, as in AdamW
    return tl.where(mean == 0.0, 0.0, tl.where(mean == float("inf"), float("nan"), inverse_rms))


@triton.jit
def lerp(start, end, weight, from_start):
    """Computes ``torch.lerp`` from the nearer end, so that weights of 0 and 1 are exact.

    ``from_start`` is a constant: whether the weight is below a half.
    """
    difference = end - start
    if from_start:
        value = start + weight * difference
    else:
        value = end - difference * (1 - weight)
    return value


@triton.jit
def numerator_of(m, g, one_minus_beta1, flags):
    """Returns the momentum, or Nesterov's momentum."""
    if flags.nesterov:
        m = lerp(m, g, one_minus_beta1, flags.from_start)
    return m


@triton.jit
def divide(numerator, denominator, tuning):
    """Divides, with an error of up to 2 units in the last place."""
    if tuning.approximate_reciprocal:
        if _INTERPRETED:
            reciprocal = 1.0 / denominator
        else:
            reciprocal = tl.inline_asm_elementwise(
                "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], tl.float32, True, 1
            )
        quotient = numerator * reciprocal
    else:
        quotient = numerator / denominator
    return quotient


@triton.jit
def indices_in_whole(rows, columns, whole_start, whole_stride, large):  # [r], [c] -> [r, c] uint32
    """Returns the low and the high half of elements' indices in the whole parameter."""
    low = rows.to(tl.uint32)[:, None] * whole_stride.to(tl.uint32)
    low += columns.to(tl.uint32)[None, :]
    low += whole_start.to(tl.uint32)
    if large:
        whole_row = whole_start + rows.to(tl.int64)[:, None] * whole_stride
        high = ((whole_row + columns[None, :]) >> 32).to(tl.uint32)
    else:
        high = tl.zeros([1, 1], tl.uint32)
    return low, high


@triton.jit
def round_parameter(value, index_low, index_high, key, flags, DTYPE: tl.constexpr):
    """Rounds values of the elements 2^32 index_high + index_low to the parameter's dtype."""
    if flags.stochastic_rounding:
        rounded = stochastic_round(value, random_bits(index_low, index_high, key), DTYPE)
    else:
        rounded = round_to_nearest(value, DTYPE)
    return rounded


@triton.jit
def element_offsets(rows, columns, region, transposed):  # [r], [c] -> [r, c] int64
    """Returns elements' offsets in a contiguous tensor, or in one with transposed matrices."""
    if transposed:
        above = region.first_row // region.matrix_rows * region.matrix_rows
        inner = (rows - above).to(tl.int64)[:, None]
        inner += columns.to(tl.int64)[None, :] * region.matrix_rows
        offsets = inner + above.to(tl.int64) * region.columns
    else:
        offsets = rows.to(tl.int64)[:, None] * region.columns + columns[None, :]
    return offsets


@triton.jit
def partial_sum_pointers(partials, shape, region, fused_statistics, TILE_COLUMNS: tl.constexpr):
    """Returns pointers to a program's partial sums of row 0 and of column 0.

    The entry's partial sums of columns are [programs one below another, columns]. Its partial sums
    of rows are [tiles side by side, rows]. With ``fused_statistics``, tiles begin at multiples of
    TILE_COLUMNS: the sums over the columns that tile q and block b share are at index q + b, which
    no two such pairs have in common. The sums at the next index are of the block to the right.
    """
    row_block = region.first_row // region.block_rows
    column_block = region.first_column // region.block_columns
    programs = (region.block_rows + region.summed_rows - 1) // region.summed_rows
    program = (
        row_block * programs
        + (region.first_row - row_block * region.block_rows) // region.summed_rows
    )
    if fused_statistics:
        tile = column_block + region.first_column // TILE_COLUMNS
    else:
        tiles = (region.block_columns + TILE_COLUMNS - 1) // TILE_COLUMNS
        in_block = region.first_column - column_block * region.block_columns
        tile = column_block * tiles + in_block // TILE_COLUMNS
    row_partials = partials + tl.load(shape + ROW_PARTIALS) + tile * region.rows
    column_partials = partials + tl.load(shape + COLUMN_PARTIALS) + program * region.columns
    return row_partials, column_partials


@triton.jit
def add_partials(source, count, stride, lanes, inside, PARTIALS: tl.constexpr, WIDTH: tl.constexpr):
    """Adds up ``count`` vectors of WIDTH partial sums, ``stride`` apart, always in one order."""
    total = tl.zeros([PARTIALS, WIDTH], tl.float32)
    for first in range(0, count, PARTIALS):
        k = first + tl.arange(0, PARTIALS)
        offsets = k.to(tl.int64)[:, None] * stride + lanes[None, :]
        mask = (k < count)[:, None] & inside[None, :]
        total += tl.load(source + offsets, mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def add_distant_rows(squares, HEIGHT: tl.constexpr):  # [r, c] -> [HEIGHT, c]
    """Adds up rows that are HEIGHT apart. One thread has all of them, and keeps only their sum."""
    rows: tl.constexpr = squares.shape[0]
    columns: tl.constexpr = squares.shape[1]
    return tl.sum(tl.reshape(squares, [rows // HEIGHT, HEIGHT, columns]), axis=0)


@triton.jit
def sum_squares_of_rows(squares, index, matrix, one_block):  # [r, c], [c] -> [r], [r]
    """Returns each row's sums of squares in the columns of ``Matrix.block``, and of the next."""
    if one_block:
        sums = tl.sum(squares, axis=1)
        next_sums = sums  # unused
    else:
        in_first = (index < (matrix.block + 1) * matrix.region.block_columns)[None, :]
        sums = tl.sum(tl.where(in_first, squares, 0.0), axis=1)
        next_sums = tl.sum(tl.where(in_first, 0.0, squares), axis=1)
    return sums, next_sums


# ---------------------------------------------------------------------------------------------
# functions of ``matrices_kernel``
# ---------------------------------------------------------------------------------------------


@triton.jit
def load_step_scalars(scalars, one_minus_beta1, eps):
    """Returns the ``StepScalars`` of an entry, which ``stripes_kernel`` wrote."""
    decay = tl.load(scalars + DECAY).to(tl.float32, bitcast=True)
    step_size = tl.load(scalars + STEP_SIZE).to(tl.float32, bitcast=True)
    key = tl.load(scalars + KEY).to(tl.uint32, bitcast=True)
    floor = tl.load(scalars + FLOOR).to(tl.float32, bitcast=True)
    return StepScalars(
        decay=decay,
        step_size=step_size,
        key=key,
        floor=floor,
        one_minus_beta1=one_minus_beta1,
        eps=eps,
    )


@triton.jit
def load_columns(index, inside, column_roots, inverse_rms, block, block_columns, narrow):
    """Returns the ``Columns`` of a tile; ``block`` is ``Matrix.block``."""
    roots = tl.load(column_roots + index, mask=inside, other=0.0)
    if narrow:
        inverse = tl.load(inverse_rms + index // block_columns, mask=inside, other=0.0)
    else:
        inverse = tl.load(inverse_rms + block)
    return Columns(index=index, inside=inside, roots=roots, inverse_rms=inverse)


@triton.jit
def _load_row_roots(rows, in_rows, columns, mask, matrix, variant):  # [r, 1] or [r, c]
    """Returns a_i for every element of a tile."""
    row_roots = matrix.row_roots + rows.to(tl.int64) * matrix.column_blocks
    block_columns = matrix.region.block_columns
    if variant.one_block:
        a = tl.load(row_roots + matrix.block, mask=in_rows, other=0.0) * columns.inverse_rms
        a = a[:, None]
    elif variant.narrow:
        block = columns.index // block_columns
        a = tl.load(row_roots[:, None] + block[None, :], mask=mask, other=0.0)
        a *= columns.inverse_rms[None, :]
    else:
        # a tile is no wider than a block, so it has columns of two blocks at most
        next_block = tl.minimum(matrix.block + 1, matrix.column_blocks - 1)
        a = tl.load(row_roots + matrix.block, mask=in_rows, other=0.0) * columns.inverse_rms
        next_a = tl.load(row_roots + next_block, mask=in_rows, other=0.0) * matrix.next_inverse_rms
        in_first = columns.index < (matrix.block + 1) * block_columns
        a = tl.where(in_first[None, :], a[:, None], next_a[:, None])
    return a


@triton.jit
def update_tile(m, rows, in_rows, columns, matrix, step, variant, flags, tuning):
    """Updates a tile of a matrix.

    Args:
        m: [r, c] float32: the momentum before the step, or with the gradient if it was folded; 0
            outside of the matrix.
        rows: [r] int32: indices.
        in_rows: [r] bool: whether the row belongs to the program.
        columns: ``Columns``.
        matrix: ``Matrix``.
        step: ``StepScalars``.
        variant: ``MatrixVariant``.
        flags: ``UpdateFlags``.
        tuning: ``Tuning``.

    Returns:
        The new momentum and the squares of the gradient, both [r, c] float32. For a folded gradient
        the momentum takes the place of the squares.
    """
    mask = in_rows[:, None] & columns.inside[None, :]
    offsets = element_offsets(rows, columns.index, matrix.region, variant.transposed)
    value = tl.load(matrix.param + offsets, mask=mask, other=0.0)
    if variant.low_bits:
        low_offsets = rows.to(tl.int64)[:, None] * matrix.region.columns + columns.index[None, :]
        value = join(value, tl.load(matrix.low_bits + low_offsets, mask=mask, other=0))
    else:
        value = value.to(tl.float32)
    if variant.folded:
        numerator = m
        squares = m
    else:
        g = tl.load(matrix.grad + offsets, mask=mask, other=0.0).to(tl.float32)
        if flags.maximize:
            g = -g
        m = lerp(m, g, step.one_minus_beta1, flags.from_start)
        numerator = numerator_of(m, g, step.one_minus_beta1, flags)
        squares = g * g

    a = _load_row_roots(rows, in_rows, columns, mask, matrix, variant)
    root = a * columns.roots[None, :]
    smallest = tl.abs(numerator) * step.floor
    root = tl.where(root < smallest, smallest, root)  # not tl.maximum, which may drop a NaN

    index_low, index_high = indices_in_whole(
        rows, columns.index, matrix.whole_start, matrix.whole_stride, variant.large
    )
    value = value * step.decay - divide(step.step_size * numerator, root + step.eps, tuning)
    if variant.low_bits:
        bits = tl.full([1, 1], 0x80, tl.uint32)
        if flags.stochastic_rounding:
            bits = random_bits(index_low, index_high, step.key)
        value, low = split(round_to_24_bits(value, bits), tl.int8)
        tl.store(matrix.low_bits + low_offsets, low, mask=mask)
    else:
        value = round_parameter(value, index_low, index_high, step.key, flags, variant.param_dtype)
    tl.store(matrix.param + offsets, value, mask=mask)
    return m, squares
