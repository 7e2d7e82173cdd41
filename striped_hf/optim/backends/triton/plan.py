"""The tiles of entries that each program of a kernel works on.

A ``Plan`` is made once for entries of certain shapes, dtypes and strides. An entry's number is its
position among the entries that the kernels support.
"""

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from striped_hf.optim import momentum
from striped_hf.optim.backends.triton import arguments, tile_sizes
from striped_hf.optim.backends.triton.addresses import Addresses
from striped_hf.optim.backends.triton.arguments import (
    EntryPointers,
    EntryShape,
    MatrixVariant,
    StatisticsVariant,
    VectorVariant,
)
from striped_hf.optim.backends.triton.workspace import Workspace, ceil_div, copy_each, tile_columns
from striped_hf.optim.interface import LOW_BITS, Entry, Sums

ALIGNMENT = 16  # bytes of a vector; also the number of int8 columns in a vector
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
MOMENTUM_DTYPES = {
    "float32": tl.float32,
    "bfloat16": tl.bfloat16,
    "int8": tl.int8,
    "int4": tl.uint8,
}
# the state's tensors, in the order in which ``EntryPointers`` has their addresses
_STATE_KEYS = EntryPointers._fields[2:-1]


# ---------------------------------------------------------------------------------------------
# which entries the kernels support
# ---------------------------------------------------------------------------------------------


class Strides(Enum):
    """The order in memory of the elements of a parameter and its gradient."""

    CONTIGUOUS = 0
    TRANSPOSED = 1  # every matrix is the transposed view of a contiguous one
    OTHER = 2


def strides_of(entry: Entry) -> Strides:
    """Returns the strides that parameter and gradient have in common."""
    tensors = [entry.param] if entry.grad is None else [entry.param, entry.grad]
    if all(map(Tensor.is_contiguous, tensors)):
        return Strides.CONTIGUOUS
    if entry.param.dim() >= 2 and all(tensor.mT.is_contiguous() for tensor in tensors):
        return Strides.TRANSPOSED
    return Strides.OTHER


def is_supported(entry: Entry, strides: Strides) -> bool:
    """Whether the kernels can step an entry. They count rows and columns in int32."""
    if strides is Strides.OTHER or not all(map(Tensor.is_contiguous, entry.state.values())):
        return False
    if entry.param.dim() < 2:
        return True
    columns = entry.param.shape[-1]
    return max(columns, entry.param.numel() // columns) < 1 << 30


# ---------------------------------------------------------------------------------------------
# tiles
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """For each variant of a kernel, the tiles that its programs work on.

    Attributes:
        statistics: [programs, 3] int32: entry, first row, first column.
        matrices: [programs, 3] int32, the same.
        vectors: [programs, 2] int32: entry, number of the tile.
    """

    statistics: dict[StatisticsVariant, Tensor]
    matrices: dict[MatrixVariant, Tensor]
    vectors: dict[VectorVariant, Tensor]


def _list_tiles(
    entries: list[Entry],
    strides: list[Strides],
    aligned: list[bool],
    workspace: Workspace,
    device: torch.device,
) -> Tiles:
    """Lists the tiles of all entries. The lists of arguments have one item per entry."""
    statistics, matrices, vectors = defaultdict(list), defaultdict(list), defaultdict(list)
    for number, entry in enumerate(entries):
        param_dtype = TRITON_DTYPES[entry.param.dtype]
        # a folded gradient's dtype does not count
        grad_dtype = tl.float32 if entry.grad is None else TRITON_DTYPES[entry.grad.dtype]
        if entry.param.dim() < 2:
            indices = np.arange(ceil_div(entry.param.numel(), tile_sizes.VECTOR_BLOCK))
            vector = VectorVariant(
                param_dtype, grad_dtype, aligned[number], LOW_BITS in entry.state
            )
            vectors[vector].append(_combinations(number, indices))
            continue
        shape, fused = workspace.shapes[number], workspace.fused_statistics[number]
        layout = {
            "aligned": aligned[number],
            "transposed": strides[number] is Strides.TRANSPOSED,
            "fused_statistics": fused,
        }
        first_rows = np.arange(0, shape.rows, shape.block_rows)[:, None]
        columns = np.arange(0, shape.columns, momentum.BLOCK_SIZE)
        first_columns = np.arange(0, shape.columns, shape.block_columns)
        if fused:  # the update's tiles, cut at the borders of blocks
            first_columns = np.union1d(columns, first_columns)
        else:
            in_block = np.arange(0, shape.block_columns, tile_columns(fused))
            first_columns = (first_columns[:, None] + in_block).ravel()
        statistics[StatisticsVariant(grad_dtype=grad_dtype, **layout)].append(
            _combinations(
                number,
                (first_rows + np.arange(0, shape.block_rows, shape.summed_rows)).ravel(),
                first_columns,
            )
        )
        # with more rows per program there are fewer partial sums
        updated_rows = shape.summed_rows if fused else tile_sizes.UPDATED_ROWS.value
        rows_of_programs = (first_rows + np.arange(0, shape.block_rows, updated_rows)).ravel()
        narrow = shape.column_blocks > 1 and shape.block_columns < momentum.BLOCK_SIZE
        in_one_block = _are_in_one_block(columns, shape) & (not narrow)
        for one_block in np.unique(in_one_block).tolist():
            matrix = MatrixVariant(
                param_dtype=param_dtype,
                grad_dtype=grad_dtype,
                momentum_dtype=MOMENTUM_DTYPES[entry.momentum_dtype],
                qmax=momentum.QMAX.get(entry.momentum_dtype, 0),
                one_block=one_block,
                narrow=narrow,
                large=is_large(shape.rows, shape.whole_start, shape.whole_stride),
                folded=entry.grad is None,
                low_bits=LOW_BITS in entry.state,
                **layout,
            )
            matrices[matrix].append(
                _combinations(number, rows_of_programs, columns[in_one_block == one_block])
            )
    # in reverse order: the cache still has the gradients that the statistics read last
    reverse = {key: [every[::-1] for every in reversed(tiles)] for key, tiles in matrices.items()}
    return Tiles(
        statistics=copy_each(statistics, device, np.int32),
        matrices=copy_each(dict(reversed(reverse.items())), device, np.int32),
        vectors=copy_each(vectors, device, np.int32),
    )


def _are_in_one_block(first_columns: np.ndarray, shape: EntryShape) -> np.ndarray:
    """Returns, for each tile of the update, whether all its columns are of one block."""
    last_columns = np.minimum(first_columns + momentum.BLOCK_SIZE, shape.columns) - 1
    return first_columns // shape.block_columns == last_columns // shape.block_columns


def is_large(rows: int, whole_start: int, whole_stride: int) -> bool:
    """Whether an element's index in the whole parameter may need more than 32 bits."""
    return whole_start + rows * whole_stride > 1 << 32


def _combinations(number: int, *axes: np.ndarray) -> np.ndarray:
    """Returns [combinations, 1 + axes]: all combinations of the axes' values, after ``number``."""
    grids = np.meshgrid(*axes, indexing="ij")
    columns = [np.full(grids[0].size, number), *(grid.ravel() for grid in grids)]
    return np.stack(columns, axis=1)


def launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Returns the context in which kernels are launched on a device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ---------------------------------------------------------------------------------------------
# plans
# ---------------------------------------------------------------------------------------------


class Plan:
    """The data that the steps of some entries need in addition to the entries' tensors.

    Attributes:
        lagged: Whether it is for lagged steps: their updates compute the statistics of all entries
            that have no tile across two blocks.
        device: The device of all entries.
        supported: The positions of the entries that the kernels step.
        fallback: The positions of the entries that the reference steps, because the kernels do not
            support their strides.
        workspace, addresses, tiles: The data of the supported entries.
        sums: The result of ``statistics``, but None for ``fallback``.
        pending: The list that ``statistics`` got, until ``update`` gets it, too.
    """

    def __init__(self, entries: list[Entry], strides: list[Strides], lagged: bool) -> None:
        self.lagged = lagged
        self.device = entries[0].param.device
        pairs = list(zip(entries, strides, strict=True))
        self.supported = [i for i, pair in enumerate(pairs) if is_supported(*pair)]
        self.fallback = [i for i, pair in enumerate(pairs) if not is_supported(*pair)]
        supported = [entries[i] for i in self.supported]
        self.workspace = Workspace(supported, lagged, self.device)
        self.addresses = Addresses(self.device)
        self.tiles = Tiles({}, {}, {})
        self.sums: list[Sums | None] = [None] * len(entries)
        for number, i in enumerate(self.supported):
            if entries[i].param.dim() >= 2:
                self.sums[i] = self.workspace.sums_of(number, entries[i])
        self.pending: list[Entry] | None = None
        self._strides = [strides[i] for i in self.supported]
        self._aligned: list[bool] | None = None

    def launching(self) -> AbstractContextManager[Any]:
        """The context in which kernels are launched on the plan's device."""
        return launching_on(self.device)

    def refresh(self, entries: list[Entry]) -> None:
        """Updates the addresses, and the tiles if the alignment of an address has changed."""
        addresses = self._addresses_of(entries)
        if entries[0].step == 0:
            self.addresses.stage(len(addresses))
        if self.addresses.are_current(addresses):
            return
        array = np.array(addresses, dtype=np.int64).reshape(-1, arguments.POINTERS.value)
        aligned = self._alignment(array)
        if aligned != self._aligned:
            supported = [entries[i] for i in self.supported]
            self.tiles = _list_tiles(supported, self._strides, aligned, self.workspace, self.device)
            self._aligned = aligned
        self.addresses.copy(addresses, array)

    def _addresses_of(self, entries: list[Entry]) -> list[int]:
        """Returns the fields of every supported entry's ``EntryPointers``, one after another."""
        addresses: list[int] = []
        first_step = entries[0].step
        for i in self.supported:
            entry = entries[i]
            state = entry.state
            # a step of 0 means that only the device knows it
            step = entry.step - first_step if entry.step else state["step"].data_ptr()
            grad = 0 if entry.grad is None else entry.grad.data_ptr()
            addresses += (entry.param.data_ptr(), grad)
            # the state of a part of a sharded matrix has no stripes; a vector's state has no scales
            addresses += [state[key].data_ptr() if key in state else 0 for key in _STATE_KEYS]
            addresses.append(step)
        return addresses

    def _alignment(self, addresses: np.ndarray) -> list[bool]:
        """Returns, for each entry, whether its rows can be read in vectors."""
        pointers = EntryPointers(*addresses.T)
        read = np.stack(
            (
                *(pointers.param, pointers.grad, pointers.exp_avg, pointers.exp_avg_sq),
                pointers.param_low_bits,
            )
        )
        aligned = (read % ALIGNMENT == 0).all(axis=0).tolist()
        return [
            is_aligned
            and strides is Strides.CONTIGUOUS
            and shape.columns % ALIGNMENT == shape.block_columns % ALIGNMENT == 0
            for is_aligned, strides, shape in zip(
                aligned, self._strides, self.workspace.shapes, strict=True
            )
        ]
