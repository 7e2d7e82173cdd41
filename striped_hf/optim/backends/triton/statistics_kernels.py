"""The kernels that add up the squares of gradients by row and by column."""

import triton
import triton.language as tl

from striped_hf.optim.backends.triton.arguments import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    COLUMNS,
    GRAD_POINTER,
    MATRIX_ROWS,
    POINTERS,
    ROWS,
    SHAPES,
    SUMMED_ROWS,
)
from striped_hf.optim.backends.triton.functions import (
    Region,
    add_partials,
    element_offsets,
    load_step,
    load_steps,
    partial_sum_pointers,
)


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
