"""Replaces other kinds of tensors by plain tensors, whose memory kernels may read and write."""

from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has its own memory, and is no DTensor or other wrapper around tensors."""
    return _is_plain_class(type(tensor))


@cache
def _is_plain_class(cls: type) -> bool:
    # a wrapper has its own __torch_dispatch__; a subclass without one is an ordinary tensor
    return cls.__torch_dispatch__ is Tensor.__torch_dispatch__  # type: ignore[attr-defined]


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values. Meta tensors and fake tensors have none."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def has_memory(tensor: Tensor) -> bool:
    """Whether the storage of a strided tensor has all of its elements.

    Other code may have freed it, or made it smaller, behind the tensor's back.
    """
    if tensor.is_contiguous():
        elements = tensor.numel()
    else:
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        elements = 1 + sum((size - 1) * stride for size, stride in sizes)
    end = (tensor.storage_offset() + elements) * tensor.itemsize
    return not tensor.numel() or end <= tensor.untyped_storage().nbytes()


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements of a strided tensor share memory, so that a kernel cannot write them."""
    if tensor.is_contiguous():
        return False
    return any(n > 1 and not s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def plain_gradient(grad: Tensor) -> Tensor:
    """Returns a gradient as a plain tensor: itself, or a copy of a wrapper or a lazy view.

    Lazy views are negative and conjugate views, which have the bits of another tensor, and zero
    tensors, which have no memory.
    """
    if is_plain(grad):
        if grad.is_neg():
            return grad.resolve_neg()
        if grad._is_zerotensor():
            return torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device)
        return grad
    return _copy(grad) if has_values(grad) else grad


def plain_parameter(param: Tensor) -> Tensor:
    """Returns a parameter as a plain tensor: itself, or a copy that the caller copies back."""
    if is_plain(param):
        return param.detach().clone().resolve_neg() if param.is_neg() else param
    return _copy(param) if has_values(param) else param


def problem_of_wrapper(param: Tensor) -> str | None:
    """Explains why a copy cannot replace a parameter in the step; None: it can."""
    if is_plain(param) or not has_values(param) or not hasattr(param, "__tensor_flatten__"):
        return None
    inner = [getattr(param, name) for name in param.__tensor_flatten__()[0]]
    alike = [t for t in inner if t.shape == param.shape and t.dtype == param.dtype]
    if len(alike) < 2:
        return None
    return (
        f"is a {type(param).__name__}, which wraps {len(alike)} tensors of its shape and dtype: "
        "give the optimizer each of them as a parameter"
    )


def _copy(tensor: Tensor) -> Tensor:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return plain.copy_(tensor.detach())
