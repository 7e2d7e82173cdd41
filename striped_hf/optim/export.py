"""Exports a StripedAdamW's state in the form that ``torch.optim.AdamW`` uses."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from striped_hf.optim import momentum
from striped_hf.optim.interface import State
from striped_hf.optim.sharded.layout import is_sharded, wrap

# the keys that AdamW's groups and ours have in common
SHARED_WITH_ADAMW = ("lr", "betas", "eps", "weight_decay", "maximize", "initial_lr", "param_names")


def adamw_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """Returns the state of a StripedAdamW as a state dict of ``torch.optim.AdamW``.

    ``torch.optim.AdamW.load_state_dict`` takes it, over the same groups of parameters. So does a
    StripedAdamW with another ``momentum_dtype`` or other ``blocks``, which encodes it anew.

    The momentum is decoded. The second moment of a matrix is expanded from its stripes, block by
    block, to row_i col_j / mean(row), as Adafactor does (Shazeer and Stern, 2018, algorithm 2).
    0-D and 1-D parameters lose nothing. ``nesterov`` and ``lagged``, which AdamW does not have, are
    left out. So is the floor under the root: the means of an exported second moment are the
    stripes.

    If parameters are sharded, all processes must call the function together. The state is gathered
    whole, one parameter at a time, and sharded as its parameter is.

    Args:
        optimizer: A StripedAdamW.

    Returns:
        The groups with AdamW's keys; and for each parameter that has state ``step``, [] float32 on
        the CPU, and ``exp_avg`` and ``exp_avg_sq``, float32 of its shape. They share no memory with
        the optimizer.

    Raises:
        ValueError: The optimizer is not a StripedAdamW.
    """
    defaults = torch.optim.AdamW([torch.empty(0)]).param_groups[0]
    states: dict[int, State] = {}
    groups: list[dict[str, Any]] = []
    position = 0
    for group in optimizer.param_groups:
        if "momentum_dtype" not in group:
            raise ValueError(
                f"{type(optimizer).__name__} has no momentum_dtype in its param groups: pass a "
                "StripedAdamW"
            )
        shared = {key: group[key] for key in SHARED_WITH_ADAMW if key in group}
        first = position
        for param in group["params"]:
            if optimizer.state.get(param):
                states[position] = _expanded(optimizer.state[param], param)
            position += 1
        groups.append({**defaults, **shared, "params": list(range(first, position))})
    return {"state": states, "param_groups": groups}


@torch.no_grad()
def _expanded(state: State, param: Tensor) -> State:
    """Returns AdamW's state of one parameter."""
    whole = {
        key: value.full_tensor() if is_sharded(value) else value for key, value in state.items()
    }
    expanded = {key: _as_param(value, param) for key, value in expand(whole, param.shape).items()}
    return {"step": whole["step"].to("cpu", copy=True), **expanded}


def expand(state: State, shape: torch.Size) -> State:
    """Returns ``exp_avg`` and ``exp_avg_sq``, float32 of a parameter's shape, from its whole state.

    Args:
        state: As ``state.zero_state`` describes it, for any of the matrices as which the parameter
            can be read.
        shape: The parameter's shape.
    """
    codes, scale = state["exp_avg"], state.get("exp_avg_scale")
    momentum_dtype = "int4" if codes.dtype == torch.uint8 else "int8"  # used only with a scale
    if "exp_avg_sq" in state:
        exp_avg_sq, columns = state["exp_avg_sq"], codes.shape[-1] if codes.dim() else 1
    else:
        row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        exp_avg_sq, columns = _second_moment(row, col), col.shape[-1]
    exp_avg = momentum.decode(codes, scale, momentum_dtype, columns)
    return {"exp_avg": exp_avg.reshape(shape), "exp_avg_sq": exp_avg_sq.reshape(shape)}


def _second_moment(row: Tensor, col: Tensor) -> Tensor:
    """Expands stripes to a second moment.

    Args:
        row: [..., R, bc] float32.
        col: [..., br, C] float32.

    Returns:
        [..., R, C] float32.
    """
    row = row.unflatten(-2, (col.shape[-2], -1))  # [..., br, R / br, bc]
    col = col.unflatten(-1, (row.shape[-1], -1))  # [..., br, bc, C / bc]
    mean = row.mean(-2, keepdim=True)
    # divided first: the product of row and column underflows where gradients are small
    share = torch.where(mean > 0, row / mean, 0.0)
    return (share.unsqueeze(-1) * col.unsqueeze(-3)).flatten(-2).flatten(-3, -2)


def _as_param(value: Tensor, param: Tensor) -> Tensor:
    """Returns a copy of a whole state entry that is sharded as the parameter is."""
    if not is_sharded(param):
        return value.clone(memory_format=torch.contiguous_format)
    mesh, placements = param.device_mesh, tuple(param.placements)
    size, offset = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    local = value[tuple(slice(at, at + n) for at, n in zip(offset, size, strict=True))]
    return wrap(local.clone(), value.shape, mesh, placements)
