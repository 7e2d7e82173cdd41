"""Folds the gradient of one matrix: the launches of ``fold_kernels.py``."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from striped_hf.optim import momentum
from striped_hf.optim.backends.triton import fold_kernels, tile_sizes
from striped_hf.optim.backends.triton.arguments import OPTIONS, FoldVariant, constants
from striped_hf.optim.backends.triton.plan import (
    ALIGNMENT,
    MOMENTUM_DTYPES,
    TRITON_DTYPES,
    is_large,
    launching_on,
)
from striped_hf.optim.backends.triton.workspace import ceil_div
from striped_hf.optim.interface import Blocks, Entry, Folded, Settings

_SUM_WIDTH = tile_sizes.COMBINED_WIDTH


class _Geometry(NamedTuple):
    """The numbers that depend on a matrix's shape and blocks alone."""

    sizes: dict[str, int]  # arguments of both kernels
    folded_rows: int
    one_block: bool  # as in ``FoldVariant``
    vectors: bool  # rows are whole vectors
    programs: int  # of ``fold_kernel``
    sum_programs: int  # of ``add_folded_kernel``
    partials: int  # elements of the buffer


def can_fold(entry: Entry, folded: Folded) -> bool:
    """Whether the kernels support the strides, and count rows and columns in int32."""
    tensors = [entry.gradient, *entry.state.values(), folded.row_sums, folded.col_sums]
    if folded.sketch is not None:
        tensors.append(folded.sketch)
    *_, columns = entry.param.shape
    small = max(columns, entry.param.numel() // columns) < 1 << 30
    return small and all(map(Tensor.is_contiguous, tensors))


def launch_fold(
    entry: Entry, folded: Folded, settings: Settings, is_first: bool, coefficient: Tensor | None
) -> None:
    """Launches the kernels; the arguments are as in ``interface.Backend.fold``."""
    grad, state = entry.gradient, entry.state
    geometry = _geometry(entry.param.shape, entry.blocks)
    rows, columns = geometry.sizes["rows"], geometry.sizes["columns"]
    whole_stride = entry.whole_stride or columns
    scale, sketch = state.get("exp_avg_scale"), folded.sketch
    grad_address, exp_avg_address = grad.data_ptr(), state["exp_avg"].data_ptr()
    coefficient_address = 0 if coefficient is None else coefficient.data_ptr()
    variant = FoldVariant(
        grad_dtype=TRITON_DTYPES[grad.dtype],
        momentum_dtype=MOMENTUM_DTYPES[entry.momentum_dtype],
        qmax=momentum.QMAX.get(entry.momentum_dtype, 0),
        aligned=geometry.vectors and (grad_address | exp_avg_address) % ALIGNMENT == 0,
        large=is_large(rows, entry.whole_start, whole_stride),
        one_block=geometry.one_block,
        maximize=settings.maximize,
        from_start=1 - settings.beta1 < 0.5,
        is_first=is_first,
        has_coefficient=coefficient is not None,
        has_sketch=sketch is not None,
    )
    partials = torch.empty(geometry.partials, dtype=torch.float32, device=grad.device)
    with launching_on(grad.device):
        fold_kernels.fold_kernel[(geometry.programs,)](
            grad=grad_address,
            exp_avg=exp_avg_address,
            exp_avg_scale=0 if scale is None else scale.data_ptr(),
            sketch=0 if sketch is None else sketch.data_ptr(),
            coefficient=coefficient_address,
            partials=partials,
            **geometry.sizes,
            whole_start=entry.whole_start,
            whole_stride=whole_stride,
            step=entry.step,
            one_minus_beta1=1 - settings.beta1,
            variant=_constants(variant),
            FOLDED_ROWS=geometry.folded_rows,
            TILE_ROWS=tile_sizes.UPDATE_TILE_ROWS,
            num_warps=4,
            **OPTIONS,
        )
        fold_kernels.add_folded_kernel[(geometry.sum_programs,)](
            row_sums=folded.row_sums.data_ptr(),
            col_sums=folded.col_sums.data_ptr(),
            coefficient=coefficient_address,
            partials=partials,
            **geometry.sizes,
            HAS_COEFFICIENT=coefficient is not None,
            FOLDED_ROWS=geometry.folded_rows,
            PARTIALS=tile_sizes.COMBINED_PARTIALS,
            WIDTH=_SUM_WIDTH,
            num_warps=4,
            **OPTIONS,
        )


_constants = cache(constants)


@cache
def _geometry(shape: torch.Size, blocks: Blocks) -> _Geometry:
    """Returns the geometry of a matrix of shape [..., R, C] with blocks (br, bc)."""
    *_, matrix_rows, columns = shape
    rows = shape.numel() // columns
    block_rows, block_columns = matrix_rows // blocks[0], columns // blocks[1]
    folded_rows = tile_sizes.folded_rows(shape.numel())
    tiles = momentum.scale_columns(columns)
    programs = rows // block_rows * ceil_div(block_rows, folded_rows)
    column_parts, row_parts = ceil_div(columns, _SUM_WIDTH), ceil_div(rows, _SUM_WIDTH)
    return _Geometry(
        sizes={
            "rows": rows,
            "columns": columns,
            "block_rows": block_rows,
            "block_columns": block_columns,
        },
        folded_rows=folded_rows,
        one_block=blocks[1] == 1 or block_columns % momentum.BLOCK_SIZE == 0,
        vectors=columns % ALIGNMENT == 0,
        programs=programs * tiles,
        sum_programs=rows // block_rows * column_parts + blocks[1] * row_parts,
        partials=programs * columns + (tiles + blocks[1] - 1) * rows,
    )
