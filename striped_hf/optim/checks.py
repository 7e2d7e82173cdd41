"""The parameters and gradients that StripedAdamW refuses. Messages name cause, value and fix.

``options.py`` has the checks of hyperparameters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from striped_hf.optim.blocks import blocks_of, is_marked
from striped_hf.optim.interface import LOW_BITS, BlocksOption, Group, State
from striped_hf.optim.options import as_blocks, check_options, is_list_of_blocks
from striped_hf.optim.plain import has_memory, is_expanded, is_plain
from striped_hf.optim.sharded.layout import is_sharded, local_of, part_shape
from striped_hf.optim.state import Description, name_of

_ORDINARY = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLATTENED = (
    "was flattened by FSDP1 (FullyShardedDataParallel), which leaves no matrix to factor: use "
    "FSDP2, torch's fully_shard, or fsdp_version: 2 in accelerate's config"
)


def check_group(group: Group, group_index: int) -> None:
    """Raises ValueError unless a param group can be stepped. Its pairs become tuples.

    A frozen parameter may have any dtype and shape, and a lazy parameter has none yet. Both are
    checked at their first gradient.
    """
    check_options(group)
    group["betas"] = tuple(float(beta) for beta in group["betas"])
    blocks, params = group["blocks"], group["params"]
    if not is_list_of_blocks(blocks):
        group["blocks"] = as_blocks(blocks)
    elif len(blocks) == len(params):
        group["blocks"] = [as_blocks(each) for each in blocks]
    elif all(is_marked(param) for param in params):
        group["blocks"] = (1, 1)  # other code regrouped the parameters: their marks count
    else:
        raise ValueError(
            f"blocks has {len(blocks)} pairs for the {len(params)} parameters of param group "
            f"{group_index}: pass a pair for each, or one for all"
        )
    for i, param in enumerate(params):
        if any_flattened([param]):
            raise ValueError(f"{name_of(group, i, group_index)} {_FLATTENED}")
        if param.requires_grad and not is_lazy(param):
            problem = (
                _problem_of_dtype(param)
                or _problem_of_placements(param)
                or _problem_of_master_bits(param, group["master_bits"] is not None)
            )
            if problem is not None:
                raise ValueError(f"{name_of(group, i, group_index)} {problem}")


def check_blocks(group: Group, group_index: int) -> None:
    """Raises ValueError unless the blocks of a param group divide its parameters."""
    for i, param in enumerate(group["params"]):
        if param.requires_grad and not is_lazy(param):
            problem = _problem_of_blocks(param.shape, blocks_of(group, i))
            if problem is not None:
                raise ValueError(f"{name_of(group, i, group_index)} {problem}")


def _problem_of_dtype(param: Tensor) -> str | None:
    if param.dtype in _DTYPES:
        return None
    return (
        f"is {param.dtype}: convert the model to float32, bfloat16 or float16, or leave the "
        "parameter out of the optimizer"
    )


def _problem_of_master_bits(param: Tensor, has_master_bits: bool) -> str | None:
    if not has_master_bits or param.dtype != torch.float16:
        return None
    return (
        "is float16, but master_bits=24 keeps the next 8 bits of bfloat16 weights: convert the "
        "model to bfloat16, or leave master_bits out"
    )


def _problem_of_placements(param: Tensor) -> str | None:
    if not is_sharded(param) or not any(p.is_partial() for p in param.placements):
        return None
    return (
        "has a Partial placement: every process has a summand, and none has its value: "
        "redistribute it to Shard or Replicate"
    )


def _problem_of_blocks(shape: Sequence[int], blocks: BlocksOption) -> str | None:
    if len(shape) < 2 or isinstance(blocks, str):
        return None
    if shape[-2] % blocks[0] == 0 and shape[-1] % blocks[1] == 0:
        return None
    return (
        f"is not divided by blocks={blocks}: pass counts that divide its last two dimensions, or "
        "put it into a param group with blocks=(1, 1)"
    )


def any_flattened(params: list[Tensor]) -> bool:
    """Whether FSDP1 flattened a parameter, which leaves no rows and columns; it marks those."""
    return True in [hasattr(param, "_fsdp_flattened") for param in params]


def is_ordinary(param: Tensor, grad: Tensor, state: State, description: Description) -> bool:
    """Whether a parameter can be stepped as it is; else ``problem_of_gradient`` and others decide.

    ``known.py`` compares all that this depends on.
    """
    strided, shape, device = torch.strided, param.shape, param.get_device()
    if (
        type(param) not in _ORDINARY
        or type(grad) is not Tensor
        or param.layout is not strided
        or grad.layout is not strided
        or param.dtype not in _DTYPES
        or grad.dtype not in _DTYPES
        or grad.shape != shape
        or grad.get_device() != device
        or not (param.data_ptr() and grad.data_ptr())
        or is_expanded(param)
        or not (has_memory(param) and has_memory(grad))
        or param.is_neg()
        or grad.is_neg()
        or hasattr(param, "_fsdp_flattened")
        or len(state) != 1 + len(description.tensors)
        or (description.low_bits is not None and param.dtype is not torch.bfloat16)
    ):
        return False
    step = state.get("step")
    if type(step) is not Tensor or step.dtype is not torch.float32 or step.dim():
        return False
    for key, size, dtype in description.tensors:
        value = state.get(key)
        if (
            type(value) is not Tensor
            or value.layout is not strided
            or value.dtype is not dtype
            or value.shape != size
            or value.get_device() != device
            or not value.data_ptr()
            or not value.is_contiguous()
            or value.untyped_storage().nbytes() - value.storage_offset() * 4 < value.nbytes
            or value.is_neg()
        ):
            return False
    return True


def problem_of_gradient(param: Tensor, grad: Tensor | None, capturable: bool) -> str | None:
    """Explains why a parameter cannot be stepped by its gradient; None: it can be stepped.

    Args:
        param: A parameter.
        grad: Its gradient; None for a sharded parameter that has none in this process.
        capturable: Whether the optimizer is capturable.
    """
    if param.dtype not in _DTYPES:
        return _problem_of_dtype(param)
    problem = _problem_of_placements(param)
    if problem is not None:
        return problem
    if is_sharded(param) and capturable:
        return (
            "is sharded (a DTensor), and its sums are not exchanged in a CUDA graph: leave "
            "capturable out"
        )
    if grad is None:
        return None
    if grad.layout is not torch.strided:
        return (
            f"has a gradient of layout {grad.layout}: make it dense, for an embedding with "
            "sparse=False"
        )
    if param.layout is not torch.strided:
        return f"has layout {param.layout}: make it dense"
    if grad.dtype not in _DTYPES:
        return f"has a gradient of dtype {grad.dtype}: make it float32, bfloat16 or float16"
    if is_sharded(param) != is_sharded(grad):
        sides = ("a DTensor", "a plain tensor")
        which = sides if is_sharded(param) else sides[::-1]
        return (
            f"is {which[0]} and its gradient {which[1]}: distribute the gradient over the "
            "parameter's mesh, or make both whole"
        )
    if param.shape != grad.shape or param.device != grad.device:
        return (
            f"is on {param.device} and its gradient on {grad.device} with shape "
            f"{tuple(grad.shape)}: it was resized or moved after the backward pass; compute the "
            "gradient again"
        )
    part, grad_part = (local_of(t) if is_sharded(t) else t for t in (param, grad))
    if _is_freed(part) or _is_freed(grad_part) or part._is_zerotensor():
        return (
            "or its gradient has no memory, because its storage was freed or made smaller: step "
            "before that"
        )
    if is_expanded(part):
        return "is expanded, so that its elements share memory: replace it by its clone()"
    return _FLATTENED if any_flattened([param]) else None


def problem_of_shards(param: DTensor, state: State) -> str | None:
    """Names a tensor whose local shard does not have the shape of its placements; None: none."""
    grad = {} if param.grad is None else {"gradient": param.grad}
    for what, value in {"parameter": param, **grad, **state}.items():
        if not is_sharded(value):
            continue
        part, mesh, placements = local_of(value), value.device_mesh, tuple(value.placements)
        expected = part_shape(value.shape, mesh, placements)
        if part.shape != expected:
            return (
                f"has a {what} with a local shard of shape {tuple(part.shape)}, but shape "
                f"{tuple(value.shape)} with the placements {placements} on {mesh} means "
                f"{tuple(expected)} here: make it with distribute_tensor, or give from_local its "
                "shape"
            )
    return None


def _is_freed(tensor: Tensor) -> bool:
    if not is_plain(tensor) or tensor._is_zerotensor() or tensor.is_meta:
        return False
    return not has_memory(tensor)


def problem_of_shape(before: Sequence[int]) -> str:
    """Explains that a parameter no longer has the shape for which its state was made."""
    return (
        f"had shape {tuple(before)} when its state was made: undo what resized it, or drop the "
        "state (optimizer.state.pop(parameter)), which starts it afresh"
    )


def problem_of_state(param: Tensor, state: State, description: Description) -> str | None:
    """Describes the part of a parameter's state that does not fit it; None: the state fits.

    The state must have the shapes and dtypes of ``state.zero_state``, because kernels read and
    write as many elements as the parameter's shape and format say. ``blocks`` of a parameter
    without a state must divide it.

    Args:
        param: The parameter.
        state: Its state; empty if there is none yet.
        description: The parameter's description, which decides the state.
    """
    if problem := _problem_of_master_bits(param, description.low_bits is not None):
        return problem
    if not state:
        return _problem_of_blocks(description.shape, description.blocks)
    step = state.get("step")
    if not isinstance(step, Tensor) or step.dtype is not torch.float32 or step.numel() != 1:
        return _misfit("step", step, torch.Size(()), torch.float32, description)
    device = param.device
    for key, shape, dtype in description.tensors:
        value = state.get(key)
        if value is None and key == LOW_BITS:
            continue  # it was in float32 before, or master_bits was None
        if (
            not isinstance(value, Tensor)
            or not (is_plain(value) or is_sharded(value) or not is_plain(param))
            or value.shape != shape
            or value.dtype is not dtype
            or value.device != device
            or value.layout is not torch.strided
            or value.is_neg()
            or value._is_zerotensor()
            or _is_freed(value)
            or is_expanded(value)
        ):
            return _misfit(key, value, shape, dtype, description, device)
    return None


def _misfit(
    key: str,
    value: Any,
    shape: torch.Size,
    dtype: torch.dtype,
    description: Description,
    device: torch.device | str = "any device",
) -> str:
    if isinstance(value, Tensor):
        kind = "" if is_plain(value) else f"a {type(value).__name__}, "
        if value.layout is torch.strided:
            kind += "without its memory, " if _is_freed(value) or value._is_zerotensor() else ""
            kind += "expanded, " if is_expanded(value) else ""
        found = f"is {kind}{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    else:
        found = "is missing" if value is None else f"is a {type(value).__name__}"
    return (
        f"has a state that does not fit it: {key!r} {found}, but with momentum_dtype="
        f"{description.momentum_dtype!r} and blocks={description.blocks} a plain {dtype} of shape "
        f"{tuple(shape)} on {device} is needed. Undo what changed the parameter, its state or its "
        "group after its last step, or drop the state (optimizer.state.pop(parameter)), which "
        "starts it afresh"
    )
