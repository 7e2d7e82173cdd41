"""The step of ``reference.py`` on a GPU: a few launches for all tensors of a table.

A step over matrices is four launches, whatever their number: sums of squares over tiles of each
gradient, the tiles' sums added up in a fixed order, the stripes, and the update. A lagged step is
the roots of the stripes, an update that adds up its tiles' squares, their sums, and the stripes;
only first steps, and blocks whose columns are not whole tiles, have sums of squares before it. 0-D
and 1-D parameters take one launch of their own. Every launch has a list of tiles, each naming an
entry of the table, and finds the entry's tensors in a table of pointers; a launch is repeated only
for what must be compiled differently, such as another dtype.

What depends on shapes alone (lists of tiles, offsets, buffers) is a ``_Plan``, made once. The
pointers go to the device when one has changed, by an asynchronous copy from pinned memory. Nothing
waits for the device, no kernel uses atomics, and every sum has a fixed order: runs repeat bit for
bit.

Importing it raises ImportError where no kernel can run.
"""

import logging
import math
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from striped_hf.optim import momentum
from striped_hf.optim.backends import reference
from striped_hf.optim.backends.reference import Entry, Roots, Settings, Sums
from striped_hf.optim.backends.triton import kernels as jit
from striped_hf.optim.backends.triton.kernels import tl

logger = logging.getLogger(__name__)

DEVICE_TYPES = ("cpu",) if jit.INTERPRETED else ("cuda",)
CAPTURABLE = True  # steps and learning rates may be known to the device only

# ---------------------------------------------------------------------------------------------
# the functions of a backend
# ---------------------------------------------------------------------------------------------


def step(table: list[Entry], settings: Settings) -> None:
    """As ``reference.step``; a lagged one reads most gradients from memory only once."""
    if not table:
        return
    plan = _plan(table, one_pass=settings.lagged)
    plan.refresh(table)
    with plan.on_device():
        plan.statistics(table)
        plan.update(table[0].step, settings)
    if plan.others:
        reference.step([table[i] for i in plan.others], settings)


def statistics(table: list[Entry]) -> list[Sums | None]:
    """Sums the squares of every gradient by row and by column.

    Args:
        table: Parameters of any shape on one device, none empty; gradients of any floating dtype.

    Returns:
        As ``reference.statistics``: for each matrix the row sums [..., R, bc] and the column sums
        [..., br, C], float32. They live in one buffer, which the next call for the same
        parameters overwrites, and where an update may find the roots.

    Raises:
        RuntimeError: A CUDA graph is being captured, and there was no such step before it.
    """
    if not table:
        return []
    plan = _plan(table, one_pass=False)
    plan.refresh(table)
    plan.table = table
    with plan.on_device():
        plan.statistics(table)
    sums = list(plan.sums)
    if plan.others:
        for i, pair in zip(
            plan.others, reference.statistics([table[i] for i in plan.others]), strict=True
        ):
            sums[i] = pair
    return sums


def update(table: list[Entry], roots: list[Roots | None], settings: Settings) -> None:
    """Updates momentum and parameter of every entry in place; as ``reference.update``.

    Args:
        table: What was given to ``statistics``.
        roots: a and c, in tensors of the sums' shapes.
        settings: Of the param group.
    """
    if not table:
        return
    plan = _plan(table, one_pass=False)
    if plan.table is not table:
        plan.refresh(table)
    plan.table = None
    with plan.on_device():
        plan.take(roots)
        plan.update(table[0].step, settings, has_roots=True)
    if plan.others:
        reference.update([table[i] for i in plan.others], [roots[i] for i in plan.others], settings)


# ---------------------------------------------------------------------------------------------
# plans
# ---------------------------------------------------------------------------------------------

_CONTIGUOUS, _TRANSPOSED, _STRIDED = range(3)
# from jit.EXP_AVG_POINTER on
_POINTED_AT = ("exp_avg", "exp_avg_scale", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")
_ALIGNMENT = 16  # bytes of a vector load; also the columns that rows of int8 need for it

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_STORED = {
    "float32": tl.float32,
    "bfloat16": tl.bfloat16,
    "int8": tl.int8,
    "int4": tl.uint8,
}


# Newer versions of Triton ask for a choice: the kernels are right either way, and shorter with it.
_OPTIONS = {"enable_fp_fusion": True}


class _Plan:
    """What a step over one table needs beside the tensors' addresses.

    ``others`` are the positions of entries whose tensors have strides that no kernel takes: the
    reference steps them.

    With ``one_pass`` it is a lagged step's. Its updates add up the squares that the statistics
    would, but those of entries with a tile across two blocks.
    """

    def __init__(self, table: list[Entry], layouts: list[int], one_pass: bool) -> None:
        self.one_pass = one_pass
        self.device = table[0].param.device
        self.table: list[Entry] | None = None  # between statistics and update
        self.layouts = layouts
        self.own = [i for i, entry in enumerate(table) if _is_own(entry, layouts[i])]
        own = set(self.own)
        self.others = [i for i in range(len(table)) if i not in own]
        if self.others:
            _warn_of_strides(tuple(table[self.others[0]].param.shape))
        self.addresses: list[int] | None = None
        self.aligned: list[bool] | None = None
        self.spare: list[Tensor] = []
        self.captured: list[tuple[Tensor, Tensor]] = []
        self.pointers = torch.empty(0)
        self.sums: list[Sums | None] = [None] * len(table)
        self._lay_out([table[i] for i in self.own])

    def on_device(self) -> AbstractContextManager[Any]:
        """The context in which this plan's kernels are launched."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    # -- shapes ---------------------------------------------------------------------------------

    def _lay_out(self, entries: list[Entry]) -> None:
        """Places every entry in the buffers and lists what has no dtype: sums and stripes."""
        self.shapes = np.zeros((len(entries), jit.SHAPES.value), dtype=np.int64)
        total = sum(entry.param.numel() for entry in entries if entry.param.dim() >= 2)
        strip = jit.STRIP_ROWS if total < jit.LARGE_MODEL else jit.LARGE_STRIP_ROWS
        partials = sums = cells = 0
        jobs: dict[bool, list[np.ndarray]] = defaultdict(list)  # by whether they take one pass
        segments: dict[bool, list[np.ndarray]] = defaultdict(list)
        for number, entry in enumerate(entries):
            if entry.param.dim() < 2:
                self.shapes[number, jit.COLUMNS.value] = entry.param.numel()
                self.shapes[number, jit.START.value] = entry.start
                continue
            matrix_rows, columns = entry.param.shape[-2:]
            rows = entry.param.numel() // columns
            row_blocks, col_blocks = entry.blocks
            height, width = matrix_rows // row_blocks, columns // col_blocks
            bands = rows // height  # rows of blocks, over all matrices
            one_pass = self._is_one_pass(width, col_blocks)
            strips, tiles = _ceil(height, strip), _ceil(width, _tile_columns(one_pass))
            row_partials, col_partials = partials, partials + col_blocks * tiles * rows
            partials = col_partials + bands * strips * columns
            row_sums, col_sums = sums, _padded(sums + rows * col_blocks)
            sums = _padded(col_sums + bands * columns)
            self.shapes[number] = (
                *(rows, matrix_rows, columns, height, width, col_blocks, strip),
                *(row_partials, col_partials, row_sums, col_sums, cells),
                *(entry.start, entry.pitch or columns),
            )
            jobs[one_pass] += _row_jobs(rows, col_blocks, tiles, row_partials, row_sums)
            jobs[one_pass] += _col_jobs(bands, columns, strips, col_partials, col_sums)
            segments[one_pass] += [
                _row_segments(number, bands, col_blocks, height, width, cells),
                _col_segments(number, bands * columns, height),
            ]
            cells += bands * col_blocks

        self.partials_size = partials
        self.buffer = torch.zeros(sums, dtype=torch.float32, device=self.device)
        self.cells = torch.zeros(cells, dtype=torch.float32, device=self.device)
        scalars = (len(entries), jit.SCALARS.value)
        self.scalars = torch.zeros(scalars, dtype=torch.int32, device=self.device)
        self.device_shapes = self._put(self.shapes)
        self.jobs = {key: self._put(np.concatenate(rows)) for key, rows in jobs.items()}
        self.segments = {key: self._put(np.concatenate(rows)) for key, rows in segments.items()}
        for number, (i, entry) in enumerate(zip(self.own, entries, strict=True)):
            if entry.param.dim() >= 2:
                self.sums[i] = self._sums_of(number, entry)

    def _is_one_pass(self, width: int, col_blocks: int) -> bool:
        """Whether a lagged update can add up squares: no tile has columns of two blocks."""
        return self.one_pass and (col_blocks == 1 or width % momentum.BLOCK_SIZE == 0)

    def _sums_of(self, number: int, entry: Entry) -> Sums:
        *matrices, rows, columns = entry.param.shape
        row_blocks, col_blocks = entry.blocks
        views = []
        for column, shape in (
            (jit.ROW_SUMS, (*matrices, rows, col_blocks)),
            (jit.COL_SUMS, (*matrices, row_blocks, columns)),
        ):
            start = int(self.shapes[number, column.value])
            views.append(self.buffer[start : start + math.prod(shape)].view(shape))
        return views[0], views[1]

    def _list_tiles(self, entries: list[Entry], aligned: list[bool]) -> None:
        """Lists the tiles of what is compiled for dtypes and alignment."""
        statistics, matrices, vectors = defaultdict(list), defaultdict(list), defaultdict(list)
        for number, entry in enumerate(entries):
            dtypes = (_TRITON_DTYPES[entry.param.dtype], _TRITON_DTYPES[entry.grad.dtype])
            if entry.param.dim() < 2:
                blocks = np.arange(_ceil(entry.param.numel(), jit.VECTOR_BLOCK.value))
                vectors[(*dtypes, aligned[number])].append(_rows_of(number, blocks))
                continue
            rows, _, columns, height, width, col_blocks, strip = self.shapes[number, :7].tolist()
            transposed = self.layouts[self.own[number]] == _TRANSPOSED
            bands = np.arange(rows // height)[:, None] * height
            blocks = np.arange(col_blocks)[:, None] * width
            one_pass = self._is_one_pass(width, col_blocks)
            statistics[dtypes[1], aligned[number], transposed, one_pass].append(
                _rows_of(
                    number,
                    (bands + np.arange(0, height, strip)).ravel(),
                    (blocks + np.arange(0, width, _tile_columns(one_pass))).ravel(),
                )
            )
            narrow = col_blocks > 1 and width < momentum.BLOCK_SIZE
            large = entry.start + rows * (entry.pitch or columns) > 1 << 32
            stored = (_STORED[entry.momentum_dtype], momentum.QMAX.get(entry.momentum_dtype, 0))
            layout = (aligned[number], transposed, narrow, large, one_pass)
            # the larger strip of the statistics leaves fewer partial sums
            update_strip = strip if one_pass else jit.UPDATE_STRIP.value
            matrices[(*dtypes, *stored, *layout)].append(
                _rows_of(
                    number,
                    (bands + np.arange(0, height, update_strip)).ravel(),
                    np.arange(0, columns, momentum.BLOCK_SIZE),
                )
            )
        self.statistics_tiles = {key: self._put_tiles(tiles) for key, tiles in statistics.items()}
        # backwards: the gradients that the statistics read last are still in the cache
        self.matrix_tiles = {
            key: self._put_tiles(tiles, backwards=True) for key, tiles in reversed(matrices.items())
        }
        self.vector_tiles = {key: self._put_tiles(tiles) for key, tiles in vectors.items()}

    def _put_tiles(self, tiles: list[np.ndarray], backwards: bool = False) -> Tensor:
        every = np.concatenate(tiles).astype(np.int32)
        return self._put(every[::-1].copy() if backwards else every)

    # -- addresses ------------------------------------------------------------------------------

    def refresh(self, table: list[Entry]) -> None:
        """Brings the addresses on the device up to date."""
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        addresses = self._addresses(table)
        if table[0].step == 0 and self.device.type == "cuda" and not capturing:
            size = len(addresses)
            while len(self.spare) < _SPARE:
                self.spare.append(torch.empty(size, dtype=torch.int64, pin_memory=True))
        if addresses == self.addresses and not capturing:
            return
        array = np.array(addresses, dtype=np.int64).reshape(-1, jit.POINTERS.value)
        aligned = self._alignment(array)
        if aligned != self.aligned:
            self.aligned = aligned
            self._list_tiles([table[i] for i in self.own], aligned)
        if not capturing:
            self.addresses = addresses
            self.pointers = self._put(array)
            return
        # A graph replays the copy: host and device memory are its own for good. Pinned memory
        # cannot be asked for during a capture, so steps outside of one leave some.
        if not self.spare:
            raise RuntimeError(
                f"StripedAdamW: more than {_SPARE} steps were captured since the last one outside "
                "of a graph: take one before capturing more"
            )
        host = self.spare.pop()
        host.copy_(torch.from_numpy(array).flatten())
        self.pointers = host.to(self.device, non_blocking=True)
        self.captured.append((host, self.pointers))
        self.addresses = None

    def _addresses(self, table: list[Entry]) -> list[int]:
        addresses: list[int] = []
        first_step = table[0].step
        for i in self.own:
            entry = table[i]
            state = entry.state
            # a step of 0 stands for one that only the device knows
            step = entry.step - first_step if entry.step else state["step"].data_ptr()
            addresses += (entry.param.data_ptr(), entry.grad.data_ptr())
            # a part of a sharded matrix has no stripes of its own, and a vector has no scales
            addresses += [state[key].data_ptr() if key in state else 0 for key in _POINTED_AT]
            addresses.append(step)
        return addresses

    def _alignment(self, addresses: np.ndarray) -> list[bool]:
        """For each entry, whether its rows can be read in vectors."""
        loaded = [
            jit.PARAM_POINTER.value,
            jit.GRAD_POINTER.value,
            jit.EXP_AVG_POINTER.value,
            jit.EXP_AVG_SQ_POINTER.value,
        ]
        lengths = self.shapes[:, [jit.COLUMNS.value, jit.BLOCK_WIDTH.value]]
        aligned = (addresses[:, loaded] % _ALIGNMENT == 0).all(1) & (lengths % 16 == 0).all(1)
        contiguous = np.array([self.layouts[i] == _CONTIGUOUS for i in self.own], dtype=bool)
        return (aligned & contiguous).tolist()

    def _put(self, array: np.ndarray) -> Tensor:
        """A copy on the device that nothing waits for."""
        host = torch.from_numpy(array)
        if self.device.type == "cpu":
            return host.clone()
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "StripedAdamW: the first step of these parameters is being captured in a CUDA "
                "graph: take one before capturing, as torch's notes on CUDA graphs do"
            )
        # torch keeps pinned memory from being used again before the copy is over
        return host.pin_memory().to(self.device, non_blocking=True)

    # -- launches -------------------------------------------------------------------------------

    def statistics(self, table: list[Entry]) -> None:
        """Fills the buffer with sums: of what takes one pass, only those of first steps."""
        # a step of 0 may be the first: the kernel knows
        first_step = any(table[i].step <= 1 for i in self.own)
        launched = {one_pass for one_pass in self.jobs if first_step or not one_pass}
        if not launched:
            return
        partials = self._new_partials()
        step = table[0].step
        for (grad, aligned, transposed, one_pass), tiles in self.statistics_tiles.items():
            if one_pass not in launched:
                continue
            jit.statistics_kernel[(len(tiles),)](
                *(tiles, self.pointers, self.device_shapes, partials, step),
                GRAD=grad,
                ALIGNED=aligned,
                TRANSPOSED=transposed,
                ONE_PASS=one_pass,
                CAPTURABLE=one_pass and step == 0,
                TILE_ROWS=jit.STATISTICS_ROWS,
                TILE_COLUMNS=_tile_columns(one_pass),
                num_warps=4,
                **_OPTIONS,
            )
        for one_pass in launched:
            self._combine(self.jobs[one_pass], partials)

    def _new_partials(self) -> Tensor:
        return torch.empty(self.partials_size, dtype=torch.float32, device=self.device)

    def _combine(self, jobs: Tensor, partials: Tensor) -> None:
        jit.combine_kernel[(len(jobs),)](
            *(jobs, partials, self.buffer),
            PARTIALS=jit.COMBINE_PARTIALS,
            WIDTH=jit.COMBINE_WIDTH,
            num_warps=4,
            **_OPTIONS,
        )

    def take(self, roots: list[Roots | None]) -> None:
        """Copies roots to the sums' place in the buffer."""
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for i in self.own:
            own, given = self.sums[i], roots[i]
            if own is not None and given is not None:
                targets += own
                sources += given
        if targets:
            torch._foreach_copy_(targets, sources)

    def update(self, step: int, settings: Settings, has_roots: bool = False) -> None:
        """Updates everything, from the sums or the roots in the buffer.

        ``step`` is the first entry's, 0 where it is on the device.
        """
        lr: Any = settings.lr
        common = {"LR_IN_MEMORY": isinstance(lr, Tensor), "CAPTURABLE": step == 0}
        log_beta1, log_beta2 = _log(settings.beta1), _log(settings.beta2)
        beta2, weight_decay, eps = settings.beta2, settings.weight_decay, settings.eps
        one_minus_beta1, one_minus_beta2 = 1 - settings.beta1, 1 - settings.beta2
        flags = {"MAXIMIZE": settings.maximize, "NESTEROV": settings.nesterov}
        tables = (self.pointers, self.device_shapes)

        def stripes(one_pass: bool, roots: bool) -> None:
            segments = self.segments[one_pass]
            jit.stripes_kernel[(len(segments),)](
                *(segments, *tables, self.buffer, self.cells, self.scalars),
                *(lr, step, log_beta1, log_beta2, beta2, one_minus_beta2, weight_decay),
                **common,
                LAGGED=settings.lagged,
                ONE_PASS=one_pass,
                ROOTS=roots,
                HAS_ROOTS=has_roots,
                BLOCK=jit.STRIPE_BLOCK,
                num_warps=8,
                **_OPTIONS,
            )

        for one_pass in self.segments:
            stripes(one_pass, roots=True)
        partials = self._new_partials() if True in self.segments else self.buffer
        for key, tiles in self.matrix_tiles.items():
            param, grad, stored, qmax, aligned, transposed, narrow, large, one_pass = key
            jit.matrices_kernel[(len(tiles),)](
                *(tiles, *tables, self.buffer, self.cells, self.scalars, partials),
                *(one_minus_beta1, eps),
                PARAM=param,
                GRAD=grad,
                MOMENTUM=stored,
                QMAX=qmax,
                ALIGNED=aligned,
                TRANSPOSED=transposed,
                NARROW=narrow,
                LARGE=large,
                LAGGED=settings.lagged,
                SUMS=one_pass,
                **flags,
                STOCHASTIC=settings.stochastic_rounding and param != tl.float32,
                TILE_ROWS=jit.UPDATE_ROWS.value,
                num_warps=4,
                **_OPTIONS,
            )
        if True in self.segments:
            self._combine(self.jobs[True], partials)
            stripes(one_pass=True, roots=False)
        for (param, grad, aligned), tiles in self.vector_tiles.items():
            jit.vectors_kernel[(len(tiles),)](
                *(tiles, *tables, lr, step, log_beta1, log_beta2, one_minus_beta1),
                *(beta2, one_minus_beta2, eps, weight_decay),
                PARAM=param,
                GRAD=grad,
                ALIGNED=aligned,
                **common,
                **flags,
                STOCHASTIC=settings.stochastic_rounding and param != tl.float32,
                BLOCK=jit.VECTOR_BLOCK.value,
                num_warps=4,
                **_OPTIONS,
            )


# By the table's first parameter, so that a plan goes when the model does; a model whose gradients
# come and go (experts, frozen layers) has several.
_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_PLANS_KEPT = 16
_SPARE = 4  # pinned tables of addresses that a plan keeps for captures


def _plan(table: list[Entry], one_pass: bool) -> _Plan:
    """Returns the plan of a table, which it has where one like it was seen before."""
    plans: dict[tuple[Any, ...], _Plan] = _plans.setdefault(table[0].param, {})
    for plan in plans.values():
        if plan.table is table and plan.one_pass == one_pass:
            return plan
    layouts = [_layout(entry) for entry in table]
    key = (
        table[0].param.device,
        one_pass,
        tuple(
            (e.param.shape, e.param.dtype, e.grad.dtype, *e[3:5], *e[6:], layout)
            for e, layout in zip(table, layouts, strict=True)
        ),
    )
    if key not in plans:
        if any(
            e.step == 0 and not _is_own(e, layout) for e, layout in zip(table, layouts, strict=True)
        ):
            raise RuntimeError(
                "capturable=True steps contiguous and transposed parameters only, and one has "
                "other strides: make it contiguous"
            )
        # what a graph was captured with must stay
        idle = [old for old, plan in plans.items() if not plan.captured]
        for old in idle[: max(0, len(idle) + 1 - _PLANS_KEPT)]:
            del plans[old]
        plans[key] = _Plan(table, layouts, one_pass)
    return plans[key]


def _layout(entry: Entry) -> int:
    param, grad = entry.param, entry.grad
    if param.is_contiguous() and grad.is_contiguous():
        return _CONTIGUOUS
    if param.dim() >= 2 and param.mT.is_contiguous() and grad.mT.is_contiguous():
        return _TRANSPOSED
    return _STRIDED


def _is_own(entry: Entry, layout: int) -> bool:
    """Whether the kernels take an entry. Numbers of rows and columns are int32 there."""
    if layout == _STRIDED or not all(map(Tensor.is_contiguous, entry.state.values())):
        return False
    if entry.param.dim() < 2:
        return True
    columns = entry.param.shape[-1]
    return max(columns, entry.param.numel() // columns) < 1 << 30


@cache  # once
def _warn_once() -> None:
    logger.warning(
        "StripedAdamW: parameters, gradients or state that are neither contiguous nor transposed "
        "are stepped in plain PyTorch, several times slower: make them contiguous"
    )


def _warn_of_strides(shape: tuple[int, ...]) -> None:
    _warn_once()
    logger.debug("StripedAdamW: the first such parameter has shape %s", shape)


def _tile_columns(one_pass: bool) -> int:
    """Columns that one program adds up: of one pass, what a program of the update has."""
    return momentum.BLOCK_SIZE if one_pass else jit.STATISTICS_COLUMNS


def _ceil(size: int, step: int) -> int:
    return -(-size // step)


def _padded(offset: int) -> int:
    """The next multiple of 32, at which a buffer can be read in vectors."""
    return _ceil(offset, 32) * 32


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _rows_of(number: int, *axes: np.ndarray) -> np.ndarray:
    """[product of the axes' lengths, 1 + axes]: the number before every combination, in order."""
    grids = np.meshgrid(*axes, indexing="ij")
    columns = [np.full(grids[0].size, number), *(grid.ravel() for grid in grids)]
    return np.stack(columns, axis=1)


def _row_jobs(rows: int, col_blocks: int, tiles: int, partials: int, sums: int) -> list[np.ndarray]:
    """The combine kernel's jobs for row sums: of each block's tiles, [tiles, rows] to [rows]."""
    return [
        _jobs(rows, partials + q * tiles * rows, tiles, rows, sums + q, col_blocks)
        for q in range(col_blocks)
    ]


def _col_jobs(bands: int, columns: int, strips: int, partials: int, sums: int) -> list[np.ndarray]:
    """The combine kernel's jobs for column sums: of each band's strips, [strips, C] to [C]."""
    if strips == 1:  # nothing to add up: one copy of all bands
        return [_jobs(bands * columns, partials, 1, 0, sums, 1)]
    return [
        _jobs(
            columns, partials + band * strips * columns, strips, columns, sums + band * columns, 1
        )
        for band in range(bands)
    ]


def _jobs(
    size: int, partials: int, count: int, stride: int, sums: int, sums_stride: int
) -> np.ndarray:
    """[programs, 6]: adds up ``count`` vectors of ``size``, ``stride`` apart."""
    first = np.arange(0, size, jit.COMBINE_WIDTH)
    jobs = np.empty((len(first), 6), dtype=np.int64)
    jobs[:, 0] = partials + first
    jobs[:, 1] = count
    jobs[:, 2] = stride
    jobs[:, 3] = np.minimum(size - first, jit.COMBINE_WIDTH)
    jobs[:, 4] = sums + first * sums_stride
    jobs[:, 5] = sums_stride
    return jobs


def _row_segments(
    number: int, bands: int, col_blocks: int, height: int, width: int, cells: int
) -> np.ndarray:
    """[bands * bc, 7]: the stripes kernel's segments of row [..., R, bc], one for each cell."""
    band, block = (axis.ravel() for axis in np.indices((bands, col_blocks)))
    segments = np.zeros((len(band), 7), dtype=np.int64)
    segments[:, 0] = number
    segments[:, 2] = band * height * col_blocks + block
    segments[:, 3] = col_blocks
    segments[:, 4] = height
    segments[:, 5] = width
    segments[:, 6] = cells + band * col_blocks + block
    return segments


def _col_segments(number: int, size: int, height: int) -> np.ndarray:
    """[programs, 7]: the stripes kernel's segments of col [..., br, C], ``size`` in all."""
    first = np.arange(0, size, jit.STRIPE_BLOCK)
    segments = np.zeros((len(first), 7), dtype=np.int64)
    segments[:, 0] = number
    segments[:, 1] = 1
    segments[:, 2] = first
    segments[:, 3] = 1
    segments[:, 4] = np.minimum(size - first, jit.STRIPE_BLOCK)
    segments[:, 5] = height
    return segments
