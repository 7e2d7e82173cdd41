"""The kernels that update momentum and parameters.

The arithmetic is float32. A matrix's update uses a fast division, and its codes use fast square
roots, with errors of up to 2 units in the last place. The step of 0-D and 1-D parameters, which is
AdamW's, is correctly rounded.
"""

import triton
import triton.language as tl

from striped_hf.optim import momentum
from striped_hf.optim.backends.triton.arguments import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    COLUMN_BLOCKS,
    COLUMN_SUMS,
    COLUMNS,
    EXP_AVG_POINTER,
    EXP_AVG_SCALE_POINTER,
    EXP_AVG_SQ_POINTER,
    FIRST_BLOCK,
    GRAD_POINTER,
    LOW_BITS_POINTER,
    MATRIX_ROWS,
    PARAM_POINTER,
    POINTERS,
    ROW_SUMS,
    ROWS,
    SCALARS,
    SHAPES,
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
    bias_correction,
    decay_and_step_size,
    lerp,
    load_aligned_pointer,
    load_columns,
    load_pointer,
    load_step,
    load_step_scalars,
    numerator_of,
    partial_sum_pointers,
    round_parameter,
    sum_squares_of_rows,
    update_tile,
)
from striped_hf.optim.backends.triton.tile_sizes import UPDATED_ROWS

_BLOCK_SIZE = tl.constexpr(momentum.BLOCK_SIZE)  # columns of a quantization block


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
        # Not the indices and masks of the loop: the compiler would keep them in registers, or in
        # local memory, throughout the loop.
        start = tl.load(tile + 2)
        size = tl.minimum(tl.load(shape + COLUMNS) - start, _BLOCK_SIZE).to(tl.int32)
        low_size = size
        if variant.qmax == 7:
            low_size = (size + 1) // 2
            high_sums = tl.sum(high_column_sums, axis=0)
            high_partials = column_partials + start + low_size
            tl.store(high_partials + lanes, high_sums, mask=lanes < size - low_size)
        sums = tl.sum(column_sums, axis=0)
        tl.store(column_partials + start + lanes, sums, mask=lanes < low_size)


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
