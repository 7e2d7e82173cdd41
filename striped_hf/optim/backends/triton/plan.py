"""The work of each program of a kernel, and the buffers of a step: made once for some entries.

A ``Plan`` depends on the kinds of its entries alone, so that any entries of these kinds can take
their places. An entry's number is its place in the plan.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from striped_hf.optim import momentum
from striped_hf.optim.backends.triton import tile_sizes
from striped_hf.optim.backends.triton.addresses import Addresses, copy_to_device
from striped_hf.optim.backends.triton.arguments import (
    EntryShape,
    MatrixVariant,
    StatisticsVariant,
    VectorVariant,
)
from striped_hf.optim.backends.triton.kinds import (
    MOMENTUM_DTYPES,
    TRITON_DTYPES,
    EntryKind,
    Strides,
)
from striped_hf.optim.backends.triton.workspace import (
    WorkList,
    Workspace,
    ceil_div,
    concatenate,
    tile_columns,
)

# ---------------------------------------------------------------------------------------------
# tiles
# ---------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """For each variant of a kernel, the tiles that its programs work on.

    Attributes:
        statistics: [programs, 3] int32: entry, first row, first column.
        matrices: [programs, 3] int32, the same.
        vectors: [programs, 2] int32: entry, number of the tile.
    """

    statistics: dict[StatisticsVariant, WorkList]
    matrices: dict[MatrixVariant, WorkList]
    vectors: dict[VectorVariant, WorkList]


def _list_tiles(kinds: Sequence[EntryKind], workspace: Workspace) -> Tiles:
    """Lists the tiles of all entries."""
    statistics, matrices, vectors = defaultdict(list), defaultdict(list), defaultdict(list)
    for number, kind in enumerate(kinds):
        param_dtype = TRITON_DTYPES[kind.param_dtype]
        # a folded gradient's dtype does not count
        grad_dtype = tl.float32 if kind.grad_dtype is None else TRITON_DTYPES[kind.grad_dtype]
        if not kind.is_matrix:
            indices = np.arange(ceil_div(kind.shape.numel(), tile_sizes.VECTOR_BLOCK))
            vector = VectorVariant(param_dtype, grad_dtype, kind.aligned, kind.low_bits)
            vectors[vector].append(_combinations(number, indices))
            continue
        shape, fused = workspace.shapes[number], workspace.fused_statistics[number]
        layout = {
            "aligned": kind.aligned,
            "transposed": kind.strides is Strides.TRANSPOSED,
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
                momentum_dtype=MOMENTUM_DTYPES[kind.momentum_dtype],
                qmax=momentum.QMAX.get(kind.momentum_dtype, 0),
                one_block=one_block,
                narrow=narrow,
                large=is_large(shape.rows, shape.whole_start, shape.whole_stride),
                folded=kind.grad_dtype is None,
                low_bits=kind.low_bits,
                **layout,
            )
            matrices[matrix].append(
                _combinations(number, rows_of_programs, columns[in_one_block == one_block])
            )
    # in reverse order: the cache still has the gradients that the statistics read last
    reverse = {key: [every[::-1] for every in reversed(tiles)] for key, tiles in matrices.items()}
    return Tiles(
        statistics=concatenate(statistics, np.int32),
        matrices=concatenate(dict(reversed(reverse.items())), np.int32),
        vectors=concatenate(vectors, np.int32),
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


class Programs(NamedTuple):
    """The work of the kernels' programs on some entries of a plan, on the device.

    Attributes:
        statistics, matrices, vectors: As in ``Tiles``.
        reductions, segments, means: As in ``Workspace``.
    """

    statistics: dict[StatisticsVariant, Tensor]
    matrices: dict[MatrixVariant, Tensor]
    vectors: dict[VectorVariant, Tensor]
    reductions: dict[bool, Tensor]
    segments: dict[bool, Tensor]
    means: dict[None, Tensor]


class Plan:
    """The data that the steps of some entries need in addition to the entries' tensors.

    Attributes:
        kinds: The kind of each entry, by number.
        workspace: Its buffers, and the work on them.
        addresses: The addresses of the tensors of a step.
        captured: The data that CUDA graphs read in every replay.
    """

    _SELECTIONS_KEPT = 8

    def __init__(self, kinds: tuple[EntryKind, ...], lagged: bool, device: torch.device) -> None:
        """Makes a plan.

        Args:
            kinds: The kind of each entry.
            lagged: Whether it is for lagged steps: their updates compute the statistics of all
                entries that have no tile across two blocks.
            device: The device of all entries.

        Raises:
            RuntimeError: A CUDA graph is being captured.
        """
        self.kinds = kinds
        self.workspace = Workspace(kinds, lagged, device)
        self.addresses = Addresses(device, len(kinds))
        self.captured: list[Any] = []
        self._device = device
        self._tiles = _list_tiles(kinds, self.workspace)
        self._programs: OrderedDict[bytes, Programs] = OrderedDict()
        self._counts = Counter(kinds)
        self._stream = _current_stream(device)
        self._programs_on_stream: set[int] = set()  # by ``id``
        self.programs_of(range(len(kinds)))

    def numbers_of(self, kinds: Sequence[EntryKind]) -> list[int] | None:
        """Returns a number for each of some entries by their kinds; None: the plan has too few."""
        if kinds == self.kinds:
            return list(range(len(kinds)))
        if not Counter(kinds) <= self._counts:
            return None
        free = defaultdict(list)
        for number in reversed(range(len(self.kinds))):
            free[self.kinds[number]].append(number)
        return [free[kind].pop() for kind in kinds]

    def programs_of(self, numbers: Sequence[int]) -> Programs:
        """Returns the work on some of the entries.

        Raises:
            RuntimeError: A CUDA graph is being captured, and no step had these entries before.
        """
        chosen = np.zeros(len(self.kinds), dtype=bool)
        chosen[list(numbers)] = True
        key = chosen.tobytes()
        if key in self._programs:
            self._programs.move_to_end(key)
            return self._programs[key]
        workspace = self.workspace
        lists = (*self._tiles, workspace.reductions, workspace.segments, workspace.means)
        programs = Programs(*(_copy_each(of_kernel, chosen, self._device) for of_kernel in lists))
        if len(self._programs) >= self._SELECTIONS_KEPT:
            self._programs.popitem(last=False)
        self._programs[key] = programs
        return programs

    def set_addresses(self, numbers: list[int], pointers: np.ndarray, programs: Programs) -> None:
        """Brings the addresses of a step's tensors to the device, and keeps what a graph needs.

        Raises:
            RuntimeError: Too many steps were captured since the last one outside of a graph.
        """
        captured = self.addresses.set(numbers, pointers)
        if captured is not None:
            self.captured.append((captured, programs))

    def use_on_current_stream(self, programs: Programs) -> None:
        """Lets the current stream finish its work before the memory of the plan is used again.

        The allocator reuses freed memory as soon as the stream on which it was allocated has got
        there, and does not know of other streams. Everything that the plan allocates after this
        call, and before the stream changes again, is allocated on the current stream.
        """
        stream = _current_stream(self._device)
        if stream is None:
            return
        if stream != self._stream:
            self._stream = stream
            self._programs_on_stream = set()
            for tensor in (*self.workspace.buffers(), self.addresses.on_device):
                tensor.record_stream(stream)
        if id(programs) not in self._programs_on_stream:
            self._programs_on_stream.add(id(programs))
            for of_kernel in programs:
                for tensor in of_kernel.values():
                    tensor.record_stream(stream)


def _copy_each(
    lists: dict[Any, WorkList], chosen: np.ndarray, device: torch.device
) -> dict[Any, Tensor]:
    """Copies the work on the chosen entries to the device; leaves out empty lists."""
    arrays = {key: of_key.array[chosen[of_key.entries]] for key, of_key in lists.items()}
    return {key: copy_to_device(array, device) for key, array in arrays.items() if len(array)}


def _current_stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class Plans:
    """The plans of an optimizer's steps on one device.

    A model has several if it has several param groups, or if some of its parameters have gradients
    in some steps only. A step may use a part of a plan: then only the work of its programs is
    listed anew. Where sets keep differing (experts), one plan for all of them replaces the others.
    """

    ENTRIES_KEPT = 8192  # of all plans together, before one plan replaces them

    def __init__(self, lagged: bool, device: torch.device) -> None:
        self._lagged = lagged
        self._device = device
        self._plans: dict[tuple[EntryKind, ...], Plan] = {}
        self._are_many = False

    def find(self, kinds: tuple[EntryKind, ...]) -> tuple[Plan, list[int]]:
        """Returns a plan for entries of these kinds, and the entries' numbers in it.

        Raises:
            RuntimeError: A CUDA graph is being captured, and there was no such step before.
        """
        plan = self._plans.get(kinds)
        if plan is not None:
            return plan, list(range(len(kinds)))
        kept = sum(map(len, self._plans))
        self._are_many = self._are_many or kept + len(kinds) > max(
            self.ENTRIES_KEPT, 3 * len(kinds)
        )
        for plan in self._plans.values():
            if self._are_many or len(plan.kinds) <= 2 * len(kinds):
                numbers = plan.numbers_of(kinds)
                if numbers is not None:
                    return plan, numbers
        counts = Counter(kinds)
        if self._are_many:
            for known in self._plans:
                counts |= Counter(known)
            plan = self._add(tuple(counts.elements()))
            # CUDA graphs need the plans that they were captured with
            self._plans = {key: p for key, p in self._plans.items() if p is plan or p.captured}
        else:
            plan = self._add(kinds)
        numbers = plan.numbers_of(kinds)
        assert numbers is not None  # it has all of these kinds
        return plan, numbers

    def _add(self, kinds: tuple[EntryKind, ...]) -> Plan:
        self._plans[kinds] = Plan(kinds, self._lagged, self._device)
        return self._plans[kinds]
