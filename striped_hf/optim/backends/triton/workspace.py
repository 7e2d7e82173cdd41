"""The buffers of a plan, and the work of ``combine_kernel`` and ``stripes_kernel`` on them."""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from striped_hf.optim import momentum
from striped_hf.optim.backends.triton import arguments, tile_sizes
from striped_hf.optim.backends.triton.addresses import copy_to_device
from striped_hf.optim.backends.triton.arguments import EntryShape
from striped_hf.optim.interface import Entry, Sums

Key = TypeVar("Key")


class Workspace:
    """The buffers of a plan, and the work of its programs on them.

    It depends on the entries' shapes and blocks alone.

    Attributes:
        shapes: The shape of each entry.
        fused_statistics: For each entry, whether its update computes the statistics.
        device_shapes, sums, inverse_rms, totals, scalars: As in ``arguments.Buffers``.
        reductions: [programs, 7] int64, the work of ``combine_kernel``, by ``fused_statistics``.
        segments: [programs, 8] int64, the work of ``stripes_kernel``, by ``fused_statistics``.
        means: [programs, 4] int64, the work of ``means_kernel``; None if there is none.
    """

    def __init__(self, entries: list[Entry], lagged: bool, device: torch.device) -> None:
        self.fused_statistics = [lagged and _can_fuse_statistics(entry) for entry in entries]
        self.shapes, self._partials_size, sums, blocks = _place(entries, self.fused_statistics)
        self.sums = torch.zeros(sums, dtype=torch.float32, device=device)
        self.inverse_rms = torch.zeros(blocks, dtype=torch.float32, device=device)
        scalars = (len(entries), arguments.SCALARS.value)
        self.scalars = torch.zeros(scalars, dtype=torch.int32, device=device)
        self.device_shapes = copy_to_device(np.array(self.shapes, dtype=np.int64), device)
        reductions: dict[bool, list[np.ndarray]] = defaultdict(list)
        segments: dict[bool, list[np.ndarray]] = defaultdict(list)
        means: list[np.ndarray] = []
        totals = 0
        for number, (shape, fused) in enumerate(
            zip(self.shapes, self.fused_statistics, strict=True)
        ):
            if shape.rows:
                reductions[fused] += _reductions(number, shape, fused)
                of_rows, of_blocks = _row_segments(number, shape, totals)
                segments[fused] += [of_rows, _column_segments(number, shape)]
                means.append(of_blocks)
                totals += of_blocks[:, 2].sum()
        self.reductions = copy_each(reductions, device)
        self.segments = copy_each(segments, device)
        self.totals = torch.zeros(totals, dtype=torch.float32, device=device)
        self.means = copy_to_device(np.concatenate(means), device) if totals else None

    def new_partials(self) -> Tensor:
        """Allocates the buffer of a step's partial sums."""
        return self.sums.new_empty(self._partials_size)

    def sums_of(self, number: int, entry: Entry) -> Sums:
        """Views the row sums [..., R, bc] and the column sums [..., br, C] of a matrix."""
        *matrices, rows, columns = entry.param.shape
        row_blocks, column_blocks = entry.blocks
        shape = self.shapes[number]
        row_shape, column_shape = (*matrices, rows, column_blocks), (*matrices, row_blocks, columns)
        return self._view(shape.row_sums, row_shape), self._view(shape.column_sums, column_shape)

    def _view(self, start: int, shape: tuple[int, ...]) -> Tensor:
        return self.sums[start : start + math.prod(shape)].view(shape)


def _can_fuse_statistics(entry: Entry) -> bool:
    """Whether no tile of the update has columns of more than two blocks."""
    if entry.param.dim() < 2:
        return False
    column_blocks = entry.blocks[1]
    return column_blocks == 1 or entry.param.shape[-1] // column_blocks >= momentum.BLOCK_SIZE


def tile_columns(fused_statistics: bool) -> int:
    """Returns the number of columns whose squares one program adds up; fused: of the update."""
    return momentum.BLOCK_SIZE if fused_statistics else tile_sizes.STATISTICS_TILE_COLUMNS


def _place(
    entries: list[Entry], fused_statistics: list[bool]
) -> tuple[list[EntryShape], int, int, int]:
    """Gives every entry its places in the buffers.

    Returns:
        The shapes, and the numbers of partial sums, sums and blocks.
    """
    elements = sum(entry.param.numel() for entry in entries if entry.param.dim() >= 2)
    summed_rows = tile_sizes.SUMMED_ROWS_OF_SMALL_MODELS
    if elements >= tile_sizes.LARGE_MODEL:
        summed_rows = tile_sizes.SUMMED_ROWS_OF_LARGE_MODELS
    shapes = []
    partials = sums = blocks = 0
    for entry, fused in zip(entries, fused_statistics, strict=True):
        if entry.param.dim() < 2:
            shapes.append(EntryShape(columns=entry.param.numel(), whole_start=entry.whole_start))
            continue
        matrix_rows, columns = entry.param.shape[-2:]
        shape = EntryShape(
            rows=entry.param.numel() // columns,
            matrix_rows=matrix_rows,
            columns=columns,
            block_rows=matrix_rows // entry.blocks[0],
            block_columns=columns // entry.blocks[1],
            column_blocks=entry.blocks[1],
            summed_rows=summed_rows,
            first_block=blocks,
            whole_start=entry.whole_start,
            whole_stride=entry.whole_stride or columns,
        )
        row_blocks = shape.rows // shape.block_rows  # of all matrices
        programs = ceil_div(shape.block_rows, summed_rows)
        if fused:
            # a tile that has columns of two blocks has two sums for each row
            parts = ceil_div(columns, momentum.BLOCK_SIZE) + shape.column_blocks - 1
        else:
            parts = shape.column_blocks * ceil_div(shape.block_columns, tile_columns(fused))
        column_partials = partials + parts * shape.rows
        column_sums = _padded(sums + shape.rows * shape.column_blocks)
        shapes.append(
            shape._replace(
                row_partials=partials,
                column_partials=column_partials,
                row_sums=sums,
                column_sums=column_sums,
            )
        )
        partials = column_partials + row_blocks * programs * columns
        sums = _padded(column_sums + row_blocks * columns)
        blocks += row_blocks * shape.column_blocks
    return shapes, partials, sums, blocks


def _row_parts(shape: EntryShape, fused: bool, block: int) -> range:
    """Returns the places of a block's partial sums of rows, see ``partial_sum_pointers``."""
    width = tile_columns(fused)
    if fused:
        first, last = block * shape.block_columns, (block + 1) * shape.block_columns - 1
        return range(first // width + block, last // width + block + 1)
    tiles = ceil_div(shape.block_columns, width)
    return range(block * tiles, (block + 1) * tiles)


def _reductions(number: int, shape: EntryShape, fused: bool) -> Iterator[np.ndarray]:
    """Yields the work of ``combine_kernel`` on one entry."""
    for block in range(shape.column_blocks):  # [tiles, rows] to [rows]
        parts = _row_parts(shape, fused, block)
        yield _reduction(
            entry=number,
            size=shape.rows,
            source=shape.row_partials + parts.start * shape.rows,
            count=len(parts),
            stride=shape.rows,
            target=shape.row_sums + block,
            target_stride=shape.column_blocks,
        )
    row_blocks = shape.rows // shape.block_rows
    programs = ceil_div(shape.block_rows, shape.summed_rows)
    # [programs, columns] to [columns] for each row of blocks; one copy if there is one program each
    vectors, size = (
        (1, row_blocks * shape.columns) if programs == 1 else (row_blocks, shape.columns)
    )
    for i in range(vectors):
        yield _reduction(
            entry=number,
            size=size,
            source=shape.column_partials + i * programs * size,
            count=programs,
            stride=size,
            target=shape.column_sums + i * size,
            target_stride=1,
        )


def _reduction(
    entry: int, size: int, source: int, count: int, stride: int, target: int, target_stride: int
) -> np.ndarray:
    """Returns [programs, 7]: additions of ``count`` vectors of ``size`` sums, ``stride`` apart.

    The columns are the first partial sum, ``count``, ``stride``, the number of sums, the first sum,
    the distance of two sums, and the entry.
    """
    first = np.arange(0, size, tile_sizes.COMBINED_WIDTH)
    reduction = np.empty((len(first), 7), dtype=np.int64)
    reduction[:, 0] = source + first
    reduction[:, 1] = count
    reduction[:, 2] = stride
    reduction[:, 3] = np.minimum(size - first, tile_sizes.COMBINED_WIDTH)
    reduction[:, 4] = target + first * target_stride
    reduction[:, 5] = target_stride
    reduction[:, 6] = entry
    return reduction


def _row_segments(
    number: int, shape: EntryShape, first_total: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the segments of row [..., R, bc], and the means of blocks with several segments.

    Args:
        number: The entry's number.
        shape: Its shape.
        first_total: The index of the first sum of a segment in ``Buffers.totals``.

    Returns:
        [segments, 8]: the entry, whether the stripe is col, the first element, the distance of two
        elements, their number, the number of squares in each mean, the block, and the index of the
        segment's sum, or -1 if the block has no other segment.

        [blocks, 4]: the block, the index of its first sum, their number, and the number of rows.
    """
    row_blocks = shape.rows // shape.block_rows
    size = tile_sizes.STRIPE_BLOCK
    parts = ceil_div(shape.block_rows, size)
    axes = np.indices((row_blocks, shape.column_blocks, parts))
    row, column, part = (axis.ravel() for axis in axes)
    block = shape.first_block + row * shape.column_blocks + column
    totals = first_total + np.arange(len(block))
    segments = np.zeros((len(block), 8), dtype=np.int64)
    segments[:, 0] = number
    segments[:, 2] = (row * shape.block_rows + part * size) * shape.column_blocks + column
    segments[:, 3] = shape.column_blocks
    segments[:, 4] = np.minimum(shape.block_rows - part * size, size)
    segments[:, 5] = shape.block_columns
    segments[:, 6] = block
    segments[:, 7] = totals if parts > 1 else -1
    first = np.flatnonzero(part == 0) if parts > 1 else np.arange(0)
    means = np.stack([block, totals, np.full_like(block, parts)], axis=1)[first]
    return segments, np.insert(means, 3, shape.block_rows, axis=1)


def _column_segments(number: int, shape: EntryShape) -> np.ndarray:
    """Returns [programs, 8]: the segments of col [..., br, C], in ``_row_segments``'s columns."""
    size = shape.rows // shape.block_rows * shape.columns
    first = np.arange(0, size, tile_sizes.STRIPE_BLOCK)
    segments = np.zeros((len(first), 8), dtype=np.int64)
    segments[:, 0] = number
    segments[:, 1] = 1
    segments[:, 2] = first
    segments[:, 3] = 1
    segments[:, 4] = np.minimum(size - first, tile_sizes.STRIPE_BLOCK)
    segments[:, 5] = shape.block_rows
    return segments


def copy_each(
    arrays: dict[Key, list[np.ndarray]], device: torch.device, dtype: type[np.generic] = np.int64
) -> dict[Key, Tensor]:
    """Concatenates each list and copies the result to the device."""
    return {
        key: copy_to_device(np.concatenate(parts).astype(dtype), device)
        for key, parts in arrays.items()
    }


def ceil_div(size: int, step: int) -> int:
    return -(-size // step)


def _padded(offset: int) -> int:
    """Returns the next multiple of 32, at which a buffer can be read in vectors."""
    return ceil_div(offset, 32) * 32
