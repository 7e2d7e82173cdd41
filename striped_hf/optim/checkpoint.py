"""Loads the state dict of a StripedAdamW, and converts the one of a ``torch.optim.AdamW``."""

from itertools import chain, product
from typing import Any

import torch
from torch import Tensor

from striped_hf.optim import momentum
from striped_hf.optim.export import SHARED_WITH_ADAMW, expand
from striped_hf.optim.interface import LOW_BITS, Blocks, Group, State
from striped_hf.optim.matrix import readings
from striped_hf.optim.options import check_options, is_list_of_blocks
from striped_hf.optim.plain import has_values
from striped_hf.optim.sharded.agreement import count_processes
from striped_hf.optim.sharded.layout import by_rows, is_elsewhere, is_sharded, sharded_dim, wrap
from striped_hf.optim.state import Description, blocks_of, description_of, name_of, zero_state
from striped_hf.optim.views import as_stepped

# the keys of a group that are not taken from a state dict: its blocks are the same, perhaps as one
# pair for all, and master_bits may be new here
_NOT_LOADED = ("params", "blocks", "master_bits")


def prepare_state_dict(state_dict: dict[str, Any], groups: list[Group]) -> dict[str, Any]:
    """Checks a state dict against the param groups that will load it, and fits it to them.

    It changes neither the state dict nor the groups. A ``torch.optim.AdamW`` state dict is
    converted: second moments are reduced to their means by row and by column, and the momentum is
    encoded. Options that AdamW does not have stay as the groups have them. Its parameters are
    matched by name where both sides know names, else by position.

    Args:
        state_dict: The state dict of a StripedAdamW or an AdamW.
        groups: The optimizer's param groups.

    Returns:
        A state dict whose groups correspond to ``groups`` and whose states have the dtypes and
        shapes of ``state.zero_state``, keyed by position.

    Raises:
        ValueError: The state dict has other groups, another momentum format or other stripes, a
            state is incomplete or of a wrong shape, or only some processes of sharded parameters
            got a state dict of AdamW.
    """
    is_adamw = _is_adamw(state_dict)
    _check_same_kind(is_adamw, groups)  # first: no process must wait for one that has failed
    for saved in state_dict["param_groups"]:
        if len(saved.get("param_names", saved["params"])) != len(saved["params"]):
            raise ValueError(
                f"a param group of the state dict has {len(saved['param_names'])} param_names for "
                f"{len(saved['params'])} parameters: pass what state_dict() returned, unchanged"
            )
    if is_adamw:
        state_dict = _from_adamw(state_dict, groups)
    saved_groups = state_dict["param_groups"]
    _check_sizes(saved_groups, groups)
    saved_ids = list(chain.from_iterable(group["params"] for group in saved_groups))
    unknown = state_dict["state"].keys() - set(saved_ids)
    if unknown:
        raise ValueError(
            f"the state dict holds state for the parameters {sorted(unknown)}, which none of its "
            "param groups lists: pass what state_dict() returned, unchanged"
        )

    states: dict[int, State] = {}
    new_groups = []
    position = 0
    for group_index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        first = position
        for i in range(len(group["params"])):
            name = name_of(group, i, group_index)
            _check_same_storage(saved, group, i, name)
            is_here = not is_elsewhere(group["params"][i])
            if is_here and saved_ids[position] in state_dict["state"]:
                description = description_of(group, i)
                loaded = state_dict["state"][saved_ids[position]]
                _check_low_bits(loaded, group, i, name)
                loaded = _as_read_here(loaded, description, name)
                zeros = zero_state(description, torch.device("meta"))
                states[position] = _checked_state(loaded, zeros, name)
            position += 1
        loaded_options = {key: value for key, value in saved.items() if key not in _NOT_LOADED}
        new_groups.append({**group, **loaded_options, "params": list(range(first, position))})
        _check_options(new_groups[-1], group_index)
    return {"state": states, "param_groups": new_groups}


def _check_sizes(saved_groups: list[Group], groups: list[Group]) -> None:
    saved_sizes = [len(group["params"]) for group in saved_groups]
    sizes = [len(group["params"]) for group in groups]
    if saved_sizes != sizes:
        raise ValueError(
            f"the state dict has param groups of {saved_sizes} parameters, this optimizer of "
            f"{sizes}: build its param groups as those of the optimizer that was saved"
        )


def _check_options(group: Group, group_index: int) -> None:
    try:
        check_options(group)
    except ValueError as error:
        raise ValueError(
            f"param group {group_index} of the state dict: {error}; correct it in the state dict"
        ) from error


def _check_same_storage(saved: Group, group: Group, position: int, name: str) -> None:
    for key in ("momentum_dtype", "blocks"):
        if key not in saved:
            raise ValueError(
                f"{name}: the state dict's param group has no {key!r} (it has {sorted(saved)}): "
                "load one that StripedAdamW or torch.optim.AdamW saved"
            )
        if key == "blocks" and _is_of_others(saved):
            continue  # the shapes of its stripes tell
        here, there = (
            _pair_of(side, position) if key == "blocks" else side[key] for side in (group, saved)
        )
        if there != here:
            raise ValueError(
                f"{name}: the state dict was saved with {key}={there!r}, this optimizer has "
                f"{key}={here!r}: construct it with {key}={there!r} to go on, or start afresh"
            )


def _check_low_bits(loaded: dict[str, Any], group: Group, position: int, name: str) -> None:
    """Raises ValueError if a bfloat16 matrix would lose the bits that its state was saved with."""
    value, description = loaded.get(LOW_BITS), description_of(group, position)
    is_low = group["params"][position].dtype == torch.bfloat16
    if is_low and description.low_bits is None and value is not None and value.dtype == torch.int8:
        raise ValueError(
            f"{name}: the state dict was saved with master_bits=24, this optimizer has "
            f"master_bits=None: construct it with master_bits=24 to go on, or delete "
            f"{LOW_BITS!r} from the states, which rounds the weights to bfloat16"
        )


def _pair_of(group: Group, position: int) -> Blocks:
    blocks = blocks_of(group, position)
    return (1, 1) if isinstance(blocks, str) else blocks  # how it is read may change


def _is_of_others(saved: Group) -> bool:
    """Whether ``blocks`` are a list for other parameters: other code may have removed some."""
    blocks = saved["blocks"]
    return is_list_of_blocks(blocks) and len(blocks) != len(saved["params"])


def _as_read_here(loaded: dict[str, Any], description: Description, name: str) -> dict[str, Any]:
    """Converts a state that was saved when its parameter was read as another matrix.

    Kernels of convolutions were once saved as stacks of matrices [..., R, C]. The second moment is
    expanded from the saved stripes and reduced to the new ones, and the momentum is encoded anew.
    A state that fits already, or that fits no reading, is returned unchanged.
    """
    shape = description.shape
    if len(shape) < 3 or description.blocks != (1, 1) or _fits(loaded, description):
        return loaded
    for stepped, stored in product(readings(shape).values(), momentum.MOMENTUM_DTYPES):
        saved = Description(shape, stepped, stored, (1, 1), None)
        if stepped == description.stepped or not _fits(loaded, saved):
            continue
        for key in saved.keys:
            problem = _problem_of_values(key, loaded[key])
            if problem is not None:
                raise ValueError(f"{name}: {key!r} in the state dict {problem}")
        whole = {
            key: loaded[key].full_tensor() if is_sharded(loaded[key]) else loaded[key]
            for key in saved.keys
        }
        expanded = expand(whole, shape)
        return _state_from_adamw({**loaded, **expanded}, description, name)
    return loaded


def _fits(loaded: dict[str, Any], description: Description) -> bool:
    values = [(loaded.get(key), shape, dtype) for key, shape, dtype in description.tensors]
    return all(
        isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype
        for value, shape, dtype in values
    )


def _problem_of_values(key: str, value: Tensor) -> str | None:
    """Describes a value of a loaded tensor that no run can have written; None: there is none."""
    if value.layout is not torch.strided:
        return f"has layout {value.layout}: make it dense"
    if is_sharded(value) or not has_values(value):
        return None  # an error in only some of the processes would leave the others waiting
    if key == "step" and not (value >= 0 and value == value.round()):
        return f"is {value.item()}: a number of steps is a whole number >= 0"
    if key == "exp_avg_scale" and not ((value >= 0) & value.isfinite()).all():
        return "has a scale that is negative or not finite: load an earlier checkpoint"
    return None


def _checked_state(loaded: dict[str, Any], zeros: State, name: str) -> State:
    """Checks the entries of ``loaded`` that belong to a state against its zeros; returns them."""
    state = {}
    for key, like in zeros.items():
        if key == LOW_BITS and key not in loaded:  # saved without them
            state[key] = torch.zeros(like.shape, dtype=like.dtype)
            continue
        if key not in loaded:
            raise ValueError(
                f"{name}: the state dict lacks {key!r} (it has {sorted(loaded)}): it was cut short "
                "or saved by another optimizer; load the one that StripedAdamW saved"
            )
        value = torch.as_tensor(loaded[key], dtype=like.dtype if key == "step" else None)
        if value.shape != like.shape or value.dtype != like.dtype:
            raise ValueError(
                f"{name}: {key!r} in the state dict is {value.dtype} of shape "
                f"{tuple(value.shape)} where {like.dtype} of shape {tuple(like.shape)} is needed: "
                "load a state dict of this model, saved with the same momentum_dtype and blocks"
            )
        problem = _problem_of_values(key, value)
        if problem is not None:
            raise ValueError(f"{name}: {key!r} in the state dict {problem}")
        state[key] = value
    return state


# -------------------------------------------------------------------------------------------------
# AdamW
# -------------------------------------------------------------------------------------------------


def _is_adamw(state_dict: dict[str, Any]) -> bool:
    return any("amsgrad" in group for group in state_dict["param_groups"])


def _check_same_kind(is_adamw: bool, groups: list[Group]) -> None:
    """Raises ValueError if the processes of sharded parameters got state dicts of two optimizers.

    torch fills this optimizer's template with the values that rank 0 broadcasts. Only rank 0 then
    sees that the state dict is AdamW's.
    """
    params = [param for group in groups for param in group["params"]]
    if any(count not in (0, processes) for count, processes in count_processes(params, is_adamw)):
        raise ValueError(
            "some processes got the state dict of AdamW and others did not, as with "
            "broadcast_from_rank0=True, which cannot carry AdamW's state into this optimizer's: "
            "load it in the same way into an optimizer torch.optim.AdamW(model.parameters()), and "
            "then call load_state_dict(adamw.state_dict()) of this optimizer in every process"
        )


def _from_adamw(state_dict: dict[str, Any], groups: list[Group]) -> dict[str, Any]:
    """Converts an AdamW's state dict to one of a StripedAdamW with these groups."""
    saved = [
        (group, i) for group in state_dict["param_groups"] for i in range(len(group["params"]))
    ]
    for group in state_dict["param_groups"]:
        if group["amsgrad"]:
            raise ValueError(
                "the AdamW state dict has amsgrad=True, whose running maximum has no stripes: "
                "start afresh, or go on with AdamW"
            )
    partners = _match(state_dict, groups)
    states: dict[int, State] = {}
    new_groups: list[Group] = []
    position = 0
    for group_index, group in enumerate(groups):
        new_group = {**group, "params": []}
        names: list[str] = []
        for i in range(len(group["params"])):
            name = name_of(group, i, group_index)
            saved_group, saved_position = saved[partners[position]]
            id_ = saved_group["params"][saved_position]
            shared = {key: saved_group[key] for key in SHARED_WITH_ADAMW if key in saved_group}
            if isinstance(shared["lr"], Tensor) and not isinstance(group["lr"], Tensor):
                shared["lr"] = shared["lr"].item()  # torchao's AdamW makes a tensor of every rate
            if "param_names" in shared:  # as in torch, they replace those of the optimizer
                names.append(shared.pop("param_names")[saved_position])
            if i > 0 and any(new_group[key] != value for key, value in shared.items()):
                raise ValueError(
                    f"{name} and those before it in its group come from AdamW groups with "
                    "different hyperparameters: split this optimizer's groups as AdamW's were"
                )
            new_group.update(shared)
            new_group["params"].append(position)
            if id_ in state_dict["state"] and not is_elsewhere(group["params"][i]):
                loaded = state_dict["state"][id_]
                states[position] = _state_from_adamw(loaded, description_of(group, i), name)
            position += 1
        if names:
            new_group["param_names"] = names
        new_groups.append(new_group)
    return {"state": states, "param_groups": new_groups}


def _state_from_adamw(loaded: dict[str, Any], description: Description, name: str) -> State:
    loaded = {key: _decoded(value) for key, value in loaded.items()}
    for key in ("step", "exp_avg", "exp_avg_sq"):
        if key not in loaded or (key != "step" and loaded[key].shape != description.shape):
            raise ValueError(
                f"{name}: the AdamW state dict has no {key!r} of its shape: load one of this model"
            )
        if key != "step" and not loaded[key].is_floating_point():
            raise ValueError(
                f"{name}: {key!r} in the AdamW state dict is {loaded[key].dtype}, which are codes "
                "of another optimizer: convert it to float32 first"
            )
    exp_avg = _in_state_shape(loaded["exp_avg"], description)
    state = {
        "step": torch.as_tensor(loaded["step"], dtype=torch.float32),
        **_coded(exp_avg, description.momentum_dtype),
    }
    exp_avg_sq = loaded["exp_avg_sq"].float()
    if len(description.stepped) < 2:
        state["exp_avg_sq"] = exp_avg_sq
    else:
        if is_sharded(exp_avg_sq):  # the means of its parts, which need not hold whole blocks
            exp_avg_sq = exp_avg_sq.full_tensor()
        exp_avg_sq = exp_avg_sq.reshape(description.stepped)
        row_blocks, column_blocks = description.blocks
        state["exp_avg_sq_row"] = exp_avg_sq.unflatten(-1, (column_blocks, -1)).mean(-1)
        state["exp_avg_sq_col"] = exp_avg_sq.unflatten(-2, (row_blocks, -1)).mean(-2)
    return state


def _in_state_shape(exp_avg: Tensor, description: Description) -> Tensor:
    """Reshapes a momentum from the parameter's shape to the state's; whole, if it must be."""
    shape, dims = description.state_shape, len(description.state_shape)
    if dims == exp_avg.dim():
        return exp_avg
    if is_sharded(exp_avg):
        placements = tuple(exp_avg.placements)
        if placements == by_rows(placements, exp_avg.dim()):
            local = as_stepped(exp_avg.to_local().contiguous(), dims)
            return wrap(local, shape, exp_avg.device_mesh, placements)
        exp_avg = exp_avg.full_tensor()
    return exp_avg.reshape(shape)


def _coded(exp_avg: Tensor, momentum_dtype: str) -> State:
    """Encodes a momentum. Each process encodes its rows, or the whole if shards cut codes."""
    if is_sharded(exp_avg):
        dims, placements = exp_avg.dim(), tuple(exp_avg.placements)
        is_coded = momentum_dtype in momentum.QMAX
        if not any(is_coded and sharded_dim(p, dims) == dims - 1 for p in placements):
            whole = momentum.init(exp_avg.shape, momentum_dtype, torch.device("meta"))
            local = _coded(exp_avg.to_local(), momentum_dtype)
            return {
                key: wrap(value, whole[key].shape, exp_avg.device_mesh, placements)
                for key, value in local.items()
            }
        exp_avg = exp_avg.full_tensor()
    codes, scale = momentum.encode(exp_avg.float(), momentum_dtype)
    return {"exp_avg": codes} if scale is None else {"exp_avg": codes, "exp_avg_scale": scale}


def _decoded(value: Any) -> Any:
    """Returns a value of AdamW's state; decodes it to float32 if torchao's AdamW stores codes."""
    if is_sharded(value):
        local = value.to_local()
        decoded = _decoded(local)
        if decoded is local:
            return value
        return wrap(decoded, value.shape, value.device_mesh, tuple(value.placements))
    # torch's own method with this name is for other tensors
    if isinstance(value, Tensor) and type(value).dequantize is not Tensor.dequantize:
        return value.dequantize()
    return value


def _match(state_dict: dict[str, Any], groups: list[Group]) -> list[int]:
    """Returns, for each parameter of ``groups`` in order, its position among the saved ones."""
    saved_groups = state_dict["param_groups"]
    if all("param_names" in group for group in (*saved_groups, *groups)):
        saved_names = list(chain.from_iterable(group["param_names"] for group in saved_groups))
        names = list(chain.from_iterable(group["param_names"] for group in groups))
        if sorted(saved_names) != sorted(names):
            differing = sorted(set(saved_names) ^ set(names))
            raise ValueError(
                f"the AdamW state dict and this optimizer differ in the parameters {differing}: "
                "load one of this model, with the same parameters frozen"
            )
        return [saved_names.index(name) for name in names]

    _check_sizes(saved_groups, groups)
    return list(range(sum(len(group["params"]) for group in groups)))
