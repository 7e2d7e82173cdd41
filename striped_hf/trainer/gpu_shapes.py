"""Makes operations on fake CPU tensors allocate the same memory as on a GPU.

torch refuses fake tensors of a device that it was not built for. So memory is planned on fake
tensors of the CPU. Some operations allocate other tensors on a CPU than on a GPU:

- Attention. A GPU's flash attention keeps queries, keys, values, its result and one number per
  query, also with dropout and with fewer heads of keys than of queries. On a CPU either of the two
  needs the whole matrix of attention weights.
- Dropout. A GPU keeps a mask of one byte per element. A CPU keeps a mask in the tensor's dtype.
- Autocast. On a GPU more functions compute in float32.
- Products by groups of rows (mixtures of experts). Fake tensors do not support them in float32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

ATTENTION = "causal_shapes"  # among transformers' attention implementations

# The functions of language models that autocast computes in float32 on a GPU only (torch 2.13,
# ATen/autocast_mode.h)
_FLOAT32 = (
    *("__pow__", "cross_entropy", "cumprod", "cumsum", "exp", "group_norm", "layer_norm", "log"),
    *("log_softmax", "logsumexp", "norm", "pow", "prod", "reciprocal", "rms_norm", "rsqrt"),
    *("softmax", "softplus", "sum"),
)


class GpuShapes(TorchFunctionMode):
    """Lets functions on fake CPU tensors allocate the same tensors as on a GPU.

    The backward pass is not in the mode. Layers that are computed again there must enter the mode.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.dropout:
            return _dropout(*args, **kwargs)
        name = getattr(func, "__name__", None)
        if name in ("grouped_mm", "_grouped_mm") and args[0].dtype == torch.float32:
            return _GroupedProduct.apply(*args[:2])  # type: ignore[no-untyped-call]
        if name in _FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tuple(map(_in_float32, args))
            kwargs = {key: _in_float32(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value


class _GroupedProduct(torch.autograd.Function):
    """Allocates like the product of [N, d] and [experts, d, width], and computes nothing."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return rows.new_empty(len(rows), weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


class _FlashAttention(torch.autograd.Function):
    """Allocates like flash attention, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        result = query.new_empty(batch, length, heads, value.shape[-1])
        log_sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, log_sums)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        sums = torch.empty_like(query, dtype=torch.float32)  # for the queries' gradient
        result = tuple(map(torch.empty_like, (query, key, value)))
        del sums
        return result


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Computes attention with transformers' signature; it is causal and gets no mask."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    result: Tensor = _FlashAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return result, None


AttentionInterface.register(ATTENTION, _attention)
