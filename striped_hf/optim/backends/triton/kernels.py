"""The kernels of the Triton backend; ``launch.py`` launches them, and says how.

Arithmetic is float32. The update's division and the roots of the codes are the fast ones, good to
2 units in the last place; what enters many elements (stripes, their roots, bias corrections) and
the step of 0-D and 1-D parameters, which is AdamW's, is correctly rounded.

Importing it raises ImportError where no kernel can run. With TRITON_INTERPRET=1 the kernels are
interpreted, on tensors of the CPU: for tests only.
"""

import os

import torch

from striped_hf.optim import momentum, rounding

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("triton is not installed") from error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    raise ImportError("there is no CUDA device")

# ---------------------------------------------------------------------------------------------
# layouts that the host writes and the kernels read
# ---------------------------------------------------------------------------------------------

# a row of the table of pointers, int64
PARAM_POINTER = tl.constexpr(0)
GRAD_POINTER = tl.constexpr(1)
EXP_AVG_POINTER = tl.constexpr(2)
SCALE_POINTER = tl.constexpr(3)
ROW_POINTER = tl.constexpr(4)
COL_POINTER = tl.constexpr(5)
EXP_AVG_SQ_POINTER = tl.constexpr(6)
STEP_POINTER = tl.constexpr(7)  # pointer to the step, or how far it is from the first entry's
POINTERS = tl.constexpr(8)

# a row of the table of shapes, int64; all matrices of a parameter lie one below another
ROWS = tl.constexpr(0)  # of all its matrices together
MATRIX_ROWS = tl.constexpr(1)
COLUMNS = tl.constexpr(2)
BLOCK_HEIGHT = tl.constexpr(3)  # of a block
BLOCK_WIDTH = tl.constexpr(4)
COL_BLOCKS = tl.constexpr(5)
STRIP = tl.constexpr(6)  # rows whose squares one program adds up
ROW_PARTIALS = tl.constexpr(7)  # offsets into the buffers
COL_PARTIALS = tl.constexpr(8)
ROW_SUMS = tl.constexpr(9)
COL_SUMS = tl.constexpr(10)
CELLS = tl.constexpr(11)  # a cell is a block of a matrix: where its 1 / sqrt(mean(row)) stands
START = tl.constexpr(12)  # place in the whole parameter: of the first element, of a row
PITCH = tl.constexpr(13)
SHAPES = tl.constexpr(14)

# what all elements of an entry share, int32 (bits of a float32 in all but the key)
DECAY = tl.constexpr(0)
STEP_SIZE = tl.constexpr(1)
KEY = tl.constexpr(2)
OWN_SHARE = tl.constexpr(3)  # of a gradient in the root of its own second moment; 0 at step 1
SCALARS = tl.constexpr(4)

_BLOCK_SIZE = tl.constexpr(momentum.BLOCK_SIZE)
_SEED = tl.constexpr(rounding.SEED)
_FLOAT16_MIN_NORMAL = tl.constexpr(2.0**-14)
_TRUNCATES = tl.constexpr(INTERPRETED)  # the interpreter's cast to bfloat16 does not round
# 1.5 * 2^23: added to a number below 2^22 it rounds to an integer, half to even, in the low bits
_TO_INTEGER = tl.constexpr(12582912.0)

# Tile sizes. A warp reads a row of 128 columns with four elements a lane, 16 bytes in float32: the
# same four in every tensor of the update, whatever its dtype, so that no layout is converted. Each
# thread then has 16 (update) or 32 (statistics) elements of every tensor on their way from memory,
# and four warps a program leave registers for some 20 warps a multiprocessor: more bytes in flight
# than it takes to hide the latency of HBM.
STATISTICS_ROWS, STATISTICS_COLUMNS = 16, 256
UPDATE_ROWS = tl.constexpr(16)
# Rows that one program of the update walks down: reading its tables and its part of the column
# stripe costs less than a hundredth of that, and GPT-2 124M is still 15 tiles per running program.
UPDATE_STRIP = tl.constexpr(64)
# Rows whose squares one program adds up. Partial sums take 4 / strip bytes per element, so that
# large models get the larger one; small ones need enough programs.
STRIP_ROWS, LARGE_STRIP_ROWS, LARGE_MODEL = 128, 256, 1 << 29
COMBINE_PARTIALS, COMBINE_WIDTH = 32, 64
# A cell's rows are one program's work: 50,257 of them are 13 iterations.
STRIPE_BLOCK = 4096
VECTOR_BLOCK = tl.constexpr(1024)


# ---------------------------------------------------------------------------------------------
# kernels
# ---------------------------------------------------------------------------------------------


@triton.jit
def _offsets(
    rows, cols, first_row, matrix_rows, columns, TRANSPOSED: tl.constexpr
):  # [r], [c] -> [r, c] int64
    """Where the elements lie, of a contiguous tensor or one whose matrices are transposed."""
    if TRANSPOSED:
        above = first_row // matrix_rows * matrix_rows  # a program's rows are of one matrix
        inner = (rows - above).to(tl.int64)[:, None] + cols.to(tl.int64)[None, :] * matrix_rows
        offsets = inner + above.to(tl.int64) * columns
    else:
        offsets = rows.to(tl.int64)[:, None] * columns + cols[None, :]
    return offsets


@triton.jit
def _mix(x):  # uint32
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _random_bits(low, high, key):  # uint32
    """``rounding.random_bits`` of element 2^32 high + low, where key is mix(SEED ^ step)."""
    return _mix(_mix(low ^ _mix(key ^ high)))


@triton.jit
def _step_key(step):  # int32
    return _mix(step.to(tl.uint32) ^ _SEED)


@triton.jit
def _truncate_after_adding(values, bits, MASK: tl.constexpr):
    summed = values.to(tl.uint32, bitcast=True) + (bits & MASK)
    return (summed & (0xFFFFFFFF - MASK)).to(tl.float32, bitcast=True)


@triton.jit
def _stochastic_round(values, bits, DTYPE: tl.constexpr):
    """``rounding.stochastic_round``."""
    if DTYPE == tl.bfloat16:
        rounded = _truncate_after_adding(values, bits, 0xFFFF)
    else:
        rounded = _truncate_after_adding(values, bits, 0x1FFF)
        offset = _truncate_after_adding(tl.abs(values) + _FLOAT16_MIN_NORMAL, bits, 0x1FFF)
        magnitude = (offset - _FLOAT16_MIN_NORMAL).to(tl.uint32, bitcast=True)
        sign = values.to(tl.uint32, bitcast=True) & 0x80000000
        subnormal = (magnitude | sign).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(values) < _FLOAT16_MIN_NORMAL, subnormal, rounded)
    return tl.where(tl.abs(values) < float("inf"), rounded, values).to(DTYPE)


@triton.jit
def _nearest(values, DTYPE: tl.constexpr):
    if _TRUNCATES and DTYPE == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        values = tl.where(values == values, rounded, values)
    return values.to(DTYPE)


@triton.jit
def _lerp(start, end, weight):
    """torch.lerp, which takes the nearer end so that weights of 0 and 1 are exact."""
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - difference * (1 - weight))


@triton.jit
def _step_of(pointers, step, CAPTURABLE: tl.constexpr):  # int32
    if CAPTURABLE:
        current = tl.load(tl.load(pointers + STEP_POINTER).to(tl.pointer_type(tl.float32))).to(
            tl.int32
        )
    else:
        current = (tl.load(pointers + STEP_POINTER) + step).to(tl.int32)
    return current


@triton.jit
def _rate(lr, LR_IN_MEMORY: tl.constexpr):  # float64
    if LR_IN_MEMORY:
        rate = tl.load(lr).to(tl.float64)
    else:
        rate = tl.cast(lr, tl.float64)
    return rate


@triton.jit
def _bias_correction(step, log_beta):  # float64
    """1 - beta^step. The logarithm is float32: its rounding moves the result by 1e-7 of itself."""
    return 1.0 - tl.exp(step.to(tl.float64) * tl.cast(log_beta, tl.float64))


@triton.jit
def _partials(
    partials,
    shape,
    first_row,
    first_col,
    total_rows,
    columns,
    height,
    width,
    strip,
    TILE_COLUMNS: tl.constexpr,
):
    """Where a program's partial sums go: of rows [tiles, rows], of columns [strips, columns]."""
    row_block = first_row // height
    col_block = first_col // width
    strips = (height + strip - 1) // strip
    strip_index = row_block * strips + (first_row - row_block * height) // strip
    per_block = (width + TILE_COLUMNS - 1) // TILE_COLUMNS
    tile_index = col_block * per_block + (first_col - col_block * width) // TILE_COLUMNS
    row_partials = partials + tl.load(shape + ROW_PARTIALS) + tile_index * total_rows
    col_partials = partials + tl.load(shape + COL_PARTIALS) + strip_index * columns
    return row_partials, col_partials


@triton.jit(do_not_specialize=["step"])
def statistics_kernel(
    tiles,  # [programs, 3] int32: entry, first row, first column
    pointers,
    shapes,
    partials,
    step,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ONE_PASS: tl.constexpr,  # after its first step the update adds up an entry's squares
    CAPTURABLE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Adds up the squares of a strip of rows, at most TILE_COLUMNS wide and of one block."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    entry = tl.load(tile).to(tl.int64)
    if ONE_PASS:
        current = _step_of(pointers + entry * POINTERS, step, CAPTURABLE)
        if current > 1:
            return
    first_row = tl.load(tile + 1)
    first_col = tl.load(tile + 2)
    shape = shapes + entry * SHAPES
    total_rows = tl.load(shape + ROWS)
    matrix_rows = tl.load(shape + MATRIX_ROWS).to(tl.int32)
    columns = tl.load(shape + COLUMNS)
    height = tl.load(shape + BLOCK_HEIGHT).to(tl.int32)
    width = tl.load(shape + BLOCK_WIDTH).to(tl.int32)
    strip = tl.load(shape + STRIP).to(tl.int32)
    grad = tl.load(pointers + entry * POINTERS + GRAD_POINTER).to(tl.pointer_type(GRAD))
    if ALIGNED:
        grad = tl.multiple_of(grad, 16)
        columns = tl.multiple_of(columns, 16)
        width = tl.multiple_of(width, 16)
        first_col = tl.multiple_of(first_col, 16)

    end_row = tl.minimum(first_row + strip, (first_row // height + 1) * height)
    end_col = (first_col // width + 1) * width
    row_partials, col_partials = _partials(
        partials,
        shape,
        first_row,
        first_col,
        total_rows,
        columns,
        height,
        width,
        strip,
        TILE_COLUMNS,
    )

    cols = first_col + tl.arange(0, TILE_COLUMNS)
    in_cols = cols < end_col
    col_sums = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for row in range(first_row, end_row, TILE_ROWS):
        rows = row + tl.arange(0, TILE_ROWS)
        in_rows = rows < end_row
        offsets = _offsets(rows, cols, first_row, matrix_rows, columns, TRANSPOSED)
        mask = in_rows[:, None] & in_cols[None, :]
        g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        squares = g * g
        tl.store(row_partials + rows, tl.sum(squares, axis=1), mask=in_rows)
        col_sums += squares
    tl.store(col_partials + cols, tl.sum(col_sums, axis=0), mask=in_cols)


@triton.jit
def combine_kernel(
    jobs,  # [programs, 6] int64: first partial, how many, their distance, sums, first sum, distance
    partials,
    sums,
    PARTIALS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds up partial sums, always in the same order."""
    job = jobs + tl.program_id(0).to(tl.int64) * 6
    source = partials + tl.load(job)
    count = tl.load(job + 1).to(tl.int32)
    stride = tl.load(job + 2)
    size = tl.load(job + 3).to(tl.int32)
    target = sums + tl.load(job + 4)
    target_stride = tl.load(job + 5)
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
    segments,  # [programs, 7] int64: entry, is column, first, distance, size, averaged, cell
    pointers,
    shapes,
    sums,
    cells,
    scalars,
    lr,
    step,
    log_beta1,
    log_beta2,
    beta2,
    one_minus_beta2,
    weight_decay,
    LR_IN_MEMORY: tl.constexpr,
    CAPTURABLE: tl.constexpr,
    LAGGED: tl.constexpr,  # after the first step the roots are those of the step before
    ONE_PASS: tl.constexpr,  # after the first step the sums are there after the update only
    ROOTS: tl.constexpr,  # the update is still to come
    HAS_ROOTS: tl.constexpr,  # roots are in the sums' place, with 1 / sqrt(mean(row)) in them
    BLOCK: tl.constexpr,
):
    """Averages sums into a part of a stripe, and leaves the roots that the update needs.

    A part of a row stripe is all rows of one cell, so that their mean can be taken. The roots are
    sqrt(row) and sqrt(col / (1 - b2^t)), in the sums' place, and 1 / sqrt(mean(row)).

    What is stepped in one pass is launched twice: before the update for its roots, which leave
    their place to the sums in the update, and after it to average them.
    """
    segment = segments + tl.program_id(0).to(tl.int64) * 7
    entry = tl.load(segment)
    is_column = tl.load(segment + 1) != 0
    start = tl.load(segment + 2)
    stride = tl.load(segment + 3)
    size = tl.load(segment + 4).to(tl.int32)
    averaged = tl.load(segment + 5).to(tl.float32)
    cell = tl.load(segment + 6)
    shape = shapes + entry * SHAPES
    pointer = pointers + entry * POINTERS
    first_cell = tl.load(shape + CELLS)
    buffered = start + tl.where(is_column, tl.load(shape + COL_SUMS), tl.load(shape + ROW_SUMS))
    address = tl.where(is_column, tl.load(pointer + COL_POINTER), tl.load(pointer + ROW_POINTER))
    stripe = address.to(tl.pointer_type(tl.float32)) + start

    current = _step_of(pointer, step, CAPTURABLE)
    first_step = current <= 1
    summed = size  # how many sums are there
    if ONE_PASS:
        if ROOTS:
            summed = tl.where(first_step, size, 0)
        else:
            summed = tl.where(first_step, 0, size)
    corrected = current
    if LAGGED:
        corrected = tl.maximum(current - 1, 1)
    bias_correction2 = _bias_correction(corrected, log_beta2).to(tl.float32)
    correction = tl.div_rn(1.0, tl.sqrt_rn(tl.where(is_column, bias_correction2, 1.0)))
    weight = tl.div_rn(one_minus_beta2, averaged)
    total = tl.zeros([BLOCK], tl.float32)
    if not HAS_ROOTS:
        for first in range(0, size, BLOCK):
            lanes = first + tl.arange(0, BLOCK)
            inside = lanes < size
            offsets = lanes.to(tl.int64) * stride
            has_sum = lanes < summed
            before = tl.load(stripe + offsets, mask=inside, other=0.0)
            value = beta2 * before
            value += weight * tl.load(sums + buffered + offsets, mask=has_sum, other=0.0)
            tl.store(stripe + offsets, value, mask=has_sum)
            if ROOTS:
                if LAGGED:
                    value = tl.where(first_step, value, before)
                root = tl.sqrt_rn(value) * correction
                tl.store(sums + buffered + offsets, root, mask=inside)
                total += value

    if ROOTS:
        of_rows = is_column == 0
        if of_rows:
            mean = tl.div_rn(tl.sum(total, axis=0), size.to(tl.float32))
            inverse = tl.div_rn(1.0, tl.sqrt_rn(mean))
            # 0/0 is an all-zero gradient, which moves nothing; an Inf must be as loud as AdamW's
            inverse = tl.where(
                mean == 0.0, 0.0, tl.where(mean == float("inf"), float("nan"), inverse)
            )
            if HAS_ROOTS:
                inverse = 1.0
            tl.store(cells + cell, inverse)
            if cell == first_cell:
                rate = _rate(lr, LR_IN_MEMORY)
                decay = (1.0 - rate * tl.cast(weight_decay, tl.float64)).to(tl.float32)
                step_size = (rate / _bias_correction(current, log_beta1)).to(tl.float32)
                shared = scalars + entry * SCALARS
                tl.store(shared + DECAY, decay.to(tl.int32, bitcast=True))
                tl.store(shared + STEP_SIZE, step_size.to(tl.int32, bitcast=True))
                tl.store(shared + KEY, _step_key(current).to(tl.int32, bitcast=True))
                if LAGGED:
                    own = _bias_correction(current, log_beta2).to(tl.float32)
                    own_share = tl.sqrt_rn(tl.div_rn(one_minus_beta2, own))
                    own_share = tl.where(first_step, 0.0, own_share)
                    tl.store(shared + OWN_SHARE, own_share.to(tl.int32, bitcast=True))


@triton.jit
def _move(
    param,
    value,
    g,
    m,
    denominator,
    offsets,
    mask,
    low,
    high,
    decay,
    step_size,
    key,
    one_minus_beta1,
    eps,
    PARAM: tl.constexpr,
    NESTEROV: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Decays and moves a tile of a parameter, given this step's momentum, and stores it."""
    if NESTEROV:
        m = _lerp(m, g, one_minus_beta1)
    denominator += eps
    if EXACT:
        update = tl.div_rn(step_size * m, denominator)
    else:
        update = step_size * m / denominator
    value = value * decay - update
    if STOCHASTIC:
        rounded = _stochastic_round(value, _random_bits(low, high, key), PARAM)
    else:
        rounded = _nearest(value, PARAM)
    tl.store(param + offsets, rounded, mask=mask)


@triton.jit
def _update_tile(
    param,
    grad,
    m,
    rows,
    in_rows,
    cols,
    mask,
    first_row,
    matrix_rows,
    columns,
    row_roots,
    col_blocks,
    width,
    first_block,
    inverse,
    next_inverse,
    c,
    whole_start,
    pitch,
    decay,
    step_size,
    key,
    own_share,
    one_minus_beta1,
    eps,
    PARAM: tl.constexpr,
    NARROW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LARGE: tl.constexpr,
    LAGGED: tl.constexpr,
    SUMS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    NESTEROV: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Moves a tile of a matrix; returns its new momentum and the squares of its gradient.

    ``m`` is 0 where ``mask`` is not set.
    """
    offsets = _offsets(rows, cols, first_row, matrix_rows, columns, TRANSPOSED)
    g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(param + offsets, mask=mask, other=0.0).to(tl.float32)
    if MAXIMIZE:
        g = -g
    m = _lerp(m, g, one_minus_beta1)

    row_of_roots = row_roots + rows.to(tl.int64) * col_blocks
    if SUMS:  # of one block
        a = tl.load(row_of_roots + first_block, mask=in_rows, other=0.0) * inverse
        a = a[:, None]
    elif NARROW:
        block = cols // width
        a = tl.load(row_of_roots[:, None] + block[None, :], mask=mask, other=0.0) * inverse[None, :]
    else:
        # a tile is no wider than a block, so that it has columns of two at most
        next_block = tl.minimum(first_block + 1, col_blocks - 1)
        a = tl.load(row_of_roots + first_block, mask=in_rows, other=0.0) * inverse
        next_a = tl.load(row_of_roots + next_block, mask=in_rows, other=0.0) * next_inverse
        in_first = cols < (first_block + 1) * width
        a = tl.where(in_first[None, :], a[:, None], next_a[:, None])

    denominator = a * c[None, :]
    if LAGGED:
        own = tl.abs(g) * own_share
        # not tl.maximum, which may drop a NaN
        denominator = tl.where(denominator < own, own, denominator)

    low = rows.to(tl.uint32)[:, None] * pitch.to(tl.uint32) + cols.to(tl.uint32)[None, :]
    low += whole_start.to(tl.uint32)
    if LARGE:
        index = whole_start + rows.to(tl.int64)[:, None] * pitch + cols[None, :]
        high = (index >> 32).to(tl.uint32)
    else:
        high = tl.zeros([1, 1], tl.uint32)
    _move(
        param,
        value,
        g,
        m,
        denominator,
        offsets,
        mask,
        low,
        high,
        decay,
        step_size,
        key,
        one_minus_beta1,
        eps,
        PARAM,
        NESTEROV,
        STOCHASTIC,
        False,
    )
    return m, g * g


@triton.jit
def _decode(codes, scale, QMAX: tl.constexpr):  # [r, c] int32, [r] float32 -> [r, c] float32
    values = codes.to(tl.float32)
    return values * tl.abs(values) * (1.0 / (QMAX * QMAX)) * scale[:, None]


@triton.jit
def _largest(m):  # [r, c] float32 -> [r] int32
    """Bits of the largest magnitude of a row. As integers, NaN is the largest of all."""
    return tl.max(tl.abs(m).to(tl.int32, bitcast=True), axis=1)


@triton.jit
def _encode(m, scale, QMAX: tl.constexpr):  # [r, c] float32, [r] float32 -> [r, c] int32
    # sqrt(x) / sqrt(scale), not sqrt(x / scale): one division for a row
    factor = tl.div_rn(QMAX * 1.0, tl.sqrt_rn(scale))
    magnitude = tl.sqrt(tl.abs(m)) * factor[:, None] + _TO_INTEGER
    codes = magnitude.to(tl.int32, bitcast=True) & 0xFF
    coded = (scale > 0.0) & (scale < float("inf"))
    codes = tl.where(coded[:, None], codes, 0)
    return tl.where(m < 0.0, -codes, codes)


@triton.jit
def _fold(squares, HEIGHT: tl.constexpr):  # [r, c] -> [HEIGHT, c]
    """Adds up rows HEIGHT apart: those that one thread has, so that it keeps one sum of them."""
    rows: tl.constexpr = squares.shape[0]
    columns: tl.constexpr = squares.shape[1]
    return tl.sum(tl.reshape(squares, [rows // HEIGHT, HEIGHT, columns]), axis=0)


@triton.jit
def matrices_kernel(
    tiles,  # [programs, 3] int32: entry, first row, first column
    pointers,
    shapes,
    roots,
    cells,
    scalars,
    partials,
    one_minus_beta1,
    eps,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTUM: tl.constexpr,
    QMAX: tl.constexpr,  # 0 where the momentum is not coded
    ALIGNED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    NARROW: tl.constexpr,  # blocks of columns are narrower than a tile
    LARGE: tl.constexpr,  # more than 2^32 elements
    LAGGED: tl.constexpr,
    SUMS: tl.constexpr,  # add up squares too: no tile has columns of two blocks
    MAXIMIZE: tl.constexpr,
    NESTEROV: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Updates momentum and parameter in a strip of rows, as wide as a block of codes.

    With SUMS it leaves what the statistics do, so that they need not read the gradient as well.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    entry = tl.load(tile).to(tl.int64)
    first_row = tl.load(tile + 1)
    first_col = tl.multiple_of(tl.load(tile + 2), 128)
    shape = shapes + entry * SHAPES
    matrix_rows = tl.load(shape + MATRIX_ROWS).to(tl.int32)
    columns = tl.load(shape + COLUMNS)
    height = tl.load(shape + BLOCK_HEIGHT).to(tl.int32)
    width = tl.load(shape + BLOCK_WIDTH).to(tl.int32)
    col_blocks = tl.load(shape + COL_BLOCKS).to(tl.int32)
    whole_start = tl.load(shape + START)
    pitch = tl.load(shape + PITCH)
    row_roots = roots + tl.load(shape + ROW_SUMS)
    col_roots = roots + tl.load(shape + COL_SUMS)
    cells += tl.load(shape + CELLS)
    pointer = pointers + entry * POINTERS
    param = tl.load(pointer + PARAM_POINTER).to(tl.pointer_type(PARAM))
    grad = tl.load(pointer + GRAD_POINTER).to(tl.pointer_type(GRAD))
    exp_avg = tl.load(pointer + EXP_AVG_POINTER).to(tl.pointer_type(MOMENTUM))
    scales = tl.load(pointer + SCALE_POINTER).to(tl.pointer_type(tl.float32))
    shared = scalars + entry * SCALARS
    decay = tl.load(shared + DECAY).to(tl.float32, bitcast=True)
    step_size = tl.load(shared + STEP_SIZE).to(tl.float32, bitcast=True)
    key = tl.load(shared + KEY).to(tl.uint32, bitcast=True)
    own_share = 0.0
    if LAGGED:
        own_share = tl.load(shared + OWN_SHARE).to(tl.float32, bitcast=True)

    size = tl.minimum(columns - first_col, _BLOCK_SIZE).to(tl.int32)
    code_columns = columns
    if QMAX == 7:
        # the two halves of a block, whose codes share bytes, are two tiles
        code_columns = (columns + 1) // 2
        low_size = (size + 1) // 2
    else:
        low_size = size
    if ALIGNED:
        # four elements of every tensor: alike in all, or Triton would convert between layouts
        param = tl.multiple_of(param, PARAM.primitive_bitwidth // 2)
        grad = tl.multiple_of(grad, GRAD.primitive_bitwidth // 2)
        exp_avg = tl.multiple_of(exp_avg, MOMENTUM.primitive_bitwidth // 2)
        columns = tl.multiple_of(columns, 16)
        code_columns = tl.multiple_of(code_columns, 8)
        size = tl.multiple_of(size, 16)
        low_size = tl.multiple_of(low_size, 8)
    WIDTH: tl.constexpr = _BLOCK_SIZE // 2 if QMAX == 7 else _BLOCK_SIZE
    lanes = tl.arange(0, WIDTH)
    if QMAX == 7:
        code_cols = first_col // 2 + lanes
    else:
        code_cols = first_col + lanes
    cols = first_col + lanes
    in_cols = lanes < low_size
    high_cols = first_col + low_size + lanes
    in_high_cols = lanes < size - low_size

    row_block = first_row // height
    strip = UPDATE_STRIP
    if SUMS:
        strip = tl.load(shape + STRIP).to(tl.int32)
        total_rows = tl.load(shape + ROWS)
        row_partials, col_partials = _partials(
            partials,
            shape,
            first_row,
            first_col,
            total_rows,
            columns,
            height,
            width,
            strip,
            _BLOCK_SIZE,
        )
        # a step of 128 threads down the rows, four elements each
        HEIGHT: tl.constexpr = 512 // WIDTH
        col_sums = tl.zeros([HEIGHT, WIDTH], tl.float32)
        high_col_sums = col_sums
    end_row = tl.minimum(first_row + strip, (row_block + 1) * height)
    col_roots += row_block * columns
    c = tl.load(col_roots + cols, mask=in_cols, other=0.0)
    cells += row_block.to(tl.int64) * col_blocks
    first_block = first_col // width
    if NARROW:
        inverse = tl.load(cells + cols // width, mask=in_cols, other=0.0)
        next_inverse = inverse
    else:
        inverse = tl.load(cells + first_block)
        next_inverse = tl.load(cells + tl.minimum(first_block + 1, col_blocks - 1))
    if QMAX == 7:
        high_c = tl.load(col_roots + high_cols, mask=in_high_cols, other=0.0)
        if NARROW:
            high_inverse = tl.load(cells + high_cols // width, mask=in_high_cols, other=0.0)
        else:
            high_inverse = inverse
    scale_columns = (columns + _BLOCK_SIZE - 1) // _BLOCK_SIZE
    scales += first_col // _BLOCK_SIZE

    for row in range(first_row, end_row, TILE_ROWS):
        rows = row + tl.arange(0, TILE_ROWS)
        in_rows = rows < end_row
        mask = in_rows[:, None] & in_cols[None, :]
        code_offsets = rows.to(tl.int64)[:, None] * code_columns + code_cols[None, :]
        stored = tl.load(exp_avg + code_offsets, mask=mask, other=0)
        if QMAX == 0:
            m = stored.to(tl.float32)
        else:
            scale_offsets = rows.to(tl.int64) * scale_columns
            scale = tl.load(scales + scale_offsets, mask=in_rows, other=0.0)
            if QMAX == 7:
                both = stored.to(tl.int32)
                m = _decode((both & 15) - 8, scale, QMAX)
                high_mask = in_rows[:, None] & in_high_cols[None, :]
                high_m = tl.where(high_mask, _decode((both >> 4) - 8, scale, QMAX), 0.0)
                m = tl.where(mask, m, 0.0)
            else:
                m = _decode(stored.to(tl.int32), scale, QMAX)
        m, squares = _update_tile(
            param,
            grad,
            m,
            rows,
            in_rows,
            cols,
            mask,
            first_row,
            matrix_rows,
            columns,
            row_roots,
            col_blocks,
            width,
            first_block,
            inverse,
            next_inverse,
            c,
            whole_start,
            pitch,
            decay,
            step_size,
            key,
            own_share,
            one_minus_beta1,
            eps,
            PARAM,
            NARROW,
            TRANSPOSED,
            LARGE,
            LAGGED,
            SUMS,
            MAXIMIZE,
            NESTEROV,
            STOCHASTIC,
        )
        if SUMS:
            col_sums += _fold(squares, HEIGHT)
            row_sums = tl.sum(squares, axis=1)
        if QMAX == 0:
            tl.store(exp_avg + code_offsets, _nearest(m, MOMENTUM), mask=mask)
        else:
            largest = _largest(m)
            if QMAX == 7:
                high_m, squares = _update_tile(
                    param,
                    grad,
                    high_m,
                    rows,
                    in_rows,
                    high_cols,
                    high_mask,
                    first_row,
                    matrix_rows,
                    columns,
                    row_roots,
                    col_blocks,
                    width,
                    first_block,
                    high_inverse,
                    next_inverse,
                    high_c,
                    whole_start,
                    pitch,
                    decay,
                    step_size,
                    key,
                    own_share,
                    one_minus_beta1,
                    eps,
                    PARAM,
                    NARROW,
                    TRANSPOSED,
                    LARGE,
                    LAGGED,
                    SUMS,
                    MAXIMIZE,
                    NESTEROV,
                    STOCHASTIC,
                )
                if SUMS:
                    high_col_sums += _fold(squares, HEIGHT)
                    row_sums += tl.sum(squares, axis=1)
                largest = tl.maximum(largest, _largest(high_m))
            scale = largest.to(tl.float32, bitcast=True)
            codes = _encode(m, scale, QMAX)
            if QMAX == 7:
                # the last byte of an odd block has nothing in its high half, stored as 0
                high_codes = tl.where(high_mask, _encode(high_m, scale, QMAX) + 8, 0)
                codes = (codes + 8) | (high_codes << 4)
            tl.store(exp_avg + code_offsets, codes.to(MOMENTUM), mask=mask)
            tl.store(scales + scale_offsets, scale, mask=in_rows)
        if SUMS:
            tl.store(row_partials + rows, row_sums, mask=in_rows)

    if SUMS:
        tl.store(col_partials + cols, tl.sum(col_sums, axis=0), mask=in_cols)
        if QMAX == 7:
            high_sums = tl.sum(high_col_sums, axis=0)
            tl.store(col_partials + high_cols, high_sums, mask=in_high_cols)


@triton.jit(do_not_specialize=["step"])
def vectors_kernel(
    tiles,  # [programs, 2] int32: entry, number of the block
    pointers,
    shapes,
    lr,
    step,
    log_beta1,
    log_beta2,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    LR_IN_MEMORY: tl.constexpr,
    CAPTURABLE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    NESTEROV: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """AdamW's step for a block of a 0-D or 1-D parameter."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    entry = tl.load(tile).to(tl.int64)
    start = tl.load(tile + 1).to(tl.int64) * BLOCK
    size = tl.load(shapes + entry * SHAPES + COLUMNS)
    whole_start = tl.load(shapes + entry * SHAPES + START)
    pointer = pointers + entry * POINTERS
    param = tl.load(pointer + PARAM_POINTER).to(tl.pointer_type(PARAM))
    grad = tl.load(pointer + GRAD_POINTER).to(tl.pointer_type(GRAD))
    exp_avg = tl.load(pointer + EXP_AVG_POINTER).to(tl.pointer_type(tl.float32))
    exp_avg_sq = tl.load(pointer + EXP_AVG_SQ_POINTER).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        param = tl.multiple_of(param, PARAM.primitive_bitwidth // 2)
        grad = tl.multiple_of(grad, GRAD.primitive_bitwidth // 2)
        exp_avg = tl.multiple_of(exp_avg, 16)
        exp_avg_sq = tl.multiple_of(exp_avg_sq, 16)
        size = tl.multiple_of(size, 16)
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < size
    g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(param + offsets, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + offsets, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq + offsets, mask=mask, other=0.0)
    if MAXIMIZE:
        g = -g
    m = _lerp(m, g, one_minus_beta1)
    v = v * beta2 + one_minus_beta2 * g * g
    tl.store(exp_avg + offsets, m, mask=mask)
    tl.store(exp_avg_sq + offsets, v, mask=mask)

    current = _step_of(pointer, step, CAPTURABLE)
    rate = _rate(lr, LR_IN_MEMORY)
    decay = (1.0 - rate * tl.cast(weight_decay, tl.float64)).to(tl.float32)
    step_size = (rate / _bias_correction(current, log_beta1)).to(tl.float32)
    correction = tl.sqrt_rn(_bias_correction(current, log_beta2).to(tl.float32))
    denominator = tl.div_rn(tl.sqrt_rn(v), correction)
    _move(
        param,
        value,
        g,
        m,
        denominator,
        offsets,
        mask,
        (whole_start + offsets).to(tl.uint32),
        ((whole_start + offsets) >> 32).to(tl.uint32),
        decay,
        step_size,
        _step_key(current),
        one_minus_beta1,
        eps,
        PARAM,
        NESTEROV,
        STOCHASTIC,
        True,
    )
