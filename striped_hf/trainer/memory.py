"""Memory: the bytes of tensors and of an optimizer's state, and this process's peak."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def tensor_bytes(value: Any, whole: bool = False) -> int:
    """Counts the bytes of all tensors in a value.

    Looks into dicts, lists, tuples, and tensor subclasses that wrap other tensors, such as
    torchao's quantized states (their ``nbytes`` is the size of the decoded tensor). A tensor that
    occurs more than once counts once.

    Args:
        value: A tensor, or a container of tensors.
        whole: Whether a ``DTensor`` counts with its whole shape; otherwise only this process's
            part counts.
    """
    tensors = {id(tensor): tensor for tensor in _tensors(value, whole)}
    return sum(tensor.nbytes for tensor in tensors.values())


def _tensors(value: Any, whole: bool) -> Iterator[torch.Tensor]:
    if whole and isinstance(value, DTensor):
        yield value  # its nbytes are for the whole shape
    elif hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        for name in names:
            yield from _tensors(getattr(value, name), whole)
    elif isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, whole)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, whole)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Counts the bytes of all tensors in an optimizer's state, with all shards of sharded ones."""
    return tensor_bytes(dict(optimizer.state), whole=True)


def peak_memory_mib() -> float:
    """Returns the peak memory in MiB: of the GPU's allocations, or without a GPU of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":  # Windows has no `resource`
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
