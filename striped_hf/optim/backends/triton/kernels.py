"""The kernels of the Triton backend; ``launch.py`` launches them.

The arithmetic is float32. A matrix's update uses a fast division, and its codes use fast square
roots, with errors of up to 2 units in the last place. The stripes, their roots, the bias
corrections, and the step of 0-D and 1-D parameters, which is AdamW's, are correctly rounded.
"""

import triton
import triton.language as tl

from striped_hf.optim import momentum
from striped_hf.optim.backends.triton.arguments import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    COLUMN_BLOCKS,
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
    LOW_BITS_POINTER,
    MATRIX_ROWS,
    PARAM_POINTER,
    POINTERS,
    ROW_POINTER,
    ROW_SUMS,
    ROWS,
    SCALARS,
    SHAPES,
    STEP_SIZE,
    SUMMED_ROWS,
    WHOLE_START,
    WHOLE_STRIDE,
)
from striped_hf.optim.backends.triton.codec import (
    StoredMomentum,
    join,
    load_momentum,
    split,
    step_key,
    store_momentum,
)
from striped_hf.optim.backends.triton.functions import (
    Matrix,
    Region,
    add_distant_rows,
    add_partials,
    bias_correction,
    decay_and_step_size,
    element_offsets,
    inverse_rms_of,
    lerp,
    load_aligned_pointer,
    load_columns,
    load_pointer,
    load_step,
    load_step_scalars,
    load_steps,
    momentum_floor,
    numerator_of,
    partial_sum_pointers,
    round_parameter,
    sum_squares_of_rows,
    update_tile,
)
from striped_hf.optim.backends.triton.tile_sizes import UPDATED_ROWS

_BLOCK_SIZE = tl.constexpr(momentum.BLOCK_SIZE)  # columns of a quantization block


# ---------------------------------------------------------------------------------------------
# statistics and stripes
# ---------------------------------------------------------------------------------------------


@triton.jit
def sum_squares(
    tile, buffers, variant, tuning, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr
):
    """Adds up the squares of some rows of one block, at most TILE_COLUMNS wide."""
    entry = tl.load(tile).to(tl.int64)
    pointers = buffers.pointers + entry * POINTERS
    first_row = tl.load(tile + 1)
    first_column = tl.load(tile + 2)
    shape = buffers.shapes + entry * SHAPES
    rows = tl.load(shape + ROWS)
    matrix_rows = tl.load(shape + MATRIX_ROWS).to(tl.int32)
    columns = tl.load(shape + COLUMNS)
    block_rows = tl.load(shape + BLOCK_ROWS).to(tl.int32)
    block_columns = tl.load(shape + BLOCK_COLUMNS).to(tl.int32)
    summed_rows = tl.load(shape + SUMMED_ROWS).to(tl.int32)
    # without a function: Triton before 3.9 loses the hints about a function's result
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
    if variant.fused_statistics:  # a tile of the update, cut at the borders of blocks
        end_column = tl.minimum(end_column, (first_column // TILE_COLUMNS + 1) * TILE_COLUMNS)
    row_partials, column_partials = partial_sum_pointers(
        buffers.partials, shape, region, variant.fused_statistics, TILE_COLUMNS
    )

    column_indices = first_column + tl.arange(0, TILE_COLUMNS)
    in_columns = column_indices < end_column
    column_sums = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for row in tl.range(first_row, end_row, TILE_ROWS, num_stages=tuning.stages):
        row_indices = row + tl.arange(0, TILE_ROWS)
        in_rows = row_indices < end_row
        offsets = element_offsets(row_indices, column_indices, region, variant.transposed)
        mask = in_rows[:, None] & in_columns[None, :]
        g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        squares = g * g
        tl.store(row_partials + row_indices, tl.sum(squares, axis=1), mask=in_rows)
        column_sums += squares
    tl.store(column_partials + column_indices, tl.sum(column_sums, axis=0), mask=in_columns)


@triton.jit(do_not_specialize=["step"])
def statistics_kernel(
    tiles,  # [programs, 3] int32: entry, first row, first column
    buffers,  # ``Buffers``
    step,
    variant,  # ``StatisticsVariant``
    tuning,  # ``Tuning``
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Computes the partial sums of squares of a tile of the gradient."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    if variant.fused_statistics:
        pointers = buffers.pointers + tl.load(tile).to(tl.int64) * POINTERS
        current = load_step(pointers, step, False)
        if current > 1:
            return
    sum_squares(tile, buffers, variant, tuning, TILE_ROWS, TILE_COLUMNS)


@triton.jit
def add_reduction(reduction, buffers, PARTIALS: tl.constexpr, WIDTH: tl.constexpr):
    """Adds up partial sums, always in the same order."""
    source = buffers.partials + tl.load(reduction)
    count = tl.load(reduction + 1).to(tl.int32)
    stride = tl.load(reduction + 2)
    size = tl.load(reduction + 3).to(tl.int32)
    target = buffers.sums + tl.load(reduction + 4)
    target_stride = tl.load(reduction + 5)
    lanes = tl.arange(0, WIDTH)
    inside = lanes < size
    total = add_partials(source, count, stride, lanes, inside, PARTIALS, WIDTH)
    tl.store(target + lanes * target_stride, total, mask=inside)


@triton.jit
def combine_kernel(
    reductions,  # [programs, 7] int64: rows of ``Workspace.reductions``
    buffers,  # ``Buffers``
    PARTIALS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds up the partial sums of a reduction."""
    reduction = reductions + tl.program_id(0).to(tl.int64) * 7
    add_reduction(reduction, buffers, PARTIALS, WIDTH)


# Where only the device knows whether a lagged step is an entry's first, the step has the next two
# kernels. They do their work then, and otherwise end at once: a program looks at many entries'
# steps together.


@triton.jit(do_not_specialize=["count"])
def first_statistics_kernel(
    tiles,  # [count, 3] int32: as for ``statistics_kernel``
    count,
    buffers,  # ``Buffers``
    variant,  # ``StatisticsVariant``
    tuning,  # ``Tuning``
    TILES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Computes the partial sums of squares of TILES tiles whose entries are in their first step."""
    first = tl.program_id(0) * TILES
    numbers = tl.minimum(first + tl.arange(0, TILES), count - 1)
    entries = tl.load(tiles + numbers.to(tl.int64) * 3)
    if tl.min(load_steps(buffers, entries), axis=0) > 1:
        return
    for number in range(first, tl.minimum(first + TILES, count)):
        tile = tiles + tl.cast(number, tl.int64) * 3
        if load_steps(buffers, tl.load(tile)) <= 1:
            sum_squares(tile, buffers, variant, tuning, TILE_ROWS, TILE_COLUMNS)


@triton.jit(do_not_specialize=["count"])
def first_combine_kernel(
    reductions,  # [count, 7] int64: as for ``combine_kernel``
    count,
    buffers,  # ``Buffers``
    REDUCTIONS: tl.constexpr,
    PARTIALS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds up the partial sums of REDUCTIONS reductions whose entries are in their first step."""
    first = tl.program_id(0) * REDUCTIONS
    numbers = tl.minimum(first + tl.arange(0, REDUCTIONS), count - 1)
    entries = tl.load(reductions + numbers.to(tl.int64) * 7 + 6)
    if tl.min(load_steps(buffers, entries), axis=0) > 1:
        return
    for number in range(first, tl.minimum(first + REDUCTIONS, count)):
        reduction = reductions + tl.cast(number, tl.int64) * 7
        if load_steps(buffers, tl.load(reduction + 6)) <= 1:
            add_reduction(reduction, buffers, PARTIALS, WIDTH)


@triton.jit(do_not_specialize=["step", "first_step"])
def stripes_kernel(
    segments,  # [programs, 8] int64: rows of ``Workspace.segments``
    buffers,  # ``Buffers``
    hyper,  # ``Hyperparameters``
    step,
    first_step,  # 1; 0 if the sums of a first step are there after the update only
    on_device,  # ``OnDevice``
    variant,  # ``StripesVariant``
    BLOCK: tl.constexpr,
):
    """Averages sums into a segment of a stripe, and writes the roots that the update needs.

    A segment has at most BLOCK elements. Before the update, sqrt(row) and
    sqrt(col / (1 - beta2^t)) replace the sums. If a segment of a row stripe has all rows of a block
    of the matrix, 1 / sqrt(mean(row)) goes to ``inverse_rms``; else its sum goes to ``totals``, for
    ``means_kernel``.

    If the update computes the statistics, this kernel runs twice. Before the update it writes the
    roots into the places of the update's sums. After the update it averages the sums.

    In a first step without sums before the update, the stripes and their roots are 0. Then
    ``momentum_floor`` is the root, and the step is AdamW's.
    """
    segment = segments + tl.program_id(0).to(tl.int64) * 8
    entry = tl.load(segment)
    is_column = tl.load(segment + 1) != 0
    start = tl.load(segment + 2)
    stride = tl.load(segment + 3)
    size = tl.load(segment + 4).to(tl.int32)
    averaged = tl.load(segment + 5).to(tl.float32)
    block = tl.load(segment + 6)
    total_index = tl.load(segment + 7)  # -1: the segment has all rows of the block
    shape = buffers.shapes + entry * SHAPES
    pointers = buffers.pointers + entry * POINTERS
    first_block = tl.load(shape + FIRST_BLOCK)
    sums = buffers.sums
    sums += start + tl.where(is_column, tl.load(shape + COLUMN_SUMS), tl.load(shape + ROW_SUMS))
    address = tl.where(
        is_column, tl.load(pointers + COLUMN_POINTER), tl.load(pointers + ROW_POINTER)
    )
    stripe = address.to(tl.pointer_type(tl.float32)) + start

    current = load_step(pointers, step, on_device.step)
    is_first_step = current <= first_step
    summed = size  # the number of sums
    if variant.fused_statistics:
        if variant.before_update:
            summed = tl.where(is_first_step, size, 0)
        else:
            summed = tl.where(is_first_step, 0, size)
    corrected = current
    if variant.lagged:
        corrected = tl.maximum(current - 1, 1)
    bias_correction2 = bias_correction(corrected, hyper.log_beta2).to(tl.float32)
    correction = tl.div_rn(1.0, tl.sqrt_rn(tl.where(is_column, bias_correction2, 1.0)))
    weight = tl.div_rn(hyper.one_minus_beta2, averaged)
    total = 0.0
    if not variant.has_roots:
        lanes = tl.arange(0, BLOCK)
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
            total = tl.sum(value, axis=0)

    if variant.before_update:
        is_row = is_column == 0
        if is_row:
            if variant.has_roots:
                tl.store(buffers.inverse_rms + block, 1.0)
            elif total_index < 0:
                tl.store(buffers.inverse_rms + block, inverse_rms_of(total, size))
            else:
                tl.store(buffers.totals + total_index, total)
            if block == first_block:  # several programs may write the same numbers
                decay, step_size = decay_and_step_size(current, hyper, on_device)
                scalars = buffers.scalars + entry * SCALARS
                tl.store(scalars + DECAY, decay.to(tl.int32, bitcast=True))
                tl.store(scalars + STEP_SIZE, step_size.to(tl.int32, bitcast=True))
                tl.store(scalars + KEY, step_key(current).to(tl.int32, bitcast=True))
                floor = momentum_floor(current, hyper, variant.nesterov)
                tl.store(scalars + FLOOR, floor.to(tl.int32, bitcast=True))


@triton.jit
def means_kernel(
    means,  # [programs, 4] int64: rows of ``Workspace.means``
    buffers,  # ``Buffers``
    BLOCK: tl.constexpr,
):
    """Computes 1 / sqrt(mean(row)) of a block whose row stripe has several segments."""
    mean = means + tl.program_id(0).to(tl.int64) * 4
    block = tl.load(mean)
    totals = buffers.totals + tl.load(mean + 1)
    count = tl.load(mean + 2).to(tl.int32)
    rows = tl.load(mean + 3)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        lanes = first + tl.arange(0, BLOCK)
        total += tl.load(totals + lanes, mask=lanes < count, other=0.0)
    tl.store(buffers.inverse_rms + block, inverse_rms_of(tl.sum(total, axis=0), rows))


# ---------------------------------------------------------------------------------------------
# the update of matrices
# ---------------------------------------------------------------------------------------------


@triton.jit
def matrices_kernel(
    tiles,  # [programs, 3] int32: entry, first row, first column
    buffers,  # ``Buffers``
    one_minus_beta1,
    eps,
    variant,  # ``MatrixVariant``
    flags,  # ``UpdateFlags``
    tuning,  # ``Tuning``
    TILE_ROWS: tl.constexpr,
):
    """Updates momentum and parameter in some rows, in the columns of one quantization block.

    With ``fused_statistics`` it also writes the partial sums that ``statistics_kernel`` would
    write, so that the step reads the gradient once.

    If the gradient was ``folded`` it reads the momentum and does not write it.
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
    param = load_aligned_pointer(pointers, PARAM_POINTER, variant.param_dtype, variant.aligned)
    grad = load_aligned_pointer(pointers, GRAD_POINTER, variant.grad_dtype, variant.aligned)
    exp_avg = load_aligned_pointer(
        pointers, EXP_AVG_POINTER, variant.momentum_dtype, variant.aligned
    )
    scales = load_pointer(pointers, EXP_AVG_SCALE_POINTER, tl.float32)
    low_bits = load_aligned_pointer(pointers, LOW_BITS_POINTER, tl.int8, variant.aligned)
    step = load_step_scalars(buffers.scalars + entry * SCALARS, one_minus_beta1, eps)

    # two 4-bit codes share a byte, so the two halves of a quantization block are two tiles
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
    if variant.fused_statistics:
        updated_rows = tl.load(shape + SUMMED_ROWS).to(tl.int32)
    region = Region(
        first_row=first_row,
        first_column=first_column,
        rows=tl.load(shape + ROWS),
        matrix_rows=matrix_rows,
        columns=columns,
        block_rows=block_rows,
        block_columns=block_columns,
        summed_rows=updated_rows,
    )
    if variant.fused_statistics:
        row_partials, column_partials = partial_sum_pointers(
            buffers.partials, shape, region, True, _BLOCK_SIZE
        )
        # 128 threads with four columns each have HEIGHT rows at a time
        HEIGHT: tl.constexpr = 512 // WIDTH
        column_sums = tl.zeros([HEIGHT, WIDTH], tl.float32)
        high_column_sums = column_sums
    end_row = tl.minimum(first_row + updated_rows, (row_block + 1) * block_rows)
    column_roots += row_block * columns
    inverse_rms += row_block.to(tl.int64) * column_blocks
    block = first_column // block_columns
    low_columns = load_columns(
        first_column + lanes,
        lanes < low_size,
        column_roots,
        inverse_rms,
        block,
        block_columns,
        variant.narrow,
    )
    if variant.qmax == 7:
        high_columns = load_columns(
            first_column + low_size + lanes,
            lanes < size - low_size,
            column_roots,
            inverse_rms,
            block,
            block_columns,
            variant.narrow,
        )
    else:
        high_columns = low_columns
    matrix = Matrix(
        param=param,
        low_bits=low_bits,
        grad=grad,
        region=region,
        row_roots=row_roots,
        column_blocks=column_blocks,
        block=block,
        next_inverse_rms=tl.load(inverse_rms + tl.minimum(block + 1, column_blocks - 1)),
        whole_start=whole_start,
        whole_stride=whole_stride,
    )
    stored = StoredMomentum(
        exp_avg=exp_avg,
        scales=scales + first_column // _BLOCK_SIZE,
        code_columns=code_columns,
        scale_columns=(columns + _BLOCK_SIZE - 1) // _BLOCK_SIZE,
        code_index=code_index,
    )

    for row in tl.range(first_row, end_row, TILE_ROWS, num_stages=tuning.stages):
        rows = row + tl.arange(0, TILE_ROWS)
        in_rows = rows < end_row
        m, high_m = load_momentum(
            stored, rows, in_rows, low_columns.inside, high_columns.inside, variant.qmax
        )
        m, squares = update_tile(
            m, rows, in_rows, low_columns, matrix, step, variant, flags, tuning
        )
        if variant.fused_statistics:
            column_sums += add_distant_rows(squares, HEIGHT)
            row_sums, next_row_sums = sum_squares_of_rows(
                squares, low_columns.index, matrix, variant.one_block
            )
        if variant.qmax == 7:
            high_m, squares = update_tile(
                high_m, rows, in_rows, high_columns, matrix, step, variant, flags, tuning
            )
            if variant.fused_statistics:
                high_column_sums += add_distant_rows(squares, HEIGHT)
                high_row_sums, next_high_row_sums = sum_squares_of_rows(
                    squares, high_columns.index, matrix, variant.one_block
                )
                row_sums += high_row_sums
                next_row_sums += next_high_row_sums
        if not variant.folded:
            store_momentum(
                m,
                high_m,
                stored,
                rows,
                in_rows,
                low_columns.inside,
                high_columns.inside,
                variant.qmax,
                variant.momentum_dtype,
            )
        if variant.fused_statistics:
            tl.store(row_partials + rows, row_sums, mask=in_rows)
            if not variant.one_block:
                next_partials = row_partials + region.rows
                tl.store(next_partials + rows, next_row_sums, mask=in_rows)

    if variant.fused_statistics:
        tl.store(
            column_partials + low_columns.index,
            tl.sum(column_sums, axis=0),
            mask=low_columns.inside,
        )
        if variant.qmax == 7:
            high_sums = tl.sum(high_column_sums, axis=0)
            tl.store(column_partials + high_columns.index, high_sums, mask=high_columns.inside)


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
    """Performs AdamW's step for BLOCK elements of a 0-D or 1-D parameter."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    entry = tl.load(tile).to(tl.int64)
    start = tl.load(tile + 1).to(tl.int64) * BLOCK
    size = tl.load(buffers.shapes + entry * SHAPES + COLUMNS)
    whole_start = tl.load(buffers.shapes + entry * SHAPES + WHOLE_START)
    pointers = buffers.pointers + entry * POINTERS
    param = load_aligned_pointer(pointers, PARAM_POINTER, variant.param_dtype, variant.aligned)
    grad = load_aligned_pointer(pointers, GRAD_POINTER, variant.grad_dtype, variant.aligned)
    exp_avg = load_aligned_pointer(pointers, EXP_AVG_POINTER, tl.float32, variant.aligned)
    exp_avg_sq = load_aligned_pointer(pointers, EXP_AVG_SQ_POINTER, tl.float32, variant.aligned)
    if variant.aligned:
        size = tl.multiple_of(size, 16)
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < size
    g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(param + offsets, mask=mask, other=0.0)
    if variant.low_bits:
        low_bits = load_aligned_pointer(pointers, LOW_BITS_POINTER, tl.int32, variant.aligned)
        value = join(value, tl.load(low_bits + offsets, mask=mask, other=0))
    else:
        value = value.to(tl.float32)
    m = tl.load(exp_avg + offsets, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq + offsets, mask=mask, other=0.0)
    if flags.maximize:
        g = -g
    m = lerp(m, g, hyper.one_minus_beta1, flags.from_start)
    v = v * hyper.beta2 + hyper.one_minus_beta2 * g * g
    tl.store(exp_avg + offsets, m, mask=mask)
    tl.store(exp_avg_sq + offsets, v, mask=mask)

    current = load_step(pointers, step, on_device.step)
    decay, step_size = decay_and_step_size(current, hyper, on_device)
    correction = tl.sqrt_rn(bias_correction(current, hyper.log_beta2).to(tl.float32))
    denominator = tl.div_rn(tl.sqrt_rn(v), correction) + hyper.eps
    numerator = numerator_of(m, g, hyper.one_minus_beta1, flags)
    value = value * decay - tl.div_rn(step_size * numerator, denominator)
    if variant.low_bits:
        rounded, low = split(value, tl.int32)
        tl.store(low_bits + offsets, low, mask=mask)
    else:
        index = whole_start + offsets
        rounded = round_parameter(
            value,
            index.to(tl.uint32),
            (index >> 32).to(tl.uint32),
            step_key(current),
            flags,
            variant.param_dtype,
        )
    tl.store(param + offsets, rounded, mask=mask)
