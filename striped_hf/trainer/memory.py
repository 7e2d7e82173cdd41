"""Memory: what tensors and an optimizer's state store, and this process's peak."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def tensor_bytes(value: Any, whole: bool = False) -> int:
    """Counts the bytes that all tensors in a value store.

    Looks into dicts, lists and tuples, and into tensor subclasses that wrap others, as the coded
    states of torchao do (their own ``nbytes`` is the decoded tensor's). A tensor that is there more
    than once counts once.

    Args:
        value: What holds the tensors.
        whole: Of a ``DTensor``, counts all of the tensor, as one process without shards would have
            it; otherwise this process's part.
    """
    tensors = {id(tensor): tensor for tensor in _tensors(value, whole)}
    return sum(tensor.nbytes for tensor in tensors.values())


def _tensors(value: Any, whole: bool) -> Iterator[torch.Tensor]:
    if whole and isinstance(value, DTensor):
        yield value  # whose nbytes are of its whole shape
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
    """Counts the bytes of all tensors in an optimizer's state, of sharded ones all shards'."""
    return tensor_bytes(dict(optimizer.state), whole=True)


def peak_memory_mib() -> float:
    """Returns the most memory used so far: the GPU's allocations, or else the process's, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":  # where Python has no `resource`
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
