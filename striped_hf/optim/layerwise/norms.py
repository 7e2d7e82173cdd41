"""The norm of all gradients of a step, folded or not."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from striped_hf.optim.layerwise.open_matrix import OpenMatrix
from striped_hf.optim.sharded.layout import is_sharded


def square_norms_of_gradients(grads: list[Tensor]) -> list[Tensor]:
    """Returns the squares of the norms of whole and of sharded gradients, [] each."""
    sharded = [grad for grad in grads if is_sharded(grad)]
    whole = [grad for grad in grads if not is_sharded(grad)]
    norms = [torch.nn.utils.get_total_norm(some) for some in (sharded, whole) if some]
    return [(n.full_tensor() if is_sharded(n) else n).float().square() for n in norms]


def square_norms_of_folded(opened: dict[Tensor, OpenMatrix]) -> list[Tensor]:
    """Returns the squares of the norms of the folded gradients, [] each, over all processes.

    The gradients count as they were before clipping.
    """
    plain: dict[torch.device, list[Tensor]] = {}
    sharded: dict[tuple[DeviceMesh, tuple[Placement, ...]], list[Tensor]] = {}
    for param, matrix in opened.items():
        square = matrix.square_norm()
        if is_sharded(param):
            assert matrix.description.layout is not None
            added = tuple(
                Partial() if placement.is_shard() else Replicate()
                for placement in matrix.description.layout.placements
            )
            sharded.setdefault((param.device_mesh, added), []).append(square)
        else:
            plain.setdefault(square.device, []).append(square)
    squares = [torch.stack(some).sum() for some in plain.values()]
    for (mesh, placements), some in sharded.items():
        part = torch.stack(some).sum().to(mesh.device_type)
        squares.append(DTensor.from_local(part, mesh, placements, run_check=False).full_tensor())
    return squares
