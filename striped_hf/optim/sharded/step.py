"""The step of sharded parameters: local statistics, one exchange of sums, local updates."""

from itertools import product
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from striped_hf.optim.backends import reference
from striped_hf.optim.interface import Backend, Blocks, Entry, Roots, Settings, State, Sums
from striped_hf.optim.plain import plain_gradient, plain_parameter
from striped_hf.optim.sharded.layout import Layout, Piece, is_sharded, wrap
from striped_hf.optim.state import Description
from striped_hf.optim.views import as_stepped

MeshDimension = tuple[DeviceMesh, int]


class Matrix(NamedTuple):
    """A matrix whose rows or columns are sharded, in one step of this process.

    Attributes:
        param: The parameter.
        shape: The shape of the whole as which it is stepped, [..., R, C].
        layout: Its layout.
        blocks: Its (br, bc).
        step: The number of this step, from 1.
        local: This process's part of the parameter, a copy where it is stepped by rows.
        row: This process's part of the row stripe, [..., R, bc].
        col: This process's part of the column stripe, [..., br, C].
        entries: One for each piece of the layout.
    """

    param: DTensor
    shape: torch.Size
    layout: Layout
    blocks: Blocks
    step: int
    local: Tensor
    row: Tensor
    col: Tensor
    entries: list[Entry]

    @property
    def block_grid(self) -> torch.Size:
        """[..., br, bc], the shape of what has one number for each block of each matrix."""
        return torch.Size((*self.row.shape[:-2], *self.blocks))

    def row_views(self, row: Tensor) -> list[Tensor]:
        """Cuts a row stripe: for each piece and each of its blocks of columns, its rows."""
        return [view for piece in self.layout.pieces for view in row[piece.index].unbind(-1)]

    def mesh_dims(self, dims: tuple[int, ...]) -> list[MeshDimension]:
        """Names dimensions of its mesh as ``_all_reduce`` needs them."""
        return [(self.param.device_mesh, dim) for dim in dims]


class MatrixBatch(NamedTuple):
    """The sharded matrices of one param group on one type of device, and what steps them."""

    backend: Backend
    settings: Settings
    matrices: list[Matrix]


def localize(
    param: DTensor, state: State, description: Description, step: int
) -> tuple[list[Entry], Matrix | None, list[tuple[Tensor, Tensor]]]:
    """Returns what this process steps of one sharded parameter.

    Args:
        param: With its gradient.
        state: Its state.
        description: Its description.
        step: The number of this step, from 1.

    Returns:
        Entries for a backend's ``step``, none where the part is empty; or, where rows or columns
        are sharded, no entries and a matrix for ``step`` below. Last, where no kernel can step the
        local tensor, it and the copy that is stepped in its place.
    """
    layout, grad = description.layout, param.grad
    assert layout is not None
    assert grad is not None
    assert is_sharded(grad)
    if tuple(grad.placements) != layout.placements:
        grad = grad.redistribute(placements=layout.placements)
    local_grad = plain_gradient(grad.to_local())
    target = param.to_local()
    local = plain_parameter(target)
    dims = len(description.stepped)
    if dims != param.dim() and not local.is_contiguous():
        local = local.contiguous()
    copies = [] if local is target else [(target, local)]
    if tuple(param.placements) != layout.placements:
        # without clone it would not be a copy where the rows were the parameter's own already
        local = param.redistribute(placements=layout.placements).to_local()
        local = plain_parameter(local).clone(memory_format=torch.contiguous_format)
        copies = []  # ``_return_rows`` copies it back
    local_state = {key: value.to_local() for key, value in state.items() if is_sharded(value)}
    stepped, stepped_grad = local, local_grad
    if dims != param.dim():
        stepped, stepped_grad = as_stepped(local, dims), as_stepped(local_grad.contiguous(), dims)
        if dims == 1:
            local_state = {key: value.view(-1) for key, value in local_state.items()}
    entries = []
    for piece in layout.pieces:
        piece_state = {}
        for key, part in local_state.items():
            is_stripe = key in ("exp_avg_sq_row", "exp_avg_sq_col")
            if not (is_stripe and layout.needs_exchange):
                piece_state[key] = part[piece.col_index if key == "exp_avg_sq_col" else piece.index]
        entries.append(
            Entry(
                param=stepped[piece.index],
                grad=stepped_grad[piece.index],
                state=piece_state,
                momentum_dtype=description.momentum_dtype,
                blocks=piece.blocks,
                step=step,
                whole_start=piece.whole_start,
                whole_stride=piece.whole_stride,
            )
        )
    if not layout.needs_exchange:
        return entries, None, copies
    row, col = local_state["exp_avg_sq_row"], local_state["exp_avg_sq_col"]
    whole = description.stepped
    matrix = Matrix(param, whole, layout, description.blocks, step, local, row, col, entries)
    return [], matrix, copies


def step(batches: list[MatrixBatch]) -> None:
    """Steps matrices whose rows or columns are sharded; every process of their meshes joins in.

    Args:
        batches: With the same matrices in the same order in all processes.
    """
    matrices = [matrix for batch in batches for matrix in batch.matrices]
    if not matrices:
        return
    settings = [batch.settings for batch in batches for _ in batch.matrices]
    sums = [pair for batch in batches for pair in _local_sums(batch)]
    roots = iter(_stripes(matrices, settings, sums))
    for batch in batches:
        entries = [entry for matrix in batch.matrices for entry in matrix.entries]
        batch.backend.update(entries, [next(roots) for _ in entries], batch.settings)
    for matrix in matrices:
        _return_rows(matrix)


# -------------------------------------------------------------------------------------------------
# stripes
# -------------------------------------------------------------------------------------------------


def _local_sums(batch: MatrixBatch) -> list[Sums]:
    """Returns this process's sums of squares of every matrix, shaped as its stripes."""
    entries = [entry for matrix in batch.matrices for entry in matrix.entries]
    found = iter(batch.backend.statistics(entries))
    sums = []
    for matrix in batch.matrices:
        pieces = matrix.layout.pieces
        if len(pieces) == 1 and matrix.blocks[0] == 1:
            row_sums, col_sums = _not_none(next(found))
            sums.append((row_sums.view_as(matrix.row), col_sums.view_as(matrix.col)))
            continue
        row_sums, col_sums = torch.zeros_like(matrix.row), torch.zeros_like(matrix.col)
        for piece in pieces:
            row_sums[piece.index], col_sums[piece.col_index] = _not_none(next(found))
        sums.append((row_sums, col_sums))
    return sums


def _not_none(sums: Sums | None) -> Sums:
    assert sums is not None  # a piece of a matrix is a matrix
    return sums


def _stripes(
    matrices: list[Matrix], settings: list[Settings], sums: list[Sums]
) -> list[Roots | None]:
    """Averages sums into the stripes, and returns the roots of every entry.

    As ``reference.stripes``, of parts, and in few operations for all matrices: on a GPU their
    number determines the time.
    """
    is_lagged = [s.lagged and matrix.step > 1 for matrix, s in zip(matrices, settings, strict=True)]
    beta2s = [s.beta2 for s in settings]
    row, col = [matrix.row for matrix in matrices], [matrix.col for matrix in matrices]
    # the stripes that this step divides by
    divided_row, divided_col = (
        [s.clone() if lagged else s for s, lagged in zip(stripes, is_lagged, strict=True)]
        for stripes in (row, col)
    )
    heights = [matrix.shape[-2] // matrix.blocks[0] for matrix in matrices]
    widths = [matrix.shape[-1] // matrix.blocks[1] for matrix in matrices]

    along_columns = [matrix.mesh_dims(matrix.layout.col_dims) for matrix in matrices]
    row_sums = _all_reduce([pair[0] for pair in sums], along_columns)
    reference.average(row, row_sums, widths, beta2s)
    views = [
        view
        for matrix, r in zip(matrices, divided_row, strict=True)
        for view in matrix.row_views(r)
    ]
    along_rows = [matrix.mesh_dims(matrix.layout.row_dims) for matrix in matrices]
    local_sums = [pair[1] for pair in sums] + _sums_by_block(matrices, views)
    added = _all_reduce(local_sums, 2 * along_rows)
    reference.average(col, added[: len(matrices)], heights, beta2s)

    means = torch._foreach_div(added[len(matrices) :], heights)
    a = reference.roots_of(views, _row_divisors(matrices, list(means)))
    corrections = [
        1 - beta2 ** (matrix.step - lagged)
        for matrix, beta2, lagged in zip(matrices, beta2s, is_lagged, strict=True)
    ]
    c = reference.roots_of(divided_col, corrections)
    return _roots_of_entries(matrices, a, c)


def _sums_by_block(matrices: list[Matrix], views: list[Tensor]) -> list[Tensor]:
    """Returns for each matrix the sums of its row views in each block, [..., br, bc]."""
    device = matrices[0].local.device
    if device.type == "cpu":  # where a norm adds up in one float32, off by 1e-5 for long rows
        found = iter([view.sum() for view in views])
    else:  # second moments are not negative, and an Inf or a NaN stays one
        found = iter(torch._foreach_norm(views, 1) if views else ())
    zero = torch.zeros((), dtype=torch.float32, device=device)
    sums = []
    for matrix in matrices:
        local = {
            (*_block_row(piece), block): next(found)
            for piece in matrix.layout.pieces
            for block in range(matrix.blocks[1])
        }
        every = [local.get(block, zero) for block in product(*map(range, matrix.block_grid))]
        of_matrix = torch.stack(every) if every else zero.new_zeros(0)
        sums.append(of_matrix.view(matrix.block_grid))
    return sums


def _row_divisors(matrices: list[Matrix], means: list[Tensor]) -> list[Tensor]:
    """Returns what each of the matrices' row views is divided by, [].

    Args:
        matrices: With their pieces.
        means: For each matrix mean(row) of each block, [..., br, bc].
    """
    divisors = reference.row_divisor(torch.cat([mean.flatten() for mean in means]))
    by_matrix = divisors.split([matrix.block_grid.numel() for matrix in matrices])
    return [
        divisor
        for matrix, of_matrix in zip(matrices, by_matrix, strict=True)
        for piece in matrix.layout.pieces
        for divisor in of_matrix.view(matrix.block_grid)[_block_row(piece)].unbind(-1)
    ]


def _block_row(piece: Piece) -> tuple[int, ...]:
    """Returns the place of a piece's row of blocks in [..., br]."""
    *matrix, band = piece.col_index
    assert isinstance(band, slice)
    return (*matrix, band.start)  # type: ignore[return-value]


def _roots_of_entries(
    matrices: list[Matrix], a: list[Tensor], c: list[Tensor]
) -> list[Roots | None]:
    """Returns a [..., R, bc] and c [..., br, C] of every piece, from those of views and stripes."""
    views = iter(a)
    roots: list[Roots | None] = []
    for matrix, of_columns in zip(matrices, c, strict=True):
        for piece in matrix.layout.pieces:
            blocks = [next(views) for _ in range(matrix.blocks[1])]
            of_rows = torch.stack(blocks, -1) if len(blocks) > 1 else blocks[0].unsqueeze(-1)
            roots.append((of_rows, of_columns[piece.col_index]))
    return roots


# -------------------------------------------------------------------------------------------------
# communication
# -------------------------------------------------------------------------------------------------


def _all_reduce(tensors: list[Tensor], dims: list[list[MeshDimension]]) -> list[Tensor]:
    """Adds up tensors over processes, in one all-reduce for each mesh dimension.

    Args:
        tensors: float32, with the same shapes in all processes along its dimensions.
        dims: For each tensor, the mesh dimensions to add it up along.

    Returns:
        The sums, in the tensors' order; a tensor without dimensions is returned itself.
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
    """Brings a parameter that was stepped by rows back to its own placements."""
    param, layout = matrix.param, matrix.layout
    if tuple(param.placements) == layout.placements:
        return
    stepped = wrap(matrix.local, param.shape, param.device_mesh, layout.placements)
    param.to_local().copy_(stepped.redistribute(placements=param.placements).to_local())
