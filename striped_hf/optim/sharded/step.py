"""The step of sharded parameters: DTensors, of which every process has a part.

The stripes are those of the whole matrix. A process sums the squares of its own part
(``statistics``); what other processes have of the same columns, or rows, is added in an all-reduce;
and its own part is then updated by the roots of whole stripes (``update``). One all-reduce a mesh
dimension carries the sums of all parameters. Momentum, its scales and the stripe along the sharded
dimension are sharded as the parameter is; the other stripe is the same in every process.

What travels for a matrix [..., R, C] whose rows are sharded are its column sums [..., br, C], and
the sum of each block's row stripe, for mean(row); where columns are sharded, its row sums. Counts
need not: every process knows the shape of the whole. A process with an empty part joins in.

Where only leading dimensions are sharded, as of stacked experts, every matrix is whole in some
process and its step is the ordinary one, and so is that of 0-D and 1-D parameters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from striped_hf.optim import momentum, state
from striped_hf.optim.backends.reference import Entry, Index, Roots, Settings, mean_divisor, sqrt
from striped_hf.optim.state import Blocks, State

Placements = tuple[Placement, ...]
MeshDimension = tuple[DeviceMesh, int]


@dataclass(frozen=True)
class _Piece:
    """A part of a shard that a backend takes as one tensor.

    ``index`` and ``col_index`` find it in the local parameter (and row stripe) and in the local
    column stripe; ``blocks`` are its own; ``start`` and ``pitch`` are ``Entry``'s.
    """

    index: Index
    col_index: Index
    blocks: Blocks
    start: int
    pitch: int


@dataclass(frozen=True)
class _Layout:
    """How this process steps its part of one parameter.

    ``placements`` are those of its momentum. They are the parameter's own, but for a matrix that is
    stepped by rows: one with its columns cut where codes or blocks cannot be, whose gradient and
    parameter are exchanged for rows, and back, in every step.

    ``row_dims`` and ``col_dims``: the dimensions of the mesh along which rows and columns are cut.
    """

    placements: Placements
    pieces: tuple[_Piece, ...]
    row_dims: tuple[int, ...]
    col_dims: tuple[int, ...]


class Matrix(NamedTuple):
    """A matrix whose rows or columns are sharded, in one step of this process.

    ``local`` is this process's part, a copy where it is stepped by rows; ``row`` [..., R, bc] and
    ``col`` [..., br, C] are its parts of the stripes; ``entries`` has one for each piece.
    """

    param: DTensor
    layout: _Layout
    blocks: Blocks
    step: int
    local: Tensor
    row: Tensor
    col: Tensor
    entries: list[Entry]

    @property
    def cells(self) -> torch.Size:
        """[..., br, bc], one for each block of each matrix."""
        return torch.Size((*self.row.shape[:-2], *self.blocks))

    def views(self, row: Tensor) -> list[Tensor]:
        """Cuts a row stripe: for each piece and each of its blocks of columns, its rows."""
        return [view for piece in self.layout.pieces for view in row[piece.index].unbind(-1)]

    def along(self, dims: tuple[int, ...]) -> list[MeshDimension]:
        """Names dimensions of its mesh as ``_add_up`` takes them."""
        return [(self.param.device_mesh, dim) for dim in dims]


Table = tuple[ModuleType, Settings, list[Matrix]]


def is_sharded(param: Tensor) -> bool:
    """Whether a parameter is a DTensor, of which this process may have a part only."""
    return isinstance(param, DTensor)


# -------------------------------------------------------------------------------------------------
# state
# -------------------------------------------------------------------------------------------------


def init_state(param: DTensor, momentum_dtype: str, blocks: Blocks) -> State:
    """Returns the zero state of a sharded parameter: as ``state.init_state``, in DTensors."""
    whole = state.init_state(param, momentum_dtype, blocks, torch.device("meta"))
    layout = _layout_of(param, momentum_dtype, blocks)
    shape, _ = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, layout.placements
    )
    storage = momentum.storage_format(param.shape, momentum_dtype)
    device = param.to_local().device
    zeros = momentum.init(torch.Size(shape), storage, device)  # a zero may have another code
    new = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    for key, like in whole.items():
        if key == "step":
            continue
        placements = _placements_of(key, layout.placements, param.dim())
        if key not in zeros:
            part, _ = compute_local_shape_and_global_offset(
                like.shape, param.device_mesh, placements
            )
            zeros[key] = torch.zeros(part, dtype=like.dtype, device=device)
        new[key] = _wrap(zeros[key], like.shape, param.device_mesh, placements)
    return new


def place_state(
    key: str, value: Tensor, param: Tensor, momentum_dtype: str, blocks: Blocks
) -> Tensor:
    """Returns one loaded entry of a state, but ``step``, as ``param``'s state has it.

    Args:
        key: Of the state.
        value: A DTensor with any placements, or the whole.
        param: The parameter, sharded or not.
        momentum_dtype: As its param group has it.
        blocks: (br, bc).
    """
    if not isinstance(param, DTensor):
        return value.full_tensor() if isinstance(value, DTensor) else value
    layout = _layout_of(param, momentum_dtype, blocks)
    placements = _placements_of(key, layout.placements, param.dim())
    if isinstance(value, DTensor):
        if value.device_mesh == param.device_mesh:
            return value.redistribute(placements=placements)
        value = value.full_tensor()
    size, offset = compute_local_shape_and_global_offset(value.shape, param.device_mesh, placements)
    local = value[tuple(slice(at, at + n) for at, n in zip(offset, size, strict=True))]
    return _wrap(local.to(param.to_local().device), value.shape, param.device_mesh, placements)


def _placements_of(key: str, placements: Sequence[Placement], dims: int) -> Placements:
    """Returns the placements of a state from those of the momentum: a stripe lacks a dimension."""
    reduced = {"exp_avg_sq_row": dims - 1, "exp_avg_sq_col": dims - 2}.get(key)
    return tuple(
        Replicate()
        if reduced is not None and _sharded_dim(placement, dims) == reduced
        else placement
        for placement in placements
    )


def _sharded_dim(placement: Placement, dims: int) -> int | None:
    return placement.dim % dims if isinstance(placement, (Shard, _StridedShard)) else None


def _wrap(local: Tensor, shape: torch.Size, mesh: DeviceMesh, placements: Placements) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride
    )


# -------------------------------------------------------------------------------------------------
# layouts
# -------------------------------------------------------------------------------------------------


def _layout_of(param: DTensor, momentum_dtype: str, blocks: Blocks) -> _Layout:
    storage = momentum.storage_format(param.shape, momentum_dtype)
    return _layout(param.shape, param.device_mesh, tuple(param.placements), storage, blocks)


@cache  # the geometry of a model does not change from step to step
def _layout(
    shape: torch.Size, mesh: DeviceMesh, placements: Placements, storage: str, blocks: Blocks
) -> _Layout:
    dims = len(shape)
    over: dict[int, list[int]] = {}
    for mesh_dim, placement in enumerate(placements):
        dim = _sharded_dim(placement, dims)
        if dim is not None and mesh.size(mesh_dim) > 1:
            over.setdefault(dim, []).append(mesh_dim)
    columns_over = over.get(dims - 1, []) if dims >= 2 else []
    if columns_over and not _can_cut_columns(
        shape, mesh, placements, columns_over, storage, blocks
    ):
        placements = tuple(
            Shard(dims - 2) if mesh_dim in columns_over else placement
            for mesh_dim, placement in enumerate(placements)
        )
        rows_over, columns_over = sorted(over.get(dims - 2, []) + columns_over), []
    else:
        rows_over = over.get(dims - 2, []) if dims >= 2 else []
    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    pieces: list[_Piece] = []
    if torch.Size(local).numel() and (rows_over or columns_over or local[1:] != shape[1:]):
        pieces = list(_runs_of_rows(shape, local, offset, blocks))
    elif torch.Size(local).numel():
        start = offset[0] * shape[1:].numel() if shape else 0
        pieces = [_Piece((), (), blocks, start, shape[-1] if dims >= 2 else 0)]
    return _Layout(placements, tuple(pieces), tuple(rows_over), tuple(columns_over))


def _can_cut_columns(
    shape: torch.Size,
    mesh: DeviceMesh,
    placements: Placements,
    columns_over: list[int],
    storage: str,
    blocks: Blocks,
) -> bool:
    """Whether a matrix can be stepped with its columns cut as they are; the same in all processes.

    A block of codes must be whole in one process, and so must the stripes of a block of columns.
    """
    if blocks[1] > 1:
        return False
    if storage not in momentum.QMAX:
        return True
    if len(columns_over) > 1 or not isinstance(placements[columns_over[0]], Shard):
        return False
    parts = mesh.size(columns_over[0])
    width = -(-shape[-1] // parts)  # of every part but the last ones, which may be narrower
    scales = momentum.scale_columns(shape[-1])
    return width % momentum.BLOCK_SIZE == 0 and -(-scales // parts) * momentum.BLOCK_SIZE == width


def _runs_of_rows(
    whole: torch.Size, local: Sequence[int], offset: Sequence[int], blocks: Blocks
) -> Iterator[_Piece]:
    """Cuts the matrices of a shard where their rows of blocks end."""
    strides = torch.empty(whole, device="meta").stride()
    start = sum(at * stride for at, stride in zip(offset, strides, strict=True))
    height, first = whole[-2] // blocks[0], offset[-2]
    last = first + local[-2] - 1
    for matrix in product(*map(range, local[:-2])):
        above = sum(at * stride for at, stride in zip(matrix, strides, strict=False))
        for band in range(first // height, last // height + 1):
            begin = max(band * height, first) - first
            end = min((band + 1) * height, last + 1) - first
            yield _Piece(
                index=(*matrix, slice(begin, end)),
                col_index=(*matrix, slice(band, band + 1)),
                blocks=(1, blocks[1]),
                start=start + above + begin * whole[-1],
                pitch=whole[-1],
            )


# -------------------------------------------------------------------------------------------------
# the step
# -------------------------------------------------------------------------------------------------


def localize(
    param: DTensor, own: State, momentum_dtype: str, blocks: Blocks, step: int
) -> tuple[list[Entry], Matrix | None]:
    """Returns what this process steps of one sharded parameter.

    Args:
        param: With its gradient.
        own: Its state.
        momentum_dtype: As its param group has it.
        blocks: (br, bc).
        step: Of the update about to be made, from 1.

    Returns:
        Entries for a backend's ``step``, none where the part is empty; or, where rows or columns
        are sharded, no entry and a matrix for ``step`` below.
    """
    layout = _layout_of(param, momentum_dtype, blocks)
    grad = param.grad
    assert isinstance(grad, DTensor)
    if tuple(grad.placements) != layout.placements:
        grad = grad.redistribute(placements=layout.placements)
    local, local_grad = param.to_local(), grad.to_local()
    if tuple(param.placements) != layout.placements:
        # rows that were the parameter's own already would not be a copy
        local = param.redistribute(placements=layout.placements).to_local()
        local = local.clone(memory_format=torch.contiguous_format)
    parts = {key: value.to_local() for key, value in own.items() if isinstance(value, DTensor)}
    is_exchanged = bool(layout.row_dims or layout.col_dims)
    storage = momentum.storage_format(param.shape, momentum_dtype)
    entries = []
    for piece in layout.pieces:
        pieces = {}
        for key, part in parts.items():
            is_stripe = key in ("exp_avg_sq_row", "exp_avg_sq_col")
            if not (is_stripe and is_exchanged):
                pieces[key] = part[piece.col_index if key == "exp_avg_sq_col" else piece.index]
        tensors = (local[piece.index], local_grad[piece.index], pieces, storage)
        entries.append(Entry(*tensors, piece.blocks, step, piece.start, piece.pitch))
    if not is_exchanged:
        return entries, None
    stripes = (parts["exp_avg_sq_row"], parts["exp_avg_sq_col"])
    return [], Matrix(param, layout, blocks, step, local, *stripes, entries)


def step(tables: list[Table]) -> None:
    """Steps matrices whose rows or columns are sharded; every process of their meshes joins in.

    Args:
        tables: For each param group, and each kind of device it is on: the backend, the group's
            settings, and its matrices, in the same order in all processes.
    """
    matrices = [matrix for _, _, table in tables for matrix in table]
    if not matrices:
        return
    settings = [settings for _, settings, table in tables for _ in table]
    sums = [pair for backend, _, table in tables for pair in _sums(backend, table)]
    roots = iter(_stripes(matrices, settings, sums))
    for backend, group_settings, table in tables:
        entries = [entry for matrix in table for entry in matrix.entries]
        backend.update(entries, [next(roots) for _ in entries], group_settings)
    for matrix in matrices:
        _return_rows(matrix)


def _sums(backend: ModuleType, table: list[Matrix]) -> list[tuple[Tensor, Tensor]]:
    """Returns this process's sums of squares of every matrix, shaped as its stripes."""
    found = iter(backend.statistics([entry for matrix in table for entry in matrix.entries]))
    sums = []
    for matrix in table:
        pieces = matrix.layout.pieces
        if len(pieces) == 1 and matrix.blocks[0] == 1:
            row_sums, col_sums = next(found)
            sums.append((row_sums.view_as(matrix.row), col_sums.view_as(matrix.col)))
            continue
        row_sums, col_sums = torch.zeros_like(matrix.row), torch.zeros_like(matrix.col)
        for piece in pieces:
            row_sums[piece.index], col_sums[piece.col_index] = next(found)
        sums.append((row_sums, col_sums))
    return sums


def _stripes(
    matrices: list[Matrix], settings: list[Settings], sums: list[tuple[Tensor, Tensor]]
) -> list[Roots | None]:
    """Averages sums into the stripes, and returns the roots of every entry.

    What ``reference.stripes`` does, of parts and in few operations for all: on a GPU their number
    is what would take the time.
    """
    lagged = [s.lagged and matrix.step > 1 for matrix, s in zip(matrices, settings, strict=True)]
    row, col = [matrix.row for matrix in matrices], [matrix.col for matrix in matrices]
    old = [
        (r.clone(), c.clone()) if late else (r, c)
        for r, c, late in zip(row, col, lagged, strict=True)
    ]
    heights = [matrix.param.shape[-2] // matrix.blocks[0] for matrix in matrices]
    widths = [matrix.param.shape[-1] // matrix.blocks[1] for matrix in matrices]

    along_columns = [matrix.along(matrix.layout.col_dims) for matrix in matrices]
    row_sums = _add_up([pair[0] for pair in sums], along_columns)
    _average(row, row_sums, widths, settings)
    divided = [before[0] for before in old]  # the stripes that this step divides by
    views = [view for matrix, r in zip(matrices, divided, strict=True) for view in matrix.views(r)]
    along_rows = [matrix.along(matrix.layout.row_dims) for matrix in matrices]
    added = _add_up([pair[1] for pair in sums] + _cells(matrices, views), 2 * along_rows)
    _average(col, added[: len(matrices)], heights, settings)

    means = torch._foreach_div(added[len(matrices) :], heights)
    divisors = mean_divisor(torch.cat([mean.flatten() for mean in means]))
    corrections = [
        1 - s.beta2 ** (matrix.step - late)
        for matrix, s, late in zip(matrices, settings, lagged, strict=True)
    ]
    c = torch._foreach_div([before[1] for before in old], corrections)
    return _roots_of_entries(matrices, views, divisors, _sqrt(list(c)))


def _average(
    stripes: list[Tensor], sums: list[Tensor], counts: list[int], settings: list[Settings]
) -> None:
    torch._foreach_mul_(stripes, [s.beta2 for s in settings])
    weights = [(1 - s.beta2) / count for s, count in zip(settings, counts, strict=True)]
    torch._foreach_add_(stripes, torch._foreach_mul(sums, weights))


def _cells(matrices: list[Matrix], views: list[Tensor]) -> list[Tensor]:
    """Returns for each matrix the sums of its row stripe's views in each block, [..., br, bc]."""
    device = matrices[0].local.device
    if device.type == "cpu":  # where a norm's sum has one float32, off by 1e-5 for long rows
        found = iter([view.sum() for view in views])
    else:  # second moments are not negative, and an Inf or a NaN stays one
        found = iter(torch._foreach_norm(views, 1) if views else ())
    cells = []
    zero = torch.zeros((), dtype=torch.float32, device=device)
    for matrix in matrices:
        own = {
            (*_matrix_index(piece), block): next(found)
            for piece in matrix.layout.pieces
            for block in range(matrix.blocks[1])
        }
        every = [own.get(cell, zero) for cell in product(*map(range, matrix.cells))]
        of_matrix = torch.stack(every) if every else zero.new_zeros(0)
        cells.append(of_matrix.view(matrix.cells))
    return cells


def _matrix_index(piece: _Piece) -> tuple[int, ...]:
    """Returns where a piece's row of blocks is in [..., br]."""
    *matrix, band = piece.col_index
    assert isinstance(band, slice)
    return (*matrix, band.start)  # type: ignore[return-value]


def _roots_of_entries(
    matrices: list[Matrix], views: list[Tensor], divisors: Tensor, c: list[Tensor]
) -> list[Roots | None]:
    of_views: list[Tensor] = []
    of_matrices = divisors.split([matrix.cells.numel() for matrix in matrices])
    for matrix, of_matrix in zip(matrices, of_matrices, strict=True):
        for piece in matrix.layout.pieces:
            of_views += of_matrix.view(matrix.cells)[_matrix_index(piece)].unbind(-1)
    a = iter(_sqrt(list(torch._foreach_div(views, of_views))) if views else ())
    roots: list[Roots | None] = []
    for matrix, of_columns in zip(matrices, c, strict=True):
        for piece in matrix.layout.pieces:
            blocks = [next(a) for _ in range(matrix.blocks[1])]
            of_rows = torch.stack(blocks, -1) if len(blocks) > 1 else blocks[0].unsqueeze(-1)
            roots.append((of_rows, of_columns[piece.col_index]))
    return roots


def _sqrt(tensors: list[Tensor]) -> list[Tensor]:
    """``reference.sqrt`` of many tensors."""
    flat = sqrt(torch.cat([x.flatten() for x in tensors]))
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def _add_up(tensors: list[Tensor], dims: list[list[MeshDimension]]) -> list[Tensor]:
    """Adds up tensors over processes, in one all-reduce for each mesh dimension.

    Args:
        tensors: float32, with the same shapes in all processes along its dimensions.
        dims: For each tensor, those that it is to be added up along.

    Returns:
        The sums, in the tensors' order; those without dimensions are the tensors themselves.
    """
    results = list(tensors)
    for mesh, dim in dict.fromkeys(mesh_dim for each in dims for mesh_dim in each):
        positions = [i for i, each in enumerate(dims) if (mesh, dim) in each]
        flat = torch.cat([results[i].flatten() for i in positions])
        added = flat.to(mesh.device_type)  # offloaded parameters are not where the mesh is
        dist.all_reduce(added, group=mesh.get_group(dim))
        parts = added.to(flat.device).split([results[i].numel() for i in positions])
        for i, part in zip(positions, parts, strict=True):
            results[i] = part.view(results[i].shape)
    return results


def _return_rows(matrix: Matrix) -> None:
    """Brings what was stepped by rows back to where the parameter has it."""
    param, layout = matrix.param, matrix.layout
    if tuple(param.placements) == layout.placements:
        return
    stepped = _wrap(matrix.local, param.shape, param.device_mesh, layout.placements)
    param.to_local().copy_(stepped.redistribute(placements=param.placements).to_local())
