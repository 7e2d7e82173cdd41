"""Copies arrays, and the tensors' addresses, to the device asynchronously."""

import numpy as np
import torch
from torch import Tensor

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


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Addresses:
    """The addresses of the entries' tensors, on the host and on the device.

    The device gets a new copy when an address has changed.

    Attributes:
        on_device: [entries, 8] int64.
        captured: The copies that belong to CUDA graphs: host memory and device memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_device = torch.empty(0, dtype=torch.int64)
        self.captured: list[tuple[Tensor, Tensor]] = []
        self._device = device
        self._current: list[int] | None = None
        self._staged: list[Tensor] = []

    def stage(self, size: int) -> None:
        """Allocates pinned memory for ``size`` addresses, which a capture cannot do itself."""
        if self._device.type == "cuda" and not is_capturing(self._device):
            while len(self._staged) < _STAGED:
                self._staged.append(torch.empty(size, dtype=torch.int64, pin_memory=True))

    def are_current(self, addresses: list[int]) -> bool:
        """Whether the device has these addresses, and no graph needs a copy of its own."""
        return addresses == self._current and not is_capturing(self._device)

    def copy(self, addresses: list[int], array: np.ndarray) -> None:
        """Copies addresses to the device.

        Args:
            addresses: The addresses; ``are_current`` compares the next addresses with them.
            array: The same addresses, [entries, 8] int64.

        Raises:
            RuntimeError: Too many steps were captured since the last one outside of a graph.
        """
        if not is_capturing(self._device):
            self._current = addresses
            self.on_device = copy_to_device(array, self._device)
            return
        # A replayed graph repeats the copy, so its host and device memory stay its own.
        if not self._staged:
            raise RuntimeError(
                f"StripedAdamW: more than {_STAGED} steps were captured since the last one outside "
                "of a graph: take one before capturing more"
            )
        host = self._staged.pop()
        host.copy_(torch.from_numpy(array).flatten())
        self.on_device = host.to(self._device, non_blocking=True)
        self.captured.append((host, self.on_device))
        self._current = None
