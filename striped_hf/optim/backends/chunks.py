"""Bounds the reference's temporary memory: small tensors in batches, large ones in chunks."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from striped_hf.optim.interface import Entry

Index = tuple[int | slice, ...]

# The number of elements in a chunk. A step's temporaries are about seven float32 arrays of this
# size, or of one row of a matrix if that is larger. On a CPU they fit into the cache. On other
# devices they keep the device busy.
CHUNK_SIZE = {"cpu": 1 << 16}
DEFAULT_CHUNK_SIZE = 1 << 20

_skipped = False


@contextlib.contextmanager
def skipped() -> Iterator[None]:
    """Skips all chunks while its context is open.

    It is for steps on fake tensors, which have no values. Such a step shows its memory much faster
    without the chunks' temporaries, which are bounded.
    """
    global _skipped
    before, _skipped = _skipped, True
    try:
        yield
    finally:
        _skipped = before


def batches(entries: list[Entry]) -> Iterator[list[int]]:
    """Yields the positions of entries that are alike and together have at most one chunk."""
    alike = defaultdict(list)
    for i, entry in enumerate(entries):
        p = entry.param
        grad_dtype = None if entry.grad is None else entry.grad.dtype
        kind = (p.dtype, grad_dtype, *entry[3:])
        alike[p.shape, p.device, kind].append(i)
    for (shape, device, _), positions in alike.items():
        size = max(1, _chunk_size(device) // shape.numel())
        yield from (positions[i : i + size] for i in range(0, len(positions), size))


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stacks n tensors to [n, ...]: a view of the tensor if n is 1, else a copy."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tuple(tensors))


def unstack(tensors: Sequence[Tensor], stacked: Tensor) -> None:
    """Copies the values of ``stack(tensors)``, after changes, back to the tensors."""
    if len(tensors) > 1:
        torch._foreach_copy_(list(tensors), list(stacked.unbind()))


def chunks(shape: torch.Size, unit: int, device: torch.device) -> Iterator[tuple[Index, int]]:
    """Cuts stacked arrays into chunks that are consecutive in row-major order.

    Args:
        shape: The dimensions of one array that may be cut.
        unit: The number of elements behind each position of ``shape``, which are never cut.
        device: The device, which decides the size of a chunk. A chunk has at least ``unit``
            elements.

    Yields:
        The chunk's index in [n, *shape], which keeps n whole, and the row-major position of its
        first element in each array.
    """
    limit = _chunk_size(device)

    def cut(shape: torch.Size, index: Index, start: int) -> Iterator[tuple[Index, int]]:
        if shape.numel() * unit <= limit or not shape:
            yield index, start
            return
        inner = shape[1:].numel() * unit
        if inner > limit and len(shape) > 1:
            for i in range(shape[0]):
                yield from cut(shape[1:], (*index, i), start + i * inner)
        else:
            size = max(1, limit // inner)
            for i in range(0, shape[0], size):
                yield (*index, slice(i, i + size)), start + i * inner

    return iter(()) if _skipped else cut(shape, (slice(None),), 0)


def _chunk_size(device: torch.device) -> int:
    return CHUNK_SIZE.get(device.type, DEFAULT_CHUNK_SIZE)
