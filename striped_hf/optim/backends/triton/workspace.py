"""The buffers of a plan, and the work of ``combine_kernel`` and ``stripes_kernel`` on them."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from striped_hf.optim import momentum
from striped_hf.optim.backends.triton import arguments, tile_sizes
from striped_hf.optim.backends.triton.addresses import copy_to_device
from striped_hf.optim.backends.triton.arguments import EntryShape
from striped_hf.optim.backends.triton.kinds import EntryKind
from striped_hf.optim.interface import Sums

Key = TypeVar("Key")


class WorkList(NamedTuple):
    """The work of a kernel's programs.

    Attributes:
        array: [programs, numbers]: what each program works on.
        entries: [programs]: the number of the entry that it works on.
    """

    array: np.ndarray
    entries: np.ndarray


class Workspace:
    """The buffers of a plan, and the work of its programs on them.

    It depends on the entries' shapes and blocks alone.

    Attributes:
        shapes: The shape of each entry.
        fused_statistics: For each entry, whether its update computes the statistics.
        device_shapes, sums, inverse_rms, scalars: As in ``arguments.Buffers``.
        reductions: [programs, 6] int64, the work of ``combine_kernel``, by ``fused_statistics``.
        segments: [programs, 7] int64, the work of ``stripes_kernel``, by ``fused_statistics``.
    """

    def __init__(self, kinds: Sequence[EntryKind], lagged: bool, device: torch.device) -> None:
        self.fused_statistics = [lagged and _can_fuse_statistics(kind) for kind in kinds]
        self.shapes, self._partials_size, sums, blocks = _place(kinds, self.fused_statistics)
        self.sums = torch.zeros(sums, dtype=torch.float32, device=device)
        self.inverse_rms = torch.zeros(blocks, dtype=torch.float32, device=device)
        scalars = (len(kinds), arguments.SCALARS.value)
        self.scalars = torch.zeros(scalars, dtype=torch.int32, device=device)
        self.device_shapes = copy_to_device(np.array(self.shapes, dtype=np.int64), device)
        reductions: dict[bool, list[np.ndarray]] = defaultdict(list)
        reduced: dict[bool, list[int]] = defaultdict(list)  # the entry of each
        segments: dict[bool, list[np.ndarray]] = defaultdict(list)
        for number, (shape, fused) in enumerate(
            zip(self.shapes, self.fused_statistics, strict=True)
        ):
            if shape.rows:
                of_entry = list(_reductions(shape, tile_columns(fused)))
                reductions[fused] += of_entry
                reduced[fused] += [number] * sum(map(len, of_entry))
                segments[fused] += [_row_segments(number, shape), _column_segments(number, shape)]
        self.reductions = {
            fused: WorkList(np.concatenate(parts), np.array(reduced[fused]))
            for fused, parts in reductions.items()
        }
        self.segments = concatenate(segments)

    def buffers(self) -> tuple[Tensor, ...]:
        """Returns all tensors on the device."""
        return self.device_shapes, self.sums, self.inverse_rms, self.scalars

    def new_partials(self) -> Tensor:
        """Allocates the buffer of a step's partial sums."""
        return self.sums.new_empty(self._partials_size)

    def sums_of(self, number: int, kind: EntryKind, sums: Tensor) -> Sums:
        """Views the row sums [..., R, bc] and the column sums [..., br, C] of a matrix.

        Args:
            number: The entry's number.
            kind: Its kind.
            sums: ``self.sums`` or a tensor of its size.
        """
        *matrices, rows, columns = kind.shape
        row_blocks, column_blocks = kind.blocks
        shape = self.shapes[number]
        row_shape, column_shape = (*matrices, rows, column_blocks), (*matrices, row_blocks, columns)
        return _view(sums, shape.row_sums, row_shape), _view(sums, shape.column_sums, column_shape)


def _view(sums: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
    return sums[start : start + math.prod(shape)].view(shape)


def _can_fuse_statistics(kind: EntryKind) -> bool:
    """Whether no tile of the update has columns of two blocks."""
    if not kind.is_matrix:
        return False
    column_blocks = kind.blocks[1]
    return column_blocks == 1 or kind.shape[-1] // column_blocks % momentum.BLOCK_SIZE == 0


def tile_columns(fused_statistics: bool) -> int:
    """Returns the number of columns whose squares one program adds up; fused: of the update."""
    return momentum.BLOCK_SIZE if fused_statistics else tile_sizes.STATISTICS_TILE_COLUMNS


def _place(
    kinds: Sequence[EntryKind], fused_statistics: list[bool]
) -> tuple[list[EntryShape], int, int, int]:
    """Gives every entry its places in the buffers.

    Returns:
        The shapes, and the numbers of partial sums, sums and blocks.
    """
    elements = sum(kind.shape.numel() for kind in kinds if kind.is_matrix)
    summed_rows = tile_sizes.SUMMED_ROWS_OF_SMALL_MODELS
    if elements >= tile_sizes.LARGE_MODEL:
        summed_rows = tile_sizes.SUMMED_ROWS_OF_LARGE_MODELS
    shapes = []
    partials = sums = blocks = 0
    for kind, fused in zip(kinds, fused_statistics, strict=True):
        if not kind.is_matrix:
            shapes.append(EntryShape(columns=kind.shape.numel(), whole_start=kind.whole_start))
            continue
        matrix_rows, columns = kind.shape[-2:]
        shape = EntryShape(
            rows=kind.shape.numel() // columns,
            matrix_rows=matrix_rows,
            columns=columns,
            block_rows=matrix_rows // kind.blocks[0],
            block_columns=columns // kind.blocks[1],
            column_blocks=kind.blocks[1],
            summed_rows=summed_rows,
            first_block=blocks,
            whole_start=kind.whole_start,
            whole_stride=kind.whole_stride or columns,
        )
        row_blocks = shape.rows // shape.block_rows  # of all matrices
        programs = ceil_div(shape.block_rows, summed_rows)
        tiles = ceil_div(shape.block_columns, tile_columns(fused))
        column_partials = partials + shape.column_blocks * tiles * shape.rows
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


def _reductions(shape: EntryShape, columns_of_tile: int) -> Iterator[np.ndarray]:
    """Yields the work of ``combine_kernel`` on one entry."""
    tiles = ceil_div(shape.block_columns, columns_of_tile)
    for block in range(shape.column_blocks):  # [tiles, rows] to [rows]
        yield _reduction(
            size=shape.rows,
            source=shape.row_partials + block * tiles * shape.rows,
            count=tiles,
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
            size=size,
            source=shape.column_partials + i * programs * size,
            count=programs,
            stride=size,
            target=shape.column_sums + i * size,
            target_stride=1,
        )


def _reduction(
    size: int, source: int, count: int, stride: int, target: int, target_stride: int
) -> np.ndarray:
    """Returns [programs, 6]: additions of ``count`` vectors of ``size`` sums, ``stride`` apart.

    The columns are the first partial sum, ``count``, ``stride``, the number of sums, the first sum,
    and the distance of two sums.
    """
    first = np.arange(0, size, tile_sizes.COMBINED_WIDTH)
    reduction = np.empty((len(first), 6), dtype=np.int64)
    reduction[:, 0] = source + first
    reduction[:, 1] = count
    reduction[:, 2] = stride
    reduction[:, 3] = np.minimum(size - first, tile_sizes.COMBINED_WIDTH)
    reduction[:, 4] = target + first * target_stride
    reduction[:, 5] = target_stride
    return reduction


def _row_segments(number: int, shape: EntryShape) -> np.ndarray:
    """Returns [blocks, 7]: the segments of row [..., R, bc], one for each block of the entry.

    The columns are the entry, whether the stripe is col, the first element, the distance of two
    elements, their number, the number of squares in each mean, and the block.
    """
    row_blocks = shape.rows // shape.block_rows
    row, column = (axis.ravel() for axis in np.indices((row_blocks, shape.column_blocks)))
    segments = np.zeros((len(row), 7), dtype=np.int64)
    segments[:, 0] = number
    segments[:, 2] = row * shape.block_rows * shape.column_blocks + column
    segments[:, 3] = shape.column_blocks
    segments[:, 4] = shape.block_rows
    segments[:, 5] = shape.block_columns
    segments[:, 6] = shape.first_block + row * shape.column_blocks + column
    return segments


def _column_segments(number: int, shape: EntryShape) -> np.ndarray:
    """Returns [programs, 7]: the segments of col [..., br, C], in ``_row_segments``'s columns."""
    size = shape.rows // shape.block_rows * shape.columns
    first = np.arange(0, size, tile_sizes.STRIPE_BLOCK)
    segments = np.zeros((len(first), 7), dtype=np.int64)
    segments[:, 0] = number
    segments[:, 1] = 1
    segments[:, 2] = first
    segments[:, 3] = 1
    segments[:, 4] = np.minimum(size - first, tile_sizes.STRIPE_BLOCK)
    segments[:, 5] = shape.block_rows
    return segments


def concatenate(
    arrays: dict[Key, list[np.ndarray]], dtype: type[np.generic] = np.int64
) -> dict[Key, WorkList]:
    """Concatenates each list of arrays whose first column is the entry's number."""
    joined = {key: np.concatenate(parts).astype(dtype) for key, parts in arrays.items()}
    return {key: WorkList(array, array[:, 0]) for key, array in joined.items()}


def ceil_div(size: int, step: int) -> int:
    return -(-size // step)


def _padded(offset: int) -> int:
    """Returns the next multiple of 32, at which a buffer can be read in vectors."""
    return ceil_div(offset, 32) * 32
