"""Matrices whose rows or columns are sharded, in one step: their sums, new stripes and roots."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from striped_hf.optim.backends import reference
from striped_hf.optim.interface import Backend, Entry, Roots, Settings, State, Sums
from striped_hf.optim.sharded.agreement import Addend, Item, MeshDimension
from striped_hf.optim.sharded.layout import Layout, Piece, local_of
from striped_hf.optim.state import Description


class FoldedGradients(Protocol):
    """The sums of gradients that were folded into the momentum: ``layerwise.OpenMatrix``."""

    def sums(self) -> Sums:
        """Returns this process's sums of squares, shaped as its stripes."""

    def entries(self, entries: list[Entry], /) -> list[Entry]:
        """Returns entries, one for each piece, with the momentum that includes the gradients."""


@dataclass(frozen=True)
class ShardedParameter:
    """A sharded parameter in one step.

    Attributes:
        param: The parameter.
        grad: Its gradient; None if this process has none, or has folded it.
        description: Its description.
        item: Its item, which must be equal in all processes.
        backend: The backend that steps it.
        settings: Its param group's settings.
        folded: The sums of the gradients, if this process has folded any.
    """

    param: DTensor
    grad: Tensor | None
    description: Description
    item: Item
    backend: Backend
    settings: Settings
    folded: FoldedGradients | None = None

    @property
    def has_gradient(self) -> bool:
        """Whether this process has a gradient, or has folded one."""
        return self.grad is not None or self.folded is not None

    @property
    def layout(self) -> Layout:
        """Its layout."""
        assert self.description.layout is not None
        return self.description.layout

    @property
    def mesh_dims(self) -> list[MeshDimension]:
        """The mesh dimensions of its exchanges; empty if each process steps it alone."""
        mesh = self.param.device_mesh
        if self.item.is_redistributed:
            return [(mesh, dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]
        return [(mesh, dim) for dim in sorted(self.layout.row_dims + self.layout.col_dims)]


class Stripes(NamedTuple):
    """The new stripes of one matrix, and the roots of every piece of its layout."""

    row: Tensor
    col: Tensor
    roots: list[Roots | None]


@dataclass
class Matrix:
    """A matrix whose rows or columns are sharded, in one step of this process.

    Attributes:
        of: The sharded parameter.
        step: The number of this step, from 1.
        row: This process's part of the row stripe, [..., R, bc].
        col: This process's part of the column stripe, [..., br, C].
        local: This process's part of the parameter; a copy if it is stepped by rows.
        entries: One for each piece of the layout; none if this process has no gradient.
        row_sums: Sums of squares, shaped as ``row``.
        col_sums: Sums of squares, shaped as ``col``.
        block_sums: The sum of the row stripe that this step divides by in each block, [..., br,
            bc]; not added up if every process has all rows.
        gradients: [2]: the number of processes with a gradient, and the number of processes without
            one whose part is not empty.
        stripes: The new stripes of this step.
        state: None if this process has no gradient.
    """

    of: ShardedParameter
    step: int
    row: Tensor
    col: Tensor
    local: Tensor
    entries: list[Entry]
    row_sums: Addend
    col_sums: Addend
    block_sums: Addend
    gradients: Addend
    stripes: Stripes | None = None
    state: State | None = None

    @property
    def height(self) -> int:
        """The rows of a block."""
        return self.of.description.stepped[-2] // self.of.description.blocks[0]

    @property
    def width(self) -> int:
        """The columns of a block."""
        return self.of.description.stepped[-1] // self.of.description.blocks[1]

    @property
    def block_grid(self) -> torch.Size:
        """The shape [..., br, bc] of a tensor with one number for each block of each matrix."""
        return torch.Size((*self.row.shape[:-2], *self.of.description.blocks))

    @property
    def is_lagged(self) -> bool:
        """Whether it divides by the stripes of the step before."""
        return self.of.settings.lagged and self.step > 1

    @property
    def new_stripes(self) -> Stripes:
        """The new stripes, which ``set_stripes`` has computed."""
        assert self.stripes is not None
        return self.stripes

    @property
    def addends(self) -> tuple[Addend, ...]:
        """The tensors that are added up over processes."""
        return self.row_sums, self.col_sums, self.block_sums, self.gradients

    def row_views(self, row: Tensor) -> list[Tensor]:
        """Cuts a row stripe: for each piece and each of its blocks of columns, its rows."""
        return [view for piece in self.of.layout.pieces for view in row[piece.index].unbind(-1)]


def new_matrix(of: ShardedParameter, step: int, state: State) -> Matrix:
    """Returns a matrix without entries and sums; its state may be empty."""
    layout, (row_blocks, col_blocks) = of.layout, of.description.blocks
    *leading, rows, columns = layout.part
    device, mesh = of.param.device, of.param.device_mesh
    along_rows = [(mesh, dim) for dim in layout.row_dims]
    along_columns = [(mesh, dim) for dim in layout.col_dims]
    everywhere = along_rows + along_columns
    if state:
        row, col = local_of(state["exp_avg_sq_row"]), local_of(state["exp_avg_sq_col"])
    else:
        row = torch.zeros((*leading, rows, col_blocks), dtype=torch.float32, device=device)
        col = torch.zeros((*leading, row_blocks, columns), dtype=torch.float32, device=device)
    is_missing = not of.has_gradient and layout.part.numel() > 0
    return Matrix(
        of=of,
        step=step,
        row=row,
        col=col,
        local=local_of(of.param),
        entries=[],
        row_sums=Addend(row, along_columns),
        col_sums=Addend(col, along_rows),
        # if every process has all rows, the sum is computed from the stripe
        block_sums=Addend(row, everywhere if along_rows else []),
        gradients=Addend(_flags(of.has_gradient, is_missing, device), everywhere),
    )


@cache
def _flags(has_gradient: bool, is_missing: bool, device: torch.device) -> Tensor:
    return torch.tensor([has_gradient, is_missing], dtype=torch.float32, device=device)


def set_sums(of_batch: list[Matrix]) -> None:
    """Computes this process's sums of squares of the matrices of one param group."""
    folded = [matrix for matrix in of_batch if matrix.of.folded is not None]
    for matrix in folded:
        assert matrix.of.folded is not None
        matrix.row_sums.value, matrix.col_sums.value = matrix.of.folded.sums()
    others = [matrix for matrix in of_batch if matrix.of.folded is None]
    entries = [entry for matrix in others for entry in matrix.entries]
    found = iter(of_batch[0].of.backend.statistics(entries))
    for matrix in others:
        pieces = matrix.of.layout.pieces if matrix.entries else ()
        if len(pieces) == 1 and matrix.of.description.blocks[0] == 1:
            row_sums, col_sums = _not_none(next(found))
            matrix.row_sums.value = row_sums.view_as(matrix.row)
            matrix.col_sums.value = col_sums.view_as(matrix.col)
            continue
        matrix.row_sums.value = torch.zeros_like(matrix.row)
        matrix.col_sums.value = torch.zeros_like(matrix.col)
        for piece in pieces:
            row_sums, col_sums = _not_none(next(found))
            matrix.row_sums.value[piece.index] = row_sums
            matrix.col_sums.value[piece.col_index] = col_sums


def _not_none(sums: Sums | None) -> Sums:
    assert sums is not None  # a piece of a matrix is a matrix
    return sums


def set_block_sums(matrices: list[Matrix]) -> None:
    """Computes this process's addend to the sum of the row stripe in each block."""
    parts = []
    for matrix in matrices:
        mesh, col_dims = matrix.of.param.device_mesh, matrix.of.layout.col_dims
        # all processes that share the rows have the old stripe; each adds the sums of its columns
        sharing = math.prod(mesh.size(dim) for dim in col_dims)
        parts.append(matrix.row / sharing if sharing > 1 else matrix.row.clone())
    now = [i for i, matrix in enumerate(matrices) if not matrix.is_lagged]
    if now:
        reference.average(
            [parts[i] for i in now],
            [matrices[i].row_sums.value for i in now],
            [matrices[i].width for i in now],
            [matrices[i].of.settings.beta2 for i in now],
        )
    for matrix, sums in zip(matrices, _sums_by_block(matrices, parts), strict=True):
        matrix.block_sums.value = sums


def _sums_by_block(matrices: list[Matrix], rows: list[Tensor]) -> list[Tensor]:
    """Returns for each matrix the sums of a row stripe [..., R, bc] by block, [..., br, bc]."""
    views = [v for m, row in zip(matrices, rows, strict=True) for v in m.row_views(row)]
    if not views or views[0].device.type == "cpu":
        # here a norm adds up in one float32, with an error of 1e-5 for long rows
        found = iter([view.sum() for view in views])
    else:  # second moments are not negative, and an Inf or a NaN stays one
        found = iter(torch._foreach_norm(views, 1))
    sums = []
    for matrix in matrices:
        local = {
            (*_block_row(piece), block): next(found)
            for piece in matrix.of.layout.pieces
            for block in range(matrix.of.description.blocks[1])
        }
        zero = torch.zeros((), dtype=torch.float32, device=matrix.row.device)
        every = [local.get(block, zero) for block in product(*map(range, matrix.block_grid))]
        of_matrix = torch.stack(every) if every else zero.new_zeros(0)
        sums.append(of_matrix.view(matrix.block_grid))
    return sums


def set_stripes(matrices: list[Matrix]) -> None:
    """Averages sums into new stripes, and computes the roots of every piece.

    It does the work of ``reference.stripes`` on parts, in few operations for all matrices: on a GPU
    the number of operations determines the time.
    """
    if not matrices:
        return
    beta2s = [matrix.of.settings.beta2 for matrix in matrices]
    row, col = [m.row.clone() for m in matrices], [m.col.clone() for m in matrices]
    row_sums, col_sums = [m.row_sums.value for m in matrices], [m.col_sums.value for m in matrices]
    reference.average(row, row_sums, [m.width for m in matrices], beta2s)
    reference.average(col, col_sums, [m.height for m in matrices], beta2s)
    # the stripes that this step divides by
    divided_row = [m.row if m.is_lagged else new for m, new in zip(matrices, row, strict=True)]
    divided_col = [m.col if m.is_lagged else new for m, new in zip(matrices, col, strict=True)]

    whole = [i for i, matrix in enumerate(matrices) if not matrix.of.layout.row_dims]
    sums = _sums_by_block([matrices[i] for i in whole], [divided_row[i] for i in whole])
    for i, of_matrix in zip(whole, sums, strict=True):
        matrices[i].block_sums.value = of_matrix
    means = torch._foreach_div([m.block_sums.value for m in matrices], [m.height for m in matrices])

    views = [v for m, r in zip(matrices, divided_row, strict=True) for v in m.row_views(r)]
    a = iter(reference.roots_of(views, _row_divisors(matrices, list(means))))
    corrections = [
        1 - beta2 ** (matrix.step - matrix.is_lagged)
        for matrix, beta2 in zip(matrices, beta2s, strict=True)
    ]
    c = reference.roots_of(divided_col, corrections)
    for matrix, new_row, new_col, of_columns in zip(matrices, row, col, c, strict=True):
        matrix.stripes = Stripes(new_row, new_col, _roots_of_pieces(matrix, a, of_columns))


def _row_divisors(matrices: list[Matrix], means: list[Tensor]) -> list[Tensor]:
    """Returns the divisor of each of the matrices' row views, [].

    Args:
        matrices: With their pieces.
        means: For each matrix mean(row) of each block, [..., br, bc].
    """
    divisors = reference.row_divisor(torch.cat([mean.flatten() for mean in means]))
    by_matrix = divisors.split([matrix.block_grid.numel() for matrix in matrices])
    return [
        divisor
        for matrix, of_matrix in zip(matrices, by_matrix, strict=True)
        for piece in matrix.of.layout.pieces
        for divisor in of_matrix.view(matrix.block_grid)[_block_row(piece)].unbind(-1)
    ]


def _block_row(piece: Piece) -> tuple[int, ...]:
    """Returns the place of a piece's row of blocks in [..., br]."""
    *matrix, band = piece.col_index
    assert isinstance(band, slice)
    return (*matrix, band.start)  # type: ignore[return-value]


def _roots_of_pieces(matrix: Matrix, a: Iterator[Tensor], c: Tensor) -> list[Roots | None]:
    """Returns a [..., R, bc] and c [..., br, C] of every piece of a matrix.

    Args:
        matrix: The matrix.
        a: The roots of its row views, followed by the roots for the next matrices.
        c: The root of its column stripe.
    """
    roots: list[Roots | None] = []
    for piece in matrix.of.layout.pieces:
        blocks = [next(a) for _ in range(matrix.of.description.blocks[1])]
        of_rows = torch.stack(blocks, -1) if len(blocks) > 1 else blocks[0].unsqueeze(-1)
        roots.append((of_rows, c[piece.col_index]))
    return roots
