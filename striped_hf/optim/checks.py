"""What StripedAdamW refuses: each message names the argument, its value, and the mend."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from striped_hf.optim import momentum
from striped_hf.optim.state import Group, blocks_of, describe

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SWITCHES = {
    "maximize": (True, False),
    "nesterov": (True, False),
    "lagged": (True, False),
    "stochastic_rounding": (True, False, None),
}


def check_hyperparameters(group: Group) -> None:
    """Raises ValueError unless a param group's values, or the defaults, are in their ranges."""
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"lr={group['lr']} is a tensor of several elements: pass one of one")
    for key in ("lr", "eps", "weight_decay"):
        value = group[key]
        if not isinstance(value, (Real, Tensor)) or not 0 <= float(value) < math.inf:
            raise ValueError(f"{key}={value!r} is out of range: pass a finite number >= 0")
    betas = group["betas"]
    if not _is_pair(betas) or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas} is out of range: pass two numbers in [0, 1)")
    if group["momentum_dtype"] not in momentum.MOMENTUM_DTYPES:
        raise ValueError(
            f"momentum_dtype={group['momentum_dtype']!r} is unknown: pass one of "
            f"{', '.join(momentum.MOMENTUM_DTYPES)}"
        )
    blocks = group["blocks"]
    for pair in blocks if _is_one_each(blocks) else [blocks]:
        if not _is_pair(pair) or not all(isinstance(b, int) and b > 0 for b in pair):
            raise ValueError(f"blocks={pair} is no pair of counts: pass two integers >= 1")
    for key, allowed in _SWITCHES.items():
        if group[key] not in allowed:
            raise ValueError(f"{key}={group[key]!r} is no switch: pass one of {allowed}")


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def _is_one_each(blocks: Any) -> bool:
    return isinstance(blocks, list) and all(isinstance(pair, (tuple, list)) for pair in blocks)


def check_group(group: Group, group_index: int) -> None:
    """Raises ValueError unless a param group can be stepped; its blocks become tuples."""
    check_hyperparameters(group)
    blocks = group["blocks"]
    if not _is_one_each(blocks):
        group["blocks"] = tuple(blocks)
    elif len(blocks) == len(group["params"]):
        group["blocks"] = [tuple(pair) for pair in blocks]
    else:
        raise ValueError(
            f"blocks has {len(blocks)} pairs for the {len(group['params'])} parameters of param "
            f"group {group_index}: pass a pair for each, or one for all"
        )
    for i, param in enumerate(group["params"]):
        name = describe(group, i, group_index)
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
            raise ValueError(_flattened_message(name))


def _is_flattened(param: Tensor) -> bool:
    # FSDP1 marks what it flattened; a flattened matrix has no rows and columns left
    return getattr(param, "_fsdp_flattened", False)


def _flattened_message(name: str) -> str:
    return (
        f"{name} was flattened by FSDP1 (FullyShardedDataParallel), which leaves no matrix to "
        "factor: use FSDP2, torch's fully_shard, or fsdp_version: 2 in accelerate's config"
    )


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


def check_gradient(param: Tensor, group: Group, i: int, group_index: int, capturable: bool) -> None:
    """Raises RuntimeError for what can have changed since construction."""
    grad = param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{describe(group, i, group_index)} has a gradient of layout {grad.layout}: make it "
            "dense, for an embedding with sparse=False"
        )
    if grad.dtype not in _DTYPES:
        raise RuntimeError(
            f"{describe(group, i, group_index)} has a gradient of dtype {grad.dtype}: make it "
            "float32, bfloat16 or float16"
        )
    is_sharded = hasattr(param, "device_mesh")
    if is_sharded != hasattr(grad, "device_mesh"):
        sides = ("a DTensor", "a plain tensor")
        which = sides if is_sharded else sides[::-1]
        raise RuntimeError(
            f"{describe(group, i, group_index)} is {which[0]} and its gradient {which[1]}: "
            "distribute the gradient over the parameter's mesh, or make both whole"
        )
    if is_sharded and capturable:
        raise RuntimeError(
            f"{describe(group, i, group_index)} is sharded (a DTensor), and its sums are not "
            "exchanged in a CUDA graph: leave capturable out"
        )
    if _is_flattened(param):
        raise RuntimeError(_flattened_message(describe(group, i, group_index)))
