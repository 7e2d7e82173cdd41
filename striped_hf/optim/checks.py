"""Which parameters and gradients StripedAdamW refuses: messages name cause, value and fix.

``options.py`` has the checks of hyperparameters.
"""

import torch
from torch import Tensor

from striped_hf.optim.interface import Group
from striped_hf.optim.options import check_options, is_list_of_blocks
from striped_hf.optim.sharded.layout import is_sharded
from striped_hf.optim.state import blocks_of, name_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLATTENED = (
    "was flattened by FSDP1 (FullyShardedDataParallel), which leaves no matrix to factor: use "
    "FSDP2, torch's fully_shard, or fsdp_version: 2 in accelerate's config"
)


def check_group(group: Group, group_index: int) -> None:
    """Raises ValueError unless a param group can be stepped; its blocks become tuples."""
    check_options(group)
    blocks = group["blocks"]
    if not is_list_of_blocks(blocks):
        group["blocks"] = tuple(blocks)
    elif len(blocks) == len(group["params"]):
        group["blocks"] = [tuple(pair) for pair in blocks]
    else:
        raise ValueError(
            f"blocks has {len(blocks)} pairs for the {len(group['params'])} parameters of param "
            f"group {group_index}: pass a pair for each, or one for all"
        )
    for i, param in enumerate(group["params"]):
        name = name_of(group, i, group_index)
        if param.dtype not in _DTYPES:
            raise ValueError(
                f"{name} is {param.dtype}: convert the model to float32, bfloat16 or float16, or "
                "leave the parameter out of the optimizer"
            )
        if param.dim() >= 2 and any(
            size % count for size, count in zip(param.shape[-2:], blocks_of(group, i), strict=True)
        ):
            raise ValueError(
                f"{name} is not divided by blocks={blocks_of(group, i)}: pass counts that divide "
                "its last two dimensions, or put it into a param group with blocks=(1, 1)"
            )
        if _is_flattened(param):
            raise ValueError(f"{name} {_FLATTENED}")


def _is_flattened(param: Tensor) -> bool:
    # FSDP1 marks what it flattened; a flattened matrix has no rows and columns left
    return getattr(param, "_fsdp_flattened", False)


def check_not_flattened(group: Group, matrices: int, group_index: int) -> None:
    """Raises RuntimeError where a group's parameters were swapped for one flat buffer.

    Args:
        group: A param group.
        matrices: How many of its parameters were matrices on construction.
        group_index: Its position.
    """
    params = group["params"]
    if matrices > 0 and len(params) == 1 and params[0].dim() == 1:
        raise RuntimeError(
            f"the parameters of param group {group_index}, {matrices} matrices among them, were "
            f"flattened into one buffer of {params[0].numel()} elements, as DeepSpeed ZeRO does, "
            "which leaves no matrix to factor: use FSDP2, torch's fully_shard, or fsdp_version: 2 "
            "in accelerate's config"
        )


def check_gradient(group: Group, position: int, group_index: int, capturable: bool) -> None:
    """Raises RuntimeError unless a parameter can be stepped by its gradient, which is not None.

    Args:
        group: A param group.
        position: The parameter's.
        group_index: The group's position.
        capturable: Whether the optimizer is.
    """
    problem = _problem(group["params"][position], capturable)
    if problem is not None:
        raise RuntimeError(f"{name_of(group, position, group_index)} {problem}")


def _problem(param: Tensor, capturable: bool) -> str | None:
    grad = param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        return (
            f"has a gradient of layout {grad.layout}: make it dense, for an embedding with "
            "sparse=False"
        )
    if grad.dtype not in _DTYPES:
        return f"has a gradient of dtype {grad.dtype}: make it float32, bfloat16 or float16"
    if is_sharded(param) != is_sharded(grad):
        sides = ("a DTensor", "a plain tensor")
        which = sides if is_sharded(param) else sides[::-1]
        return (
            f"is {which[0]} and its gradient {which[1]}: distribute the gradient over the "
            "parameter's mesh, or make both whole"
        )
    if is_sharded(param) and capturable:
        return (
            "is sharded (a DTensor), and its sums are not exchanged in a CUDA graph: leave "
            "capturable out"
        )
    return _FLATTENED if _is_flattened(param) else None
