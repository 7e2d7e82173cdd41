"""The kernels of the Triton backend; ``launch.py`` launches them.

Arithmetic is float32. The division of a matrix's update and the roots of its codes are the fast
ones, good to 2 units in the last place. The stripes, their roots, the bias corrections, and the
step of 0-D and 1-D parameters, which is AdamW's, are correctly rounded.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from striped_hf.optim import momentum
from striped_hf.optim.backends.triton.arguments import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    COLUMN_BLOCKS,
    COLUMN_PARTIALS,
    COLUMN_POINTER,
    COLUMN_SUMS,
    COLUMNS,
    DECAY,
    EXP_AVG_POINTER,
    EXP_AVG_SCALE_POINTER,
    EXP_AVG_SQ_POINTER,
    FIRST_BLOCK,
    FLOOR,
    GRAD_POINTER,
    KEY,
    MATRIX_ROWS,
    PARAM_POINTER,
    POINTERS,
    ROW_PARTIALS,
    ROW_POINTER,
    ROW_SUMS,
    ROWS,
    SCALARS,
    SHAPES,
    STEP_POINTER,
    STEP_SIZE,
    SUMMED_ROWS,
    UPDATED_ROWS,
    WHOLE_START,
    WHOLE_STRIDE,
)
from striped_hf.optim.backends.triton.codec import (
    decode,
    encode,
    largest_magnitude,
    random_bits,
    round_to_nearest,
    step_key,
    stochastic_round,
)

_BLOCK_SIZE = tl.constexpr(momentum.BLOCK_SIZE)  # columns of a quantization block


# ---------------------------------------------------------------------------------------------
# what kernels pass to functions
# ---------------------------------------------------------------------------------------------


class Region(NamedTuple):
    """Where a program's rows and columns lie. The rows are of one block, so of one matrix."""

    first_row: Any  # of all matrices together
    first_column: Any
    rows: Any  # of all matrices together
    matrix_rows: Any
    columns: Any
    block_rows: Any
    block_columns: Any
    summed_rows: Any


class Matrix(NamedTuple):
    """What the tiles of a program have in common."""

    param: Any  # pointers
    grad: Any
    region: Region
    row_roots: Any  # pointer to a, [rows, column_blocks], not yet divided by sqrt(mean(row))
    column_blocks: Any
    block: Any  # the column block of the first column
    next_inverse_rms: Any  # of the block at its right
    whole_start: Any
    whole_stride: Any


class Columns(NamedTuple):
    """The columns of a tile."""

    index: Any  # [c] int32
    inside: Any  # [c] bool
    roots: Any  # [c] float32: c_j
    inverse_rms: Any  # [c] where the variant is narrow, else of the block of the first column


class Step(NamedTuple):
    """The numbers of an entry's step."""

    decay: Any
    size: Any
    key: Any
    floor: Any
    one_minus_beta1: Any
    eps: Any


# ---------------------------------------------------------------------------------------------
# functions that kernels share
# ---------------------------------------------------------------------------------------------


@triton.jit
def _load_pointer(pointers, INDEX: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(pointers + INDEX).to(tl.pointer_type(DTYPE))


@triton.jit
def _load_aligned_pointer(pointers, INDEX: tl.constexpr, DTYPE: tl.constexpr, aligned):
    """The pointer to a tensor that is read in vectors of four elements, if it is aligned.

    Four in every tensor: with more in some, Triton would convert between layouts.
    """
    pointer = tl.load(pointers + INDEX).to(tl.pointer_type(DTYPE))
    if aligned:
        # not DTYPE.primitive_bitwidth // 2, which Triton 3.3 cannot read
        if DTYPE == tl.float32:
            pointer = tl.multiple_of(pointer, 16)
        elif DTYPE == tl.bfloat16 or DTYPE == tl.float16:
            pointer = tl.multiple_of(pointer, 8)
        else:
            pointer = tl.multiple_of(pointer, 4)
    return pointer


@triton.jit
def _load_step(pointers, step, on_device):  # int32
    """The entry's step, from 1. ``step`` is the first entry's."""
    if on_device:
        current = tl.load(_load_pointer(pointers, STEP_POINTER, tl.float32)).to(tl.int32)
    else:
        current = (tl.load(pointers + STEP_POINTER) + step).to(tl.int32)
    return current


@triton.jit
def _bias_correction(step, log_beta):  # float64
    """1 - beta^step. The logarithm is float32: its rounding changes the result by 1e-7 of it."""
    return 1.0 - tl.exp(step.to(tl.float64) * tl.cast(log_beta, tl.float64))


@triton.jit
def _decay_and_step_size(step, hyper, on_device):  # float32, float32
    """1 - lr * weight_decay and lr / (1 - beta1^t)."""
    if on_device.lr:
        lr = tl.load(hyper.lr).to(tl.float64)
    else:
        lr = tl.cast(hyper.lr, tl.float64)
    decay = (1.0 - lr * tl.cast(hyper.weight_decay, tl.float64)).to(tl.float32)
    step_size = (lr / _bias_correction(step, hyper.log_beta1)).to(tl.float32)
    return decay, step_size


@triton.jit
def _lerp(start, end, weight):
    """torch.lerp: it starts from the nearer end, so that weights of 0 and 1 are exact."""
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - difference * (1 - weight))


@triton.jit
def _scaled_direction(m, g, step, flags):
    """The step size times the momentum, or times Nesterov's."""
    if flags.nesterov:
        m = _lerp(m, g, step.one_minus_beta1)
    return step.size * m


@triton.jit
def _round_parameter(value, low, high, key, flags, DTYPE: tl.constexpr):
    """Rounds the value of element 2^32 high + low to the parameter's dtype."""
    if flags.stochastic_rounding:
        rounded = stochastic_round(value, random_bits(low, high, key), DTYPE)
    else:
        rounded = round_to_nearest(value, DTYPE)
    return rounded


@triton.jit
def _offsets(rows, columns, region, transposed):  # [r], [c] -> [r, c] int64
    """Where the elements lie, of a contiguous tensor or of one whose matrices are transposed."""
    if transposed:
        above = region.first_row // region.matrix_rows * region.matrix_rows
        inner = (rows - above).to(tl.int64)[:, None]
        inner += columns.to(tl.int64)[None, :] * region.matrix_rows
        offsets = inner + above.to(tl.int64) * region.columns
    else:
        offsets = rows.to(tl.int64)[:, None] * region.columns + columns[None, :]
    return offsets


@triton.jit
def _partial_sums(partials, shape, region, TILE_COLUMNS: tl.constexpr):
    """Pointers to a program's partial sums: of row 0 and of column 0.

    Those of rows are [column tiles, rows], those of columns [row programs, columns].
    """
    row_block = region.first_row // region.block_rows
    column_block = region.first_column // region.block_columns
    programs = (region.block_rows + region.summed_rows - 1) // region.summed_rows
    program = (
        row_block * programs
        + (region.first_row - row_block * region.block_rows) // region.summed_rows
    )
    tiles = (region.block_columns + TILE_COLUMNS - 1) // TILE_COLUMNS
    tile = (
        column_block * tiles
        + (region.first_column - column_block * region.block_columns) // TILE_COLUMNS
    )
    row_partials = partials + tl.load(shape + ROW_PARTIALS) + tile * region.rows
    column_partials = partials + tl.load(shape + COLUMN_PARTIALS) + program * region.columns
    return row_partials, column_partials


# ---------------------------------------------------------------------------------------------
# statistics and stripes
# ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["step"])
def statistics_kernel(
    tiles,  # [programs, 3] int32: entry, first row, first column
    buffers,  # ``Buffers``
    step,
    variant,  # ``StatisticsVariant``
    STEP_ON_DEVICE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Adds up the squares of some rows of one block, at most TILE_COLUMNS wide."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    entry = tl.load(tile).to(tl.int64)
    pointers = buffers.pointers + entry * POINTERS
    if variant.fused_statistics:
        current = _load_step(pointers, step, STEP_ON_DEVICE)
        if current > 1:
            return
    first_row = tl.load(tile + 1)
    first_column = tl.load(tile + 2)
    shape = buffers.shapes + entry * SHAPES
    rows = tl.load(shape + ROWS)
    matrix_rows = tl.load(shape + MATRIX_ROWS).to(tl.int32)
    columns = tl.load(shape + COLUMNS)
    block_rows = tl.load(shape + BLOCK_ROWS).to(tl.int32)
    block_columns = tl.load(shape + BLOCK_COLUMNS).to(tl.int32)
    summed_rows = tl.load(shape + SUMMED_ROWS).to(tl.int32)
    # not by a function: Triton before 3.9 loses hints about what a function returns
    grad = tl.load(pointers + GRAD_POINTER).to(tl.pointer_type(variant.grad_dtype))
    if variant.aligned:
        grad = tl.multiple_of(grad, 16)
        columns = tl.multiple_of(columns, 16)
        block_columns = tl.multiple_of(block_columns, 16)
        first_column = tl.multiple_of(first_column, 16)
    region = Region(
        first_row=first_row,
        first_column=first_column,
        rows=rows,
        matrix_rows=matrix_rows,
        columns=columns,
        block_rows=block_rows,
        block_columns=block_columns,
        summed_rows=summed_rows,
    )
    end_row = tl.minimum(first_row + summed_rows, (first_row // block_rows + 1) * block_rows)
    end_column = (first_column // block_columns + 1) * block_columns
    row_partials, column_partials = _partial_sums(buffers.partials, shape, region, TILE_COLUMNS)

    tile_columns = first_column + tl.arange(0, TILE_COLUMNS)
    in_columns = tile_columns < end_column
    column_sums = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for row in range(first_row, end_row, TILE_ROWS):
        tile_rows = row + tl.arange(0, TILE_ROWS)
        in_rows = tile_rows < end_row
        offsets = _offsets(tile_rows, tile_columns, region, variant.transposed)
        mask = in_rows[:, None] & in_columns[None, :]
        g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        squares = g * g
        tl.store(row_partials + tile_rows, tl.sum(squares, axis=1), mask=in_rows)
        column_sums += squares
    tl.store(column_partials + tile_columns, tl.sum(column_sums, axis=0), mask=in_columns)


@triton.jit
def combine_kernel(
    reductions,  # [programs, 6] int64: rows of ``plan.reductions``
    buffers,  # ``Buffers``
    PARTIALS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds up partial sums, always in the same order."""
    reduction = reductions + tl.program_id(0).to(tl.int64) * 6
    source = buffers.partials + tl.load(reduction)
    count = tl.load(reduction + 1).to(tl.int32)
    stride = tl.load(reduction + 2)
    size = tl.load(reduction + 3).to(tl.int32)
    target = buffers.sums + tl.load(reduction + 4)
    target_stride = tl.load(reduction + 5)
    lanes = tl.arange(0, WIDTH)
    inside = lanes < size
    total = tl.zeros([PARTIALS, WIDTH], tl.float32)
    for first in range(0, count, PARTIALS):
        k = first + tl.arange(0, PARTIALS)
        offsets = k.to(tl.int64)[:, None] * stride + lanes[None, :]
        mask = (k < count)[:, None] & inside[None, :]
        total += tl.load(source + offsets, mask=mask, other=0.0)
    tl.store(target + lanes * target_stride, tl.sum(total, axis=0), mask=inside)


@triton.jit(do_not_specialize=["step"])
def stripes_kernel(
    segments,  # [programs, 7] int64: rows of ``plan.segments``
    buffers,  # ``Buffers``
    hyper,  # ``Hyperparameters``
    step,
    on_device,  # ``OnDevice``
    variant,  # ``StripesVariant``
    BLOCK: tl.constexpr,
):
    """Averages sums into a segment of a stripe, and writes the roots that the update needs.

    A segment of a row stripe is all rows of one block, so that the program can take their mean.
    Before the update, sqrt(row) and sqrt(col / (1 - beta2^t)) replace the sums, and
    1 / sqrt(mean(row)) goes to ``inverse_rms``.

    Where the update computes the statistics, this kernel runs twice: before the update it writes
    the roots, in the places where the update's sums go, and after the update it averages the sums.
    """
    segment = segments + tl.program_id(0).to(tl.int64) * 7
    entry = tl.load(segment)
    is_column = tl.load(segment + 1) != 0
    start = tl.load(segment + 2)
    stride = tl.load(segment + 3)
    size = tl.load(segment + 4).to(tl.int32)
    averaged = tl.load(segment + 5).to(tl.float32)
    block = tl.load(segment + 6)
    shape = buffers.shapes + entry * SHAPES
    pointers = buffers.pointers + entry * POINTERS
    first_block = tl.load(shape + FIRST_BLOCK)
    sums = buffers.sums
    sums += start + tl.where(is_column, tl.load(shape + COLUMN_SUMS), tl.load(shape + ROW_SUMS))
    address = tl.where(
        is_column, tl.load(pointers + COLUMN_POINTER), tl.load(pointers + ROW_POINTER)
    )
    stripe = address.to(tl.pointer_type(tl.float32)) + start

    current = _load_step(pointers, step, on_device.step)
    is_first_step = current <= 1
    summed = size  # how many sums are there
    if variant.fused_statistics:
        if variant.before_update:
            summed = tl.where(is_first_step, size, 0)
        else:
            summed = tl.where(is_first_step, 0, size)
    corrected = current
    if variant.lagged:
        corrected = tl.maximum(current - 1, 1)
    bias_correction2 = _bias_correction(corrected, hyper.log_beta2).to(tl.float32)
    correction = tl.div_rn(1.0, tl.sqrt_rn(tl.where(is_column, bias_correction2, 1.0)))
    weight = tl.div_rn(hyper.one_minus_beta2, averaged)
    total = tl.zeros([BLOCK], tl.float32)
    if not variant.has_roots:
        for first in range(0, size, BLOCK):
            lanes = first + tl.arange(0, BLOCK)
            inside = lanes < size
            offsets = lanes.to(tl.int64) * stride
            has_sum = lanes < summed
            before = tl.load(stripe + offsets, mask=inside, other=0.0)
            value = hyper.beta2 * before
            value += weight * tl.load(sums + offsets, mask=has_sum, other=0.0)
            tl.store(stripe + offsets, value, mask=has_sum)
            if variant.before_update:
                if variant.lagged:
                    value = tl.where(is_first_step, value, before)
                root = tl.sqrt_rn(value) * correction
                tl.store(sums + offsets, root, mask=inside)
                total += value

    if variant.before_update:
        is_row = is_column == 0
        if is_row:
            mean = tl.div_rn(tl.sum(total, axis=0), size.to(tl.float32))
            inverse_rms = tl.div_rn(1.0, tl.sqrt_rn(mean))
            # 0/0 is an all-zero gradient, which must change nothing; an Inf must give NaN, as in
            # AdamW
            inverse_rms = tl.where(
                mean == 0.0, 0.0, tl.where(mean == float("inf"), float("nan"), inverse_rms)
            )
            if variant.has_roots:
                inverse_rms = 1.0
            tl.store(buffers.inverse_rms + block, inverse_rms)
            if block == first_block:
                decay, step_size = _decay_and_step_size(current, hyper, on_device)
                scalars = buffers.scalars + entry * SCALARS
                tl.store(scalars + DECAY, decay.to(tl.int32, bitcast=True))
                tl.store(scalars + STEP_SIZE, step_size.to(tl.int32, bitcast=True))
                tl.store(scalars + KEY, step_key(current).to(tl.int32, bitcast=True))
                if variant.lagged:
                    bias_correction2 = _bias_correction(current, hyper.log_beta2).to(tl.float32)
                    floor = tl.sqrt_rn(tl.div_rn(hyper.one_minus_beta2, bias_correction2))
                    floor = tl.where(is_first_step, 0.0, floor)
                    tl.store(scalars + FLOOR, floor.to(tl.int32, bitcast=True))


# ---------------------------------------------------------------------------------------------
# the update of matrices
# ---------------------------------------------------------------------------------------------


@triton.jit
def _load_step_numbers(scalars, one_minus_beta1, eps, lagged):
    floor = 0.0
    decay = tl.load(scalars + DECAY).to(tl.float32, bitcast=True)
    step_size = tl.load(scalars + STEP_SIZE).to(tl.float32, bitcast=True)
    key = tl.load(scalars + KEY).to(tl.uint32, bitcast=True)
    if lagged:
        floor = tl.load(scalars + FLOOR).to(tl.float32, bitcast=True)
    return Step(
        decay=decay,
        size=step_size,
        key=key,
        floor=floor,
        one_minus_beta1=one_minus_beta1,
        eps=eps,
    )


@triton.jit
def _load_columns(index, inside, column_roots, inverse_rms, block, block_columns, narrow):
    """The ``Columns`` of a tile whose first column is in column block ``block``."""
    roots = tl.load(column_roots + index, mask=inside, other=0.0)
    if narrow:
        inverse = tl.load(inverse_rms + index // block_columns, mask=inside, other=0.0)
    else:
        inverse = tl.load(inverse_rms + block)
    return Columns(index=index, inside=inside, roots=roots, inverse_rms=inverse)


@triton.jit
def _load_row_roots(rows, in_rows, columns, mask, matrix, variant):  # [r, 1] or [r, c]
    """a, for every element of a tile."""
    row_roots = matrix.row_roots + rows.to(tl.int64) * matrix.column_blocks
    block_columns = matrix.region.block_columns
    if variant.fused_statistics:  # all columns are of one block
        a = tl.load(row_roots + matrix.block, mask=in_rows, other=0.0) * columns.inverse_rms
        a = a[:, None]
    elif variant.narrow:
        block = columns.index // block_columns
        a = tl.load(row_roots[:, None] + block[None, :], mask=mask, other=0.0)
        a *= columns.inverse_rms[None, :]
    else:
        # a tile is no wider than a block, so that it has columns of two at most
        next_block = tl.minimum(matrix.block + 1, matrix.column_blocks - 1)
        a = tl.load(row_roots + matrix.block, mask=in_rows, other=0.0) * columns.inverse_rms
        next_a = tl.load(row_roots + next_block, mask=in_rows, other=0.0) * matrix.next_inverse_rms
        in_first = columns.index < (matrix.block + 1) * block_columns
        a = tl.where(in_first[None, :], a[:, None], next_a[:, None])
    return a


@triton.jit
def _update_tile(m, rows, in_rows, columns, matrix, step, variant, flags):
    """Updates a tile of a matrix; returns its new momentum and the squares of its gradient.

    ``m`` is the momentum before, float32, and 0 outside of the matrix.
    """
    mask = in_rows[:, None] & columns.inside[None, :]
    offsets = _offsets(rows, columns.index, matrix.region, variant.transposed)
    g = tl.load(matrix.grad + offsets, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(matrix.param + offsets, mask=mask, other=0.0).to(tl.float32)
    if flags.maximize:
        g = -g
    m = _lerp(m, g, step.one_minus_beta1)

    a = _load_row_roots(rows, in_rows, columns, mask, matrix, variant)
    denominator = a * columns.roots[None, :]
    if flags.lagged:
        smallest = tl.abs(g) * step.floor
        # not tl.maximum, which may drop a NaN
        denominator = tl.where(denominator < smallest, smallest, denominator)

    low = rows.to(tl.uint32)[:, None] * matrix.whole_stride.to(tl.uint32)
    low += columns.index.to(tl.uint32)[None, :]
    low += matrix.whole_start.to(tl.uint32)
    if variant.large:
        whole_row = matrix.whole_start + rows.to(tl.int64)[:, None] * matrix.whole_stride
        high = ((whole_row + columns.index[None, :]) >> 32).to(tl.uint32)
    else:
        high = tl.zeros([1, 1], tl.uint32)
    denominator += step.eps
    value = value * step.decay - _scaled_direction(m, g, step, flags) / denominator
    value = _round_parameter(value, low, high, step.key, flags, variant.param_dtype)
    tl.store(matrix.param + offsets, value, mask=mask)
    return m, g * g


@triton.jit
def _fold(squares, HEIGHT: tl.constexpr):  # [r, c] -> [HEIGHT, c]
    """Adds up rows HEIGHT apart: one thread has them all, and keeps one sum of them."""
    rows: tl.constexpr = squares.shape[0]
    columns: tl.constexpr = squares.shape[1]
    return tl.sum(tl.reshape(squares, [rows // HEIGHT, HEIGHT, columns]), axis=0)


@triton.jit
def matrices_kernel(
    tiles,  # [programs, 3] int32: entry, first row, first column
    buffers,  # ``Buffers``
    one_minus_beta1,
    eps,
    variant,  # ``MatrixVariant``
    flags,  # ``UpdateFlags``
    TILE_ROWS: tl.constexpr,
):
    """Updates momentum and parameter in some rows of one quantization block of columns.

    With ``fused_statistics`` it also leaves the partial sums that ``statistics_kernel`` would, so
    that the step reads the gradient from memory once.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    entry = tl.load(tile).to(tl.int64)
    first_row = tl.load(tile + 1)
    first_column = tl.multiple_of(tl.load(tile + 2), 128)
    shape = buffers.shapes + entry * SHAPES
    matrix_rows = tl.load(shape + MATRIX_ROWS).to(tl.int32)
    columns = tl.load(shape + COLUMNS)
    block_rows = tl.load(shape + BLOCK_ROWS).to(tl.int32)
    block_columns = tl.load(shape + BLOCK_COLUMNS).to(tl.int32)
    column_blocks = tl.load(shape + COLUMN_BLOCKS).to(tl.int32)
    whole_start = tl.load(shape + WHOLE_START)
    whole_stride = tl.load(shape + WHOLE_STRIDE)
    row_roots = buffers.sums + tl.load(shape + ROW_SUMS)
    column_roots = buffers.sums + tl.load(shape + COLUMN_SUMS)
    inverse_rms = buffers.inverse_rms + tl.load(shape + FIRST_BLOCK)
    pointers = buffers.pointers + entry * POINTERS
    param = _load_aligned_pointer(pointers, PARAM_POINTER, variant.param_dtype, variant.aligned)
    grad = _load_aligned_pointer(pointers, GRAD_POINTER, variant.grad_dtype, variant.aligned)
    exp_avg = _load_aligned_pointer(
        pointers, EXP_AVG_POINTER, variant.momentum_dtype, variant.aligned
    )
    scales = _load_pointer(pointers, EXP_AVG_SCALE_POINTER, tl.float32)
    step = _load_step_numbers(buffers.scalars + entry * SCALARS, one_minus_beta1, eps, flags.lagged)

    # two 4-bit codes share a byte: the two halves of a quantization block are two tiles
    size = tl.minimum(columns - first_column, _BLOCK_SIZE).to(tl.int32)
    code_columns = columns
    if variant.qmax == 7:
        code_columns = (columns + 1) // 2
        low_size = (size + 1) // 2
    else:
        low_size = size
    if variant.aligned:
        columns = tl.multiple_of(columns, 16)
        code_columns = tl.multiple_of(code_columns, 8)
        size = tl.multiple_of(size, 16)
        low_size = tl.multiple_of(low_size, 8)
    WIDTH: tl.constexpr = _BLOCK_SIZE // 2 if variant.qmax == 7 else _BLOCK_SIZE
    lanes = tl.arange(0, WIDTH)
    if variant.qmax == 7:
        code_index = first_column // 2 + lanes
    else:
        code_index = first_column + lanes

    row_block = first_row // block_rows
    updated_rows = UPDATED_ROWS
    rows_of_all = 0
    if variant.fused_statistics:
        updated_rows = tl.load(shape + SUMMED_ROWS).to(tl.int32)
        rows_of_all = tl.load(shape + ROWS)
    region = Region(
        first_row=first_row,
        first_column=first_column,
        rows=rows_of_all,
        matrix_rows=matrix_rows,
        columns=columns,
        block_rows=block_rows,
        block_columns=block_columns,
        summed_rows=updated_rows,
    )
    if variant.fused_statistics:
        row_partials, column_partials = _partial_sums(buffers.partials, shape, region, _BLOCK_SIZE)
        # 128 threads, four columns each, have HEIGHT rows at a time
        HEIGHT: tl.constexpr = 512 // WIDTH
        column_sums = tl.zeros([HEIGHT, WIDTH], tl.float32)
        high_column_sums = column_sums
    end_row = tl.minimum(first_row + updated_rows, (row_block + 1) * block_rows)
    column_roots += row_block * columns
    inverse_rms += row_block.to(tl.int64) * column_blocks
    block = first_column // block_columns
    low = _load_columns(
        first_column + lanes,
        lanes < low_size,
        column_roots,
        inverse_rms,
        block,
        block_columns,
        variant.narrow,
    )
    if variant.qmax == 7:
        high = _load_columns(
            first_column + low_size + lanes,
            lanes < size - low_size,
            column_roots,
            inverse_rms,
            block,
            block_columns,
            variant.narrow,
        )
    matrix = Matrix(
        param=param,
        grad=grad,
        region=region,
        row_roots=row_roots,
        column_blocks=column_blocks,
        block=block,
        next_inverse_rms=tl.load(inverse_rms + tl.minimum(block + 1, column_blocks - 1)),
        whole_start=whole_start,
        whole_stride=whole_stride,
    )
    scale_columns = (columns + _BLOCK_SIZE - 1) // _BLOCK_SIZE
    scales += first_column // _BLOCK_SIZE

    for row in range(first_row, end_row, TILE_ROWS):
        rows = row + tl.arange(0, TILE_ROWS)
        in_rows = rows < end_row
        mask = in_rows[:, None] & low.inside[None, :]
        code_offsets = rows.to(tl.int64)[:, None] * code_columns + code_index[None, :]
        stored = tl.load(exp_avg + code_offsets, mask=mask, other=0)
        if variant.qmax == 0:
            m = stored.to(tl.float32)
        else:
            scale_offsets = rows.to(tl.int64) * scale_columns
            scale = tl.load(scales + scale_offsets, mask=in_rows, other=0.0)
            if variant.qmax == 7:
                both = stored.to(tl.int32)
                m = decode((both & 15) - 8, scale, variant.qmax)
                high_mask = in_rows[:, None] & high.inside[None, :]
                high_m = tl.where(high_mask, decode((both >> 4) - 8, scale, variant.qmax), 0.0)
                m = tl.where(mask, m, 0.0)
            else:
                m = decode(stored.to(tl.int32), scale, variant.qmax)
        m, squares = _update_tile(m, rows, in_rows, low, matrix, step, variant, flags)
        if variant.fused_statistics:
            column_sums += _fold(squares, HEIGHT)
            row_sums = tl.sum(squares, axis=1)
        if variant.qmax == 0:
            new = round_to_nearest(m, variant.momentum_dtype)
            tl.store(exp_avg + code_offsets, new, mask=mask)
        else:
            largest = largest_magnitude(m)
            if variant.qmax == 7:
                high_m, squares = _update_tile(
                    high_m, rows, in_rows, high, matrix, step, variant, flags
                )
                if variant.fused_statistics:
                    high_column_sums += _fold(squares, HEIGHT)
                    row_sums += tl.sum(squares, axis=1)
                largest = tl.maximum(largest, largest_magnitude(high_m))
            scale = largest.to(tl.float32, bitcast=True)
            codes = encode(m, scale, variant.qmax)
            if variant.qmax == 7:
                # the last byte of an odd block has nothing in its high half, stored as 0
                high_codes = tl.where(high_mask, encode(high_m, scale, variant.qmax) + 8, 0)
                codes = (codes + 8) | (high_codes << 4)
            tl.store(exp_avg + code_offsets, codes.to(variant.momentum_dtype), mask=mask)
            tl.store(scales + scale_offsets, scale, mask=in_rows)
        if variant.fused_statistics:
            tl.store(row_partials + rows, row_sums, mask=in_rows)

    if variant.fused_statistics:
        tl.store(column_partials + low.index, tl.sum(column_sums, axis=0), mask=low.inside)
        if variant.qmax == 7:
            high_sums = tl.sum(high_column_sums, axis=0)
            tl.store(column_partials + high.index, high_sums, mask=high.inside)


# ---------------------------------------------------------------------------------------------
# the update of vectors
# ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["step"])
def vectors_kernel(
    tiles,  # [programs, 2] int32: entry, number of the tile
    buffers,  # ``Buffers``
    hyper,  # ``Hyperparameters``
    step,
    on_device,  # ``OnDevice``
    variant,  # ``VectorVariant``
    flags,  # ``UpdateFlags``
    BLOCK: tl.constexpr,
):
    """AdamW's step for BLOCK elements of a 0-D or 1-D parameter."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    entry = tl.load(tile).to(tl.int64)
    start = tl.load(tile + 1).to(tl.int64) * BLOCK
    size = tl.load(buffers.shapes + entry * SHAPES + COLUMNS)
    whole_start = tl.load(buffers.shapes + entry * SHAPES + WHOLE_START)
    pointers = buffers.pointers + entry * POINTERS
    param = _load_aligned_pointer(pointers, PARAM_POINTER, variant.param_dtype, variant.aligned)
    grad = _load_aligned_pointer(pointers, GRAD_POINTER, variant.grad_dtype, variant.aligned)
    exp_avg = _load_aligned_pointer(pointers, EXP_AVG_POINTER, tl.float32, variant.aligned)
    exp_avg_sq = _load_aligned_pointer(pointers, EXP_AVG_SQ_POINTER, tl.float32, variant.aligned)
    if variant.aligned:
        size = tl.multiple_of(size, 16)
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < size
    g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(param + offsets, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + offsets, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq + offsets, mask=mask, other=0.0)
    if flags.maximize:
        g = -g
    m = _lerp(m, g, hyper.one_minus_beta1)
    v = v * hyper.beta2 + hyper.one_minus_beta2 * g * g
    tl.store(exp_avg + offsets, m, mask=mask)
    tl.store(exp_avg_sq + offsets, v, mask=mask)

    current = _load_step(pointers, step, on_device.step)
    decay, step_size = _decay_and_step_size(current, hyper, on_device)
    correction = tl.sqrt_rn(_bias_correction(current, hyper.log_beta2).to(tl.float32))
    denominator = tl.div_rn(tl.sqrt_rn(v), correction) + hyper.eps
    numbers = Step(
        decay=decay,
        size=step_size,
        key=step_key(current),
        floor=0.0,
        one_minus_beta1=hyper.one_minus_beta1,
        eps=hyper.eps,
    )
    update = tl.div_rn(_scaled_direction(m, g, numbers, flags), denominator)
    value = value * decay - update
    low, high = (whole_start + offsets).to(tl.uint32), ((whole_start + offsets) >> 32).to(tl.uint32)
    value = _round_parameter(value, low, high, numbers.key, flags, variant.param_dtype)
    tl.store(param + offsets, value, mask=mask)
