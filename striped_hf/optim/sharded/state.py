"""The state of sharded parameters: the state of whole parameters, in DTensors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from striped_hf.optim import momentum
from striped_hf.optim.interface import State
from striped_hf.optim.sharded.layout import Layout, Placements, is_sharded, sharded_dim, wrap
from striped_hf.optim.state import Description, zero_state


def init_state(param: DTensor, description: Description) -> State:
    """Returns the zero state of a sharded parameter: as ``state.zero_state``, in DTensors."""
    layout = _layout(description)
    mesh, device = param.device_mesh, param.to_local().device
    whole = zero_state(description, torch.device("meta"))
    shape, _ = compute_local_shape_and_global_offset(
        description.state_shape, mesh, layout.placements
    )
    # by ``init``, because the code of zero may be another number than 0
    zeros = momentum.init(torch.Size(shape), description.momentum_dtype, device)
    state = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    for key, like in whole.items():
        if key == "step":
            continue
        placements = _placements_of(key, layout.placements, len(description.state_shape))
        if key not in zeros:
            part, _ = compute_local_shape_and_global_offset(like.shape, mesh, placements)
            zeros[key] = torch.zeros(part, dtype=like.dtype, device=device)
        state[key] = wrap(zeros[key], like.shape, mesh, placements)
    return state


def place_state(key: str, value: Tensor, param: DTensor, description: Description) -> DTensor:
    """Returns one loaded entry of a state, placed as the state of ``param`` needs it.

    Args:
        key: A key of the state; not ``step``.
        value: A DTensor with any placements, or the whole tensor.
        param: The parameter.
        description: The parameter's description.
    """
    mesh = param.device_mesh
    layout, dims = _layout(description), len(description.state_shape)
    placements = _placements_of(key, layout.placements, dims)
    if is_sharded(value):
        if value.device_mesh == mesh:
            return value.redistribute(placements=placements)
        value = value.full_tensor()
    size, offset = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    local = value[tuple(slice(at, at + n) for at, n in zip(offset, size, strict=True))]
    return wrap(local.to(param.to_local().device), value.shape, mesh, placements)


def follow(param: Tensor, state: State, description: Description) -> None:
    """Shards a state like its parameter, if that was sharded in another way after its last step.

    Every process of the meshes must call it. If nothing has changed, it does nothing.
    """
    for key in description.keys:
        value = state[key]
        if not is_sharded(param):
            if is_sharded(value):
                state[key] = value.full_tensor()
        elif not _is_placed(key, value, param, description):
            state[key] = place_state(key, value, param, description)


def has_moved(param: DTensor, state: State, description: Description) -> bool:
    """Whether ``follow`` has anything to do."""
    return bool(state) and not all(
        _is_placed(key, state[key], param, description) for key in description.keys if key in state
    )


def _is_placed(key: str, value: Tensor, param: DTensor, description: Description) -> bool:
    return (
        is_sharded(value)
        and tuple(value.placements)
        == _placements_of(key, _layout(description).placements, len(description.state_shape))
        and value.device_mesh == param.device_mesh
    )


def _layout(description: Description) -> Layout:
    assert description.layout is not None
    return description.layout


def _placements_of(key: str, placements: Sequence[Placement], dims: int) -> Placements:
    """Returns the placements of a state from those of the momentum: a stripe lacks a dimension."""
    reduced = {"exp_avg_sq_row": dims - 1, "exp_avg_sq_col": dims - 2}.get(key)
    return tuple(
        Replicate()
        if reduced is not None and sharded_dim(placement, dims) == reduced
        else placement
        for placement in placements
    )
