"""The layout by which a process steps its part of a sharded parameter, by shape and placements."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TypeGuard

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from striped_hf.optim import momentum
from striped_hf.optim.backends.chunks import Index
from striped_hf.optim.interface import Blocks

Placements = tuple[Placement, ...]


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, of which this process may have only a part."""
    return isinstance(tensor, DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """Returns this process's part of a DTensor."""
    assert is_sharded(tensor)
    return tensor.to_local()


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor on a mesh that this process is not in."""
    return is_sharded(tensor) and tensor.device_mesh.get_coordinate() is None


@cache
def part_shape(shape: torch.Size, mesh: DeviceMesh, placements: Placements) -> torch.Size:
    """Returns the shape of this process's part of a whole."""
    return torch.Size(compute_local_shape_and_global_offset(shape, mesh, placements)[0])


def exchanged_placements(param: DTensor) -> Placements | None:
    """Returns the placements of a gradient that is not placed as its parameter.

    Processes exchange such a gradient. None: there is no gradient, or no exchange.
    """
    grad = param.grad
    if grad is None or not is_sharded(grad):
        return None
    pairs = zip(grad.placements, param.placements, strict=False)
    if all(there == here or there.is_replicate() for there, here in pairs):
        return None
    return tuple(grad.placements)


@dataclass(frozen=True)
class Piece:
    """A part of a shard that a backend steps as one tensor.

    Attributes:
        index: The piece's place in the local parameter, momentum and row stripe.
        col_index: The piece's place in the local column stripe.
        blocks: The piece's own (br, bc).
        whole_start, whole_stride: As in ``interface.Entry``.
    """

    index: Index
    col_index: Index
    blocks: Blocks
    whole_start: int
    whole_stride: int


@dataclass(frozen=True)
class Layout:
    """The layout of this process's part of one parameter.

    Attributes:
        placements: The momentum's placements. They are the parameter's own, except if codes or
            blocks do not allow the sharding of its columns. Such a matrix is stepped by rows: in
            every step its gradient and parameter are exchanged for rows, and the parameter back.
        pieces: The pieces that backends step; none if the part is empty.
        row_dims: The mesh dimensions along which rows are sharded.
        col_dims: The mesh dimensions along which columns are sharded.
        part: The shape of the part that this process steps.
    """

    placements: Placements
    pieces: tuple[Piece, ...]
    row_dims: tuple[int, ...]
    col_dims: tuple[int, ...]
    part: torch.Size

    @property
    def needs_exchange(self) -> bool:
        """Whether this process's stripes need the sums of other processes."""
        return bool(self.row_dims or self.col_dims)


def layout_of(
    shape: torch.Size,
    mesh: DeviceMesh,
    placements: Placements,
    momentum_dtype: str,
    blocks: Blocks,
) -> Layout:
    """Returns the layout of a parameter.

    Args:
        shape: The shape of the whole parameter.
        mesh: The parameter's mesh.
        placements: The parameter's placements.
        momentum_dtype: The format in which its momentum is stored.
        blocks: (br, bc).
    """
    dims = len(shape)
    over: dict[int, list[int]] = {}
    for mesh_dim, placement in enumerate(placements):
        dim = sharded_dim(placement, dims)
        if dim is not None and mesh.size(mesh_dim) > 1:
            over.setdefault(dim, []).append(mesh_dim)
    columns_over = over.get(dims - 1, []) if dims >= 2 else []
    if columns_over and not _can_shard_columns(
        shape, mesh, placements, columns_over, momentum_dtype, blocks
    ):
        placements = tuple(
            Shard(dims - 2) if mesh_dim in columns_over else placement
            for mesh_dim, placement in enumerate(placements)
        )
        rows_over, columns_over = sorted(over.get(dims - 2, []) + columns_over), []
    else:
        rows_over = over.get(dims - 2, []) if dims >= 2 else []
    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    pieces: list[Piece] = []
    if torch.Size(local).numel() and (rows_over or columns_over or local[1:] != shape[1:]):
        pieces = list(_pieces_of_rows(shape, local, offset, blocks))
    elif torch.Size(local).numel():
        start = offset[0] * shape[1:].numel() if shape else 0
        pieces = [Piece((), (), blocks, start, shape[-1] if dims >= 2 else 0)]
    return Layout(
        placements=placements,
        pieces=tuple(pieces),
        row_dims=tuple(rows_over),
        col_dims=tuple(columns_over),
        part=torch.Size(local),
    )


def _can_shard_columns(
    shape: torch.Size,
    mesh: DeviceMesh,
    placements: Placements,
    columns_over: list[int],
    momentum_dtype: str,
    blocks: Blocks,
) -> bool:
    """Whether a matrix can be stepped with its columns sharded; the same in all processes.

    Each block of codes, and each block of columns, must be whole in one process.
    """
    if blocks[1] > 1:
        return False
    if momentum_dtype not in momentum.QMAX:
        return True
    if len(columns_over) > 1 or not isinstance(placements[columns_over[0]], Shard):
        return False
    parts = mesh.size(columns_over[0])
    width = -(-shape[-1] // parts)  # of every part but the last ones, which may be narrower
    scales = momentum.scale_columns(shape[-1])
    return width % momentum.BLOCK_SIZE == 0 and -(-scales // parts) * momentum.BLOCK_SIZE == width


def _pieces_of_rows(
    whole: torch.Size, local: Sequence[int], offset: Sequence[int], blocks: Blocks
) -> Iterator[Piece]:
    """Cuts the matrices of a shard at the ends of their rows of blocks."""
    strides = torch.empty(whole, device="meta").stride()
    start = sum(at * stride for at, stride in zip(offset, strides, strict=True))
    height, first = whole[-2] // blocks[0], offset[-2]
    last = first + local[-2] - 1
    for matrix in product(*map(range, local[:-2])):
        above = sum(at * stride for at, stride in zip(matrix, strides, strict=False))
        for band in range(first // height, last // height + 1):
            begin = max(band * height, first) - first
            end = min((band + 1) * height, last + 1) - first
            yield Piece(
                index=(*matrix, slice(begin, end)),
                col_index=(*matrix, slice(band, band + 1)),
                blocks=(1, blocks[1]),
                whole_start=start + above + begin * whole[-1],
                whole_stride=whole[-1],
            )


def by_rows(placements: Placements, dims: int) -> Placements:
    """Replaces every sharding of another dimension by Shard(0).

    A parameter that backends see in another shape than its own, such as a convolution's kernel, is
    stepped with these placements: a range of its first dimension is a range of the matrix's rows.

    Args:
        placements: The parameter's placements.
        dims: The number of the parameter's dimensions.
    """
    return tuple(
        Shard(0) if sharded_dim(placement, dims) not in (None, 0) else placement
        for placement in placements
    )


def sharded_dim(placement: Placement, dims: int) -> int | None:
    """Returns the dimension of a tensor with ``dims`` dimensions that a placement shards."""
    return placement.dim % dims if isinstance(placement, (Shard, _StridedShard)) else None


def wrap(local: Tensor, shape: torch.Size, mesh: DeviceMesh, placements: Placements) -> DTensor:
    """Returns the DTensor of a whole's shape of which ``local`` is this process's part."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride
    )
