"""Copies arrays, and the tensors' addresses, to the device asynchronously."""

import numpy as np
import torch
from torch import Tensor

from striped_hf.optim.backends.triton.arguments import EntryPointers
from striped_hf.optim.capture import is_capturing

# The most copies of addresses that CUDA graphs may capture before the next step outside of a graph.
_STAGED = 4


def copy_to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Returns a copy of an array on the device, made asynchronously.

    Raises:
        RuntimeError: A CUDA graph is being captured.
    """
    host = torch.from_numpy(array)
    if device.type == "cpu":
        return host.clone()
    if is_capturing(device):
        raise RuntimeError(
            "StripedAdamW: the first step of these parameters is being captured in a CUDA "
            "graph: take one before capturing, as torch's notes on CUDA graphs do"
        )
    # torch reuses pinned memory only after the copy
    return host.pin_memory().to(device, non_blocking=True)


class Addresses:
    """The addresses of the tensors of a plan's entries, on the host and on the device.

    The device gets a new copy when an address has changed.

    Attributes:
        on_device: [entries, 9] int64, rows of ``EntryPointers``; 0 where a step has no such entry.
    """

    def __init__(self, device: torch.device, entries: int) -> None:
        self.on_device = torch.empty(0, dtype=torch.int64)
        self._device = device
        self._shape = (entries, len(EntryPointers._fields))
        self._numbers = list(range(entries))
        self._current: np.ndarray | None = None
        self._staged: list[Tensor] = []

    def stage(self) -> None:
        """Allocates pinned memory for later captures, which cannot do so themselves."""
        if self._device.type == "cuda" and not is_capturing(self._device):
            while len(self._staged) < _STAGED:
                self._staged.append(torch.empty(self._shape, dtype=torch.int64, pin_memory=True))

    def invalidate(self) -> None:
        """Makes the next ``set`` bring its addresses to the device, without a comparison.

        Whoever changes an array that was an argument of ``set`` calls this first.
        """
        self._current = None

    def set(self, numbers: list[int], pointers: np.ndarray) -> Tensor | None:
        """Brings the addresses of a step to the device, unless the device has them.

        Args:
            numbers: The entries' numbers.
            pointers: [entries of the step, 9] int64, their addresses.

        Returns:
            While a CUDA graph is being captured, the host memory that the graph copies from in
            every replay. It and ``on_device`` then belong to the graph.

        Raises:
            RuntimeError: Too many steps were captured since the last one outside of a graph.
        """
        is_captured = is_capturing(self._device)
        if pointers is self._current and not is_captured:
            return None
        every = pointers
        if numbers != self._numbers:
            every = np.zeros(self._shape, dtype=np.int64)
            every[numbers] = pointers
        if not is_captured:
            if self._current is None or not np.array_equal(every, self._current):
                self.on_device = copy_to_device(every, self._device)
            self._current = every
            return None
        if not self._staged:
            raise RuntimeError(
                f"StripedAdamW: more than {_STAGED} steps were captured since the last one outside "
                "of a graph: take one before capturing more"
            )
        host = self._staged.pop()
        host.copy_(torch.from_numpy(every))
        self.on_device = host.to(self._device, non_blocking=True)
        self._current = None
        return host
