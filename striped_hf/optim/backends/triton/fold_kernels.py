"""The kernels that fold the gradient of one matrix during the backward pass; ``fold.py``.

Sums have a fixed order and no operation is atomic: runs repeat bit for bit.
Tensors come as addresses, so that a gradient elsewhere in memory does not compile a kernel anew.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from striped_hf.optim import momentum
from striped_hf.optim.backends.triton.codec import (
    StoredMomentum,
    load_momentum,
    random_bits,
    step_key,
    store_momentum,
)
from striped_hf.optim.backends.triton.functions import (
    add_distant_rows,
    add_partials,
    aligned_pointer,
    indices_in_whole,
    lerp,
)

_BLOCK_SIZE = tl.constexpr(momentum.BLOCK_SIZE)  # columns of a quantization block, and of a tile


class Gradient(NamedTuple):
    """The facts about the gradient that all tiles of a program share."""

    pointer: Any
    columns: Any
    coefficient: Any  # a factor of the gradient, if there is one
    key: Any  # of the step's random bits
    whole_start: Any
    whole_stride: Any
    one_minus_beta1: Any


@triton.jit
def float32_pointer(address):
    """Returns the pointer to an address, which is int32 if there is no tensor."""
    return tl.cast(address, tl.int64).to(tl.pointer_type(tl.float32))


@triton.jit
def fold_tile(m, rows, in_rows, index, inside, gradient, variant):
    """Adds a tile of the gradient to the momentum.

    Args:
        m: [r, c] float32: the momentum, 0 outside of the matrix.
        rows: [r] int32: indices.
        in_rows: [r] bool: whether the row belongs to the program.
        index: [c] int32: the indices of the columns.
        inside: [c] bool: whether the column belongs to the matrix.
        gradient: ``Gradient``.
        variant: ``FoldVariant``.

    Returns:
        The new momentum and the squares of the gradient without the coefficient, both [r, c]
        float32, and the sums of the elements times their random signs, [r] float32.
    """
    mask = in_rows[:, None] & inside[None, :]
    offsets = rows.to(tl.int64)[:, None] * gradient.columns + index[None, :]
    g = tl.load(gradient.pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    squares = g * g
    if variant.maximize:
        g = -g
    if variant.has_coefficient:
        g = g * gradient.coefficient
    if variant.is_first:
        m = lerp(m, g, gradient.one_minus_beta1, variant.from_start)
    else:
        m = m + gradient.one_minus_beta1 * g
    if variant.has_sketch:
        low, high = indices_in_whole(
            rows, index, gradient.whole_start, gradient.whole_stride, variant.large
        )
        sign = random_bits(low, high, gradient.key) & 0x80000000
        signed = (g.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        signed_sums = tl.sum(signed, axis=1)
    else:
        signed_sums = tl.sum(g, axis=1)  # unused, so the compiler removes it
    return m, squares, signed_sums


@triton.jit
def sum_block(squares, index, block, block_columns):  # [r, c] -> [r]
    """Returns the sum of each row over the columns of one block of the matrix."""
    in_block = (index >= block * block_columns) & (index < (block + 1) * block_columns)
    return tl.sum(tl.where(in_block[None, :], squares, 0.0), axis=1)


_NEVER_CONSTANT = ["rows", "columns", "block_rows", "block_columns"]
_FOLD_NUMBERS = ["grad", "exp_avg", "exp_avg_scale", "sketch", "coefficient", "step"]
_FOLD_NUMBERS += ["whole_start", "whole_stride", *_NEVER_CONSTANT]


@triton.jit(do_not_specialize=_FOLD_NUMBERS)
def fold_kernel(
    grad,  # the first five are addresses; 0: there is none
    exp_avg,
    exp_avg_scale,
    sketch,
    coefficient,
    partials,  # float32: sums of columns [programs one below another, columns], then of rows
    rows,  # of all matrices together
    columns,
    block_rows,
    block_columns,
    whole_start,
    whole_stride,
    step,
    one_minus_beta1,
    variant,  # ``FoldVariant``
    FOLDED_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Folds some rows of a gradient, in the columns of one quantization block.

    The sums of rows are [tiles side by side + blocks side by side - 1, rows]. The sums over the
    columns that tile q and block b share are at index q + b. From left to right no two such pairs
    have the same q + b, and the tiles of one block follow each other.
    """
    columns = tl.cast(columns, tl.int64)
    whole_start = tl.cast(whole_start, tl.int64)
    whole_stride = tl.cast(whole_stride, tl.int64)
    tiles = ((columns + _BLOCK_SIZE - 1) // _BLOCK_SIZE).to(tl.int32)
    tile = tl.program_id(0) % tiles
    program = tl.program_id(0) // tiles
    programs = (block_rows + FOLDED_ROWS - 1) // FOLDED_ROWS
    row_block = program // programs
    first_row = row_block * block_rows + program % programs * FOLDED_ROWS
    end_row = tl.minimum(first_row + FOLDED_ROWS, (row_block + 1) * block_rows)
    first_column = tile * _BLOCK_SIZE

    # two 4-bit codes share a byte, so the two halves of a quantization block are two tiles
    size = tl.minimum(columns - first_column, _BLOCK_SIZE).to(tl.int32)
    code_columns = columns
    low_size = size
    if variant.qmax == 7:
        code_columns = (columns + 1) // 2
        low_size = (size + 1) // 2
    if variant.aligned:
        columns = tl.multiple_of(columns, 16)
        code_columns = tl.multiple_of(code_columns, 8)
        size = tl.multiple_of(size, 16)
        low_size = tl.multiple_of(low_size, 8)
    WIDTH: tl.constexpr = _BLOCK_SIZE // 2 if variant.qmax == 7 else _BLOCK_SIZE
    lanes = tl.arange(0, WIDTH)
    index, inside = first_column + lanes, lanes < low_size
    high_index, high_inside = index + low_size, lanes < size - low_size
    code_index = first_column // 2 + lanes if variant.qmax == 7 else index
    stored = StoredMomentum(
        exp_avg=aligned_pointer(exp_avg, variant.momentum_dtype, variant.aligned),
        scales=float32_pointer(exp_avg_scale) + tile,
        code_columns=code_columns,
        scale_columns=tiles,
        code_index=code_index,
    )
    factor = 1.0
    if variant.has_coefficient:
        factor = tl.load(float32_pointer(coefficient))
    gradient = Gradient(
        pointer=aligned_pointer(grad, variant.grad_dtype, variant.aligned),
        columns=columns,
        coefficient=factor,
        key=step_key(step),
        whole_start=whole_start,
        whole_stride=whole_stride,
        one_minus_beta1=one_minus_beta1,
    )
    column_partials = partials + program * columns
    row_partials = partials + rows // block_rows * programs * columns
    first_block = first_column // block_columns
    last_block = (first_column + size - 1) // block_columns

    # 128 threads with four columns each have HEIGHT rows at a time
    HEIGHT: tl.constexpr = 512 // WIDTH
    column_sums = tl.zeros([HEIGHT, WIDTH], tl.float32)
    high_column_sums = column_sums
    for row in range(first_row, end_row, TILE_ROWS):
        row_index = row + tl.arange(0, TILE_ROWS)
        in_rows = row_index < end_row
        m, high_m = load_momentum(stored, row_index, in_rows, inside, high_inside, variant.qmax)
        m, squares, signed = fold_tile(m, row_index, in_rows, index, inside, gradient, variant)
        column_sums += add_distant_rows(squares, HEIGHT)
        high_squares = squares
        if variant.qmax == 7:
            high_m, high_squares, high_signed = fold_tile(
                high_m, row_index, in_rows, high_index, high_inside, gradient, variant
            )
            high_column_sums += add_distant_rows(high_squares, HEIGHT)
            signed += high_signed
        store_momentum(
            m,
            high_m,
            stored,
            row_index,
            in_rows,
            inside,
            high_inside,
            variant.qmax,
            variant.momentum_dtype,
        )
        if variant.has_sketch:
            place = float32_pointer(sketch) + row_index.to(tl.int64) * tiles + tile
            signed += tl.load(place, mask=in_rows, other=0.0)
            tl.store(place, signed, mask=in_rows)
        if variant.one_block:
            row_sums = tl.sum(squares, axis=1)
            if variant.qmax == 7:
                row_sums += tl.sum(high_squares, axis=1)
            place = row_partials + (tile + first_block).to(tl.int64) * rows + row_index
            tl.store(place, row_sums, mask=in_rows)
        else:
            for block in range(first_block, last_block + 1):
                row_sums = sum_block(squares, index, block, block_columns)
                if variant.qmax == 7:
                    row_sums += sum_block(high_squares, high_index, block, block_columns)
                place = row_partials + (tile + block).to(tl.int64) * rows + row_index
                tl.store(place, row_sums, mask=in_rows)
    tl.store(column_partials + index, tl.sum(column_sums, axis=0), mask=inside)
    if variant.qmax == 7:
        high_sums = tl.sum(high_column_sums, axis=0)
        tl.store(column_partials + high_index, high_sums, mask=high_inside)


@triton.jit(do_not_specialize=["row_sums", "col_sums", "coefficient", *_NEVER_CONSTANT])
def add_folded_kernel(
    row_sums,  # addresses, as above
    col_sums,
    coefficient,
    partials,
    rows,
    columns,
    block_rows,
    block_columns,
    HAS_COEFFICIENT: tl.constexpr,
    FOLDED_ROWS: tl.constexpr,
    PARTIALS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds the partial sums of ``fold_kernel`` to WIDTH sums of columns, or to as many of rows."""
    columns = tl.cast(columns, tl.int64)
    rows = tl.cast(rows, tl.int64)
    programs = (block_rows + FOLDED_ROWS - 1) // FOLDED_ROWS
    row_blocks = rows // block_rows
    column_parts = (columns + WIDTH - 1) // WIDTH
    row_parts = (rows + WIDTH - 1) // WIDTH
    column_blocks = columns // block_columns
    part = tl.program_id(0) - row_blocks * column_parts
    is_row = part >= 0
    # of columns: a row of blocks; of rows: a column of blocks
    block = tl.where(is_row, part // row_parts, tl.program_id(0) // column_parts)
    first = tl.where(is_row, part % row_parts, tl.program_id(0) % column_parts) * WIDTH
    first_tile = block * block_columns // _BLOCK_SIZE
    last_tile = ((block + 1) * block_columns - 1) // _BLOCK_SIZE
    of_rows = (row_blocks * programs * columns) + (first_tile + block) * rows
    source = partials + first + tl.where(is_row, of_rows, block * programs * columns)
    count = tl.where(is_row, last_tile - first_tile + 1, programs).to(tl.int32)
    stride = tl.where(is_row, rows, columns)
    size = stride - first
    target = float32_pointer(tl.where(is_row, row_sums, col_sums))
    target += tl.where(is_row, first * column_blocks + block, block * columns + first)
    target_stride = tl.where(is_row, column_blocks, 1)

    lanes = tl.arange(0, WIDTH)
    inside = lanes < size
    total = add_partials(source, count, stride, lanes, inside, PARTIALS, WIDTH)
    if HAS_COEFFICIENT:
        factor = tl.load(float32_pointer(coefficient))
        total *= factor * factor
    target += lanes * target_stride
    total += tl.load(target, mask=inside, other=0.0)
    tl.store(target, total, mask=inside)
